//! Plans the boots of the test node. Decides which suites run in which boot, and which suites run a second time.

use std::collections::VecDeque;

/// Maximum number of node crashes. After more crashes than this, suites that fail are not retried, and suites that a
/// crashed node does not reach count as failed.
const CRASHES: u32 = 4;

/// The result of a suite in one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All tests of the suite passed.
    Passed,
    /// A test failed.
    Failed,
    /// The node ended while the suite ran.
    Begun,
    /// The node ended before the suite began.
    Waiting,
}

/// What happens to suites that did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retries {
    /// Every suite that did not pass counts as failed, even a suite that a crashed node did not reach. This applies to
    /// nodes on real KVM.
    Never,
    /// The next boot runs the suites that a crashed node did not reach. This applies to emulated nodes with
    /// `--no-retry`.
    Resume,
    /// The next boot runs the suites that a crashed node did not reach. In addition, a suite that failed runs once
    /// more, in a boot of its own. This is the default for emulated nodes, because the emulator sometimes makes a
    /// correct guest fail.
    Retry,
}

/// The suites that have yet to run with one containerd line, and the suites that failed with this line.
pub struct Plan {
    /// Suites that share boots. A boot runs up to `batch` of them.
    together: VecDeque<String>,
    /// Suites that run once more, each in a boot of its own.
    alone: VecDeque<String>,
    batch: usize,
    retries: Retries,
    retried: Vec<String>,
    failed: Vec<String>,
    crashes: u32,
}

impl Plan {
    /// Plans boots of `batch` suites each.
    pub fn new(suites: impl IntoIterator<Item = String>, batch: usize, retries: Retries) -> Self {
        Plan {
            together: suites.into_iter().collect(),
            alone: VecDeque::new(),
            batch,
            retries,
            retried: Vec::new(),
            failed: Vec::new(),
            crashes: 0,
        }
    }

    /// Removes up to `batch` suites from `together` for the next boot, and returns them. Returns an empty list if all
    /// remaining suites run alone.
    fn take_together(&mut self) -> Vec<String> {
        let count = self.batch.min(self.together.len());
        self.together.drain(..count).collect()
    }

    /// Removes a suite from `alone` for the next boot, and returns it. Returns an empty list if `alone` is empty.
    fn take_alone(&mut self) -> Vec<String> {
        self.alone.pop_front().into_iter().collect()
    }

    /// Records the results of a boot. `suites` has every suite that [`next()`] returned for this boot, with its
    /// outcome.
    pub fn ended(&mut self, suites: Vec<(String, Outcome)>) {
        let crashed = suites.iter().any(|(_, outcome)| matches!(outcome, Outcome::Begun | Outcome::Waiting));
        self.crashes += u32::from(crashed);
        // Flaws of the emulator crash a node only occasionally. More than `CRASHES` crashes must have another cause.
        let retries = if self.crashes <= CRASHES { self.retries } else { Retries::Never };
        let mut waiting = VecDeque::new();
        for (suite, outcome) in suites {
            match outcome {
                Outcome::Passed => {}
                Outcome::Waiting if retries != Retries::Never => waiting.push_back(suite),
                Outcome::Failed | Outcome::Begun if retries == Retries::Retry && !self.retried.contains(&suite) => {
                    self.retried.push(suite.clone());
                    self.alone.push_back(suite);
                }
                _ => self.failed.push(suite),
            }
        }
        let alone = waiting.len() == 1 && self.retried.contains(&waiting[0]);
        let queue = if alone { &mut self.alone } else { &mut self.together };
        for suite in waiting.into_iter().rev() {
            queue.push_front(suite);
        }
    }

    /// Returns the suites that failed. If a suite was retried, the result of the retry counts.
    pub fn failed(&self) -> &[String] {
        &self.failed
    }
}

/// Takes the suites of the next boot from the plans, and returns them with their containerd line. Returns `None` if no
/// suite is left. No suite runs a second time before all suites have begun once.
pub fn next<L: Copy>(plans: &mut [(L, Plan)]) -> Option<(L, Vec<String>)> {
    let non_empty = |line: L, suites: Vec<String>| (!suites.is_empty()).then_some((line, suites));
    let together = plans.iter_mut().find_map(|(line, plan)| non_empty(*line, plan.take_together()));
    together.or_else(|| plans.iter_mut().find_map(|(line, plan)| non_empty(*line, plan.take_alone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(retries: Retries) -> Plan {
        Plan::new(["a", "b", "c", "d", "e"].map(String::from), 3, retries)
    }

    fn suites(plan: &mut Plan) -> Vec<String> {
        let together = plan.take_together();
        if together.is_empty() { plan.take_alone() } else { together }
    }

    fn end(plan: &mut Plan, outcomes: &[(&str, Outcome)]) {
        assert_eq!(suites(plan), outcomes.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        plan.ended(outcomes.iter().map(|(name, outcome)| ((*name).to_owned(), *outcome)).collect());
    }

    #[test]
    fn suites_that_pass_run_once() {
        let mut plan = plan(Retries::Retry);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Passed), ("c", Outcome::Passed)]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty() && plan.failed().is_empty() && plan.retried.is_empty());
    }

    #[test]
    fn failed_suites_are_retried_once_at_the_end() {
        let mut plan = plan(Retries::Retry);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Failed), ("c", Outcome::Failed)]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        end(&mut plan, &[("b", Outcome::Passed)]);
        end(&mut plan, &[("c", Outcome::Failed)]);
        assert!(suites(&mut plan).is_empty());
        assert_eq!(plan.failed(), ["c"]);
        assert_eq!(plan.retried, ["b", "c"]);
    }

    #[test]
    fn retries_run_after_the_first_attempts_of_all_containerd_lines() {
        let mut plans = [("1", plan(Retries::Retry)), ("2", plan(Retries::Retry))];
        let (line, names) = next(&mut plans).unwrap();
        assert_eq!((line, names.len()), ("1", 3));
        plans[0].1.ended(names.into_iter().map(|name| (name, Outcome::Failed)).collect());
        let rest: Vec<_> =
            std::iter::from_fn(|| next(&mut plans)).map(|(line, names)| (line, names.join(""))).collect();
        let all = [("1", "de"), ("2", "abc"), ("2", "de"), ("1", "a"), ("1", "b"), ("1", "c")];
        assert_eq!(rest, all.map(|(line, names)| (line, names.to_owned())));
    }

    #[test]
    fn suites_on_real_kvm_are_not_retried() {
        let mut plan = plan(Retries::Never);
        end(&mut plan, &[("a", Outcome::Failed), ("b", Outcome::Begun), ("c", Outcome::Waiting)]);
        assert_eq!(plan.failed(), ["a", "b", "c"]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty());
    }

    #[test]
    fn resume_runs_only_the_suites_that_a_crashed_node_did_not_reach() {
        let mut plan = plan(Retries::Resume);
        end(&mut plan, &[("a", Outcome::Failed), ("b", Outcome::Begun), ("c", Outcome::Waiting)]);
        end(&mut plan, &[("c", Outcome::Passed), ("d", Outcome::Passed), ("e", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty());
        assert_eq!(plan.failed(), ["a", "b"]);
    }

    #[test]
    fn next_boot_runs_the_suites_that_a_crashed_node_did_not_reach() {
        let mut plan = plan(Retries::Retry);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Begun), ("c", Outcome::Waiting)]);
        end(&mut plan, &[("c", Outcome::Waiting), ("d", Outcome::Waiting), ("e", Outcome::Waiting)]);
        end(&mut plan, &[("c", Outcome::Passed), ("d", Outcome::Passed), ("e", Outcome::Passed)]);
        end(&mut plan, &[("b", Outcome::Waiting)]);
        end(&mut plan, &[("b", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty() && plan.failed().is_empty());
    }

    #[test]
    fn after_too_many_crashes_suites_fail_without_another_boot() {
        let mut plan = plan(Retries::Retry);
        let mut boots = 0;
        loop {
            let suites = suites(&mut plan);
            if suites.is_empty() {
                break;
            }
            boots += 1;
            plan.ended(suites.into_iter().map(|suite| (suite, Outcome::Waiting)).collect());
        }
        assert_eq!((boots, plan.failed().len()), (CRASHES + 2, 5));
    }
}
