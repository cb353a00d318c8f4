//! More files than the VMM may have open: the guest knows of each, and forgets those that it does not use.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use husk_e2e::cri::{pods, restart};
use husk_e2e::node;
use serde_json::json;

/// What the VMM may have open: its own descriptors, and the guest's files.
const LIMIT: u64 = 2048;
const DIRECTORIES: usize = 3;
const FILES: usize = 700;
/// An emulated node is slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// Most that a process may have open, whatever it may do (Documentation/admin-guide/sysctl/fs.rst).
const NR_OPEN: &str = "/proc/sys/fs/nr_open";

/// A low limit for what containerd starts, for as long as this lives: the VMM raises its own as far as the node lets it.
struct Low {
    containerd: i32,
    open: libc::rlimit,
    nr_open: String,
}

impl Low {
    fn new() -> Self {
        let containerd = restart::containerd().expect("containerd runs");
        let nr_open = fs::read_to_string(NR_OPEN).unwrap();
        let low = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
        let open = prlimit(containerd, &low);
        fs::write(NR_OPEN, LIMIT.to_string()).unwrap();
        Self { containerd, open, nr_open }
    }
}

impl Drop for Low {
    fn drop(&mut self) {
        let _ = fs::write(NR_OPEN, &self.nr_open);
        prlimit(self.containerd, &self.open);
    }
}

/// Sets a process' limit of open files; gives what it was.
fn prlimit(pid: i32, limit: &libc::rlimit) -> libc::rlimit {
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both point to limits that live through the call.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, limit, &raw mut old) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    old
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn a_pod_can_walk_through_more_files_than_can_be_open() {
    // On the node's disk, as volumes are.
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
            let _low = Low::new();
            pods.pod()
        };
        let limits = fs::read_to_string(format!("/proc/{}/limits", pod.pid())).unwrap();
        let open = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert!(open.contains(&format!(" {LIMIT} ")), "the VMM's limit is another: {open}");
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/data" }]);
        let container = pod.start(&config);
        let all = (DIRECTORIES * FILES).to_string();
        // Attributes of all; what was never read of goes first.
        assert_eq!(container.sh("ls -lR /data | grep -c ^-"), all);
        // What is read stays in the guest's memory, and the file is open as long.
        let read = container.exec_within(PATIENCE, &["sh", "-c", "find /data -type f -exec cat {} + | grep -c 1"]);
        assert_eq!((read.out.trim(), read.err.as_str()), (all.as_str(), ""), "{}", node::log_tail(20));
        // Files that are new are as well.
        let script = "mkdir /data/new && cd /data/new && seq 1 2000 | xargs touch && ls | wc -l";
        let made = container.exec_within(PATIENCE, &["sh", "-c", script]);
        assert_eq!((made.out.trim(), made.err.as_str()), ("2000", ""), "{}", node::log_tail(20));
        container.stop(0);
    });
    fs::remove_dir_all(dir).unwrap();
}
