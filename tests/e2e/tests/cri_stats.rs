//! Statistics of pods and containers through containerd's CRI, as kubelet asks for them; limits changed while they run.
use husk_e2e::cri::{call, pods, stats};
use serde_json::json;

#[test]
fn processor_memory_and_processes_are_those_inside() {
    pods("cri-stats", stats::processor_memory_and_processes);
}

#[test]
fn network_traffic_is_that_of_the_pod() {
    pods("cri-stats-net", stats::network);
}

#[test]
fn block_devices_are_told_of() {
    pods("cri-stats-disk", stats::block);
}

#[test]
fn limits_that_change_are_seen_inside() {
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
