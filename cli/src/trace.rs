//! `husk trace`: shows the timeline of a pod's start as a waterfall chart.

use std::{
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

use husk_config::{
    Config, ConfigError,
    sandbox::Sandbox,
    timeline::{Step, Timeline},
};

/// State directory of the shims. Each directory `<namespace>/<sandbox>` in the state directory contains the files
/// `sandbox.json` and `timeline.json`, which `husk trace` reads.
const STATE_DIR: &str = "/run/husk";
/// Width of the chart in columns.
const CHART_WIDTH: u128 = 40;

/// Reason why no timeline can be shown.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The timeline file is unreadable.
    #[error("failed to read timelines from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The OS error.
        #[source]
        source: io::Error,
    },
    /// The file is not a timeline file.
    #[error("failed to parse timelines in {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The position and the reason.
        #[source]
        source: serde_json::Error,
    },
    /// No sandbox has this id and no pod has this name.
    #[error("failed to find a running pod or sandbox {0:?} on this node: `husk ps` lists the running sandboxes")]
    NoSandbox(String),
    /// Several sandbox ids have this prefix, or several pods have this name.
    #[error("{0:?} matches several sandboxes: use a sandbox id from `husk ps`")]
    Ambiguous(String),
    /// Neither the command line nor the configuration names a timeline.
    #[error(
        "no timeline selected: pass a running pod or sandbox as an argument, or set timeline_log in the configuration"
    )]
    NoTimeline,
    /// The file is empty.
    #[error("no timeline in {}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Returns the text to print.
pub fn main(config: &Path, target: Option<&str>) -> Result<String, TraceError> {
    let path = match target {
        Some(target) if Path::new(target).is_file() => PathBuf::from(target),
        Some(target) => find(Path::new(STATE_DIR), target)?,
        None => Some(Config::load(config)?.timeline_log)
            .filter(|path| !path.as_os_str().is_empty())
            .ok_or(TraceError::NoTimeline)?,
    };
    let text = fs::read_to_string(&path).map_err(|source| TraceError::Read { path: path.clone(), source })?;
    let timelines = Timeline::from_lines(&text).map_err(|source| TraceError::Parse { path: path.clone(), source })?;
    Ok(waterfall(timelines.last().ok_or(TraceError::Empty { path })?))
}

/// Finds the timeline file of the only sandbox that matches `target`. Tries the sandbox id, then the pod name with or
/// without namespace, then a prefix of the sandbox id.
fn find(state: &Path, target: &str) -> Result<PathBuf, TraceError> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let sandboxes: Vec<PathBuf> = entries(state).flat_map(|namespace| entries(&namespace)).collect();
    let matching =
        |test: &dyn Fn(&Path) -> bool| -> Vec<&PathBuf> { sandboxes.iter().filter(|path| test(path)).collect() };
    let id = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let is_pod = |path: &Path| {
        let pod = pod(path);
        pod == target || pod.split_once('/').is_some_and(|(_, name)| name == target)
    };
    let found =
        [matching(&|path| id(path) == target), matching(&is_pod), matching(&|path| id(path).starts_with(target))];
    match found.into_iter().find(|found| !found.is_empty()).as_deref() {
        Some([sandbox]) => Ok(sandbox.join("timeline.json")),
        None => Err(TraceError::NoSandbox(target.into())),
        Some(_) => Err(TraceError::Ambiguous(target.into())),
    }
}

/// Returns the pod of a sandbox as `namespace/name`, or an empty string if the sandbox has no pod.
fn pod(sandbox: &Path) -> String {
    let json = fs::read(sandbox.join("sandbox.json")).ok();
    json.and_then(|text| serde_json::from_slice::<Sandbox>(&text).ok()).map(|sandbox| sandbox.pod).unwrap_or_default()
}

/// Formats a line for each step. The line has the time since the first step, the time since the previous step, and a
/// bar for the time since the previous step.
fn waterfall(timeline: &Timeline) -> String {
    let Timeline { sandbox, namespace, steps } = timeline;
    let at = |step: Option<&Step>| step.map_or(0, |step| step.at_ns);
    let (first, last) = (at(steps.first()), at(steps.last()));
    let total = u128::from(last.saturating_sub(first)).max(1);
    let column =
        |ns: u64| usize::try_from(u128::from(ns.saturating_sub(first)) * CHART_WIDTH / total).unwrap_or_default();
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
    fn bars_span_the_chart_width_without_gaps() {
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
    fn find_returns_sandboxes_by_id_and_by_pod_name() {
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
            let configured_seccomp = None;
            let sandbox =
                Sandbox { id, namespace, pod, vcpus, memory_mib, started, vmm_pid, shim_pid, configured_seccomp };
            fs::write(dir.join("sandbox.json"), serde_json::to_vec(&sandbox).unwrap()).unwrap();
        }
        let find = |target| find(state, target);
        assert_eq!(find("x").unwrap(), dir.path().join("k8s.io/xyz/timeline.json"));
        assert_eq!(find("ab").unwrap(), dir.path().join("default/ab/timeline.json"));
        assert_eq!(find("two/web").unwrap(), dir.path().join("k8s.io/uvw/timeline.json"));
        assert!(matches!(find("web"), Err(TraceError::Ambiguous(_))));
        assert!(matches!(find("a"), Err(TraceError::Ambiguous(_))));
        assert!(matches!(find("q"), Err(TraceError::NoSandbox(_))));
    }

    #[test]
    fn main_shows_the_newest_timeline_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let config = dir.path().join("config.toml");
        fs::write(&config, format!("timeline_log = {:?}\n", log.to_str().unwrap())).unwrap();
        assert!(matches!(main(&config, None), Err(TraceError::Read { .. })));
        let lines: String = [("old", 1), ("new", 2)].map(|step| timeline(&[step]).to_line().unwrap()).concat();
        fs::write(&log, lines).unwrap();
        assert!(main(&config, None).unwrap().contains("new"));
        assert!(main(&config, Some(log.to_str().unwrap())).unwrap().contains("new"));
        fs::write(&log, "").unwrap();
        assert!(matches!(main(&config, None), Err(TraceError::Empty { .. })));
        fs::write(&config, "").unwrap();
        assert!(matches!(main(&config, None), Err(TraceError::NoTimeline)));
    }
}
