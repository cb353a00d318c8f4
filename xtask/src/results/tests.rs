//! Tests the results with scripted boots: from the output of a node to the written files.

use serde_json::Value;

use super::*;
use crate::cargo_test::Binary;
use crate::libtest::TestRun;
use crate::node::Progress;

fn summary() -> Summary {
    let e2e = Some(E2eSummary { filter: String::new(), retry: true, emulated: true });
    Summary { e2e, finished: true, seconds: 9.5, stages: vec![] }
}

/// Records a boot of these suites. In `script`, lines "mark …" are marks, and all other lines are output.
fn boot(results: &mut Results, suites: &[&str], number: usize, script: &str, crashed: bool) {
    let suites: Vec<_> = suites.iter().map(|name| ((*name).to_owned(), results.next_attempt("1.7", name))).collect();
    let mut recorder = Recorder::new(results.dir.clone(), "1.7", &suites).unwrap();
    for line in script.split_inclusive('\n') {
        match line.strip_prefix("mark ") {
            Some(mark) => recorder.note(Progress::Mark(mark.trim_end())),
            None => recorder.note(Progress::Output(line.as_bytes())),
        }
    }
    let console = results.dir.join("console");
    fs::write(&console, "a panic").unwrap();
    let BootReport { attempts, parts, .. } = recorder.finish(crashed.then_some(&*console), number).unwrap();
    assert_eq!(parts.len(), attempts.len() + 1);
    results.add("1.7", attempts);
}

const FIRST: &str = "noise\n== a\nmark begun a\ntest x ... ok\ntest y ... FAILED\n== c\nfailures:\n\n\
                     ---- y stdout ----\nwhy & <how>\n\nfailures:\n    y\n\ntest result: FAILED.\nmark failed a\n\
                     mark begun b\n== b\ntest z ... ignored, long: x\ntest result: ok.\nmark passed b\n\
                     mark begun c\n== c\ntest w ... ";

fn sample(dir: &Path) -> Results {
    let mut results = Results::new(dir.join("results")).unwrap();
    for suite in ["a", "b", "c", "d"] {
        results.plan("1.7", suite);
    }
    boot(&mut results, &["a", "b", "c", "d"], 1, FIRST, true);
    boot(&mut results, &["a"], 2, "mark begun a\n== a\ntest x ... ok\ntest y ... ok\nmark passed a\n", false);
    results
}

#[test]
fn attempts_are_kept_with_their_logs() {
    let dir = tempfile::tempdir().unwrap();
    let results = sample(dir.path());
    results.write(&summary()).unwrap();
    let read = |name: &str| fs::read_to_string(results.dir.join(name)).unwrap();
    let json: Value = serde_json::from_str(&read("e2e.json")).unwrap();
    let suites = json["suites"].as_array().unwrap();
    let outcomes: Vec<_> = suites.iter().map(|suite| suite["outcome"].as_str().unwrap()).collect();
    // The line "== c" in the output of suite a does not begin the output of suite c.
    assert_eq!(outcomes, ["flaky", "passed", "failed", "not_run"]);
    let attempts = suites[0]["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!((&attempts[0]["log"], &attempts[1]["log"]), (&"logs/1.7/a.1.log".into(), &"logs/1.7/a.2.log".into()));
    assert!(read("logs/1.7/a.1.log").contains("FAILED") && !read("logs/1.7/a.2.log").contains("FAILED"));
    assert_eq!(suites[2]["attempts"][0]["outcome"], "crashed");
    assert_eq!(read(suites[2]["attempts"][0]["console"].as_str().unwrap()), "a panic");
    let tests = json["tests"].as_array().unwrap();
    let find = |name: &str, attempt: u64| {
        tests.iter().find(|test| test["name"] == name && test["attempt"] == attempt).unwrap()
    };
    assert_eq!(find("y", 1)["outcome"], "failed");
    assert_eq!(find("y", 2)["outcome"], "passed");
    assert_eq!((&find("y", 2)["suite"], &find("y", 2)["line"]), (&"a".into(), &"1.7".into()));
    assert_eq!(find("w", 1)["outcome"], "unfinished");
    let flaky = results.with_logs(SuiteOutcome::Flaky);
    assert!(flaky.len() == 1 && flaky[0].starts_with("a with containerd 1.7 (") && flaky[0].contains("a.1.log"));
}

#[test]
fn slowest_tests_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut results = Results::new(dir.path().join("results")).unwrap();
    results.plan("1.7", "a");
    let test = |name: &str, secs| TestRun::new(name, TestOutcome::Passed, Duration::from_secs(secs));
    let tests = vec![test("x", 1), test("y", 30), test("z", 2)];
    let (outcome, log) = (AttemptOutcome::Passed, PathBuf::new());
    let attempt = Attempt { attempt: 1, outcome, seconds: 33.0, log, console: None, tests };
    results.add("1.7", vec![("a".to_owned(), attempt)]);
    assert_eq!(results.slowest(2), "     30.0  a y (1.7)\n      2.0  a z (1.7)\n     33.0  all 3 tests\n");
}

#[test]
fn junit_distinguishes_flaky_and_unfinished_tests() {
    let dir = tempfile::tempdir().unwrap();
    let xml = junit::report("husk-e2e", &sample(dir.path()).suites, 9.5).to_string().unwrap();
    assert!(xml.contains("<testsuite name=\"1.7.a\""), "{xml}");
    assert!(xml.contains("<flakyFailure ") && xml.contains("\"attempt 1 failed (logs/1.7/a.1.log)\""), "{xml}");
    assert!(xml.contains("<error message=\"attempt 1 did not end: the node ended first (logs/1.7/c.1.log"), "{xml}");
    assert!(xml.contains("<skipped message=\"long: x\""), "{xml}");
    assert!(xml.contains("the suite was not run"), "{xml}");
}

#[test]
fn results_of_unit_tests_have_checks_and_test_binaries() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("logs/unit")).unwrap();
    fs::write(dir.path().join("logs/unit/old.1.log"), "old").unwrap();
    fs::write(dir.path().join("e2e.json"), "kept").unwrap();
    let mut results = Results::new_unit(dir.path().to_owned()).unwrap();
    let mut check = TestRun::new("modules", TestOutcome::Failed, Duration::from_secs(1));
    check.failure = Some("a cycle".to_owned());
    results.add_checks("format", vec![TestRun::new("imports", TestOutcome::Passed, Duration::ZERO), check]).unwrap();
    let binary = |name: &str, passed, tests| {
        let (name, duration, output) = (name.to_owned(), Duration::from_secs(2), "the output".to_owned());
        Binary { name, passed, duration, tests, output }
    };
    let test = TestRun::new("error::tests::x", TestOutcome::Passed, Duration::from_secs(2));
    results.add_binary(UNIT, binary("husk_base", true, vec![test])).unwrap();
    results.add_binary(UNIT, binary("hostile.test", true, vec![])).unwrap();
    results.add_binary(UNIT, binary("escape.test", false, vec![])).unwrap();
    results.write(&Summary { e2e: None, finished: false, seconds: 9.5, stages: vec![] }).unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let json: Value = serde_json::from_str(&read("unit.json")).unwrap();
    let suites = json["suites"].as_array().unwrap();
    let rows: Vec<_> = suites.iter().map(|suite| (&suite["line"], &suite["suite"], &suite["outcome"])).collect();
    let row = |index: usize| rows[index];
    assert_eq!(row(0), (&"checks".into(), &"format".into(), &"failed".into()));
    assert_eq!(row(1), (&"unit".into(), &"husk_base".into(), &"passed".into()));
    assert_eq!(row(3), (&"unit".into(), &"escape.test".into(), &"failed".into()));
    assert_eq!((&json["finished"], json.get("filter")), (&false.into(), None));
    assert_eq!(json["tests"][1]["failure"], "a cycle");
    let xml = read("unit.xml");
    assert!(xml.contains("<testsuites name=\"husk-unit\""), "{xml}");
    assert!(xml.contains("<testcase name=\"error::tests::x\" classname=\"unit.husk_base\" time=\"2.000\""), "{xml}");
    assert!(xml.contains("<testcase name=\"(suite)\" classname=\"unit.hostile.test\""), "{xml}");
    assert!(xml.contains("attempt 1 failed (logs/unit/escape.test.1.log)"), "{xml}");
    assert_eq!(read("logs/unit/hostile.test.1.log"), "the output");
    assert_eq!(read("logs/checks/format.1.log"), "imports ... ok\nmodules ... FAILED\na cycle\n");
    assert!(!dir.path().join("logs/unit/old.1.log").exists());
    assert_eq!(read("e2e.json"), "kept");
}
