//! Pods on a host with cgroup v1.
//!
//! Requires: cgroup v1

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_e2e::cri::{Pod, call, number, pods};
use husk_e2e::node;
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Returns the directory of a process's cgroup in each controller's hierarchy.
fn cgroups(pid: i32) -> HashMap<String, PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let mut found = HashMap::new();
    for line in text.lines() {
        let (_, rest) = line.split_once(':').unwrap();
        let (controllers, path) = rest.split_once(':').unwrap();
        for name in controllers.split(',').filter(|name| !name.is_empty()) {
            let dir = Path::new("/sys/fs/cgroup").join(controllers).join(path.trim_start_matches('/'));
            found.insert(name.to_owned(), dir);
        }
    }
    found
}

fn limit(pod: &Pod, controller: &str, file: &str) -> i64 {
    let path = cgroups(pod.pid())[controller].join(file);
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("failed to read {}: {error}", path.display()))
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn vmm_is_in_the_cgroup_of_the_pod_for_every_controller() {
    assert!(
        !Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        "this host has cgroup v2, but the suite needs cgroup v1"
    );
    pods("cri-cgroup1", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 128 * MIB });
        let parent = config["linux"]["cgroup_parent"].as_str().unwrap().to_owned();
        let pod = pods.run(config);
        for (controller, path) in cgroups(pod.pid()) {
            assert!(
                path.to_string_lossy().contains(&parent),
                "the VMM's {controller} cgroup is not in {parent}: {}",
                path.display()
            );
        }
        // All threads of the VMM are in the cgroups of the VMM process.
        for task in fs::read_dir(format!("/proc/{}/task", pod.pid())).unwrap().flatten() {
            let task_cgroup = fs::read_to_string(task.path().join("cgroup")).unwrap();
            assert_eq!(task_cgroup, fs::read_to_string(format!("/proc/{}/cgroup", pod.pid())).unwrap());
        }
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        let limits = |millis: u64, mib: u64| json!({ "cpu_quota": millis * 100, "cpu_period": 100_000, "memory_limit_in_bytes": mib * MIB });
        config["linux"]["resources"] = limits(500, 128);
        let container = pod.start(&config);
        let wait_for_limits = |quota: i64, least: u64| {
            let found = node::eventually(Duration::from_secs(30), || {
                let memory = limit(&pod, "memory", "memory.limit_in_bytes").unsigned_abs();
                let range = least * MIB..(least + 160) * MIB;
                (limit(&pod, "cpu", "cpu.cfs_quota_us") == quota && range.contains(&memory)).then_some(())
            });
            let seen = limit(&pod, "memory", "memory.limit_in_bytes");
            assert!(
                found.is_some(),
                "expected a CPU quota of {quota} µs and a memory limit from {least} MiB, got {} µs and {seen} bytes",
                limit(&pod, "cpu", "cpu.cfs_quota_us")
            );
        };
        wait_for_limits(75_000, 128);
        let update = json!({ "container_id": container.id, "linux": limits(1000, 256) });
        call("UpdateContainerResources", &update);
        wait_for_limits(125_000, 256);
        // The guest has cgroup v2 on every host.
        assert_eq!(container.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "268435456\n100000 100000");
        container.sh("dd if=/dev/zero of=/dev/null bs=64M count=1 2> /dev/null");
        let stats = call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }));
        let linux = &stats["stats"]["linux"];
        assert!(number(&linux["cpu"]["usage_core_nano_seconds"]["value"]) > 0, "{stats}");
        assert!(number(&linux["memory"]["working_set_bytes"]["value"]) > 0, "{stats}");
        pod.stop();
        pod.remove();
        let left = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().find(|dir| {
            dir.path().join(parent.trim_start_matches('/')).read_dir().is_ok_and(|mut entries| {
                entries.any(|entry| entry.is_ok_and(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
            })
        });
        assert!(left.is_none(), "{left:?} still has cgroups of the pod");
    });
}
