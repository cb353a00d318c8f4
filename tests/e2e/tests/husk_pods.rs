//! Pods as only Husk has them: a machine that can die, and nothing of the host's.
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::{self, call, pods, refused};
use husk_e2e::{node, vm};
use serde_json::{Value, json};

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
fn a_pod_whose_shim_is_killed_is_stopped_and_removed() {
    pods("cri-shim", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let shims = vm::shims_of(&pod.id);
        assert_eq!(shims.len(), 1, "one shim for a pod");
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(shims[0], libc::SIGKILL) }, 0);
        assert_eq!(container.wait().0, 137);
        let gone = node::eventually(Duration::from_secs(20), || vm::vmm_pids().is_empty().then_some(()));
        assert!(gone.is_some(), "the virtual machine outlives its shim");
        pod.stop();
        pod.remove();
    });
}

#[test]
fn a_pod_is_sized_by_its_annotations_and_listed() {
    pods("cri-size", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] =
            json!({ "cpu_quota": 150_000, "cpu_period": 100_000, "memory_limit_in_bytes": 200 << 20 });
        let pod = pods.run(config);
        // A container without a limit would have the pod grow.
        let mut limited = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        limited["linux"]["resources"] = pod.config["linux"]["resources"].clone();
        let container = pod.start(&limited);
        assert_eq!(container.sh("nproc"), "2");
        let mib: u64 = container.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse().unwrap();
        assert!((200..264).contains(&mib), "{mib} MiB in the guest");
        let output = Command::new("husk").args(["ps", "--output", "json"]).output().unwrap();
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let listed = list.as_array().unwrap().iter().find(|one| one["id"] == pod.id.as_str()).unwrap();
        assert_eq!(listed["pod"], format!("e2e/{}", pod.config["metadata"]["name"].as_str().unwrap()));
        assert_eq!((&listed["vcpus"], &listed["running"]), (&json!(2), &json!(true)));
        assert_eq!(listed["vmm_pid"], pod.pid());
        assert!(listed["used_kib"].as_u64().unwrap() > 10_000, "{listed}");
        let text = Command::new("husk").arg("ps").output().unwrap();
        assert!(String::from_utf8_lossy(&text.stdout).contains("running"));
        // By the pod's own annotations, which the drop-in for containerd passes on.
        let mut config = pods.config();
        config["annotations"] = json!({ "io.husk.vcpus": "2", "io.husk.memory_mib": "300" });
        let sized = pods.run(config);
        let seen = sized.sleeper().sh("nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo");
        let (cpus, mib) = seen.split_once('\n').unwrap();
        assert!(cpus == "2" && (250..300).contains(&mib.parse::<u64>().unwrap()), "{seen}");
        // One the operator has not allowed.
        let mut config = pods.config();
        config["annotations"] = json!({ "io.husk.kernel_params": "quiet" });
        let error = refused("RunPodSandbox", &json!({ "config": config, "runtime_handler": cri::handler() }));
        assert!(error.contains("io.husk.kernel_params") && error.contains("allowed"), "{error}");
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
