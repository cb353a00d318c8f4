//! Which suites run in which boot of the node, and which run again.

use std::collections::VecDeque;

/// How often a node may end without being done before the run is given up.
const CRASHES: u32 = 4;

/// What became of a suite in one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All its tests passed.
    Passed,
    /// A test failed.
    Failed,
    /// It was begun, and then the node ended.
    Begun,
    /// The node ended before.
    Waiting,
}

/// The suites that are still to run, and what became of the others.
pub struct Plan {
    /// Those that run together, so many a boot.
    together: VecDeque<String>,
    /// Those that run once more, each in a boot of its own.
    alone: VecDeque<String>,
    a_boot: usize,
    /// Whether one that fails is tried again: where the processor is emulated, and now and then goes astray.
    again: bool,
    unsteady: Vec<String>,
    failed: Vec<String>,
    crashes: u32,
}

impl Plan {
    /// Of `suites`, `a_boot` run together; `again` gives those that fail a second try.
    pub fn new(suites: impl IntoIterator<Item = String>, a_boot: usize, again: bool) -> Self {
        Plan {
            together: suites.into_iter().collect(),
            alone: VecDeque::new(),
            a_boot,
            again,
            unsteady: Vec::new(),
            failed: Vec::new(),
            crashes: 0,
        }
    }

    /// The suites of the next boot; none when what is left has to run alone.
    fn together(&mut self) -> Vec<String> {
        let some = self.a_boot.min(self.together.len());
        self.together.drain(..some).collect()
    }

    /// A suite that runs once more.
    fn alone(&mut self) -> Vec<String> {
        self.alone.pop_front().into_iter().collect()
    }

    /// Notes how a boot went: every suite that [`next()`] named, with what became of it.
    pub fn ended(&mut self, suites: Vec<(String, Outcome)>) {
        let crashed = suites.iter().any(|(_, outcome)| matches!(outcome, Outcome::Begun | Outcome::Waiting));
        self.crashes += u32::from(crashed);
        // The same state of the emulated machine fails them all: after so many there is more to it.
        let again = self.again && self.crashes <= CRASHES;
        let mut waiting = VecDeque::new();
        for (suite, outcome) in suites {
            match outcome {
                Outcome::Passed => {}
                Outcome::Waiting if again => waiting.push_back(suite),
                Outcome::Failed | Outcome::Begun if again && !self.unsteady.contains(&suite) => {
                    self.unsteady.push(suite.clone());
                    self.alone.push_back(suite);
                }
                _ => self.failed.push(suite),
            }
        }
        let alone = waiting.len() == 1 && self.unsteady.contains(&waiting[0]);
        let queue = if alone { &mut self.alone } else { &mut self.together };
        for suite in waiting.into_iter().rev() {
            queue.push_front(suite);
        }
    }

    /// The suites that have, or had, a second try.
    pub fn unsteady(&self) -> &[String] {
        &self.unsteady
    }

    /// The suites that failed for good.
    pub fn failed(&self) -> &[String] {
        &self.failed
    }
}

/// The suites of the next boot, and whose they are: what failed anywhere runs again when all else was begun.
pub fn next<L: Copy>(plans: &mut [(L, Plan)]) -> Option<(L, Vec<String>)> {
    let some = |line: L, suites: Vec<String>| (!suites.is_empty()).then_some((line, suites));
    let together = plans.iter_mut().find_map(|(line, plan)| some(*line, plan.together()));
    together.or_else(|| plans.iter_mut().find_map(|(line, plan)| some(*line, plan.alone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(again: bool) -> Plan {
        Plan::new(["a", "b", "c", "d", "e"].map(String::from), 3, again)
    }

    fn suites(plan: &mut Plan) -> Vec<String> {
        let some = plan.together();
        if some.is_empty() { plan.alone() } else { some }
    }

    fn end(plan: &mut Plan, outcomes: &[(&str, Outcome)]) {
        assert_eq!(suites(plan), outcomes.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        plan.ended(outcomes.iter().map(|(name, outcome)| ((*name).to_owned(), *outcome)).collect());
    }

    #[test]
    fn suites_that_pass_run_once() {
        let mut plan = plan(true);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Passed), ("c", Outcome::Passed)]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty() && plan.failed().is_empty() && plan.unsteady().is_empty());
    }

    #[test]
    fn a_suite_that_fails_has_one_more_try_at_the_end() {
        let mut plan = plan(true);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Failed), ("c", Outcome::Failed)]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        end(&mut plan, &[("b", Outcome::Passed)]);
        end(&mut plan, &[("c", Outcome::Failed)]);
        assert!(suites(&mut plan).is_empty());
        assert_eq!((plan.failed(), plan.unsteady()), (&["c".to_owned()][..], &["b".to_owned(), "c".to_owned()][..]));
    }

    #[test]
    fn what_failed_runs_again_when_all_else_was_begun() {
        let mut plans = [("1", plan(true)), ("2", plan(true))];
        let (line, names) = next(&mut plans).unwrap();
        assert_eq!((line, names.len()), ("1", 3));
        plans[0].1.ended(names.into_iter().map(|name| (name, Outcome::Failed)).collect());
        let rest: Vec<_> =
            std::iter::from_fn(|| next(&mut plans)).map(|(line, names)| (line, names.join(""))).collect();
        let all = [("1", "de"), ("2", "abc"), ("2", "de"), ("1", "a"), ("1", "b"), ("1", "c")];
        assert_eq!(rest, all.map(|(line, names)| (line, names.to_owned())));
    }

    #[test]
    fn where_kvm_is_real_nothing_is_tried_again() {
        let mut plan = plan(false);
        end(&mut plan, &[("a", Outcome::Failed), ("b", Outcome::Begun), ("c", Outcome::Waiting)]);
        assert_eq!(plan.failed(), ["a", "b", "c"]);
        end(&mut plan, &[("d", Outcome::Passed), ("e", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty());
    }

    #[test]
    fn what_a_crashed_node_did_not_come_to_goes_on_in_the_next() {
        let mut plan = plan(true);
        end(&mut plan, &[("a", Outcome::Passed), ("b", Outcome::Begun), ("c", Outcome::Waiting)]);
        end(&mut plan, &[("c", Outcome::Waiting), ("d", Outcome::Waiting), ("e", Outcome::Waiting)]);
        end(&mut plan, &[("c", Outcome::Passed), ("d", Outcome::Passed), ("e", Outcome::Passed)]);
        end(&mut plan, &[("b", Outcome::Waiting)]);
        end(&mut plan, &[("b", Outcome::Passed)]);
        assert!(suites(&mut plan).is_empty() && plan.failed().is_empty());
    }

    #[test]
    fn a_node_that_never_boots_ends_the_run() {
        let mut plan = plan(true);
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
