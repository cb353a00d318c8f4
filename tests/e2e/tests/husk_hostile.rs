//! A pod that attacks its VMM and the node: the node's log grows little.

use std::fs;
use std::time::Duration;

use husk_e2e::cri::pods;
use husk_e2e::{containerd_log, node};
use serde_json::json;

/// Returns the first and the last lines of a log.
fn ends(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let (first, last) = (lines.iter().take(20), lines.iter().skip(lines.len().saturating_sub(20)));
    first.chain(last).copied().collect::<Vec<_>>().join("\n")
}

#[test]
fn hostile_pod_that_runs_out_of_memory_again_and_again_logs_few_lines() {
    pods("hostile-oom", |pods| {
        let pod = pods.pod();
        // Each child takes more than the container's memory, and the OOM killer of the guest kills it.
        let mut config =
            pod.sh("while :; do sh -c 'x=$(head -c 100000000 /dev/zero | tr \"\\0\" x)'; echo round; done");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 16 << 20 });
        let log = containerd_log::len();
        let container = pod.start(&config);
        let killed = || {
            let text = fs::read_to_string(container.log_path()).unwrap_or_default();
            (text.lines().count() >= 20).then_some(())
        };
        let killed = node::eventually(Duration::from_secs(300), killed);
        let lines = containerd_log::since(log);
        let of_pod = lines.lines().filter(|line| line.contains(&pod.id)).count();
        println!("20 OOM kills have caused {of_pod} lines in containerd's log");
        assert!(killed.is_some(), "the container was not killed 20 times:\n{}", container.log());
        assert!(of_pod < 100, "{of_pod} lines:\n{}", ends(&lines));
    });
}
