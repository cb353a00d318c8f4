//! containerd ends and starts again while its pods go on.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Pods, try_call};
use crate::node;

/// How long containerd may take to end, and to answer again: an emulated node is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// The process of the node's containerd that is not a zombie.
pub fn containerd() -> Option<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut running = pids.filter(|pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(" (containerd) ") && !stat.contains(") Z ")
    });
    running.next()
}

/// Ends containerd by SIGTERM, as the node's service manager does.
#[track_caller]
fn end() {
    let pid = containerd().expect("containerd is running");
    // SAFETY: kill takes two integers.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let gone = node::eventually(PATIENCE, || containerd().is_none().then_some(()));
    assert!(gone.is_some(), "containerd does not end:\n{}", node::log_tail(20));
}

/// Starts it as the node's init does.
#[track_caller]
fn begin() {
    // Descriptor 9 is the node's own, to tell how the tests end.
    // By a shell that ends at once: the node's init inherits it, and not the test's process.
    let mut command = Command::new("sh");
    command.args(["-c", "setsid containerd >> /var/log/containerd.log 2>&1 9>&- &"]).stdin(Stdio::null());
    assert!(command.status().unwrap().success());
    let answers = node::eventually(PATIENCE, || {
        let status = try_call("Status", &json!({})).ok()?;
        let ready = |name: &str| {
            let conditions = status["status"]["conditions"].as_array().into_iter().flatten();
            conditions.filter(|condition| condition["type"] == name).any(|condition| condition["status"] == true)
        };
        (ready("RuntimeReady") && ready("NetworkReady")).then_some(())
    });
    assert!(answers.is_some(), "containerd does not answer:\n{}", node::log_tail(40));
}

/// Ends containerd and starts it again.
#[track_caller]
pub fn restart() {
    end();
    begin();
}

/// A container that writes a number every tenth of a second.
const COUNT: &str = "i=0; while :; do echo number $i; i=$((i+1)); sleep 0.1; done";

/// The numbers in its log.
fn counted(log: &str) -> Vec<u64> {
    let words = log.lines().filter_map(|line| line.rsplit_once("number ")?.1.parse().ok());
    words.collect()
}

/// The configuration of a container that ends with code 7 when it is told by a file, which it says by another.
fn ends(config: Value, dir: &Path) -> Value {
    let mut config = config;
    config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/told" }]);
    config
}

/// What runs goes on, and what ended meanwhile is known.
#[track_caller]
pub fn is_survived(pods: &Pods) {
    let told = pods.dir().join("told");
    fs::create_dir_all(&told).unwrap();
    let (pod, other) = (pods.pod(), pods.pod());
    let counting = pod.start(&pod.sh(COUNT));
    let sleeper = pod.sleeper();
    let until = "until [ -e /told/end ]; do sleep 0.1; done; touch /told/ended; exit 7";
    let ending = pod.start(&ends(pod.sh(until), &told));
    let created = pod.create(&pod.sh("echo begun; exit 5"));
    let alone = other.sleeper();
    counting.wait_for("number 3");
    let machine = pod.pid();

    end();
    let before = counted(&counting.log());
    fs::write(told.join("end"), "").unwrap();
    let ended = node::eventually(PATIENCE, || told.join("ended").exists().then_some(()));
    assert!(ended.is_some(), "a container does not go on without containerd");
    begin();

    assert!(pod.is_ready() && other.is_ready(), "a pod is not ready any more:\n{}", node::log_tail(60));
    assert_eq!(pod.pid(), machine);
    // runc's shim counts nothing of a container that has ended, which containerd then takes for a left-over.
    assert_eq!(ending.wait().0, if crate::runtime() == crate::RUNC { 255 } else { 7 });
    assert_eq!(sleeper.sh("echo still here"), "still here");
    let failed = alone.exec(&["sh", "-c", "echo bad >&2; exit 4"]);
    assert_eq!((failed.code, failed.err.as_str()), (4, "bad\n"));
    // Nothing of what was written is missing, that from the time without containerd included.
    let last = before.last().copied().unwrap();
    let goes_on = node::eventually(PATIENCE, || {
        let numbers = counted(&counting.log());
        numbers.last().is_some_and(|number| *number > last + 20).then_some(numbers)
    });
    let numbers = goes_on.unwrap_or_else(|| panic!("the log does not go on:\n{}", counting.log()));
    let expected: Vec<u64> = (0..u64::try_from(numbers.len()).unwrap()).collect();
    assert_eq!(numbers, expected, "lines are missing");
    // What was created before is started, what ends now is told, and more can be made.
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
    let third = pods.pod();
    assert_eq!(third.sleeper().sh("echo again"), "again");
    third.stop();
}
