//! Statistics of pods and containers through containerd's CRI, as the kubelet requests them, and updates of limits.

use husk_e2e::cri::{call, pods, stats};
use serde_json::json;

#[test]
fn cpu_memory_and_process_statistics_are_those_of_the_guest() {
    pods("cri-stats", |pods| stats::check_cpu_memory_and_pids(&pods.pod()));
}

#[test]
fn network_statistics_count_the_traffic_of_the_pod() {
    pods("cri-stats-net", |pods| stats::check_network(&pods.pod()));
}

#[test]
fn block_device_statistics_are_reported() {
    pods("cri-stats-disk", stats::check_block_io);
}

#[test]
fn updated_limits_reach_the_cgroup_of_the_container() {
    pods("cri-limits", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 200 << 20 });
        let container = pod.start(&config);
        let linux = json!({ "memory_limit_in_bytes": 300 << 20, "cpu_quota": 30000, "cpu_period": 100_000 });
        call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": linux }));
        assert_eq!(container.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "314572800\n30000 100000");
        container.stop(0);
    });
}
