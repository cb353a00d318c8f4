//! Measures the stages of a test run, and shows how long each stage took.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use husk_base::sync::lock;
use serde::Serialize;

/// A stage of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    pub name: String,
    /// Seconds from the start of the run to the start of the stage. Stages that run side by side overlap.
    pub started: f64,
    pub seconds: f64,
    /// The parts of the stage that were measured separately.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
}

/// A part of a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    pub name: String,
    pub seconds: f64,
}

/// The stages of a run. Several threads can add stages.
pub struct Stages {
    begin: Instant,
    list: Mutex<Vec<Stage>>,
}

impl Stages {
    /// Creates an empty list of stages. The run begins now.
    pub fn new() -> Self {
        Stages { begin: Instant::now(), list: Mutex::default() }
    }

    /// Runs `work`, and adds it as the stage called `name`.
    pub fn measure<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.add(name.to_owned(), begin, begin.elapsed(), Vec::new());
        result
    }

    /// Adds a stage that was measured elsewhere.
    pub fn add(&self, name: String, begin: Instant, duration: Duration, parts: Vec<Part>) {
        let started = seconds(begin.saturating_duration_since(self.begin));
        let stage = Stage { name, started, seconds: seconds(duration), parts };
        lock(&self.list).push(stage);
    }

    /// Returns the stages so far, in the order in which they began.
    pub fn list(&self) -> Vec<Stage> {
        let mut list = lock(&self.list).clone();
        list.sort_by(|a, b| a.started.total_cmp(&b.started));
        list
    }

    /// Returns the seconds since the run began.
    pub fn elapsed(&self) -> f64 {
        seconds(self.begin.elapsed())
    }
}

/// Returns a duration in seconds, rounded to hundredths.
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100.0).round() / 100.0
}

/// Returns a table of the stages and their parts, in seconds, with the total.
pub fn table(stages: &[Stage], total: f64) -> String {
    let mut text = format!("{:>9}  {:>9}  stage\n", "started", "seconds");
    for stage in stages {
        text.push_str(&format!("{:9.1}  {:9.1}  {}\n", stage.started, stage.seconds, stage.name));
        for part in &stage.parts {
            text.push_str(&format!("{:9}  {:9}  {:9.1}  {}\n", "", "", part.seconds, part.name));
        }
    }
    text.push_str(&format!("{:9}  {total:9.1}  in all\n", ""));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_the_stages_in_the_order_in_which_they_began() {
        let stages = Stages::new();
        let parts = vec![Part { name: "basics".into(), seconds: 3.25 }];
        let begin = stages.begin + Duration::from_secs(2);
        stages.add("boot 1".into(), begin, Duration::from_millis(12_345), parts);
        stages.add("lints".into(), stages.begin, Duration::from_secs(2), Vec::new());
        let text = table(&stages.list(), 14.5);
        let expected = "  started    seconds  stage\n      0.0        2.0  lints\n      2.0       12.3  boot 1\n\
                        \x20                           3.2  basics\n                14.5  in all\n";
        assert_eq!(text, expected);
        assert_eq!(stages.measure("x", || 5), 5);
        assert_eq!(stages.list().len(), 3);
    }
}
