//! Pod sandboxes: lifecycle, host name, DNS, sysctls and namespaces.

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::{self, call, expect_error, try_call};
use serde_json::{Value, json};

use super::{run_once, security_context, sleeper};

#[test]
fn sandboxes() {
    pods("conf-sandbox", |pods| {
        group("Pod sandbox", |group| {
            group.check("run, stop, remove, with the state at each step", || {
                let pod = pods.pod();
                assert!(pod.is_ready());
                pod.stop();
                assert!(!pod.is_ready());
                pod.remove();
                assert!(try_call("PodSandboxStatus", &json!({ "pod_sandbox_id": pod.id })).is_err());
            });
            group.check("stopping a sandbox stops its containers", || {
                let pod = pods.pod();
                let container = sleeper(&pod, |_| {});
                pod.stop();
                assert_eq!(container.status()["state"], "CONTAINER_EXITED");
                pod.remove();
                assert!(try_call("ContainerStatus", &json!({ "container_id": container.id })).is_err());
            });
            let pod = pods.pod();
            group.check("a sandbox is listed by id and state and by label, with its handler", || {
                let state = json!({ "state": "SANDBOX_READY" });
                let label = json!({ "husk-e2e": "conf-sandbox" });
                for filter in [json!({ "id": pod.id, "state": state }), json!({ "label_selector": label })] {
                    let list = call("ListPodSandbox", &json!({ "filter": filter }));
                    assert_eq!(list["items"][0]["id"], pod.id.as_str());
                    assert_eq!(list["items"][0]["runtime_handler"], cri::handler());
                }
            });
            group.check("the status contains the pod's addresses", || assert!(!pod.addresses().is_empty()));
            pod.remove();
            let mut config = pods.config();
            config["hostname"] = json!("the-pod");
            config["dns_config"] =
                json!({ "servers": ["10.0.0.53"], "searches": ["e2e.test"], "options": ["ndots:2"] });
            config["linux"]["sysctls"] = json!({
                "kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "20000 30000",
                "kernel.msgmax": "16384", "fs.mqueue.msg_max": "20", "net.core.somaxconn": "77",
            });
            let pod = pods.run(config);
            let container = sleeper(&pod, |_| {});
            group.check("host name", || {
                assert_eq!(container.sh("hostname; cat /etc/hostname"), "the-pod\nthe-pod");
            });
            group.check("DNS configuration", || {
                let expected = "search e2e.test\nnameserver 10.0.0.53\noptions ndots:2";
                assert_eq!(container.sh("cat /etc/resolv.conf"), expected);
            });
            group.check("safe sysctls", || {
                let text = container.sh("cd /proc/sys; cat kernel/shm_rmid_forced net/ipv4/ip_local_port_range");
                assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["1", "20000", "30000"]);
            });
            group.check("unsafe sysctls", || {
                let text = container.sh("cd /proc/sys; cat kernel/msgmax fs/mqueue/msg_max net/core/somaxconn");
                assert_eq!(text, "16384\n20\n77");
            });
            pod.stop();
        });
        group("Idempotence", |group| {
            let pod = pods.pod();
            group.check("stopping a sandbox twice succeeds", || {
                pod.stop();
                pod.stop();
            });
            group.check("removing a sandbox twice succeeds", || {
                pod.remove();
                pod.remove();
            });
            group.check("stopping and removing unknown ids succeeds", || {
                for method in ["StopPodSandbox", "RemovePodSandbox"] {
                    call(method, &json!({ "pod_sandbox_id": "no-such-sandbox" }));
                }
                for method in ["StopContainer", "RemoveContainer"] {
                    call(method, &json!({ "container_id": "no-such-container" }));
                }
            });
        });
    });
}

#[test]
fn namespaces() {
    pods("conf-namespaces", |pods| {
        let pod = pods.pod();
        let read_link = |kind: &str| format!("readlink /proc/self/ns/{kind}");
        let pid = |mode: &'static str| {
            move |config: &mut Value| security_context(config)["namespace_options"] = json!({ "pid": mode })
        };
        group("Namespaces", |group| {
            group.check("PID namespace of the container", || {
                let (a, b) = (sleeper(&pod, pid("CONTAINER")), sleeper(&pod, pid("CONTAINER")));
                assert_ne!(a.sh(&read_link("pid")), b.sh(&read_link("pid")));
                assert_eq!(a.sh("cat /proc/1/comm"), "sh");
                a.remove();
                b.remove();
            });
            group.check("PID namespace of the pod", || {
                let (a, b) = (sleeper(&pod, pid("POD")), sleeper(&pod, pid("POD")));
                assert_eq!(a.sh(&read_link("pid")), b.sh(&read_link("pid")));
                a.remove();
                b.remove();
            });
            group.check("PID namespace of another container", || {
                let a = sleeper(&pod, pid("CONTAINER"));
                let b = sleeper(&pod, |config| {
                    security_context(config)["namespace_options"] = json!({ "pid": "TARGET", "target_id": a.id });
                });
                assert_eq!(a.sh(&read_link("pid")), b.sh(&read_link("pid")));
                b.remove();
                a.remove();
            });
            for (kind, word) in [("network", "host's network"), ("pid", "host's pid"), ("ipc", "host's ipc")] {
                if kind == "network" && cri::handler() == "husk-sandbox" {
                    // containerd 2.1.9 crashes here, because its `NewBundle` gets no specification (docs/install.md).
                    continue;
                }
                let config = || {
                    let mut config = pods.config();
                    security_context(&mut config)["namespace_options"] = json!({ kind: "NODE" });
                    if kind == "network" {
                        // For a pod with the host's network, the kubelet sends an empty host name. containerd then uses
                        // the node's host name.
                        config["hostname"] = json!("");
                    }
                    config
                };
                let seen = || {
                    let pod = pods.run(config());
                    let mode = json!({ kind: "NODE" });
                    let inside = run_once(&pod, &read_link(if kind == "network" { "net" } else { kind }), |config| {
                        security_context(config)["namespace_options"] = mode;
                    });
                    let file = if kind == "network" { "net" } else { kind };
                    let outside = std::fs::read_link(format!("/proc/self/ns/{file}")).unwrap();
                    assert_eq!(inside, outside.to_string_lossy());
                    pod.remove();
                };
                group.check_or_rejected(&format!("host namespace: {kind}"), word, seen, || {
                    expect_error("RunPodSandbox", &json!({ "config": config(), "runtime_handler": cri::handler() }))
                });
            }
        });
    });
}
