//! Resources: limits, OOM kills and statistics.

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::{call, number};
use serde_json::{Value, json};

use super::{run_once, sleeper};

fn limits(limits: Value) -> impl FnOnce(&mut Value) {
    move |config| config["linux"]["resources"] = limits
}

#[test]
fn resources() {
    pods("conf-resources", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] =
            json!({ "cpu_quota": 200_000, "cpu_period": 100_000, "memory_limit_in_bytes": 300 << 20 });
        let pod = pods.run(config);
        let cgroup = |file: &str| format!("cat /sys/fs/cgroup/{file}");
        group("Resources", |group| {
            group.check("memory limit", || {
                let text = run_once(&pod, &cgroup("memory.max"), limits(json!({ "memory_limit_in_bytes": 100 << 20 })));
                assert_eq!(text, "104857600");
            });
            group.check("CPU quota", || {
                let quota = json!({ "cpu_quota": 50000, "cpu_period": 100_000 });
                assert_eq!(run_once(&pod, &cgroup("cpu.max"), limits(quota)), "50000 100000");
            });
            group.check("CPU shares", || {
                // The conversion of shares to a weight depends on the runtime's version. 1024 shares are weight 39 or
                // weight 100.
                let weight = |shares: u32| -> u32 {
                    run_once(&pod, &cgroup("cpu.weight"), limits(json!({ "cpu_shares": shares }))).parse().unwrap()
                };
                assert!(
                    weight(2) == 1 && weight(1024) < weight(2048),
                    "expected weight 1 for 2 shares, and a lower weight for 1024 shares ({}) than for 2048 shares ({})",
                    weight(1024),
                    weight(2048)
                );
            });
            group.check("cpuset", || {
                let script = "grep Cpus_allowed_list /proc/self/status | cut -f2";
                assert_eq!(run_once(&pod, script, limits(json!({ "cpuset_cpus": "1" }))), "1");
            });
            group.check("unified: a cgroup v2 file without a CRI field of its own", || {
                let text =
                    run_once(&pod, &cgroup("memory.high"), limits(json!({ "unified": { "memory.high": "67108864" } })));
                assert_eq!(text, "67108864");
            });
            group.check("limits updated while the container runs", || {
                let container = sleeper(&pod, limits(json!({ "memory_limit_in_bytes": 100 << 20 })));
                let linux = json!({ "memory_limit_in_bytes": 120 << 20, "cpu_quota": 30000, "cpu_period": 100_000 });
                call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": linux }));
                assert_eq!(
                    container.sh(&format!("{}; {}", cgroup("memory.max"), cgroup("cpu.max"))),
                    "125829120\n30000 100000"
                );
                container.remove();
            });
        });
        group("OOM", |group| {
            group.check("a container above its memory limit: OOMKilled, 137", || {
                let mut config = pod.sh("");
                config["command"] = json!(["tail", "/dev/zero"]);
                limits(json!({ "memory_limit_in_bytes": 20 << 20 }))(&mut config);
                let container = pod.start(&config);
                assert_eq!(container.wait(), (137, "OOMKilled".into()));
                container.remove();
            });
        });
        group("Statistics", |group| {
            let container = sleeper(&pod, |config| {
                config["command"] = json!([
                    "sh",
                    "-c",
                    "head -c 20000000 /dev/zero > /dev/shm/fill; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; sleep 100000"
                ]);
            });
            container.wait_for("up");
            group.check("ContainerStats: CPU and memory", || {
                let stats = call("ContainerStats", &json!({ "container_id": container.id }))["stats"].clone();
                assert!(number(&stats["cpu"]["usage_core_nano_seconds"]["value"]) > 1_000_000, "{stats}");
                assert!(number(&stats["memory"]["working_set_bytes"]["value"]) > 20_000_000, "{stats}");
            });
            group.check("ListContainerStats", || {
                let list = call("ListContainerStats", &json!({ "filter": { "pod_sandbox_id": pod.id } }));
                assert_eq!(list["stats"][0]["attributes"]["id"], container.id.as_str());
            });
            group.check("PodSandboxStats: CPU, memory, network, its containers", || {
                let stats = call("PodSandboxStats", &json!({ "pod_sandbox_id": pod.id }))["stats"]["linux"].clone();
                assert!(number(&stats["cpu"]["usage_core_nano_seconds"]["value"]) > 1_000_000, "{stats}");
                assert!(number(&stats["memory"]["working_set_bytes"]["value"]) > 20_000_000, "{stats}");
                assert_eq!(stats["network"]["default_interface"]["name"], "eth0");
                assert_eq!(stats["containers"].as_array().unwrap().len(), 1);
            });
            group.check("ListMetricDescriptors and ListPodSandboxMetrics", || {
                let known = call("ListMetricDescriptors", &json!({}))["descriptors"].clone();
                assert!(!known.as_array().unwrap().is_empty());
                let pods = call("ListPodSandboxMetrics", &json!({}))["pod_metrics"].clone();
                let pod_stats = pods.as_array().unwrap().iter().find(|one| one["pod_sandbox_id"] == pod.id.as_str());
                let containers = pod_stats.expect("no metrics of the pod")["container_metrics"].clone();
                assert!(containers.as_array().unwrap().iter().any(|one| one["container_id"] == container.id.as_str()));
            });
            container.stop(0);
        });
    });
}
