//! Tests the statistics of a pod and its containers against cgroup files, interface counters and disk counters.

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
use crate::disk::Disk;

const MIB: u64 = 1 << 20;
/// Tolerance for memory that changes between two measurements, such as the memory of an exec.
const TOLERANCE: u64 = 6 * MIB;
/// Number of bytes sent in each direction.
const TRAFFIC: usize = 3_000_000;

/// Reads a number that the CRI wraps in a message.
#[track_caller]
fn value(wrapper: &Value) -> u64 {
    number(&wrapper["value"]).unsigned_abs()
}

/// Computes CPU time in nanoseconds and working set in bytes from the concatenated cgroup files `cpu.stat`,
/// `memory.current` and `memory.stat`.
#[track_caller]
fn usage(files: &str) -> (u64, u64) {
    let value = |key: &str| -> u64 {
        let found = files.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or_else(|| panic!("no {key} in {files}"))
    };
    let current: u64 = files.lines().find_map(|line| line.parse().ok()).unwrap();
    (value("usage_usec") * 1000, current - value("inactive_file"))
}

fn usage_in_container(container: &PodContainer) -> (u64, u64) {
    usage(&container.sh("cd /sys/fs/cgroup && cat cpu.stat memory.current memory.stat"))
}

fn usage_on_node(group: &Path) -> (u64, u64) {
    let files = ["cpu.stat", "memory.current", "memory.stat"];
    usage(&files.map(|file| fs::read_to_string(group.join(file)).unwrap()).concat())
}

/// Requires that the reported CPU time and working set lie between the values measured before and after the report.
/// The working set can grow or shrink between the two measurements. Therefore the measured values are accepted in
/// either order, and the range is extended by [`TOLERANCE`] at both ends.
#[track_caller]
fn assert_between(reported: &Value, before: (u64, u64), after: (u64, u64)) {
    let cpu = value(&reported["cpu"]["usage_core_nano_seconds"]);
    assert!((before.0..=after.0).contains(&cpu), "CPU time {cpu} ns is not between {} ns and {} ns", before.0, after.0);
    let memory = value(&reported["memory"]["working_set_bytes"]);
    let range = before.1.min(after.1).saturating_sub(TOLERANCE)..before.1.max(after.1) + TOLERANCE;
    assert!(range.contains(&memory), "the working set is {memory} bytes, expected a value in {range:?}");
}

/// Returns containerd's metrics of a container (`ctr tasks metrics`).
#[track_caller]
fn metrics(container: &PodContainer) -> Value {
    let mut command = Command::new("ctr");
    command.args(["-n", KUBERNETES, "tasks", "metrics", "--format", "json", &container.id]);
    let output = Running::start(command, Input::Null).wait().expect_code(0);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("failed to parse the metrics: {error}\n{}", output.describe()))
}

/// Returns the CRI statistics of the pod.
#[track_caller]
fn pod_stats(pod: &Pod) -> Value {
    call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }))["stats"]["linux"].clone()
}

/// Tests CPU time, working set and number of processes of a container and its pod, which has no other container.
#[track_caller]
pub fn check_cpu_memory_and_pids(pod: &Pod) {
    let script = "for i in 1 2 3; do sleep 100000 & done
        i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; wait";
    let mut config = pod.sh(script);
    config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 200 * MIB });
    let container = pod.start(&config);
    container.wait_for("up");
    // The memory of a tmpfs file counts as working set until the file is removed. The page cache of files that were
    // only read need not count, because the kernel can reclaim this page cache at any time.
    container.sh("dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2> /dev/null; cat /bin/busybox > /dev/null");
    let group = Path::new("/sys/fs/cgroup").join(text(&pod.config["linux"]["cgroup_parent"]).trim_start_matches('/'));
    let (before, host) = (usage_in_container(&container), usage_on_node(&group));
    let reported = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
    let pod_stats = pod_stats(pod);
    let (host_after, after) = (usage_on_node(&group), usage_in_container(&container));
    assert_between(&reported, before, after);
    assert!(
        before.0 > 10_000_000 && before.1 > 40 * MIB,
        "CPU time (ns) and working set (bytes) are {before:?}, expected more than 10000000 ns and 40 MiB"
    );
    assert_eq!(reported["attributes"]["metadata"]["name"], config["metadata"]["name"]);
    assert_between(&pod_stats, host, host_after);
    assert_eq!(pod_stats["containers"].as_array().unwrap().len(), 1, "{pod_stats}");
    assert_between(&pod_stats["containers"][0], before, after);
    // The processes are the shell and its three children.
    assert_eq!(value(&pod_stats["process"]["process_count"]), 4, "{pod_stats}");
    let pids = &metrics(&container)["pids"];
    assert_eq!(pids["current"], 4, "{pids}");
    // The reported working set shrinks when the file is removed.
    container.sh("rm /dev/shm/fill");
    let before = usage_in_container(&container);
    let reported = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
    assert_between(&reported, before, usage_in_container(&container));
    assert!(before.1 < 20 * MIB, "the working set without the file is {} bytes, expected less than 20 MiB", before.1);
    container.stop(0);
}

/// Tests the numbers of received and sent bytes in the pod's statistics and at the container's interface.
#[track_caller]
pub fn check_network(pod: &Pod) {
    let container = pod.sleeper();
    let reported = || {
        let interface = pod_stats(pod)["network"]["default_interface"].clone();
        assert_eq!(interface["name"], "eth0");
        [value(&interface["rx_bytes"]), value(&interface["tx_bytes"])]
    };
    let observed = || -> [u64; 2] {
        let bytes = container.sh("cd /sys/class/net/eth0/statistics && cat rx_bytes tx_bytes");
        let bytes: Vec<u64> = bytes.lines().map(|line| line.parse().unwrap()).collect();
        bytes.try_into().unwrap()
    };
    // In addition to the data, the counters include headers and a few acknowledgements, which add less than a tenth.
    let expected: Range<u64> = TRAFFIC as u64..TRAFFIC as u64 * 11 / 10;
    for way in [0, 1] {
        let listener = TcpListener::bind("10.88.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (reported_before, observed_before) = (reported(), observed());
        let peer = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            match way {
                0 => stream.write_all(&vec![0; TRAFFIC]).map(|()| TRAFFIC as u64),
                _ => io::copy(&mut stream, &mut io::sink()),
            }
        });
        match way {
            0 => {
                assert_eq!(
                    container.sh(&format!("nc -w 20 10.88.0.1 {port} < /dev/null | wc -c")),
                    TRAFFIC.to_string()
                );
            }
            _ => drop(container.sh(&format!("head -c {TRAFFIC} /dev/zero | nc -w 20 10.88.0.1 {port}"))),
        }
        assert_eq!(peer.join().unwrap().unwrap(), TRAFFIC as u64);
        let (reported_after, observed_after) = (reported(), observed());
        for (name, before, after) in
            [("reported", reported_before, reported_after), ("observed", observed_before, observed_after)]
        {
            let (this, other) = (after[way] - before[way], after[1 - way] - before[1 - way]);
            assert!(
                expected.contains(&this) && other < TRAFFIC as u64 / 10,
                "{name} bytes: {this} in the tested direction, expected {expected:?}; {other} in the other direction"
            );
        }
    }
}

/// Tests the numbers of bytes that the container reads from a block device and writes to the block device.
#[track_caller]
pub fn check_block_io(pods: &Pods) {
    let disk = Disk::new(&pods.dir().join("disk"), 32);
    let pod = pods.pod();
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "mrw" }]);
    let container = pod.start(&config);
    container.sh("dd if=/dev/zero of=/dev/xvda bs=1M count=8 conv=fsync 2> /dev/null");
    container.sh("dd if=/dev/xvda of=/dev/null bs=1M skip=16 count=4 2> /dev/null");
    let inside = container.sh("cat /sys/fs/cgroup/io.stat");
    let reported = metrics(&container)["io"]["usage"].clone();
    let disks = reported.as_array().unwrap_or_else(|| panic!("the metrics have no list of disks: {reported}"));
    let entry = disks.iter().find(|disk| disk["wbytes"].as_u64().unwrap_or(0) >= 8 * MIB);
    let entry =
        entry.unwrap_or_else(|| panic!("no disk with 8 MiB written: {reported}; the guest's io.stat:\n{inside}"));
    let number = |key: &str| entry[key].as_u64().unwrap_or(0);
    assert!((4 * MIB..6 * MIB).contains(&number("rbytes")) && number("wbytes") < 9 * MIB, "{entry}");
    let line =
        format!("{}:{} rbytes={} wbytes={} ", number("major"), number("minor"), number("rbytes"), number("wbytes"));
    assert!(inside.contains(&line), "{line:?} is not in the guest's io.stat:\n{inside}");
    container.stop(0);
}
