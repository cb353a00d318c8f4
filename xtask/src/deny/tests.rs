//! Tests for each kind of violation of deny.toml.

use super::*;

const RULES: &str = "
[graph]
targets = []
[licenses]
allow = [\"MIT\"]
unused-allowed-license = \"deny\"
[bans]
multiple-versions = \"deny\"
wildcards = \"deny\"
allow-wildcard-paths = true
skip = []
[advisories]
[sources]
unknown-registry = \"deny\"
unknown-git = \"deny\"
allow-registry = [\"https://github.com/rust-lang/crates.io-index\"]
allow-git = []
";

fn package(name: &str, version: &str, license: Option<&str>) -> Package {
    let dependencies = Vec::new();
    let (name, version, license) = (name.to_owned(), version.to_owned(), license.map(str::to_owned));
    Package { name, version, license, source: None, manifest_path: "Cargo.toml".into(), dependencies }
}

fn graph(packages: Vec<Package>) -> Graph {
    Graph { lock_file: "Cargo.lock".into(), packages, sources: Vec::new() }
}

/// Checks packages against [`RULES`], in which `to` replaces `from`.
fn check(from: &str, to: &str, packages: Vec<Package>) -> Vec<String> {
    assert!(RULES.contains(from), "RULES does not contain {from:?}");
    violations(&Rules::parse(&RULES.replace(from, to)).unwrap(), &[graph(packages)]).unwrap()
}

fn mit(version: &str) -> Package {
    package("a", version, Some("MIT"))
}

#[test]
fn accepted_packages_pass() {
    assert!(check("", "", vec![mit("1.0.0"), package("b", "1.0.0", Some("MIT OR Apache-2.0"))]).is_empty());
}

#[test]
fn licence_that_is_not_allowed_is_a_violation() {
    let found = check("", "", vec![mit("1.0.0"), package("b", "1.0.0", Some("MIT AND GPL-3.0-only"))]);
    assert_eq!(found, ["b 1.0.0: deny.toml does not accept the licence `MIT AND GPL-3.0-only`"]);
}

#[test]
fn malformed_licence_is_a_violation() {
    let found = check("", "", vec![mit("1.0.0"), package("b", "1.0.0", Some("MIT OR"))]);
    assert!(found.len() == 1 && found[0].contains("failed to parse the licence `MIT OR`"), "{found:?}");
}

#[test]
fn exception_accepts_a_licence_for_its_crate_only() {
    let exception = "[[licenses.exceptions]]\n# Why.\ncrate = \"b\"\nallow = [\"ISC\"]\n[bans]";
    let isc = |name| package(name, "1.0.0", Some("ISC"));
    assert!(check("[bans]", exception, vec![mit("1.0.0"), isc("b")]).is_empty());
    let found = check("[bans]", exception, vec![mit("1.0.0"), isc("b"), isc("c")]);
    assert_eq!(found, ["c 1.0.0: deny.toml does not accept the licence `ISC`"]);
    let found = check("[bans]", exception, vec![mit("1.0.0"), package("b", "1.0.0", Some("MIT OR ISC"))]);
    assert_eq!(found, ["deny.toml: no crate needs the entry of b in [[licenses.exceptions]]; remove it"]);
}

#[test]
fn allowed_licence_that_no_crate_needs_is_a_violation() {
    let packages = vec![mit("1.0.0"), package("b", "1.0.0", Some("MIT OR Zlib"))];
    let found = check("\"MIT\"", "\"MIT\", \"Zlib\"", packages);
    assert_eq!(found, ["deny.toml: no crate needs `Zlib` in [licenses] allow; remove it"]);
}

#[test]
fn crate_without_a_licence_needs_a_clarification_with_the_hash_of_its_licence_file() {
    let dir = tempfile::tempdir().unwrap();
    let unlicensed = || Package { manifest_path: dir.path().join("Cargo.toml"), ..package("b", "1.0.0", None) };
    let found = check("", "", vec![mit("1.0.0"), unlicensed()]);
    assert!(found.len() == 1 && found[0].starts_with("b 1.0.0: its manifest names no licence"), "{found:?}");
    let clarification = "[[licenses.clarify]]\n# Why.\ncrate = \"b\"\nexpression = \"MIT\"\n\
                         license-files = [{ path = \"LICENSE\", hash = 0x32d153ff }]\n[bans]";
    fs::write(dir.path().join("LICENSE"), "abc").unwrap();
    assert!(check("[bans]", clarification, vec![mit("1.0.0"), unlicensed()]).is_empty());
    let found = check("[bans]", clarification, vec![mit("1.0.0")]);
    assert_eq!(found, ["deny.toml: no crate needs the entry of b in [[licenses.clarify]]; remove it"]);
    fs::write(dir.path().join("LICENSE"), "").unwrap();
    let found = check("[bans]", clarification, vec![mit("1.0.0"), unlicensed()]);
    assert_eq!(found, ["b 1.0.0: LICENSE changed, its hash is now 0x02cc5d05; read the file, and update deny.toml"]);
}

#[test]
fn second_version_needs_a_skip_with_a_reason() {
    let twice = || vec![mit("1.0.0"), mit("2.0.0")];
    let found = check("", "", twice());
    assert!(found.len() == 1 && found[0].contains("several versions of a: 1.0.0, 2.0.0"), "{found:?}");
    let skip = |spec: &str, reason: &str| format!("skip = [{{ crate = \"{spec}\", reason = \"{reason}\" }}]");
    assert!(check("skip = []", &skip("a@1", "because"), twice()).is_empty());
    let found = check("skip = []", &skip("a@1", " "), twice());
    assert_eq!(found, ["deny.toml: the entry of a@1 in skip has no reason; add one"]);
    let unused = "deny.toml: skip lists a@1, but no workspace uses a@1 together with another version of the crate; remove the \
         entry";
    assert_eq!(check("skip = []", &skip("a@1", "because"), vec![mit("1.0.0")]), [unused]);
    assert_eq!(check("skip = []", &skip("a@1", "because"), vec![mit("2.0.0")]), [unused]);
    let found = check("skip = []", &skip("a@1", "because"), vec![mit("1.0.0"), mit("2.0.0"), mit("3.0.0")]);
    assert!(found.len() == 1 && found[0].contains("several versions of a: 2.0.0, 3.0.0"), "{found:?}");
}

#[test]
fn two_workspaces_may_have_different_versions_of_a_crate() {
    let rules = Rules::parse(RULES).unwrap();
    let graphs = [graph(vec![mit("1.0.0")]), graph(vec![mit("2.0.0")])];
    assert!(violations(&rules, &graphs).unwrap().is_empty());
}

#[test]
fn second_version_of_vm_memory_cannot_be_skipped() {
    let skip = "skip = [{ crate = \"vm-memory@0.16\", reason = \"because\" }]";
    let vm_memory = |version| package("vm-memory", version, Some("MIT"));
    let found = check("skip = []", skip, vec![vm_memory("0.16.0"), vm_memory("0.17.1")]);
    assert_eq!(found, ["deny.toml: only one version of vm-memory is allowed; remove its entry from skip"]);
}

#[test]
fn wildcard_version_is_a_violation_unless_the_dependency_has_a_path() {
    let with = |path: Option<&str>| {
        let dependency = Dependency { name: "b".into(), req: "*".into(), path: path.map(PathBuf::from) };
        vec![Package { dependencies: vec![dependency], ..mit("1.0.0") }]
    };
    assert_eq!(check("", "", with(None)), ["a: its dependency on b has no version; add one"]);
    assert!(check("", "", with(Some("/b"))).is_empty());
}

#[test]
fn source_that_is_not_allowed_is_a_violation() {
    let rules = RULES.replace("allow-git = []", "allow-git = [\"https://example.org/good\"]");
    let rules = Rules::parse(&rules).unwrap();
    let found = |source: Option<&str>| {
        let locked = Locked { name: "b".into(), version: "1.0.0".into(), source: source.map(str::to_owned) };
        violations(&rules, &[Graph { sources: vec![locked], ..graph(vec![mit("1.0.0")]) }]).unwrap()
    };
    assert!(found(None).is_empty());
    assert!(found(Some("registry+https://github.com/rust-lang/crates.io-index")).is_empty());
    assert!(found(Some("git+https://example.org/good?branch=main#0123")).is_empty());
    for source in
        ["registry+https://example.org/index", "git+https://example.org/bad#0123", "sparse+https://example.org"]
    {
        let text = format!("Cargo.lock: deny.toml does not accept the source of b 1.0.0: {source}");
        assert_eq!(found(Some(source)), [text]);
    }
}

#[test]
fn line_of_cargo_tree_is_read() {
    assert_eq!(name_and_version("serde v1.0.229 (*)"), Some(("serde", "1.0.229")));
    assert_eq!(name_and_version("xtask v0.1.0 (/src/xtask)"), Some(("xtask", "0.1.0")));
    assert_eq!(name_and_version(""), None);
}
