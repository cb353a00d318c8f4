//! `cargo xtask deny`: checks the dependencies of the workspace against deny.toml.
//!
//! deny.toml is written for cargo-deny, which few machines have. The checks here need only cargo. They cover licences,
//! duplicate versions, wildcards and sources. They are stricter than cargo-deny in one respect: an entry of deny.toml
//! that no crate needs is an error.
//!
//! Checking advisories needs a database. `cargo deny` checks advisories if it is installed and can fetch its database.
//! If not, xtask checks only data that cargo has on this machine: the yanked versions in cargo's copy of the registry's
//! index, which may be old, and the maintenance badges in the manifests of direct dependencies.

mod expression;
mod rules;
mod status;
mod xxh32;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build::cargo;
use crate::{cmd, paths, ui};
use expression::Expression;
use rules::{Clarification, Rules, Spec};

/// Crates of rust-vmm whose types appear in the interfaces of other rust-vmm crates. Types of different versions of
/// such a crate are incompatible. Therefore `skip` in deny.toml must not list these crates.
const SINGLE_VERSION: [&str; 2] = ["vm-memory", "virtio-queue"];

/// The crates that are compiled for a workspace, and the sources in its lock file.
struct Graph {
    /// The path of the workspace's lock file, relative to the repository.
    lock_file: String,
    packages: Vec<Package>,
    sources: Vec<Locked>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a crate of the workspace.
    source: Option<String>,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    req: String,
    path: Option<PathBuf>,
}

/// A package of a lock file. A lock file lists the packages for all targets.
#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    source: Option<String>,
}

/// Checks all rules of deny.toml. If advisories cannot be checked, prints why, and what is checked instead.
pub fn deny() -> Result<()> {
    let root = paths::root();
    let path = root.join("deny.toml");
    let rules =
        Rules::parse(&fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?)?;
    let graphs = [graph(&root, &rules.graph.targets)?];
    let mut violations = violations(&rules, &graphs)?;
    if let Err(reason) = advisories(&root)? {
        let found = status::read(graphs.iter().flat_map(|graph| &graph.packages))?;
        violations.extend(found.violations);
        ui::say("deny", format!("ADVISORIES NOT CHECKED: {reason}"));
        ui::say(
            "deny",
            format!(
                "checked instead: yanked versions ({} of {} crates are in cargo's copy of the index), and maintenance \
                 badges of direct dependencies",
                found.in_index, found.crates
            ),
        );
    }
    if !violations.is_empty() {
        bail!("the dependencies violate deny.toml ({} violations):\n{}", violations.len(), violations.join("\n"));
    }
    Ok(())
}

/// Checks advisories with `cargo deny`. If `cargo deny` is not installed or cannot fetch its database, the inner result
/// is an error with the reason.
fn advisories(root: &Path) -> Result<Result<(), &'static str>> {
    let succeeds = |args: &[&str]| {
        let mut command = cargo();
        command.current_dir(root).args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !succeeds(&["deny", "--version"]) {
        return Ok(Err("`cargo deny` is not installed; `cargo install cargo-deny` installs it"));
    }
    if !succeeds(&["deny", "--locked", "fetch", "db"]) {
        return Ok(Err("`cargo deny fetch db` failed to fetch the advisory database"));
    }
    cmd::shown(cargo().current_dir(root).args(["deny", "--locked", "check", "advisories"]))?;
    Ok(Ok(()))
}

/// Reads the workspace, with all features. Cargo downloads crates that are missing on this machine.
fn graph(root: &Path, targets: &[String]) -> Result<Graph> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Locked>,
    }
    let run = |args: &[&str], target_option: &str| {
        let mut command = cargo();
        command.current_dir(root).args(args).args(["--locked", "--all-features"]);
        for target in targets {
            command.args([target_option, target]);
        }
        cmd::output(&mut command)
    };
    let text = run(&["metadata", "--format-version", "1"], "--filter-platform")?;
    let Metadata { mut packages } =
        serde_json::from_str(&text).context("failed to parse the output of `cargo metadata`")?;
    // The metadata also list optional dependencies that nothing enables, if a feature `NAME?/FEATURE` mentions them.
    // Therefore only packages that `cargo tree` lists are kept.
    let tree = run(&["tree", "--workspace", "--edges", "normal,build,dev", "--prefix", "none"], "--target")?;
    let compiled: BTreeSet<(&str, &str)> = tree.lines().filter_map(name_and_version).collect();
    packages.retain(|package| compiled.contains(&(package.name.as_str(), package.version.as_str())));
    if packages.len() != compiled.len() {
        bail!("`cargo tree` lists {} packages, but `cargo metadata` only {} of them", compiled.len(), packages.len());
    }
    let lock_file = "Cargo.lock".to_owned();
    let text = fs::read_to_string(root.join(&lock_file)).with_context(|| format!("failed to read {lock_file}"))?;
    let Lock { package } = toml::from_str(&text).with_context(|| format!("failed to parse {lock_file}"))?;
    Ok(Graph { lock_file, packages, sources: package })
}

/// Parses a line of `cargo tree`: `NAME vVERSION`, and possibly further words.
fn name_and_version(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split(' ');
    Some((words.next()?, words.next()?.strip_prefix('v')?))
}

/// Returns a message for each violation of the rules.
fn violations(rules: &Rules, graphs: &[Graph]) -> Result<Vec<String>> {
    let mut violations = licenses(rules, graphs)?;
    violations.extend(duplicates(rules, graphs)?);
    violations.extend(wildcards(rules, graphs));
    violations.extend(sources(rules, graphs));
    Ok(violations)
}

/// Returns the packages of all workspaces without duplicates.
fn packages(graphs: &[Graph]) -> impl Iterator<Item = &Package> {
    let all = graphs.iter().flat_map(|graph| &graph.packages);
    all.map(|package| ((&package.name, &package.version), package)).collect::<BTreeMap<_, _>>().into_values()
}

/// Checks the licences of all packages, and that deny.toml has only licence entries that a package needs.
fn licenses(rules: &Rules, graphs: &[Graph]) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    let allow: BTreeSet<&str> = rules.licenses.allow.iter().map(String::as_str).collect();
    // `needed` collects the accepted licences that a crate needs. `used` collects the exceptions and clarifications
    // that a crate needs.
    let (mut needed, mut used) = (BTreeSet::new(), BTreeSet::new());
    for package in packages(graphs) {
        let Package { name, version, license, .. } = package;
        let expression = match license {
            Some(license) => license.clone(),
            None => match named(rules.licenses.clarify.iter().map(|entry| (&entry.spec, entry)), package)? {
                Some(entry) => {
                    used.insert(entry.spec.as_str());
                    violations.extend(changed_files(entry, package)?);
                    entry.expression.clone()
                }
                None => {
                    violations.push(format!(
                        "{name} {version}: its manifest names no licence; add the crate to [[licenses.clarify]] in \
                         deny.toml"
                    ));
                    continue;
                }
            },
        };
        let parsed = match Expression::parse(&expression) {
            Ok(parsed) => parsed,
            Err(error) => {
                violations.push(format!("{name} {version}: failed to parse the licence `{expression}`: {error}"));
                continue;
            }
        };
        let mut accepted = allow.clone();
        if !parsed.satisfied(&accepted)
            && let Some(entry) = named(rules.licenses.exceptions.iter().map(|entry| (&entry.spec, entry)), package)?
        {
            used.insert(entry.spec.as_str());
            accepted.extend(entry.allow.iter().map(String::as_str));
        }
        if !parsed.satisfied(&accepted) {
            violations.push(format!("{name} {version}: deny.toml does not accept the licence `{expression}`"));
            continue;
        }
        let necessary = |license: &&str| {
            let without: BTreeSet<&str> = accepted.iter().copied().filter(|other| other != license).collect();
            !parsed.satisfied(&without)
        };
        needed.extend(allow.iter().copied().filter(necessary));
    }
    violations.extend(
        allow
            .difference(&needed)
            .map(|license| format!("deny.toml: no crate needs `{license}` in [licenses] allow; remove it")),
    );
    let specs = rules.licenses.exceptions.iter().map(|entry| ("exceptions", &entry.spec));
    let specs = specs.chain(rules.licenses.clarify.iter().map(|entry| ("clarify", &entry.spec)));
    for (list, spec) in specs.filter(|(_, spec)| !used.contains(spec.as_str())) {
        violations.push(format!("deny.toml: no crate needs the entry of {spec} in [[licenses.{list}]]; remove it"));
    }
    Ok(violations)
}

/// Returns the entry whose spec names the package.
fn named<'a, T>(entries: impl Iterator<Item = (&'a String, T)>, package: &Package) -> Result<Option<T>> {
    for (spec, entry) in entries {
        if Spec::parse(spec)?.matches(&package.name, &package.version) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Returns a message for each licence file whose hash differs from the hash in the clarification. If the clarification
/// lists no licence file, returns a message about that.
fn changed_files(entry: &Clarification, package: &Package) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    if entry.license_files.is_empty() {
        changed.push(format!(
            "deny.toml: the clarification of {} has no license-files; add the files that state the licence",
            entry.spec
        ));
    }
    for file in &entry.license_files {
        let path = package.manifest_path.with_file_name(&file.path);
        let data = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let hash = xxh32::xxh32(&data);
        if hash != file.hash {
            changed.push(format!(
                "{} {}: {} changed, its hash is now {hash:#010x}; read the file, and update deny.toml",
                package.name, package.version, file.path
            ));
        }
    }
    Ok(changed)
}

/// Checks that each workspace has only one version of each crate, apart from the versions that `skip` lists.
fn duplicates(rules: &Rules, graphs: &[Graph]) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    let mut used = BTreeSet::new();
    let mut skips = Vec::new();
    for skip in &rules.bans.skip {
        let spec = Spec::parse(&skip.spec)?;
        if SINGLE_VERSION.contains(&spec.name()) {
            violations
                .push(format!("deny.toml: only one version of {} is allowed; remove its entry from skip", spec.name()));
        }
        if skip.reason.trim().is_empty() {
            violations.push(format!("deny.toml: the entry of {} in skip has no reason; add one", skip.spec));
        }
        skips.push((skip.spec.as_str(), spec));
    }
    for graph in graphs {
        let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for package in &graph.packages {
            versions.entry(&package.name).or_default().insert(&package.version);
        }
        for (name, versions) in versions.into_iter().filter(|(_, versions)| versions.len() > 1) {
            let skipped = |version: &&str| {
                let skip = skips.iter().find(|(_, spec)| spec.matches(name, version));
                skip.map(|(text, _)| used.insert(*text)).is_some()
            };
            let (_, rest): (Vec<&str>, Vec<&str>) = versions.into_iter().partition(skipped);
            if rest.len() > 1 {
                violations.push(format!(
                    "{}: several versions of {name}: {}; `cargo tree --invert {name}@VERSION` shows their users",
                    graph.lock_file,
                    rest.join(", ")
                ));
            }
        }
    }
    for (text, _) in skips.iter().filter(|(text, _)| !used.contains(text)) {
        violations.push(format!(
            "deny.toml: skip lists {text}, but no workspace uses {text} together with another version of the crate; \
             remove the entry"
        ));
    }
    Ok(violations)
}

/// Checks that each dependency of a workspace's crates has a version. A dependency without a version is a wildcard.
fn wildcards(rules: &Rules, graphs: &[Graph]) -> Vec<String> {
    let own = packages(graphs).filter(|package| package.source.is_none());
    let dependencies = own.flat_map(|package| package.dependencies.iter().map(move |dependency| (package, dependency)));
    dependencies
        .filter(|(_, dependency)| dependency.req == "*")
        .filter(|(_, dependency)| !(rules.bans.allow_wildcard_paths && dependency.path.is_some()))
        .map(|(package, Dependency { name, .. })| {
            format!("{}: its dependency on {name} has no version; add one", package.name)
        })
        .collect()
}

/// Checks where the packages of the lock files come from.
fn sources(rules: &Rules, graphs: &[Graph]) -> Vec<String> {
    let accepted = |source: &str| match (source.strip_prefix("registry+"), source.strip_prefix("git+")) {
        (Some(registry), _) => rules.sources.allow_registry.iter().any(|allowed| allowed == registry),
        (_, Some(git)) => {
            // `?branch=…` and `#COMMIT` may follow the repository's address.
            let repository = git.split(['?', '#']).next();
            rules.sources.allow_git.iter().any(|allowed| Some(allowed.as_str()) == repository)
        }
        _ => false,
    };
    let mut violations = Vec::new();
    for graph in graphs {
        for Locked { name, version, source } in &graph.sources {
            // A package without a source is a directory on this machine.
            if let Some(source) = source.as_deref().filter(|source| !accepted(source)) {
                violations.push(format!(
                    "{}: deny.toml does not accept the source of {name} {version}: {source}",
                    graph.lock_file
                ));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests;
