//! `husk trace`: a pod's start as a waterfall.

use husk_config::{
    Config, ConfigError,
    sandbox::Sandbox,
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
    /// No sandbox has such an id, and no pod such a name.
    #[error("no pod or sandbox {0:?} is running on this node; `husk ps` lists them")]
    NoSandbox(String),
    /// Several sandboxes' ids begin so, or several pods are called so.
    #[error("{0:?} is several sandboxes; `husk ps` lists them")]
    Ambiguous(String),
    /// There is nothing to show.
    #[error("no timeline is kept: name a running sandbox, or set timeline_log in the configuration")]
    Nothing,
}

/// The text to print.
pub fn main(config: &Path, what: Option<&str>) -> Result<String, TraceError> {
    let path = match what {
        Some(what) if Path::new(what).is_file() => PathBuf::from(what),
        Some(what) => find(Path::new(STATE), what)?,
        None => Some(Config::load(config)?.timeline_log)
            .filter(|path| !path.as_os_str().is_empty())
            .ok_or(TraceError::Nothing)?,
    };
    let text = fs::read_to_string(&path).map_err(|source| TraceError::Read { path: path.clone(), source })?;
    let timelines = Timeline::from_lines(&text).map_err(|source| TraceError::Parse { path, source })?;
    Ok(waterfall(timelines.last().ok_or(TraceError::Nothing)?))
}

/// The timeline of the one sandbox that is meant: by its id, the beginning of it, or its pod's name with or without the
/// pod's namespace.
fn find(state: &Path, what: &str) -> Result<PathBuf, TraceError> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let sandboxes: Vec<PathBuf> = entries(state).flat_map(|namespace| entries(&namespace)).collect();
    let with = |test: &dyn Fn(&Path) -> bool| -> Vec<&PathBuf> { sandboxes.iter().filter(|path| test(path)).collect() };
    let id = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let is_pod = |path: &Path| {
        let pod = pod(path);
        pod == what || pod.split_once('/').is_some_and(|(_, name)| name == what)
    };
    let found = [with(&|path| id(path) == what), with(&is_pod), with(&|path| id(path).starts_with(what))];
    match found.into_iter().find(|found| !found.is_empty()).as_deref() {
        Some([sandbox]) => Ok(sandbox.join("timeline.json")),
        None => Err(TraceError::NoSandbox(what.into())),
        Some(_) => Err(TraceError::Ambiguous(what.into())),
    }
}

/// The pod of a sandbox, as `namespace/name`; empty where there is none.
fn pod(sandbox: &Path) -> String {
    let note = fs::read(sandbox.join("sandbox.json")).ok();
    note.and_then(|text| serde_json::from_slice::<Sandbox>(&text).ok()).map(|sandbox| sandbox.pod).unwrap_or_default()
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
    fn sandboxes_are_found_by_their_ids_and_their_pods_names() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        for (name, pod) in
            [("default/ab", ""), ("default/abc", ""), ("k8s.io/xyz", "one/web"), ("k8s.io/uvw", "two/web")]
        {
            let dir = state.join(name);
            fs::create_dir_all(&dir).unwrap();
            let (namespace, id) = name.split_once('/').unwrap();
            let (namespace, id, pod) = (namespace.into(), id.into(), pod.into());
            let (vcpus, memory_mib, started, vmm_pid, shim_pid) = (1, 128, 0, 1, 1);
            let note = Sandbox { id, namespace, pod, vcpus, memory_mib, started, vmm_pid, shim_pid };
            fs::write(dir.join("sandbox.json"), serde_json::to_vec(&note).unwrap()).unwrap();
        }
        let find = |what| find(state, what);
        assert_eq!(find("x").unwrap(), dir.path().join("k8s.io/xyz/timeline.json"));
        assert_eq!(find("ab").unwrap(), dir.path().join("default/ab/timeline.json"));
        assert_eq!(find("two/web").unwrap(), dir.path().join("k8s.io/uvw/timeline.json"));
        assert!(matches!(find("web"), Err(TraceError::Ambiguous(_))));
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
