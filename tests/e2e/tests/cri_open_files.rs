//! A pod uses more files than the VMM's fd limit allows. The shim then makes the guest forget files that are not in
//! use. If the guest keeps the files open, it gets an error.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use husk_base::sys::resource::{self, Limit};
use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{pods, restart};
use husk_e2e::{PYTHON, node, vm};
use nix::unistd::Pid;
use serde_json::json;

/// The VMM's fd limit. It covers the VMM's own fds and the guest's files.
const LIMIT: u64 = 2048;
const DIRECTORIES: usize = 3;
const FILES: usize = 700;
/// Timeout of one exec. An emulated node is slow.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The sysctl with the upper bound of every process's fd limit (Documentation/admin-guide/sysctl/fs.rst).
const NR_OPEN: &str = "/proc/sys/fs/nr_open";

/// Lowers containerd's fd limit, which containerd's children inherit. Also lowers `nr_open`, because the VMM raises its
/// own limit to `nr_open`. Dropping this struct restores both limits.
struct LowFdLimit {
    containerd: i32,
    limit: Limit,
    nr_open: String,
}

impl LowFdLimit {
    fn new() -> Self {
        let containerd = restart::containerd_pid().expect("containerd is not running");
        let nr_open = fs::read_to_string(NR_OPEN).unwrap();
        let limit = set_limit(containerd, Limit { soft: LIMIT, hard: LIMIT });
        fs::write(NR_OPEN, LIMIT.to_string()).unwrap();
        Self { containerd, limit, nr_open }
    }
}

impl Drop for LowFdLimit {
    fn drop(&mut self) {
        let _ = fs::write(NR_OPEN, &self.nr_open);
        set_limit(self.containerd, self.limit);
    }
}

/// Sets a process's fd limit. Returns the previous limit.
fn set_limit(pid: i32, limit: Limit) -> Limit {
    resource::limit(Pid::from_raw(pid), libc::RLIMIT_NOFILE, Some(limit)).expect("failed to set the fd limit")
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn pod_uses_more_files_than_the_fd_limit_of_the_vmm() {
    // The directory is on the node's disk, as volumes usually are.
    let dir = PathBuf::from("/var/lib/husk-many-files");
    for number in 0..DIRECTORIES {
        let directory = dir.join(number.to_string());
        fs::create_dir_all(&directory).unwrap();
        for number in 0..FILES {
            fs::write(directory.join(format!("file-{number}")), "1\n").unwrap();
        }
    }
    pods("cri-open-files", |pods| {
        let pod = {
            let _low = LowFdLimit::new();
            pods.pod()
        };
        let limits = fs::read_to_string(format!("/proc/{}/limits", pod.pid())).unwrap();
        let open = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert!(open.contains(&format!(" {LIMIT} ")), "the fd limit of the VMM is not {LIMIT}: {open}");
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/data" }]);
        let container = pod.start(&config);
        let total = (DIRECTORIES * FILES).to_string();
        // The container looks up all files. When few fds are free, the guest forgets files that it has not read.
        assert_eq!(container.sh("ls -lR /data | grep -c ^-"), total);
        // Data that the guest has read stays in the guest's page cache. While a file's data is in this cache, the VMM
        // keeps the file open.
        let read = container.exec_within(TIMEOUT, &["sh", "-c", "find /data -type f -exec cat {} + | grep -c 1"]);
        assert_eq!((read.out.trim(), read.err.as_str()), (total.as_str(), ""), "{}", node::log_tail(20));
        // The VMM keeps new files open as well.
        let script = "mkdir /data/new && cd /data/new && seq 1 2000 | xargs touch && ls | wc -l";
        let made = container.exec_within(TIMEOUT, &["sh", "-c", script]);
        assert_eq!((made.out.trim(), made.err.as_str()), ("2000", ""), "{}", node::log_tail(20));
        container.stop(0);
    });
    fs::remove_dir_all(dir).unwrap();
}

/// Processes that together keep more files open than the VMM's fd limit allows. Each process prints the error with
/// which it stopped.
const HOLDERS: &str = r#"
import os, time
for process in range(8):
    if os.fork() == 0:
        files = []
        try:
            for n in range(900):
                files.append(os.open("/data/held-%d-%d" % (process, n), os.O_CREAT | os.O_RDWR))
            error = 0
        except OSError as e:
            error = e.errno
        print("stopped", error, len(files), flush=True)
        time.sleep(100000)
time.sleep(100000)
"#;

#[test]
#[ignore = "long: thousands of files are opened one after another"]
fn guest_that_keeps_more_files_open_than_the_fd_limit_allows_gets_an_error() {
    let dir = PathBuf::from("/var/lib/husk-held-files");
    fs::create_dir_all(&dir).unwrap();
    need_image(PYTHON);
    pods("cri-held-files", |pods| {
        let neighbour = pods.pod();
        let beside = neighbour.sleeper();
        let pod = {
            let _low = LowFdLimit::new();
            pods.pod()
        };
        let vmm = vm::vmm_pids_of(&pod.id)[0];
        let other = pod.sleeper();
        let mut config = pod.python(HOLDERS);
        config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/data" }]);
        let holder = pod.start(&config);
        let stopped = || Some(holder.log()).filter(|log| log.matches("stopped").count() == 8);
        let log = node::eventually(Duration::from_secs(240), stopped);
        let log = log.unwrap_or_else(|| panic!("not all processes stopped: {}\n{}", holder.log(), node::log_tail(20)));
        let numbers = |line: &str| -> Vec<usize> { line.split_whitespace().filter_map(|w| w.parse().ok()).collect() };
        let stops: Vec<_> =
            log.lines().filter_map(|line| line.split_once("stopped")).map(|(_, n)| numbers(n)).collect();
        let held: usize = stops.iter().map(|stop| stop[1]).sum();
        let refused = stops.iter().filter(|stop| [libc::EMFILE, libc::ENFILE].contains(&(stop[0] as i32))).count();
        let fds = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().count();
        println!("{refused} of 8 processes were refused; together they hold {held} files; the VMM has {fds} fds");
        assert!(refused > 0, "no process got EMFILE or ENFILE:\n{log}");
        assert!(
            held <= LIMIT as usize && fds <= LIMIT as usize,
            "the pod holds {held} files and the VMM {fds} fds, more than {LIMIT}"
        );
        assert!(pod.is_ready() && beside.sh("echo new > /file; cat /file") == "new");
        // When the files are closed, the pod can open files again.
        holder.stop(0);
        assert_eq!(other.sh("echo new > /file; cat /file"), "new");
    });
    fs::remove_dir_all(dir).unwrap();
}
