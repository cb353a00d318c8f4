//! Reads the source files of the end-to-end suites. Finds the tests of each suite, and what the suite needs from `cargo
//! xtask test`.
//!
//! A suite declares its needs in its module documentation, after the first paragraph, with one line for each need. A
//! default run has neither `--all` nor `--containerd` nor a filter.
//!
//! | line | meaning |
//! | --- | --- |
//! | `Requires: containerd 2` | the suite tests something that containerd 1.7 lacks |
//! | `Requires: cgroup v1` | the suite runs only on a node with cgroup v1 |
//! | `Requires: systemd` | the suite runs only on a node with systemd |
//! | `Runs: containerd 1.7 and 2` | in a default run, the suite runs with both lines instead of 1.7 only |
//! | `Runs: containerd 2` | in a default run, the suite runs with 2 instead of 1.7 |
//! | `Runs: by name only: REASON` | the suite runs only if a filter names one of its tests |
//!
//! A long test has `#[ignore = "long: REASON"]`. A default run leaves out long tests.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use syn::{Attribute, Item};

use crate::filter::Filter;
use crate::{paths, source};

/// The name of husk-e2e's library. Its unit tests run as a suite too.
const LIBRARY: &str = "husk_e2e";
/// The prefix of the reason in a long test's `#[ignore]`.
const LONG: &str = "long: ";

/// A suite: one test binary that runs in the test node.
#[derive(Debug)]
pub struct Suite {
    /// The name of its test binary.
    pub name: String,
    /// The first paragraph of its documentation.
    pub summary: String,
    pub needs: Needs,
    pub tests: Vec<Test>,
}

/// A test of a suite.
#[derive(Debug, PartialEq, Eq)]
pub struct Test {
    /// The test's name as libtest prints it.
    pub name: String,
    /// The reason why the test is long. `None` if the test is not long.
    pub long: Option<String>,
}

/// What a suite needs from `cargo xtask test`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub node: NodeKind,
    pub lines: Lines,
    /// The reason why the suite runs only if a filter names one of its tests. `None` for other suites.
    pub by_name_only: Option<String>,
}

/// The kind of node that a suite requires.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeKind {
    #[default]
    Any,
    CgroupV1,
    Systemd,
}

/// The containerd lines with which a suite runs in a default run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lines {
    /// Only 1.7.
    #[default]
    One,
    /// 1.7 and 2.
    Both,
    /// Only 2. In other runs, the suite can run with 1.7 too.
    TwoInstead,
    /// Only 2, in every run, because 1.7 lacks what the suite tests.
    TwoOnly,
}

impl Needs {
    /// Returns a text for each need, for `cargo xtask test --list`.
    pub fn describe(&self) -> Vec<String> {
        let mut text = Vec::new();
        text.extend(match self.node {
            NodeKind::Any => None,
            NodeKind::CgroupV1 => Some("requires a node with cgroup v1".to_owned()),
            NodeKind::Systemd => Some("requires a node with systemd".to_owned()),
        });
        text.extend(match self.lines {
            Lines::One => None,
            Lines::Both => Some("runs with containerd 1.7 and 2".to_owned()),
            Lines::TwoInstead => Some(
                "runs with containerd 2; runs with 1.7 too if --all, --containerd 1.7 or a filter is given".to_owned(),
            ),
            Lines::TwoOnly => Some("requires containerd 2".to_owned()),
        });
        text.extend(self.by_name_only.as_ref().map(|reason| format!("runs by name only: {reason}")));
        text
    }

    /// Reads one `KEY: VALUE` line of a suite's documentation. Returns `false` if the line is prose.
    fn read(&mut self, line: &str) -> Result<bool> {
        let Some((key, value)) = line.split_once(':') else { return Ok(false) };
        let prose = !value.is_empty() && !value.starts_with(' ');
        if prose || key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return Ok(false);
        }
        match (key, value.trim()) {
            ("Requires", "containerd 2") => self.set_lines(Lines::TwoOnly)?,
            ("Requires", "cgroup v1") => self.set_node(NodeKind::CgroupV1)?,
            ("Requires", "systemd") => self.set_node(NodeKind::Systemd)?,
            ("Runs", "containerd 1.7 and 2") => self.set_lines(Lines::Both)?,
            ("Runs", "containerd 2") => self.set_lines(Lines::TwoInstead)?,
            ("Runs", value) if value.strip_prefix("by name only:").is_some_and(|reason| !reason.trim().is_empty()) => {
                let reason = value.trim_start_matches("by name only:").trim();
                if self.by_name_only.replace(reason.to_owned()).is_some() {
                    bail!("two lines begin with `Runs: by name only:`; keep one of them");
                }
            }
            ("Requires" | "Runs", value) => {
                bail!("unknown value `{value}` of `{key}:`; docs/testing.md lists the values")
            }
            _ => bail!("unknown key `{key}:`; the known keys are `Requires:` and `Runs:`"),
        }
        Ok(true)
    }

    fn set_lines(&mut self, lines: Lines) -> Result<()> {
        if std::mem::replace(&mut self.lines, lines) != Lines::One {
            bail!("two lines with `Requires:` or `Runs:` choose the containerd version; keep one of them");
        }
        Ok(())
    }

    fn set_node(&mut self, node: NodeKind) -> Result<()> {
        if std::mem::replace(&mut self.node, node) != NodeKind::Any {
            bail!("two lines with `Requires:` choose the kind of node; keep one of them");
        }
        Ok(())
    }
}

/// Reads all suites of the repository, sorted by name.
pub fn read() -> Result<Vec<Suite>> {
    let package = paths::root().join("tests/e2e");
    let mut suites = vec![suite(LIBRARY, &package.join("src/lib.rs"))?];
    let dir = package.join("tests");
    for entry in fs::read_dir(&dir).with_context(|| format!("failed to list {}", dir.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().map(|name| name.to_string_lossy().into_owned()) else { continue };
        if path.extension().is_some_and(|ending| ending == "rs") {
            suites.push(suite(&name, &path)?);
        } else if path.join("main.rs").exists() {
            suites.push(suite(&name, &path.join("main.rs"))?);
        }
    }
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(suites)
}

/// Reads the suite called `name` whose root file is `file`.
fn suite(name: &str, file: &Path) -> Result<Suite> {
    let modules = source::modules(file)?;
    let relative = |path: &Path| path.strip_prefix(paths::root()).unwrap_or(path).to_owned();
    let mut tests = Vec::new();
    for module in &modules {
        for item in &module.items {
            let Item::Fn(function) = item else { continue };
            if !function.attrs.iter().any(|attr| attr.path().is_ident("test")) {
                continue;
            }
            let names = module.path.iter().cloned().chain([source::name(&function.sig.ident)]);
            let name = names.collect::<Vec<_>>().join("::");
            let place = || format!("{}:{}", relative(&module.file).display(), function.sig.ident.span().start().line);
            let long = long(&function.attrs).with_context(place)?;
            tests.push(Test { name, long });
        }
    }
    let attrs = modules.first().map(|module| module.attrs.as_slice()).unwrap_or_default();
    let (summary, needs) = documentation(attrs, &relative(file))?;
    Ok(Suite { name: name.to_owned(), summary, needs, tests })
}

/// Returns the reason why a test is long, from its `#[ignore]`. `None` if the test has no `#[ignore]`.
fn long(attrs: &[Attribute]) -> Result<Option<String>> {
    let Some(ignore) = attrs.iter().find(|attr| attr.path().is_ident("ignore")) else { return Ok(None) };
    let reason = source::value(ignore, "ignore");
    match reason.as_deref().and_then(|reason| reason.strip_prefix(LONG)) {
        Some(reason) => Ok(Some(reason.to_owned())),
        None => bail!("unknown form of `#[ignore]`; only `#[ignore = \"{LONG}REASON\"]` is allowed"),
    }
}

/// Returns the first paragraph of a suite's documentation, and the needs that the lines after it declare.
fn documentation(attrs: &[Attribute], file: &Path) -> Result<(String, Needs)> {
    let (mut summary, mut needs, mut in_summary) = (Vec::new(), Needs::default(), true);
    for attr in attrs {
        let Some(text) = source::value(attr, "doc") else { continue };
        let line = text.trim();
        in_summary &= !line.is_empty();
        if in_summary {
            if line.starts_with("Requires:") || line.starts_with("Runs:") {
                bail!("{}:{}: `{line}` has to follow a blank line", file.display(), attr.pound_token.span.start().line);
            }
            summary.push(line.to_owned());
        } else {
            needs.read(line).with_context(|| format!("{}:{}", file.display(), attr.pound_token.span.start().line))?;
        }
    }
    Ok((summary.join(" "), needs))
}

/// Returns the output of `cargo xtask test --list`: the tests that `filter` selects, with their suites. Fails if the
/// filter selects no test.
pub fn list(suites: &[Suite], filter: Filter<'_>) -> Result<String> {
    let names: Vec<&str> = suites.iter().map(|suite| suite.name.as_str()).collect();
    filter.check_suites(&names)?;
    let mut text = String::new();
    for suite in suites {
        let tests: Vec<&Test> = suite.tests.iter().filter(|test| filter.selects(&suite.name, &test.name)).collect();
        if tests.is_empty() {
            continue;
        }
        text.push_str(&format!("{}: {}\n", suite.name, suite.summary));
        for need in suite.needs.describe() {
            text.push_str(&format!("  [{need}]\n"));
        }
        for test in tests {
            let long = test.long.as_ref().map(|reason| format!(" [{LONG}{reason}]")).unwrap_or_default();
            text.push_str(&format!("    {}{long}\n", test.name));
        }
    }
    if text.is_empty() {
        return filter.fail_without_match(&names);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Suite> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s.rs");
        fs::write(&file, text).unwrap();
        suite("s", &file)
    }

    fn error(text: &str) -> String {
        format!("{:#}", parse(text).unwrap_err())
    }

    #[test]
    fn needs_are_read_from_the_documentation() {
        let suite = parse(
            "//! Pods: many\n//! of them.\n//!\n//! https://a.b and a note: no key.\n//!\n//! Requires: systemd\n\
             //! Runs: by name only: it takes an hour\n\n#[test]\nfn a() {}\n\
             #[test]\n#[ignore = \"long: two minutes\"]\nfn b() {}\nfn helper() {}\nmod m { #[test] fn c() {} }\n",
        )
        .unwrap();
        assert_eq!(suite.summary, "Pods: many of them.");
        let by_name_only = Some("it takes an hour".to_owned());
        assert_eq!(suite.needs, Needs { node: NodeKind::Systemd, lines: Lines::One, by_name_only });
        let test = |name: &str, long: Option<&str>| Test { name: name.to_owned(), long: long.map(str::to_owned) };
        assert_eq!(suite.tests, [test("a", None), test("b", Some("two minutes")), test("m::c", None)]);
        let suites = [suite];
        let list = |filter| list(&suites, Filter::parse(filter));
        let needs = "  [requires a node with systemd]\n  [runs by name only: it takes an hour]\n";
        assert_eq!(list("b").unwrap(), format!("s: Pods: many of them.\n{needs}    b [long: two minutes]\n"));
        let all = format!("s: Pods: many of them.\n{needs}    a\n    b [long: two minutes]\n    m::c\n");
        assert_eq!(list("@s").unwrap(), all);
        assert_eq!(list("").unwrap(), all);
        assert!(list("nonsense").is_err() && list("s").is_err() && list("@t").is_err());
    }

    #[test]
    fn error_for_a_typo_names_the_file_and_the_line() {
        assert!(error("//! S.\n//!\n//! Requires: containerd 3\n").contains("s.rs:3: unknown value `containerd 3`"));
        assert!(error("//! S.\n//!\n//! Requries: systemd\n").contains("s.rs:3: unknown key `Requries:`"));
        assert!(error("//! S.\n//! Requires: systemd\n").contains("s.rs:2: `Requires: systemd` has to follow"));
        assert!(error("//! S.\n//!\n//! Runs: by name only:\n").contains("unknown value"));
        assert!(
            error("//! S.\n//!\n//! Runs: containerd 2\n//! Requires: containerd 2\n").contains("s.rs:4: two lines")
        );
        assert!(error("#[test]\n#[ignore]\nfn a() {}\n").contains("s.rs:3: unknown form"));
        assert!(error("#[test]\n#[ignore = \"slow\"]\nfn a() {}\n").contains("s.rs:3: unknown form"));
    }

    #[test]
    fn the_suites_of_this_repository_are_read() {
        let suites = read().unwrap();
        let find = |name: &str| suites.iter().find(|suite| suite.name == name).unwrap();
        assert!(find("conformance").tests.iter().all(|test| test.name.contains("::")));
        assert!(find("conformance").needs.by_name_only.is_some());
        assert!(!find(LIBRARY).tests.is_empty());
        assert!(suites.iter().all(|suite| !suite.tests.is_empty() && !suite.summary.is_empty()));
        assert!(find("husk_resize").tests.iter().any(|test| test.long.is_some()));
    }
}
