//! Limits that the kubelet sets beside CPU and memory, through containerd's CRI: whatever a control group has.
use husk_e2e::cri::{call, pods};
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn keys_of_control_groups_are_set_and_hold() {
    pods("cri-unified", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["resources"] = json!({
            "memory_limit_in_bytes": 200 * MIB,
            "unified": { "memory.high": (60 * MIB).to_string(), "memory.low": (10 * MIB).to_string(), "pids.max": "20" },
        });
        let container = pod.start(&config);
        let read = || container.sh("cd /sys/fs/cgroup && cat memory.max memory.high memory.low pids.max");
        assert_eq!(read(), format!("{}\n{}\n{}\n20", 200 * MIB, 60 * MIB, 10 * MIB));
        // More tasks than that there cannot be, which a child has to tell.
        let script = "i=0; while [ $i -lt 40 ]; do sleep 5 > /dev/null 2>&1 & i=$((i+1)); done; echo not reached";
        let forked = container.exec(&["sh", "-c", script]);
        assert!(forked.code != 0 && forked.err.contains("fork") && forked.out.is_empty(), "{forked:?}");
        let linux = json!({ "unified": { "memory.high": (80 * MIB).to_string(), "pids.max": "60" } });
        call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": linux }));
        assert_eq!(read(), format!("{}\n{}\n{}\n60", 200 * MIB, 80 * MIB, 10 * MIB));
        assert_eq!(container.exec(&["sh", "-c", script]).out, "not reached\n");
    });
}
