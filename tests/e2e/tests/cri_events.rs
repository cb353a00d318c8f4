//! containerd's events of a pod's containers: each event is published once, in order.
//!
//! Runs: containerd 1.7 and 2

use husk_e2e::cri::{self, pods, try_call};
use husk_e2e::events::{Events, number_exec_ids};
use serde_json::json;

#[test]
fn task_events_are_published_once_and_in_order() {
    pods("cri-events", |pods| {
        let events = Events::watch();
        let pod = pods.pod();
        // A container has three execs. One exits, one fails to start, and one exceeds its timeout.
        let container = pod.start(&pod.sh("trap 'exit 3' TERM; sleep 100000 & wait"));
        assert_eq!(container.exec(&["sh", "-c", "exit 7"]).code, 7);
        container.try_exec(&["/no/such"]).unwrap_err();
        let long = json!({ "container_id": container.id, "cmd": ["sleep", "100000"], "timeout": 1 });
        try_call("ExecSync", &long).unwrap_err();
        container.stop(30);
        container.remove();
        let expected = [
            "create",
            "start",
            "exec-added 1",
            "exec-started 1",
            "exec-exit 1 7",
            "exec-added 2",
            "exec-added 3",
            "exec-started 3",
            "exec-exit 3 137",
            "exit 3",
            "delete 3",
        ];
        assert_eq!(number_exec_ids(&events.for_container(&container.id)), expected);
        // A container exits at once. As a restart, the test creates a new container, which has another id.
        for attempt in 0..2 {
            let mut config = pod.sh("exit 5");
            config["metadata"]["attempt"] = json!(attempt);
            let short = pod.start(&config);
            assert_eq!(short.wait(), (5, "Error".into()));
            short.remove();
            assert_eq!(events.for_container(&short.id), ["create", "start", "exit 5", "delete 5"]);
        }
        // If a container exceeds its memory limit, the OOM event precedes the exit event.
        let mut config = pod.sh("");
        config["command"] = json!(["tail", "/dev/zero"]);
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 30 << 20 });
        let over_limit = pod.start(&config);
        assert_eq!(over_limit.wait(), (137, "OOMKilled".into()));
        over_limit.remove();
        assert_eq!(events.for_container(&over_limit.id), ["create", "start", "oom", "exit 137", "delete 137"]);
        // The last container is stopped with its pod.
        let last = pod.start(&pod.sh("sleep 100000"));
        pod.stop();
        pod.remove();
        assert_eq!(events.for_container(&last.id), ["create", "start", "exit 137", "delete 137"]);
        // If the shim implements the sandbox API, the sandbox has no task and therefore no task events.
        let sandbox = events.for_container(&pod.id);
        assert!(sandbox.is_empty() || sandbox == ["create", "start", "exit 137", "delete 137"], "{sandbox:?}");
    });
}

#[test]
fn cri_container_events_report_each_state_change_once() {
    pods("cri-pleg", |pods| {
        let events = cri::call_streaming("GetContainerEvents");
        let pod = pods.pod();
        let container = pod.start(&pod.sh("exit 4"));
        assert_eq!(container.wait(), (4, "Error".into()));
        container.remove();
        let killed = pod.start(&pod.sh("sleep 100000"));
        killed.stop(0);
        pod.stop();
        pod.remove();
        let mut seen = Vec::new();
        // The sandbox's deletion is the last event.
        for event in events {
            let (id, kind) = (event["container_id"].clone(), event["container_event_type"].clone());
            let last = id == pod.id.as_str() && kind == "CONTAINER_DELETED_EVENT";
            seen.push((id, kind));
            if last {
                break;
            }
        }
        let kinds_of = |id: &str| -> Vec<_> {
            let kinds =
                seen.iter().filter(|(event_id, _)| event_id == id).map(|(_, kind)| kind.as_str().unwrap_or_default());
            kinds.map(|kind| kind.trim_start_matches("CONTAINER_").trim_end_matches("_EVENT")).collect()
        };
        assert_eq!(kinds_of(&container.id), ["CREATED", "STARTED", "STOPPED", "DELETED"]);
        assert_eq!(kinds_of(&killed.id), ["CREATED", "STARTED", "STOPPED", "DELETED"]);
        assert_eq!(kinds_of(&pod.id), ["CREATED", "STARTED", "STOPPED", "DELETED"]);
    });
}
