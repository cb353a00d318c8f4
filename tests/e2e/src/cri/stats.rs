//! Statistics of a pod and its containers against what the control groups, the interfaces and the disk say themselves.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::thread;

use serde_json::{Value, json};

use super::pod::{Pods, text};
use super::{Pod, PodContainer, call, number};
use crate::KUBERNETES;
use crate::command::{Input, Running};

const MIB: u64 = 1 << 20;
/// What may come and go between two looks: an exec's own memory among it.
const NEAR: u64 = 6 * MIB;
/// Bytes sent each way.
const TRAFFIC: usize = 3_000_000;

/// A number wrapped in a message, as the CRI has them.
#[track_caller]
fn value(of: &Value) -> u64 {
    number(&of["value"]).unsigned_abs()
}

/// CPU time in nanoseconds and working set in bytes by the files of a control group: `cpu.stat`, `memory.current` and
/// `memory.stat`, one after the other.
#[track_caller]
fn used(files: &str) -> (u64, u64) {
    let value = |key: &str| -> u64 {
        let found = files.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or_else(|| panic!("no {key} in {files}"))
    };
    let current: u64 = files.lines().find_map(|line| line.parse().ok()).unwrap();
    (value("usage_usec") * 1000, current - value("inactive_file"))
}

fn inside(container: &PodContainer) -> (u64, u64) {
    used(&container.sh("cd /sys/fs/cgroup && cat cpu.stat memory.current memory.stat"))
}

fn outside(group: &Path) -> (u64, u64) {
    let files = ["cpu.stat", "memory.current", "memory.stat"];
    used(&files.map(|file| fs::read_to_string(group.join(file)).unwrap()).concat())
}

/// What is told lies between what was seen before and after; memory may have gone either way in between.
#[track_caller]
fn agree(told: &Value, before: (u64, u64), after: (u64, u64)) {
    let cpu = value(&told["cpu"]["usage_core_nano_seconds"]);
    assert!((before.0..=after.0).contains(&cpu), "CPU {cpu} not within {before:?} and {after:?}");
    let memory = value(&told["memory"]["working_set_bytes"]);
    let range = before.1.min(after.1).saturating_sub(NEAR)..before.1.max(after.1) + NEAR;
    assert!(range.contains(&memory), "working set {memory} not within {before:?} and {after:?}");
}

/// containerd's own metrics of a container.
#[track_caller]
fn metrics(container: &PodContainer) -> Value {
    let mut command = Command::new("ctr");
    command.args(["-n", KUBERNETES, "tasks", "metrics", "--format", "json", &container.id]);
    let output = Running::start(command, Input::Null).wait().expect_code(0);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.describe()))
}

/// Statistics of the pod.
#[track_caller]
fn of_pod(pod: &Pod) -> Value {
    call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }))["stats"]["linux"].clone()
}

/// CPU time, working set and number of processes, of a container and its pod.
#[track_caller]
pub fn processor_memory_and_processes(pods: &Pods) {
    let pod = pods.pod();
    let script = "for i in 1 2 3; do sleep 100000 & done
        i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; wait";
    let mut config = pod.sh(script);
    config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 200 * MIB });
    let container = pod.start(&config);
    container.wait_for("up");
    // Memory of a file system counts until it is gone; what was only read could go at any time.
    container.sh("dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2> /dev/null; cat /bin/busybox > /dev/null");
    let group = Path::new("/sys/fs/cgroup").join(text(&pod.config["linux"]["cgroup_parent"]).trim_start_matches('/'));
    let (before, host) = (inside(&container), outside(&group));
    let told = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
    let of_pod = of_pod(&pod);
    let (host_after, after) = (outside(&group), inside(&container));
    agree(&told, before, after);
    assert!(before.0 > 10_000_000 && before.1 > 40 * MIB, "{before:?}");
    assert_eq!(told["attributes"]["metadata"]["name"], config["metadata"]["name"]);
    agree(&of_pod, host, host_after);
    assert_eq!(of_pod["containers"].as_array().unwrap().len(), 1, "{of_pod}");
    agree(&of_pod["containers"][0], before, after);
    // The shell and what it has started.
    assert_eq!(value(&of_pod["process"]["process_count"]), 4, "{of_pod}");
    let pids = &metrics(&container)["pids"];
    assert_eq!(pids["current"], 4, "{pids}");
    // Less memory is told of as well.
    container.sh("rm /dev/shm/fill");
    let before = inside(&container);
    let told = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
    agree(&told, before, inside(&container));
    assert!(before.1 < 20 * MIB, "{before:?}");
    container.stop(0);
}

/// Bytes that came and went, by the pod's statistics and by the container's own interface.
#[track_caller]
pub fn network(pods: &Pods) {
    let pod = pods.pod();
    let container = pod.sleeper();
    let told = || {
        let interface = of_pod(&pod)["network"]["default_interface"].clone();
        assert_eq!(interface["name"], "eth0");
        [value(&interface["rx_bytes"]), value(&interface["tx_bytes"])]
    };
    let seen = || -> [u64; 2] {
        let bytes = container.sh("cd /sys/class/net/eth0/statistics && cat rx_bytes tx_bytes");
        let bytes: Vec<u64> = bytes.lines().map(|line| line.parse().unwrap()).collect();
        bytes.try_into().unwrap()
    };
    // With their headers, and a few acknowledgements of the other way.
    let near: Range<u64> = TRAFFIC as u64..TRAFFIC as u64 * 11 / 10;
    for way in [0, 1] {
        let listener = TcpListener::bind("10.88.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (told_before, seen_before) = (told(), seen());
        let peer = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            match way {
                0 => stream.write_all(&vec![0; TRAFFIC]).map(|()| TRAFFIC as u64),
                _ => io::copy(&mut stream, &mut io::sink()),
            }
        });
        match way {
            0 => {
                assert_eq!(container.sh(&format!("nc -w 20 10.88.0.1 {port} < /dev/null | wc -c")), TRAFFIC.to_string())
            }
            _ => drop(container.sh(&format!("head -c {TRAFFIC} /dev/zero | nc -w 20 10.88.0.1 {port}"))),
        }
        assert_eq!(peer.join().unwrap().unwrap(), TRAFFIC as u64);
        let (told_after, seen_after) = (told(), seen());
        for (name, before, after) in [("told", told_before, told_after), ("seen", seen_before, seen_after)] {
            let (this, other) = (after[way] - before[way], after[1 - way] - before[1 - way]);
            assert!(near.contains(&this) && other < TRAFFIC as u64 / 10, "{name}: {this} and {other} bytes, way {way}");
        }
    }
}

/// Bytes read from and written to a block device that the container was given.
#[track_caller]
pub fn block(pods: &Pods) {
    let image = pods.dir().join("disk");
    fs::File::create(&image).unwrap().set_len(32 * MIB).unwrap();
    let made = Command::new("losetup").args(["-f", "--show"]).arg(&image).output().unwrap();
    let device = Loop(String::from_utf8_lossy(&made.stdout).trim().to_owned());
    let pod = pods.pod();
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": device.0, "permissions": "mrw" }]);
    let container = pod.start(&config);
    container.sh("dd if=/dev/zero of=/dev/xvda bs=1M count=8 conv=fsync 2> /dev/null");
    container.sh("dd if=/dev/xvda of=/dev/null bs=1M skip=16 count=4 2> /dev/null");
    let inside = container.sh("cat /sys/fs/cgroup/io.stat");
    let told = metrics(&container)["io"]["usage"].clone();
    let disks = told.as_array().unwrap_or_else(|| panic!("{told}"));
    let entry = disks.iter().find(|disk| disk["wbytes"].as_u64().unwrap_or(0) >= 8 * MIB);
    let entry = entry.unwrap_or_else(|| panic!("{told}, and inside\n{inside}"));
    let number = |key: &str| entry[key].as_u64().unwrap_or(0);
    assert!((4 * MIB..6 * MIB).contains(&number("rbytes")) && number("wbytes") < 9 * MIB, "{entry}");
    let line =
        format!("{}:{} rbytes={} wbytes={} ", number("major"), number("minor"), number("rbytes"), number("wbytes"));
    assert!(inside.contains(&line), "{line:?} is not inside\n{inside}");
    container.stop(0);
}

/// A loop device, let go of at the end.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
