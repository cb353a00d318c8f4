//! Checks Cargo.lock: the rust-vmm crates must be of one generation, or their types do not fit together.

use crate::paths;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;

/// Crates of which there may be only one version.
const ONCE: &[&str] = &["vm-memory", "virtio-queue"];

/// Fails when the lock file has two versions of what there may be one of.
pub fn check() -> Result<()> {
    let path = paths::root().join("Cargo.lock");
    let lock = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    match twice(&lock).as_slice() {
        [] => Ok(()),
        found => bail!("Cargo.lock has several versions of {}", found.join(", and of ")),
    }
}

fn twice(lock: &str) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        if let Some(value) = line.strip_prefix("name = ") {
            name = value.trim_matches('"');
        } else if let Some(value) = line.strip_prefix("version = ")
            && ONCE.contains(&name)
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
    fn two_versions_are_found() {
        let one = "[[package]]\nname = \"vm-memory\"\nversion = \"0.17.1\"\n";
        assert!(twice(one).is_empty());
        let two = format!(
            "{one}[[package]]\nname = \"vm-memory\"\nversion = \"0.16.0\"\n[[package]]\nname = \"nix\"\nversion = \"1\"\n"
        );
        assert_eq!(twice(&two), ["vm-memory (0.17.1, 0.16.0)"]);
    }
}
