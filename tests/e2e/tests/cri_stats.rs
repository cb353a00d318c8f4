//! Statistics of pods and containers through containerd's CRI, as kubelet asks for them; limits changed while they run.
use std::io;
use std::net::TcpListener;
use std::thread;

use husk_e2e::cri::{call, number, pods};
use serde_json::{Value, json};

/// A number wrapped in a message, as the CRI has them.
#[track_caller]
fn value(of: &Value) -> i64 {
    number(&of["value"])
}

#[test]
fn statistics_tell_what_runs_inside() {
    pods("cri-stats", |pods| {
        let pod = pods.pod();
        // 40 MiB of the container's own, and some time.
        let script = "dd if=/dev/zero of=/tmp/fill bs=1M count=40 2>/dev/null
            i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; sleep 100000";
        let mut config = pod.sh(script);
        config["mounts"] = json!([]);
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 200 << 20 });
        let container = pod.start(&config);
        container.wait_for("up");
        container.sh("dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2>/dev/null");
        let stats = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
        assert!(value(&stats["cpu"]["usage_core_nano_seconds"]) > 10_000_000, "{stats}");
        let working_set = value(&stats["memory"]["working_set_bytes"]);
        assert!((40 << 20..200 << 20).contains(&working_set), "{working_set}: {stats}");
        assert_eq!(stats["attributes"]["metadata"]["name"], config["metadata"]["name"]);
        // The pod's are those of its cgroup on the node and of its network namespace.
        let before = call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }))["stats"]["linux"].clone();
        assert!(value(&before["memory"]["working_set_bytes"]) > 40 << 20, "{before}");
        assert!(value(&before["cpu"]["usage_core_nano_seconds"]) > 10_000_000, "{before}");
        assert_eq!(before["containers"].as_array().unwrap().len(), 1, "{before}");
        let listener = TcpListener::bind("10.88.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = thread::spawn(move || io::copy(&mut listener.accept().unwrap().0, &mut io::sink()).unwrap());
        container.sh(&format!("head -c 3000000 /dev/zero | nc -w 20 10.88.0.1 {port}"));
        assert_eq!(received.join().unwrap(), 3_000_000);
        let after = call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }))["stats"]["linux"].clone();
        let sent = |stats: &Value| value(&stats["network"]["default_interface"]["tx_bytes"]);
        assert_eq!(after["network"]["default_interface"]["name"], "eth0");
        assert!(sent(&after) > sent(&before) + 3_000_000, "{} and {}", sent(&before), sent(&after));
        // Limits that change are seen inside.
        let linux = json!({ "memory_limit_in_bytes": 300 << 20, "cpu_quota": 30000, "cpu_period": 100_000 });
        call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": linux }));
        assert_eq!(container.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "314572800\n30000 100000");
        container.stop(0);
    });
}
