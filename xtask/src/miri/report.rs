//! Formats the results of tests under Miri as a table.

use std::collections::BTreeMap;

use crate::cargo_test::Binary;
use crate::libtest::TestOutcome;

/// Tests of a module that is left out.
pub struct LeftOut {
    /// The name of the test binary.
    pub binary: String,
    /// Why the module is left out.
    pub reason: String,
    /// The number of tests.
    pub count: usize,
}

/// The results of one test binary.
#[derive(Debug, PartialEq)]
pub struct Row {
    name: String,
    /// Number of tests that ran.
    run: usize,
    /// Names of the tests that failed or ended the process.
    failed: Vec<String>,
    /// Number of tests that did not run, by reason.
    ignored: BTreeMap<String, usize>,
    seconds: u64,
}

impl Row {
    pub fn new(binary: &Binary, left_out: &[LeftOut]) -> Self {
        let mut ignored = BTreeMap::new();
        let of_binary = left_out.iter().filter(|left_out| left_out.binary == binary.name);
        let tests = binary.tests.iter().filter(|test| test.outcome == TestOutcome::Ignored);
        let reasons = tests.map(|test| (test.ignored.as_deref().unwrap_or("no reason"), 1));
        for (reason, count) in of_binary.map(|left_out| (left_out.reason.as_str(), left_out.count)).chain(reasons) {
            *ignored.entry(reason.to_owned()).or_default() += count;
        }
        let failed = binary
            .tests
            .iter()
            .filter(|test| matches!(test.outcome, TestOutcome::Failed | TestOutcome::Unfinished))
            .map(|test| test.name.clone());
        Row {
            name: binary.name.clone(),
            run: binary.tests.len() - binary.count(TestOutcome::Ignored),
            failed: failed.collect(),
            ignored,
            seconds: binary.duration.as_secs(),
        }
    }
}

/// Returns the table in Markdown. Its last column has the reasons why tests did not run, the most frequent one first.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| crate | tests run | failed | ignored | seconds | reasons for ignored tests |\n\
                    | --- | --: | --- | --: | --: | --- |\n"
        .to_owned();
    for Row { name, run, failed, ignored, seconds } in rows {
        let mut reasons: Vec<_> = ignored.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let reasons: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count}: {reason}")).collect();
        let failed = if failed.is_empty() { "0".to_owned() } else { failed.join(", ") };
        let count: usize = ignored.values().sum();
        text += &format!("| `{name}` | {run} | {failed} | {count} | {seconds} | {} |\n", reasons.join("; "));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::libtest::TestRun;

    #[test]
    fn ignored_tests_are_counted_by_reason() {
        let test = |name: &str, outcome, reason: Option<&str>| TestRun {
            ignored: reason.map(str::to_owned),
            ..TestRun::new(name, outcome, Duration::ZERO)
        };
        let tests = vec![
            test("a", TestOutcome::Passed, None),
            test("b", TestOutcome::Unfinished, None),
            test("c", TestOutcome::Ignored, Some("Miri has no fork")),
            test("d", TestOutcome::Ignored, Some("Miri has no bpf")),
        ];
        let (name, duration) = ("husk_vmm".to_owned(), Duration::from_millis(2500));
        let binary = Binary { name, passed: false, duration, tests, output: String::new() };
        let left_out = |binary: &str, reason: &str, count| {
            let (binary, reason) = (binary.to_owned(), reason.to_owned());
            LeftOut { binary, reason, count }
        };
        let left_out = [left_out("husk_vmm", "Miri has no fork", 3), left_out("husk_base", "Miri has no epoll", 1)];
        let text = table(&[Row::new(&binary, &left_out)]);
        assert!(
            text.ends_with("\n| `husk_vmm` | 2 | b | 5 | 2 | 4: Miri has no fork; 1: Miri has no bpf |\n"),
            "{text}"
        );
    }
}
