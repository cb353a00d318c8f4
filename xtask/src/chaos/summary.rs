//! Adds up the results of chaos runs: faults that struck, and findings, by class.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::kept;

/// A run fails if more than one of this many steps has not struck (`tests/e2e/src/chaos/verdict.rs`).
pub const STEPS_PER_MISS: usize = 50;

/// The numbers of some steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    struck: usize,
    missed: usize,
    found: usize,
}

impl Tally {
    /// Counts the steps.
    pub fn of(steps: &[Value]) -> Self {
        let mut tally = Self::default();
        steps.iter().for_each(|step| tally.add(step));
        tally
    }

    /// Adds the numbers of further steps.
    pub fn join(&mut self, other: Self) {
        self.struck += other.struck;
        self.missed += other.missed;
        self.found += other.found;
    }

    fn add(&mut self, step: &Value) {
        let struck = step.get("struck").and_then(Value::as_bool) == Some(true);
        self.struck += usize::from(struck);
        self.missed += usize::from(!struck);
        self.found += usize::from(!findings(step).is_empty());
    }

    fn steps(self) -> usize {
        self.struck + self.missed
    }

    /// Returns whether the steps have passed. Steps prove nothing if none of their faults struck.
    pub fn passes(self) -> bool {
        self.struck > 0 && self.found == 0 && self.missed <= self.steps() / STEPS_PER_MISS
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { struck, missed, found } = self;
        write!(f, "{} steps: {struck} faults struck, {missed} did not strike, {found} with findings", self.steps())
    }
}

fn findings(step: &Value) -> Vec<&str> {
    let findings = step.get("findings").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    findings.iter().filter_map(Value::as_str).collect()
}

fn text<'a>(step: &'a Value, key: &str) -> &'a str {
    step.get(key).and_then(Value::as_str).unwrap_or("?")
}

/// The results of the shards of one seed, or of the failpoints.
#[derive(Default)]
struct Group {
    shards: usize,
    steps: Vec<Value>,
}

/// Returns the lines of the summary of all results in `dir`. Single steps that were run again are left out.
pub fn lines(dir: &Path) -> Result<Vec<String>> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let entries = fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))?;
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    for name in names {
        let Some(shard) = name.strip_suffix(".json") else { continue };
        let Some(title) = title(shard) else { continue };
        let group = groups.entry(title).or_default();
        group.shards += 1;
        group.steps.extend(kept::read(&dir.join(&name))?);
    }
    Ok(groups.iter().flat_map(|(title, group)| group.lines(title)).collect())
}

/// Returns the title of the group to which a shard belongs. `None` if the results are those of a single step.
fn title(shard: &str) -> Option<String> {
    let parts: Vec<&str> = shard.split('-').collect();
    match parts.as_slice() {
        [seed, number] if seed.parse::<u64>().is_ok() && number.parse::<usize>().is_ok() => {
            Some(format!("seed {seed}"))
        }
        ["failpoints"] => Some("failpoints".to_owned()),
        _ => None,
    }
}

impl Group {
    fn lines(&self, title: &str) -> Vec<String> {
        let Self { shards, steps } = self;
        let minutes = steps.iter().filter_map(|step| step.get("seconds")?.as_f64()).sum::<f64>() / 60.0;
        let mut lines = vec![format!("{title}: {shards} shards, {}, {minutes:.0} minutes", Tally::of(steps))];
        let mut classes: BTreeMap<&str, Tally> = BTreeMap::new();
        steps.iter().for_each(|step| classes.entry(text(step, "class")).or_default().add(step));
        lines.extend(classes.iter().map(|(class, tally)| format!("    {class}: {tally}")));
        for step in steps {
            let name = text(step, "name");
            if step.get("struck").and_then(Value::as_bool) != Some(true) {
                let why = step.pointer("/misses/0").and_then(Value::as_str).unwrap_or("no reason is known");
                lines.push(format!("    did not strike: {name}: {why}"));
            }
            for finding in findings(step) {
                lines.push(format!("    found: {name}: {}", finding.lines().next().unwrap_or_default()));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn step(id: &str, class: &str, struck: bool, findings: &[&str]) -> Value {
        json!({ "step": id, "name": id, "class": class, "seconds": 30.0, "struck": struck, "misses": ["no shim"],
                "findings": findings })
    }

    #[test]
    fn shards_of_a_seed_are_added_up_by_class() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, steps: &[Value]| fs::write(dir.path().join(name), json!(steps).to_string()).unwrap();
        write("1-0.json", &[step("1:0:0", "Time", true, &[]), step("1:0:1", "Guest", true, &["a\nb", "c"])]);
        write("1-9.json", &[step("1:9:0", "Time", false, &[]), step("1:9:1", "Time", true, &[])]);
        write("1-0-7.json", &[step("1:0:7", "Time", true, &["a single step"])]);
        fs::write(dir.path().join("1-0.containerd.log"), "log").unwrap();
        let expected = [
            "seed 1: 2 shards, 4 steps: 3 faults struck, 1 did not strike, 1 with findings, 2 minutes",
            "    Guest: 1 steps: 1 faults struck, 0 did not strike, 1 with findings",
            "    Time: 3 steps: 2 faults struck, 1 did not strike, 0 with findings",
            "    found: 1:0:1: a",
            "    found: 1:0:1: c",
            "    did not strike: 1:9:0: no shim",
        ];
        assert_eq!(lines(dir.path()).unwrap(), expected);
    }

    #[test]
    fn run_fails_with_findings_with_many_misses_and_without_faults() {
        let tally = |struck, missed, found| Tally { struck, missed, found };
        assert!(tally(490, 10, 0).passes() && tally(49, 1, 0).passes());
        assert!(!tally(489, 11, 0).passes() && !tally(7, 1, 0).passes());
        assert!(!tally(50, 0, 1).passes() && !tally(0, 0, 0).passes());
        let crash = json!({ "step": "1:0:0", "struck": false, "findings": ["the node crashed"] });
        assert_eq!(Tally::of(&[crash]), tally(0, 1, 1));
    }
}
