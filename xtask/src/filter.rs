//! The filter of `cargo xtask test`: selects tests by a part of their names, or by their suites.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::Program;
use crate::cmd;

/// Selects tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter<'a> {
    /// All tests.
    All,
    /// The tests whose name contains the text.
    Name(&'a str),
    /// All tests of the suites. The text has the names of the suites, separated by commas.
    Suites(&'a str),
}

impl<'a> Filter<'a> {
    /// Parses the value of an option: an empty text, a part of a test's name, or `@SUITE,SUITE…`.
    pub fn parse(text: &'a str) -> Self {
        match text.strip_prefix('@') {
            Some(suites) => Filter::Suites(suites),
            None if text.is_empty() => Filter::All,
            None => Filter::Name(text),
        }
    }

    /// Whether the filter selects the test called `test` of the suite called `suite`.
    pub fn selects(self, suite: &str, test: &str) -> bool {
        match self {
            Filter::All => true,
            Filter::Name(part) => test.contains(part),
            Filter::Suites(suites) => suites.split(',').any(|name| name == suite),
        }
    }

    /// Returns the text that libtest has to find in the names of the selected tests. `None` if all tests of a selected
    /// suite run.
    pub fn part_of_name(self) -> Option<&'a str> {
        match self {
            Filter::Name(part) => Some(part),
            Filter::All | Filter::Suites(_) => None,
        }
    }

    /// Fails if the filter names a suite that is not in `suites`.
    pub fn check_suites(self, suites: &[&str]) -> Result<()> {
        let Filter::Suites(names) = self else { return Ok(()) };
        if let Some(unknown) = names.split(',').find(|name| !suites.contains(name)) {
            bail!("failed to find a suite called `{unknown}`; `cargo xtask test --list` lists the suites");
        }
        Ok(())
    }

    /// Fails, because the filter selects no test. `suites` has the names of all suites.
    pub fn fail_without_match<T>(self, suites: &[&str]) -> Result<T> {
        let text = self.part_of_name().unwrap_or_default();
        if suites.contains(&text) {
            bail!("failed to find a test whose name contains `{text}`; @{text} selects the tests of the suite {text}");
        }
        bail!("failed to find a test whose name contains `{text}`; `cargo xtask test --list` lists the tests");
    }

    /// Returns the names of the tests of `suite` that the filter selects. Long tests are included only if `long` is
    /// true.
    pub fn selected(self, suite: &Program, long: bool) -> Result<Vec<String>> {
        let list = |arg: Option<&str>| -> Result<Vec<String>> {
            let list = cmd::output(Command::new(&suite.path).arg("--list").args(arg))
                .with_context(|| format!("failed to list the tests of suite {}", suite.name))?;
            Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
        };
        let left_out = if long { Vec::new() } else { list(Some("--ignored"))? };
        let is_selected = |name: &String| self.selects(&suite.name, name) && !left_out.contains(name);
        Ok(list(None)?.into_iter().filter(is_selected).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_selects_by_test_name_or_by_suite() {
        let selects = |filter, suite, test| Filter::parse(filter).selects(suite, test);
        assert!(selects("", "process", "a"));
        assert!(selects("kill", "process", "signals::kill_all") && !selects("kill", "kill", "a"));
        assert!(selects("@process", "process", "a") && !selects("@process", "process2", "process"));
        assert!(selects("@io,process", "process", "a") && !selects("@io,process", "io,process", "a"));
    }

    #[test]
    fn filter_without_a_match_is_an_error_with_a_hint() {
        let suites = ["cri_userns", "process"];
        let error = |filter| Filter::parse(filter).fail_without_match::<()>(&suites).unwrap_err().to_string();
        assert!(error("nonsense").ends_with("contains `nonsense`; `cargo xtask test --list` lists the tests"));
        assert!(error("cri_userns").ends_with("; @cri_userns selects the tests of the suite cri_userns"));
        let check = |filter| Filter::parse(filter).check_suites(&suites);
        assert!(check("@cri_userns,process").is_ok() && check("nonsense").is_ok() && check("").is_ok());
        assert!(check("@process,nonsense").unwrap_err().to_string().contains("a suite called `nonsense`"));
        assert!(check("@").is_err());
    }
}
