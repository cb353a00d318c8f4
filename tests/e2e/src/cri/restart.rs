//! Restarts containerd while pods keep running.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Pod, PodContainer, Pods, try_call};
use crate::{grpc, node};

/// Timeout for containerd to exit, and to respond after its start. The timeout is long for slow emulated nodes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the pid of the node's containerd. Zombies are ignored.
pub fn containerd_pid() -> Option<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut running = pids.filter(|pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(" (containerd) ") && !stat.contains(") Z ")
    });
    running.next()
}

/// Stops containerd with SIGTERM, like a service manager.
#[track_caller]
pub fn stop_containerd() {
    let pid = containerd_pid().expect("containerd is not running");
    grpc::disconnect();
    node::send_signal(pid, Signal::SIGTERM);
    let gone = node::eventually(TIMEOUT, || containerd_pid().is_none().then_some(()));
    assert!(gone.is_some(), "containerd does not exit:\n{}", node::log_tail(20));
}

/// Kills containerd with SIGKILL, and waits for its end.
#[track_caller]
pub fn kill_containerd() {
    let pid = containerd_pid().expect("containerd is not running");
    grpc::disconnect();
    node::send_signal(pid, Signal::SIGKILL);
    let gone = node::eventually(TIMEOUT, || containerd_pid().is_none().then_some(()));
    assert!(gone.is_some(), "containerd does not exit after SIGKILL");
}

/// Starts containerd as the node's init does, and waits until it answers.
#[track_caller]
pub fn start_containerd() {
    // fd 9 is the node's status port, which containerd must not keep open. The shell exits at once, so that containerd
    // becomes a child of the node's init and not of the test process.
    let mut command = Command::new("sh");
    command.args(["-c", "setsid containerd >> /var/log/containerd.log 2>&1 9>&- &"]).stdin(Stdio::null());
    assert!(command.status().unwrap().success());
    let answers = node::eventually(TIMEOUT, || {
        let status = try_call("Status", &json!({})).ok()?;
        let ready = |name: &str| {
            let conditions = status["status"]["conditions"].as_array().into_iter().flatten();
            conditions.filter(|condition| condition["type"] == name).any(|condition| condition["status"] == true)
        };
        (ready("RuntimeReady") && ready("NetworkReady")).then_some(())
    });
    assert!(answers.is_some(), "containerd does not respond:\n{}", node::log_tail(40));
}

/// Restarts containerd.
#[track_caller]
pub fn restart_containerd() {
    stop_containerd();
    start_containerd();
}

/// Shell script that prints the next number every tenth of a second.
const COUNT: &str = "i=0; while :; do echo number $i; i=$((i+1)); sleep 0.1; done";

/// Returns the numbers in the log of a container that runs [`COUNT`].
fn numbers(log: &str) -> Vec<u64> {
    let words = log.lines().filter_map(|line| line.rsplit_once("number ")?.1.parse().ok());
    words.collect()
}

/// Adds a mount of `dir` to a container's configuration. The container's script waits for the file `exit` in `dir`,
/// creates the file `exited`, and exits.
fn with_signal_dir(config: Value, dir: &Path) -> Value {
    let mut config = config;
    config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/signals" }]);
    config
}

/// Two pods with the same handler, which run while containerd restarts.
struct Survivors<'a> {
    pods: &'a Pods,
    handler: &'a str,
    signals: PathBuf,
    pod: Pod,
    other: Pod,
    sandbox_pid: i32,
    /// A container that runs [`COUNT`].
    counting: PodContainer,
    sleeper: PodContainer,
    /// A container that exits while containerd does not run.
    ending: PodContainer,
    /// A container that is created before the restart and started afterwards.
    created: PodContainer,
    /// The only container of the pod `other`.
    alone: PodContainer,
}

impl<'a> Survivors<'a> {
    #[track_caller]
    fn start(pods: &'a Pods, handler: &'a str) -> Self {
        let signals = pods.dir().join(handler);
        fs::create_dir_all(&signals).unwrap();
        let run_pod = || pods.run_with_handler(handler, pods.config());
        let (pod, other) = (run_pod(), run_pod());
        let counting = pod.start(&pod.sh(COUNT));
        let sleeper = pod.sleeper();
        let until = "until [ -e /signals/exit ]; do sleep 0.1; done; touch /signals/exited; exit 7";
        let ending = pod.start(&with_signal_dir(pod.sh(until), &signals));
        let created = pod.create(&pod.sh("echo begun; exit 5"));
        let alone = other.sleeper();
        counting.wait_for("number 3");
        let sandbox_pid = pod.pid();
        Self { pods, handler, signals, pod, other, sandbox_pid, counting, sleeper, ending, created, alone }
    }

    /// Makes the container `ending` exit while containerd does not run. Returns the last number that the log of
    /// `counting` has before this exit.
    #[track_caller]
    fn end_one(&self) -> u64 {
        let before = numbers(&self.counting.log());
        fs::write(self.signals.join("exit"), "").unwrap();
        let ended = node::eventually(TIMEOUT, || self.signals.join("exited").exists().then_some(()));
        assert!(ended.is_some(), "{}: without containerd, the container has not exited on request", self.handler);
        before.last().copied().unwrap()
    }

    /// Tests that the restart has not changed the pods and that they continue to work. `last` is the result of
    /// [`Survivors::end_one`].
    #[track_caller]
    fn check(self, last: u64) {
        let Self { pods, handler, pod, other, sandbox_pid, counting, sleeper, ending, created, alone, .. } = self;
        assert!(pod.is_ready() && other.is_ready(), "{handler}: a pod is no longer ready:\n{}", node::log_tail(60));
        assert_eq!(pod.pid(), sandbox_pid);
        // The restarted containerd asks the shim for the pids of each container. runc's shim reports no pids for the
        // exited container. containerd therefore deletes this container's task as leaked (`loadShim` in containerd).
        // The CRI then reports exit code 255.
        assert_eq!(ending.wait().0, if crate::runtime() == crate::RUNC { 255 } else { 7 });
        assert_eq!(sleeper.sh("echo still here"), "still here");
        let failed = alone.exec(&["sh", "-c", "echo bad >&2; exit 4"]);
        assert_eq!((failed.code, failed.err.as_str()), (4, "bad\n"));
        // The log is complete: it includes the output from the time without containerd.
        let continued = node::eventually(TIMEOUT, || {
            let numbers = numbers(&counting.log());
            numbers.last().is_some_and(|number| *number > last + 20).then_some(numbers)
        });
        let numbers = continued.unwrap_or_else(|| panic!("the log does not continue:\n{}", counting.log()));
        let expected: Vec<u64> = (0..u64::try_from(numbers.len()).unwrap()).collect();
        assert_eq!(numbers, expected, "the log lacks a number, or has a number twice");
        // The container that was created before the restart can be started. New containers can be created. containerd
        // reports the exits of both containers.
        created.start();
        assert_eq!(created.wait(), (5, "Error".into()));
        let new = pod.start(&pod.sh("echo new; exit 6"));
        assert_eq!(new.wait().0, 6);
        assert!(new.log().contains("stdout F new"), "{}", new.log());
        sleeper.stop(10);
        assert_eq!(sleeper.wait().0, 0);
        for container in [&ending, &created, &new, &sleeper] {
            container.remove();
        }
        for pod in [&pod, &other] {
            pod.stop();
            assert!(!pod.is_ready());
        }
        assert_eq!(counting.wait().0, 137);
        pod.remove();
        other.remove();
        let third = pods.run_with_handler(handler, pods.config());
        assert_eq!(third.sleeper().sh("echo again"), "again");
        third.stop();
    }
}

/// Tests that containers keep running without containerd, and that containerd reports their exits after its start.
/// The pods of all `handlers` share a single restart.
#[track_caller]
pub fn check_pods_survive(pods: &Pods, handlers: &[&str]) {
    let survivors: Vec<Survivors> = handlers.iter().map(|handler| Survivors::start(pods, handler)).collect();
    stop_containerd();
    let last: Vec<u64> = survivors.iter().map(Survivors::end_one).collect();
    start_containerd();
    for (survivors, last) in survivors.into_iter().zip(last) {
        survivors.check(last);
    }
}
