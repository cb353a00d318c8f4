//! Checks Cargo.lock: the rust-vmm crates must be of one generation, or their types differ.

use crate::paths;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;

/// Crates that may have one version only.
const UNIQUE: &[&str] = &["vm-memory", "virtio-queue"];

/// Fails if the lock file has several versions of such a crate.
pub fn check() -> Result<()> {
    let path = paths::root().join("Cargo.lock");
    let lock = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    match duplicates(&lock).as_slice() {
        [] => Ok(()),
        found => bail!("Cargo.lock has several versions of {}", found.join(", and of ")),
    }
}

fn duplicates(lock: &str) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"');
        } else if let Some(value) = line.strip_prefix("version = ")
            && UNIQUE.contains(&name)
        {
            versions.entry(name).or_default().push(value.trim_matches('"'));
        }
    }
    versions.into_iter().filter(|(_, v)| v.len() > 1).map(|(n, v)| format!("{n} ({})", v.join(", "))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_versions_are_found() {
        let one = "[[package]]\nname = \"vm-memory\"\nversion = \"0.17.1\"\n";
        assert!(duplicates(one).is_empty());
        let two = format!(
            "{one}[[package]]\nname = \"vm-memory\"\nversion = \"0.16.0\"\n[[package]]\nname = \"nix\"\nversion = \"1\"\n"
        );
        assert_eq!(duplicates(&two), ["vm-memory (0.17.1, 0.16.0)"]);
    }
}
