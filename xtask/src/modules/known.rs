//! Reads and writes `xtask/known-cycles.toml`, the list of known cycles.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::paths;

const HEADER: &str = "\
# Known cycles among the child modules of a module. Each entry lists the uses that form a cycle, as \"FROM > TO\".
# Do not add a use to the list: remove the cycle instead. `cargo xtask test` fails if a use in a cycle is not listed,
# or if a listed use is no longer part of a cycle.
# `cargo xtask modules` shows where the uses are.
# `cargo xtask modules --shrink` removes listed uses that are no longer part of a cycle.
";

/// A use that is part of a cycle.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KnownUse {
    /// The crate's name, with `_` in place of `-`.
    pub krate: String,
    /// The module whose two children form this use: `crate`, or a path such as `crate::NAME`.
    pub within: String,
    /// The using and the used module, as "FROM > TO".
    pub pair: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    cycle: Vec<Cycle>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cycle {
    #[serde(rename = "crate")]
    krate: String,
    within: String,
    uses: Vec<String>,
}

/// Returns the path of the list.
pub fn path() -> PathBuf {
    paths::root().join("xtask/known-cycles.toml")
}

/// Reads the list.
pub fn read() -> Result<BTreeSet<KnownUse>> {
    let path = path();
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    parse(&text).with_context(|| format!("failed to parse {}", path.display()))
}

fn parse(text: &str) -> Result<BTreeSet<KnownUse>> {
    let file: File = toml::from_str(text)?;
    let uses = file.cycle.into_iter().flat_map(|Cycle { krate, within, uses }| {
        uses.into_iter().map(move |pair| KnownUse { krate: krate.clone(), within: within.clone(), pair })
    });
    Ok(uses.collect())
}

/// Writes the list.
pub fn write(uses: &BTreeSet<KnownUse>) -> Result<()> {
    let path = path();
    fs::write(&path, format(uses)).with_context(|| format!("failed to write {}", path.display()))
}

fn format(uses: &BTreeSet<KnownUse>) -> String {
    let mut text = HEADER.to_owned();
    let mut last = None;
    for KnownUse { krate, within, pair } in uses {
        if last != Some((krate, within)) {
            let end = if last.is_some() { "]\n" } else { "" };
            text.push_str(&format!("{end}\n[[cycle]]\ncrate = \"{krate}\"\nwithin = \"{within}\"\nuses = [\n"));
            last = Some((krate, within));
        }
        text.push_str(&format!("    \"{pair}\",\n"));
    }
    text.push_str(if last.is_some() { "]\n" } else { "" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read_as_it_was_written() {
        let known =
            |within: &str, pair: &str| KnownUse { krate: "husk_x".into(), within: within.into(), pair: pair.into() };
        let uses = BTreeSet::from([known("crate", "a > b"), known("crate", "b > a"), known("crate::a", "x > y")]);
        assert_eq!(parse(&format(&uses)).unwrap(), uses);
        assert!(parse(&format(&BTreeSet::new())).unwrap().is_empty());
        assert!(parse("[[cycle]]\ncrate = \"x\"\nwihtin = \"crate\"\nuses = []\n").is_err());
    }
}
