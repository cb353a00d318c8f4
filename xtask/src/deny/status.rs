//! Finds yanked and unmaintained crates without an advisory database. Yanked crates are marked in cargo's copy of the
//! registry's index. Unmaintained crates declare themselves in `[badges.maintenance]` of their manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Package;

/// Values of `status` in `[badges.maintenance]` by which a crate declares that nobody maintains it.
const UNMAINTAINED: [&str; 2] = ["deprecated", "none"];

/// The result of the check.
pub struct Found {
    pub violations: Vec<String>,
    /// Number of crates from a registry.
    pub crates: usize,
    /// Number of these crates whose version is in cargo's copy of the index.
    pub in_index: usize,
}

/// Reads the index and the manifests of packages that come from a registry.
pub fn read<'a>(packages: impl Iterator<Item = &'a Package>) -> Result<Found> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    read_with(&home.map(|home| indexes(&home.join("registry/index"))).unwrap_or_default(), packages)
}

/// Like [`read`], but reads the copies of the index in `indexes`.
fn read_with<'a>(indexes: &[PathBuf], packages: impl Iterator<Item = &'a Package>) -> Result<Found> {
    let (packages, own): (Vec<_>, Vec<_>) = packages.partition(|package| package.source.is_some());
    let direct: BTreeSet<_> = own.iter().flat_map(|own| &own.dependencies).map(|dependency| &dependency.name).collect();
    let packages: BTreeMap<_, _> =
        packages.into_iter().map(|package| ((&package.name, &package.version), package)).collect();
    let mut found = Found { violations: Vec::new(), crates: packages.len(), in_index: 0 };
    for Package { name, version, manifest_path, .. } in packages.into_values() {
        if let Some(yanked) = indexes.iter().find_map(|index| yanked(index, name, version)) {
            found.in_index += 1;
            if yanked {
                found.violations.push(format!("{name} {version} is yanked; `cargo update {name}` replaces it"));
            }
        }
        // As with `unmaintained = "workspace"` in deny.toml, only direct dependencies are checked. An indirect
        // dependency can be replaced only by the authors of the crates that depend on it.
        if !direct.contains(name) {
            continue;
        }
        let manifest =
            fs::read_to_string(manifest_path).with_context(|| format!("failed to read {}", manifest_path.display()))?;
        if let Some(status) = maintenance(&manifest).filter(|status| UNMAINTAINED.contains(&status.as_str())) {
            found.violations.push(format!("{name} {version} calls itself unmaintained: its badge is `{status}`"));
        }
    }
    Ok(found)
}

/// Returns the directories of cargo's copies of registry indexes.
fn indexes(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path().join(".cache")).filter(|cache| cache.is_dir()).collect()
}

/// Whether a version is yanked. `None` if cargo's copy of the index does not have the version.
///
/// The index has a file for each crate. The file has a header, and then the number and the JSON of each version,
/// separated by NUL. The format is internal to cargo (`src/cargo/sources/registry/index/cache.rs`) and can change.
/// Therefore this function ignores the header and the version numbers, and reads only the JSON parts.
fn yanked(index: &Path, name: &str, version: &str) -> Option<bool> {
    #[derive(Deserialize)]
    struct Entry {
        vers: String,
        yanked: bool,
    }
    let dir = match name.get(..3).unwrap_or(name) {
        start if name.len() < 4 => match start.len() {
            3 => format!("3/{}", name.get(..1)?),
            len => len.to_string(),
        },
        _ => format!("{}/{}", name.get(..2)?, name.get(2..4)?),
    };
    let data = fs::read(index.join(dir.to_lowercase()).join(name.to_lowercase())).ok()?;
    let parts = data.split(|byte| *byte == 0).filter(|part| part.starts_with(b"{"));
    let mut entries = parts.filter_map(|part| serde_json::from_slice::<Entry>(part).ok());
    entries.find(|entry| entry.vers == version).map(|entry| entry.yanked)
}

/// Returns the `status` of `[badges.maintenance]` in a manifest.
fn maintenance(manifest: &str) -> Option<String> {
    let manifest: toml::Table = manifest.parse().ok()?;
    Some(manifest.get("badges")?.get("maintenance")?.get("status")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deny::Dependency;

    #[test]
    fn yanked_version_is_found_in_the_index() {
        let dir = tempfile::tempdir().unwrap();
        for (path, name) in [("se/rd/serde", "serde"), ("3/n/nix", "nix"), ("2/cc", "cc"), ("1/a", "a")] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(
                &path,
                b"\x03\x02\0\0\0etag\x001.0.0\0{\"vers\":\"1.0.0\",\"yanked\":true}\x001.0.1\0{\"vers\":\"1.0.1\",\"yanked\":false}\0",
            )
            .unwrap();
            assert_eq!(yanked(dir.path(), name, "1.0.0"), Some(true));
            assert_eq!(yanked(dir.path(), name, "1.0.1"), Some(false));
            assert_eq!(yanked(dir.path(), name, "1.0.2"), None);
        }
        assert_eq!(yanked(dir.path(), "tokio", "1.0.0"), None);
    }

    #[test]
    fn yanked_version_is_a_violation() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("3/n")).unwrap();
        fs::write(dir.path().join("3/n/nix"), b"\x03\x02\0\0\0etag\x001.0.0\0{\"vers\":\"1.0.0\",\"yanked\":true}\0")
            .unwrap();
        let package = Package {
            name: "nix".into(),
            version: "1.0.0".into(),
            license: None,
            source: Some("registry+x".into()),
            manifest_path: "Cargo.toml".into(),
            dependencies: Vec::new(),
        };
        let found = read_with(&[dir.path().to_owned()], [&package].into_iter()).unwrap();
        assert_eq!(found.violations, ["nix 1.0.0 is yanked; `cargo update nix` replaces it"]);
        assert_eq!((found.crates, found.in_index), (1, 1));
    }

    #[test]
    fn maintenance_badge_is_read() {
        let manifest = "[package]\nname = \"a\"\n[badges.maintenance]\nstatus = \"deprecated\"\n";
        assert_eq!(maintenance(manifest).as_deref(), Some("deprecated"));
        assert_eq!(maintenance("[package]\nname = \"a\"\n"), None);
    }

    #[test]
    fn deprecated_direct_dependency_is_a_violation() {
        let dir = tempfile::tempdir().unwrap();
        let manifest_path = dir.path().join("Cargo.toml");
        fs::write(&manifest_path, "[badges.maintenance]\nstatus = \"deprecated\"\n").unwrap();
        let package = |name: &str, source: Option<&str>, dependencies| Package {
            name: name.to_owned(),
            version: "1.0.0".into(),
            license: None,
            source: source.map(str::to_owned),
            manifest_path: manifest_path.clone(),
            dependencies,
        };
        let dependency = Dependency { name: "no-such-crate".into(), req: "1".into(), path: None };
        let own = package("own", None, vec![dependency]);
        let registry = Some("registry+x");
        let (direct, indirect) =
            (package("no-such-crate", registry, Vec::new()), package("no-such-other", registry, Vec::new()));
        let found = read([&own, &direct, &indirect].into_iter()).unwrap();
        assert_eq!(found.violations, ["no-such-crate 1.0.0 calls itself unmaintained: its badge is `deprecated`"]);
        assert_eq!((found.crates, found.in_index), (2, 0));
    }
}
