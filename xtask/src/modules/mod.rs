//! `cargo xtask modules`: finds cycles among the modules of each crate of the workspace.
//!
//! If one module uses another, this counts as a use between two children of the innermost module that contains both
//! modules. For example, a use of `crate::b::y` by `crate::a::x` counts as a use of `b` by `a`. A module and its child
//! may use each other, because a parent often has the types that its children share. Pairs of a module and its child
//! that use each other are only counted. The functions of the crate's root are an exception: together, they count as
//! one more module, `crate`. Otherwise, a function that all modules call could hide a cycle of these modules.

mod graph;
mod known;
mod uses;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::cargo;
use crate::source::{self, Module};
use crate::{cmd, paths, ui};
use graph::{Graph, Knot};
use known::KnownUse;

/// A library or program of the workspace.
struct Crate {
    name: String,
    root: PathBuf,
}

/// The cycles of a crate.
struct Report {
    /// The text that `cargo xtask modules` prints.
    text: String,
    /// The uses that are part of a cycle.
    uses: BTreeSet<KnownUse>,
    /// A message for each cycle with a use that the list of known cycles lacks.
    errors: Vec<String>,
}

/// Prints the cycles of each crate, and the numbers of its modules, uses and cycles. Fails as [`check`] does. If
/// `shrink` is true, first removes from the list of known cycles the uses that are no longer part of a cycle.
pub fn modules(shrink: bool) -> Result<()> {
    let mut known = known::read()?;
    let reports = inspect_all(&known)?;
    for report in &reports {
        print!("{}", report.text);
    }
    if shrink {
        let kept: BTreeSet<_> = reports.iter().flat_map(|report| &report.uses).cloned().collect();
        known.retain(|used| kept.contains(used));
        known::write(&known)?;
        ui::say("modules", format!("the list of known cycles now has {} uses", known.len()));
    }
    compare(&reports, &known)
}

/// Fails if a use that is part of a cycle is not listed, or if a listed use is no longer part of a cycle.
pub fn check() -> Result<()> {
    let known = known::read()?;
    compare(&inspect_all(&known)?, &known)
}

fn inspect_all(known: &BTreeSet<KnownUse>) -> Result<Vec<Report>> {
    crates()?.iter().map(|krate| inspect(krate, known)).collect()
}

fn compare(reports: &[Report], known: &BTreeSet<KnownUse>) -> Result<()> {
    let mut errors: Vec<String> = reports.iter().flat_map(|report| &report.errors).cloned().collect();
    let gone: Vec<_> = known.iter().filter(|used| !reports.iter().any(|report| report.uses.contains(used))).collect();
    errors.extend(gone.iter().map(|KnownUse { krate, within, pair }| {
        format!("{krate}: the listed use `{pair}` within `{within}` is no longer part of a cycle\n")
    }));
    if !gone.is_empty() {
        let path = relative(&known::path());
        errors.push(format!("`cargo xtask modules --shrink` removes these uses from {}\n", path.display()));
    }
    if !errors.is_empty() {
        bail!("the cycles among modules differ from the list of known cycles:\n{}", errors.concat().trim_end());
    }
    Ok(())
}

/// Returns the libraries and programs of the workspace.
fn crates() -> Result<Vec<Crate>> {
    let text = cmd::output(cargo().args(["metadata", "--no-deps", "--format-version", "1", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&text).context("failed to parse the output of `cargo metadata`")?;
    let mut crates = Vec::new();
    let targets =
        metadata["packages"].as_array().into_iter().flatten().filter_map(|package| package["targets"].as_array());
    for target in targets.flatten() {
        let kinds = target["kind"].as_array().into_iter().flatten();
        if !kinds.filter_map(Value::as_str).any(|kind| matches!(kind, "lib" | "bin")) {
            continue;
        }
        let text = |key: &str| target[key].as_str().map(str::to_owned);
        if let (Some(name), Some(root)) = (text("name"), text("src_path")) {
            crates.push(Crate { name: name.replace('-', "_"), root: root.into() });
        }
    }
    crates.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(crates)
}

/// Finds the cycles of a crate.
fn inspect(krate: &Crate, known: &BTreeSet<KnownUse>) -> Result<Report> {
    let modules = source::modules(&krate.root)?;
    let uses = uses::uses(&modules);
    let graph = Graph::new(&modules, &uses);
    let knots = graph.knots();
    let count = modules.iter().filter(|module| !module.test_only).count();
    let mut report = Report {
        text: format!(
            "{}: {count} modules, {} uses between siblings, {} cycles, \
             {} pairs of parent and child that use each other\n",
            krate.name,
            graph.uses(),
            knots.len(),
            graph.mutual_with_parent
        ),
        uses: BTreeSet::new(),
        errors: Vec::new(),
    };
    for knot in &knots {
        let within =
            std::iter::once("crate").chain(knot.within.iter().map(String::as_str)).collect::<Vec<_>>().join("::");
        let entry = |from: &str, to: &str| KnownUse {
            krate: krate.name.clone(),
            within: within.clone(),
            pair: format!("{from} > {to}"),
        };
        report.text.push_str(&format!("  {within}: {}\n", knot.modules.join(", ")));
        for (from, to) in knot.uses.keys() {
            report.text.push_str(&format!("    {}\n", show(knot, &modules, from, to)));
        }
        let mut told = BTreeSet::new();
        for (from, to) in knot.uses.keys() {
            // A cycle is reported once, for all its uses that are not listed.
            if known.contains(&entry(from, to)) || told.contains(&(*from, *to)) {
                continue;
            }
            let cycle = knot.cycle(from, to);
            let mut text =
                format!("{}: a cycle within `{within}`; the first of these uses is not in the list:\n", krate.name);
            for (from, to) in &cycle {
                text.push_str(&format!("    {}\n", show(knot, &modules, from, to)));
            }
            told.extend(cycle);
            report.errors.push(text);
        }
        report.uses.extend(knot.uses.keys().map(|(from, to)| entry(from, to)));
    }
    Ok(report)
}

/// Formats a use with its file and line.
fn show(knot: &Knot<'_>, modules: &[Module], from: &str, to: &str) -> String {
    let place = knot.uses.get(&(from, to)).and_then(|used| {
        let file = relative(&modules.get(used.from)?.file);
        Some(format!("{}:{}", file.display(), used.line))
    });
    format!("{from} > {to} ({})", place.unwrap_or_default())
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix(paths::root()).unwrap_or(path).to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn cycle_through_a_function_of_the_root_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("lib.rs");
        let files = [
            ("lib.rs", "mod a; mod b; mod c;\nuse other::lock;\nuse c::chain;\nfn text() { b::text() }"),
            ("a.rs", "use crate::text;\nfn f() { text() }"),
            ("b.rs", "use crate::a::A;\nuse crate::{chain, lock};"),
            ("c.rs", "use crate::lock;"),
        ];
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let report = inspect(&Crate { name: "x".into(), root }, &BTreeSet::new()).unwrap();
        let pairs: Vec<_> = report.uses.iter().map(|used| used.pair.as_str()).collect();
        assert_eq!(pairs, ["a > crate", "b > a", "crate > b"]);
    }

    #[test]
    fn unknown_cycle_is_reported_with_files_and_lines() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("lib.rs");
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B;\nuse crate::c::C;"),
            ("b.rs", "\nuse crate::c::C;"),
            ("c.rs", "fn f() { crate::a::f() }"),
        ];
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let krate = Crate { name: "x".into(), root };
        let entry = |pair: &str| KnownUse { krate: "x".into(), within: "crate".into(), pair: pair.into() };
        let report = inspect(&krate, &BTreeSet::from([entry("a > c"), entry("c > a")])).unwrap();
        assert_eq!(report.errors.len(), 1);
        let place = |name: &str, line: usize| format!("({}:{line})", dir.path().join(name).display());
        let expected = format!(
            "x: a cycle within `crate`; the first of these uses is not in the list:\n\
             \x20   a > b {}\n    b > c {}\n    c > a {}\n",
            place("a.rs", 1),
            place("b.rs", 2),
            place("c.rs", 1)
        );
        assert_eq!(report.errors[0], expected);
        let all = BTreeSet::from(["a > b", "a > c", "b > c", "c > a"].map(entry));
        assert_eq!(report.uses, all);
        let reports = [inspect(&krate, &all).unwrap()];
        compare(&reports, &all).unwrap();
        let more: BTreeSet<_> = all.into_iter().chain([entry("b > a")]).collect();
        let error = compare(&reports, &more).unwrap_err().to_string();
        assert!(error.contains("x: the listed use `b > a` within `crate` is no longer part of a cycle"), "{error}");
    }
}
