//! Tests each behaviour separately and records the results for the tables in docs/conformance.md.
//!
//! If `HUSK_CONFORMANCE` names a file, the tests append one line per behaviour to this file. The line has the group,
//! the behaviour and the result, separated by tabs.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cri::{self, Pods};

thread_local! {
    /// Behaviours that failed in this test.
    static FAILED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A group of behaviours.
pub struct Group {
    name: &'static str,
    lines: Vec<String>,
}

/// Runs `body`, which tests groups of behaviours in pods. Fails at the end if a behaviour has failed.
#[track_caller]
pub fn pods(name: &str, body: impl FnOnce(&Pods)) {
    cri::pods(name, |pods| {
        body(pods);
        let failed = FAILED.take();
        assert!(failed.is_empty(), "failed behaviours: {failed:#?}");
    });
}

/// Tests all behaviours of a group.
#[track_caller]
pub fn group(name: &'static str, body: impl FnOnce(&mut Group)) {
    let mut group = Group { name, lines: Vec::new() };
    let result = catch_unwind(AssertUnwindSafe(|| body(&mut group)));
    if let Ok(path) = std::env::var("HUSK_CONFORMANCE") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(group.lines.concat().as_bytes()).unwrap();
    }
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

impl Group {
    /// Tests a behaviour that every runtime should have.
    pub fn check(&mut self, behaviour: &str, probe: impl FnOnce()) {
        let result = if catch_unwind(AssertUnwindSafe(probe)).is_ok() { "passes" } else { "fails" };
        self.record(behaviour, result);
    }

    /// Tests a behaviour that needs a mount or a namespace of the host, which a VM cannot share. With runc, `probe`
    /// tests the behaviour. Under Husk, `request` has to return an error that contains `word`.
    pub fn check_or_rejected(
        &mut self,
        behaviour: &str,
        word: &str,
        probe: impl FnOnce(),
        request: impl FnOnce() -> String,
    ) {
        if cri::handler() == "runc" {
            return self.check(behaviour, probe);
        }
        let refused = catch_unwind(AssertUnwindSafe(|| {
            let error = request();
            assert!(error.contains(word), "expected an error that contains {word:?}, got {error:?}");
        }));
        self.record(behaviour, if refused.is_ok() { "refused" } else { "fails" });
    }

    fn record(&mut self, behaviour: &str, result: &str) {
        if result == "fails" {
            FAILED.with_borrow_mut(|failed| failed.push(format!("{}: {behaviour}", self.name)));
        }
        self.lines.push(format!("{}\t{behaviour}\t{result}\n", self.name));
    }
}
