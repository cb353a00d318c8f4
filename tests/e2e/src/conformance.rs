//! Behaviours tried one by one and noted, for the table in docs/conformance.md.
//!
//! With `HUSK_CONFORMANCE` naming a file, each behaviour becomes a line of it: group, behaviour, result, with tabs in
//! between.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cri::{self, Pods};

thread_local! {
    /// What failed in this test.
    static FAILED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A group of behaviours.
pub struct Group {
    name: &'static str,
    lines: Vec<String>,
}

/// Pods for some groups of behaviours; fails at the end when one of them failed.
#[track_caller]
pub fn pods(name: &str, body: impl FnOnce(&Pods)) {
    cri::pods(name, |pods| {
        body(pods);
        let failed = FAILED.take();
        assert!(failed.is_empty(), "{failed:#?}");
    });
}

/// Tries all behaviours of a group.
#[track_caller]
pub fn group(name: &'static str, body: impl FnOnce(&mut Group)) {
    let mut group = Group { name, lines: Vec::new() };
    let whole = catch_unwind(AssertUnwindSafe(|| body(&mut group)));
    if let Ok(path) = std::env::var("HUSK_CONFORMANCE") {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(group.lines.concat().as_bytes()).unwrap();
    }
    if let Err(panic) = whole {
        std::panic::resume_unwind(panic);
    }
}

impl Group {
    /// A behaviour that every runtime is to have.
    pub fn has(&mut self, behaviour: &str, probe: impl FnOnce()) {
        let result = if catch_unwind(AssertUnwindSafe(probe)).is_ok() { "passes" } else { "fails" };
        self.note(behaviour, result);
    }

    /// A behaviour that needs what a virtual machine does not share with its host: under Husk it is refused, by an error
    /// with `word` in it.
    pub fn shares(&mut self, behaviour: &str, word: &str, probe: impl FnOnce(), asked: impl FnOnce() -> String) {
        if cri::handler() == "runc" {
            return self.has(behaviour, probe);
        }
        let refused = catch_unwind(AssertUnwindSafe(|| {
            let error = asked();
            assert!(error.contains(word), "{error}");
        }));
        self.note(behaviour, if refused.is_ok() { "refused" } else { "fails" });
    }

    fn note(&mut self, behaviour: &str, result: &str) {
        if result == "fails" {
            FAILED.with_borrow_mut(|failed| failed.push(format!("{}: {behaviour}", self.name)));
        }
        self.lines.push(format!("{}\t{behaviour}\t{result}\n", self.name));
    }
}
