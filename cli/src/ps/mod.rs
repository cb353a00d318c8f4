//! `husk ps`: lists the sandboxes of this node and their VMs.

mod jail;

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use husk_config::sandbox::Sandbox;
use serde::Serialize;

use self::jail::Jail;
use crate::output::{age, columns};

/// State directory of the shims. `husk ps` reads the files `<namespace>/<sandbox>/sandbox.json` in this directory.
const STATE_DIR: &str = "/run/husk";

/// Output format of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// A table.
    Text,
    /// A JSON array.
    Json,
}

/// One row of the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    #[serde(flatten)]
    sandbox: Sandbox,
    /// Proportional set size (PSS) of the VMM, the shim and its launcher, in KiB. Includes guest memory.
    used_kib: u64,
    /// Whether the VMM process exists.
    running: bool,
    /// What confines the VMM process. `None` if the process does not exist.
    jail: Option<Jail>,
    /// What confines the shim process. `None` if the process does not exist.
    shim_jail: Option<Jail>,
}

/// Returns the text to print.
pub fn main(output: Output) -> String {
    let mut rows = rows(Path::new(STATE_DIR), Path::new("/proc"));
    rows.sort_by_key(|row| (row.sandbox.started, row.sandbox.id.clone()));
    match output {
        Output::Text => table(&rows, SystemTime::now()),
        Output::Json => format!("{:#}\n", serde_json::json!(rows)),
    }
}

fn rows(state: &Path, proc: &Path) -> Vec<Row> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let sandboxes = entries(state).flat_map(|namespace| entries(&namespace));
    // If a sandbox is being removed, its file may already be missing.
    let files = sandboxes.filter_map(|dir| fs::read(dir.join("sandbox.json")).ok());
    files
        .filter_map(|text| serde_json::from_slice::<Sandbox>(&text).ok())
        .map(|sandbox| {
            let launcher = launcher(proc, sandbox.shim_pid);
            let used_kib =
                [sandbox.vmm_pid, sandbox.shim_pid].into_iter().chain(launcher).map(|pid| pss(proc, pid)).sum();
            let running = proc.join(sandbox.vmm_pid.to_string()).exists();
            let jail = jail::of(proc, sandbox.vmm_pid);
            let shim_jail = jail::of(proc, sandbox.shim_pid);
            Row { sandbox, used_kib, running, jail, shim_jail }
        })
        .collect()
}

/// Returns the pid of a shim's launcher, which is a child of the shim's main thread.
fn launcher(proc: &Path, shim: u32) -> Option<u32> {
    let read = |path: String| fs::read_to_string(proc.join(path)).unwrap_or_default();
    let children = read(format!("{shim}/task/{shim}/children"));
    let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.find(|pid: &u32| read(format!("{pid}/comm")).trim() == "husk-launcher")
}

/// Returns the proportional set size of a process in KiB. Returns 0 if the size is unknown.
fn pss(proc: &Path, pid: u32) -> u64 {
    let rollup = fs::read_to_string(proc.join(pid.to_string()).join("smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
}

fn table(rows: &[Row], now: SystemTime) -> String {
    let head = ["NAMESPACE", "SANDBOX", "POD", "STATE", "VCPUS", "MEMORY", "USED", "AGE", "VMM", "SHIM"];
    let mut lines = vec![head.map(str::to_owned)];
    for Row { sandbox, used_kib, running, .. } in rows {
        let started = SystemTime::UNIX_EPOCH + Duration::from_secs(sandbox.started);
        let since = now.duration_since(started).unwrap_or_default();
        lines.push([
            sandbox.namespace.clone(),
            sandbox.id.chars().take(13).collect(),
            if sandbox.pod.is_empty() { "-".into() } else { sandbox.pod.clone() },
            if *running { "running".into() } else { "dead".into() },
            sandbox.vcpus.to_string(),
            format!("{} MiB", sandbox.memory_mib),
            format!("{} MiB", used_kib / 1024),
            age(since),
            sandbox.vmm_pid.to_string(),
            sandbox.shim_pid.to_string(),
        ]);
    }
    columns(&lines)
}

#[cfg(test)]
mod tests {
    use husk_config::Seccomp;

    use super::*;

    #[test]
    fn rows_and_table_show_sandboxes_with_memory_use() {
        let dir = tempfile::tempdir().unwrap();
        let (state, proc) = (dir.path().join("husk"), dir.path().join("proc"));
        let sandbox = Sandbox {
            id: "0123456789abcdef".into(),
            namespace: "k8s.io".into(),
            pod: "shop/cart".into(),
            vcpus: 2,
            memory_mib: 320,
            started: 1000,
            vmm_pid: 12,
            shim_pid: 11,
            configured_seccomp: Some(Seccomp::Log),
        };
        fs::create_dir_all(state.join("k8s.io/0123456789abcdef")).unwrap();
        fs::create_dir_all(state.join("k8s.io/ending")).unwrap();
        let json = serde_json::to_vec(&sandbox).unwrap();
        fs::write(state.join("k8s.io/0123456789abcdef/sandbox.json"), json).unwrap();
        fs::create_dir_all(proc.join("12")).unwrap();
        fs::write(proc.join("12/smaps_rollup"), "Rss: 9 kB\nPss:   40960 kB\nPss_Dirty: 1 kB\n").unwrap();
        fs::create_dir_all(proc.join("11/task/11")).unwrap();
        fs::write(proc.join("11/task/11/children"), "12 13 ").unwrap();
        fs::create_dir_all(proc.join("13")).unwrap();
        fs::write(proc.join("13/comm"), "husk-launcher\n").unwrap();
        fs::write(proc.join("13/smaps_rollup"), "Pss:   1024 kB\n").unwrap();
        let rows = rows(&state, &proc);
        assert_eq!(rows, [Row { sandbox, used_kib: 41_984, running: true, jail: None, shim_jail: None }]);
        let text = table(&rows, SystemTime::UNIX_EPOCH + Duration::from_secs(1090));
        let expected = "\
NAMESPACE  SANDBOX        POD        STATE    VCPUS  MEMORY   USED    AGE  VMM  SHIM
k8s.io     0123456789abc  shop/cart  running  2      320 MiB  41 MiB  90s  12   11
";
        assert_eq!(text, expected);
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!((&json[0]["pod"], &json[0]["used_kib"]), (&"shop/cart".into(), &41_984.into()));
        assert_eq!(json[0]["configured_seccomp"], "log");
        // An older shim writes a file without `configured_seccomp`. `husk ps` must still read this file.
        let old = state.join("k8s.io/0123456789abcdef/sandbox.json");
        let text = fs::read_to_string(&old).unwrap().replace(",\"configured_seccomp\":\"log\"", "");
        fs::write(&old, text).unwrap();
        assert_eq!(self::rows(&state, &proc)[0].sandbox.configured_seccomp, None);
    }
}
