//! Pods as only Husk has them: a machine that can die, and nothing of the host's.
use std::time::Duration;

use husk_e2e::cri::{self, call, pods, refused};
use husk_e2e::node;
use serde_json::json;

#[test]
fn a_pod_whose_machine_dies_is_not_ready() {
    pods("cri-death", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(pod.pid(), libc::SIGKILL) }, 0);
        assert_eq!(container.wait(), (137, "Error".into()));
        let gone = node::eventually(Duration::from_secs(20), || (!pod.is_ready()).then_some(()));
        assert!(gone.is_some(), "the pod is still ready");
        pod.stop();
        pod.remove();
    });
}

#[test]
fn host_namespaces_are_refused() {
    pods("cri-host", |pods| {
        for (namespace, word) in [("network", "host network"), ("pid", "host pid"), ("ipc", "host ipc")] {
            let mut config = pods.config();
            config["linux"]["security_context"]["namespace_options"] = json!({ namespace: "NODE" });
            let error = refused("RunPodSandbox", &json!({ "config": config, "runtime_handler": cri::handler() }));
            assert!(error.contains(word) && error.contains("not"), "{error}");
        }
        let pod = pods.pod();
        let mut config = pod.sh("true");
        config["linux"]["security_context"]["namespace_options"] = json!({ "pid": "NODE" });
        let container = pod.create(&config);
        let error = refused("StartContainer", &json!({ "container_id": container.id }));
        assert!(error.contains("host pid"), "{error}");
        call("RemoveContainer", &json!({ "container_id": container.id }));
        // The failed start did no harm.
        assert_eq!(pod.sleeper().sh("echo ok"), "ok");
    });
}
