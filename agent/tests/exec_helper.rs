//! Tests of the helper that starts an exec: the real program, with a process of this test as the container's init, and
//! with a real cgroup. This process stands for the agent.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::fs::{self, File};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use husk_base::sys::process::{kill, wait};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

const HIERARCHY: &str = "/sys/fs/cgroup";

/// A cgroup with a process that stands for a container's init.
struct Container {
    cgroup: PathBuf,
    init: Child,
    dir: TempDir,
}

impl Container {
    /// Makes a container. The calling thread gets a mount namespace in which the cgroup v2 hierarchy is mounted.
    fn new(name: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("cgroup2"), HIERARCHY, Some("cgroup2"), MsFlags::empty(), none).unwrap();
        let cgroup = Path::new(HIERARCHY).join(format!("husk-agent-{name}-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let init = Command::new("sleep").arg("100000").spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), init.id().to_string()).unwrap();
        Self { cgroup, init, dir: tempfile::tempdir().unwrap() }
    }

    fn freeze(&self) {
        fs::write(self.cgroup.join("cgroup.freeze"), "1").unwrap();
        while !fs::read_to_string(self.cgroup.join("cgroup.events")).unwrap().contains("frozen 1") {
            thread::yield_now();
        }
    }

    /// Starts the helper of an exec. Returns the helper, the pipe for the PID, and the exec's output.
    fn start_exec(&self, script: &str) -> (Child, PipeReader, PipeReader) {
        let (pids, pid_writer) = io::pipe().unwrap();
        let (output, output_writer) = io::pipe().unwrap();
        fcntl(&pid_writer, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let process = json!({ "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/usr/bin:/bin"],
            "user": { "uid": 0, "gid": 0 } });
        let exec = json!({ "init_pid": self.init.id(), "process": process, "seccomp": null, "cgroup": self.cgroup,
            "console": null, "pid_pipe": pid_writer.as_raw_fd() });
        fs::write(self.dir.path().join("req"), json!({ "Exec": exec }).to_string()).unwrap();
        let helper = Command::new(env!("CARGO_BIN_EXE_husk-agent"))
            .arg0("husk-helper")
            .arg("exec")
            .args([self.dir.path().join("req"), self.dir.path().join("rsp")])
            .stdin(File::open("/dev/null").unwrap())
            .stdout(OwnedFd::from(output_writer))
            .spawn()
            .unwrap();
        (helper, pids, output)
    }

    /// Returns the response of a helper that has ended.
    fn response(&self) -> Value {
        serde_json::from_slice(&fs::read(self.dir.path().join("rsp")).unwrap()).unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.freeze"), "0");
        self.init.kill().unwrap();
        self.init.wait().unwrap();
        // The zombies of the cgroup have been reaped. Therefore the cgroup is empty.
        fs::remove_dir(&self.cgroup).unwrap();
    }
}

fn read_pid(mut pids: PipeReader) -> i32 {
    let mut pid = [0; 4];
    pids.read_exact(&mut pid).unwrap();
    i32::from_ne_bytes(pid)
}

#[test]
fn exec_in_a_frozen_cgroup_can_be_killed() {
    thread::spawn(|| {
        let container = Container::new("frozen");
        container.freeze();
        let (mut helper, pids, _output) = container.start_exec("exit 7");
        let pid = read_pid(pids);
        assert_eq!(helper.try_wait().unwrap(), None, "the helper does not wait for the process");
        kill(pid, libc::SIGKILL).unwrap();
        // The process is a child of the agent.
        let (_, status) = wait(pid, 0).unwrap().unwrap();
        assert_eq!(libc::WTERMSIG(status), libc::SIGKILL);
        assert!(helper.wait().unwrap().success());
        assert_eq!(container.response(), json!({ "pid": pid, "error": null }));
    })
    .join()
    .unwrap();
}

#[test]
fn program_of_an_exec_has_no_other_fds_than_its_streams() {
    thread::spawn(|| {
        let container = Container::new("fds");
        let (mut helper, pids, mut output) = container.start_exec("ls -1 /proc/$$/fd; exit 7");
        let pid = read_pid(pids);
        assert!(helper.wait().unwrap().success());
        let (_, status) = wait(pid, 0).unwrap().unwrap();
        assert_eq!(libc::WEXITSTATUS(status), 7);
        let mut list = String::new();
        output.read_to_string(&mut list).unwrap();
        let open: Vec<&str> = list.split_whitespace().collect();
        assert!(open.iter().all(|fd| ["0", "1", "2"].contains(fd)), "{open:?}");
    })
    .join()
    .unwrap();
}
