//! The results of a shard, which are kept in a file. The file is written after each step, because a run can be cut.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The results of a shard, in the order of its steps.
pub struct Kept {
    path: PathBuf,
    results: Vec<Value>,
}

impl Kept {
    /// Replaces the results of an earlier run, whose format can differ.
    pub fn replace(path: &Path) -> Self {
        Self { path: path.to_owned(), results: Vec::new() }
    }

    /// Reads the results that are already there.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), results: read(path)? })
    }

    /// Returns the results.
    pub fn results(&self) -> &[Value] {
        &self.results
    }

    /// Returns the number of the step after the last step with a result.
    pub fn next(&self) -> usize {
        self.results.iter().filter_map(number).max().map_or(0, |last| last + 1)
    }

    /// Removes the results from the step `from` on.
    pub fn truncate(&mut self, from: usize) -> Result<()> {
        self.results.retain(|result| number(result).is_some_and(|number| number < from));
        self.write()
    }

    /// Adds a result, which is one line of JSON, and writes the file.
    pub fn add(&mut self, line: &str) -> Result<()> {
        let result = serde_json::from_str(line).with_context(|| format!("failed to parse the result {line:?}"))?;
        self.results.push(result);
        self.write()
    }

    /// Adds the result of a step during which the node crashed.
    pub fn add_crash(&mut self, step: &str, error: &str) -> Result<()> {
        let finding = format!("the node crashed: {}", error.lines().next().unwrap_or_default());
        self.results.push(json!({ "step": step, "name": step, "struck": false, "findings": [finding] }));
        self.write()
    }

    /// Replaces the file in one step, so that it is never incomplete.
    fn write(&self) -> Result<()> {
        let part = self.path.with_extension("part");
        let text = serde_json::to_vec_pretty(&self.results)?;
        fs::write(&part, text)
            .and_then(|()| fs::rename(&part, &self.path))
            .with_context(|| format!("failed to write {}", self.path.display()))
    }
}

/// Reads the results of a shard. A missing file has no results.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("failed to read {}", path.display())),
    };
    serde_json::from_slice(&text).with_context(|| format!("failed to parse {}", path.display()))
}

/// Returns the number of a step. Its id is `SEED:SHARD:STEP`.
fn number(result: &Value) -> Option<usize> {
    result.get("step")?.as_str()?.rsplit(':').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: usize) -> String {
        json!({ "step": format!("1:3:{step}"), "struck": true, "findings": [] }).to_string()
    }

    #[test]
    fn results_are_kept_after_each_step_and_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-3.json");
        let mut kept = Kept::open(&path).unwrap();
        assert_eq!(kept.next(), 0);
        for step in 0..3 {
            kept.add(&line(step)).unwrap();
        }
        assert!(Kept::replace(&path).results().is_empty());
        // The run is cut, and another run continues it.
        let mut again = Kept::open(&path).unwrap();
        assert_eq!((again.results().len(), again.next()), (3, 3));
        again.add_crash("1:3:3", "the node ended\nits console").unwrap();
        assert_eq!(again.results()[3]["findings"], json!(["the node crashed: the node ended"]));
        // `--from 2` repeats the steps from 2 on, and keeps the earlier ones.
        again.truncate(2).unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
        assert!(again.add("no JSON").is_err());
    }
}
