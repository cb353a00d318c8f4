//! CRI's `unified` resources: any cgroup v2 file of a container.

use husk_e2e::cri::{call, pods};
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn unified_cgroup_settings_are_applied_enforced_and_updated() {
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
        // Exceeding pids.max makes fork(2) fail in the shell.
        let script = "i=0; while [ $i -lt 40 ]; do sleep 5 > /dev/null 2>&1 & i=$((i+1)); done; echo not reached";
        let forked = container.exec(&["sh", "-c", script]);
        assert!(forked.code != 0 && forked.err.contains("fork") && forked.out.is_empty(), "{forked:?}");
        let linux = json!({ "unified": { "memory.high": (80 * MIB).to_string(), "pids.max": "60" } });
        call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": linux }));
        assert_eq!(read(), format!("{}\n{}\n{}\n60", 200 * MIB, 80 * MIB, 10 * MIB));
        assert_eq!(container.exec(&["sh", "-c", script]).out, "not reached\n");
    });
}
