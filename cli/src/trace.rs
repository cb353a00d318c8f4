//! `husk trace`: a pod's start as a waterfall.

use husk_config::{
    Config, ConfigError,
    timeline::{Step, Timeline},
};
use std::{
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

/// Where shims keep their sandboxes' state: `<namespace>/<sandbox>/timeline.json`.
const STATE: &str = "/run/husk";
/// Columns of the bars.
const WIDTH: u128 = 40;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no timelines", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// No sandbox has such an id.
    #[error("no sandbox {0:?} is running on this node")]
    NoSandbox(String),
    /// Several sandboxes' ids begin so.
    #[error("several sandboxes' ids begin with {0:?}")]
    Ambiguous(String),
    /// There is nothing to show.
    #[error("no timeline is kept: name a running sandbox, or set timeline_log in the configuration")]
    Nothing,
}

/// The text to print.
pub fn main(config: &Path, what: Option<&str>) -> Result<String, TraceError> {
    let path = match what {
        Some(what) if what.contains('/') => PathBuf::from(what),
        Some(id) => find(Path::new(STATE), id)?,
        None => Some(Config::load(config)?.timeline_log)
            .filter(|path| !path.as_os_str().is_empty())
            .ok_or(TraceError::Nothing)?,
    };
    let text = fs::read_to_string(&path).map_err(|source| TraceError::Read { path: path.clone(), source })?;
    let timelines = Timeline::from_lines(&text).map_err(|source| TraceError::Parse { path, source })?;
    Ok(waterfall(timelines.last().ok_or(TraceError::Nothing)?))
}

/// The timeline of the one sandbox whose id begins with `id`, or is it.
fn find(state: &Path, id: &str) -> Result<PathBuf, TraceError> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let sandboxes: Vec<PathBuf> = entries(state).flat_map(|namespace| entries(&namespace)).collect();
    let named = |test: &dyn Fn(&str) -> bool| -> Vec<&PathBuf> {
        let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(test);
        sandboxes.iter().filter(|path| name(path)).collect()
    };
    let mut found = named(&|name| name == id);
    if found.is_empty() {
        found = named(&|name| name.starts_with(id));
    }
    match found.as_slice() {
        [sandbox] => Ok(sandbox.join("timeline.json")),
        [] => Err(TraceError::NoSandbox(id.into())),
        _ => Err(TraceError::Ambiguous(id.into())),
    }
}

/// Each step with its time since the first, since the one before, and a bar for the latter.
fn waterfall(timeline: &Timeline) -> String {
    let Timeline { sandbox, namespace, steps } = timeline;
    let at = |step: Option<&Step>| step.map_or(0, |step| step.at_ns);
    let (first, last) = (at(steps.first()), at(steps.last()));
    let total = u128::from(last.saturating_sub(first)).max(1);
    let column = |ns: u64| usize::try_from(u128::from(ns.saturating_sub(first)) * WIDTH / total).unwrap_or_default();
    let longest = steps.iter().map(|step| step.name.chars().count()).max().unwrap_or_default();
    let mut text = format!("{namespace}/{sandbox}\n");
    let mut before = first;
    for step in steps {
        let name = &step.name;
        let (since_first, since_before) =
            (millis(step.at_ns.saturating_sub(first)), millis(step.at_ns.saturating_sub(before)));
        let (from, to) = (column(before), column(step.at_ns));
        let bar = format!("{}{}", " ".repeat(from), "█".repeat(to.saturating_sub(from).max(1)));
        let _ = writeln!(text, "{name:longest$}  {since_first:>9.1} ms  {since_before:>+9.1} ms  {bar}");
        before = step.at_ns;
    }
    text
}

fn millis(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(steps: &[(&str, u64)]) -> Timeline {
        let mut timeline = Timeline { sandbox: "abc".into(), namespace: "default".into(), steps: vec![] };
        steps.iter().for_each(|(name, at)| timeline.push(*name, *at));
        timeline
    }

    #[test]
    fn bars_follow_each_other_over_the_whole_width() {
        let text = waterfall(&timeline(&[("shim up", 5_000_000), ("agent ready", 10_000_000), ("exited", 15_000_000)]));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "default/abc");
        assert_eq!(lines[1], "shim up            0.0 ms       +0.0 ms  █");
        assert_eq!(lines[2], format!("agent ready        5.0 ms       +5.0 ms  {}", "█".repeat(20)));
        assert_eq!(lines[3], format!("exited            10.0 ms       +5.0 ms  {}{}", " ".repeat(20), "█".repeat(20)));
        assert_eq!(waterfall(&timeline(&[])), "default/abc\n");
        waterfall(&timeline(&[("a", 0), ("b", u64::MAX)]));
    }

    #[test]
    fn sandboxes_are_found_by_the_beginning_of_their_ids() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["default/ab", "default/abc", "k8s.io/xyz"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let find = |id| find(dir.path(), id);
        assert_eq!(find("x").unwrap(), dir.path().join("k8s.io/xyz/timeline.json"));
        assert_eq!(find("ab").unwrap(), dir.path().join("default/ab/timeline.json"));
        assert!(matches!(find("a"), Err(TraceError::Ambiguous(_))));
        assert!(matches!(find("q"), Err(TraceError::NoSandbox(_))));
    }

    #[test]
    fn the_newest_of_the_log_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let config = dir.path().join("config.toml");
        fs::write(&config, format!("timeline_log = {:?}\n", log.to_str().unwrap())).unwrap();
        assert!(matches!(main(&config, None), Err(TraceError::Read { .. })));
        let lines: String = [("old", 1), ("new", 2)].map(|step| timeline(&[step]).to_line().unwrap()).concat();
        fs::write(&log, lines).unwrap();
        assert!(main(&config, None).unwrap().contains("new"));
        assert!(main(&config, Some(log.to_str().unwrap())).unwrap().contains("new"));
        fs::write(&config, "").unwrap();
        assert!(matches!(main(&config, None), Err(TraceError::Nothing)));
    }
}
