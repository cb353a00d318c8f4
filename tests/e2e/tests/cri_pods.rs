//! Pods through containerd's CRI: sandboxes, containers that come and go in them, and what they share.
//!
//! Runs: containerd 1.7 and 2
use husk_e2e::cri::{self, pods};
use husk_e2e::vm;
use serde_json::json;

fn husk() -> bool {
    cri::handler() != "runc"
}

#[test]
fn containers_come_and_go_in_one_pod() {
    pods("cri-life", |pods| {
        let pod = pods.pod();
        assert!(pod.is_ready());
        let machines = vm::vmm_pids();
        if husk() {
            assert_eq!(machines.len(), 1, "one virtual machine for a pod");
            assert_eq!(machines, [pod.pid()]);
        }
        // One after the other, also the last one: the pod stays.
        let first = pod.start(&pod.sh("echo one; exit 3"));
        assert_eq!(first.wait(), (3, "Error".into()));
        assert!(first.log().contains("stdout F one"), "{}", first.log());
        first.remove();
        assert!(pod.is_ready());
        // Two at once, one of which goes while the other stays.
        let (a, b) = (pod.sleeper(), pod.sleeper());
        assert_eq!(a.sh("hostname"), b.sh("hostname"));
        a.stop(10);
        assert_eq!(a.wait().0, 0, "ended by its own handler of SIGTERM");
        assert_eq!(b.sh("echo still here"), "still here");
        // The same again as a new container, as kubelet restarts one.
        a.remove();
        let again = pod.sleeper();
        assert_eq!(again.sh("echo again"), "again");
        // Without patience it is killed.
        again.stop(0);
        assert_eq!(again.wait().0, 137);
        b.stop(0);
        assert!(pod.is_ready());
        assert_eq!(vm::vmm_pids(), machines, "the same virtual machine all along");
        // One that was created and never started.
        pod.create(&pod.sh("true")).remove();
        pod.stop();
        assert!(!pod.is_ready());
        assert!(vm::vmm_pids().is_empty(), "a stopped pod has no virtual machine");
        // Both may be asked for any number of times.
        pod.stop();
        pod.remove();
        pod.remove();
    });
}

#[test]
fn containers_share_what_a_pod_shares() {
    pods("cri-shared", |pods| {
        let mut config = pods.config();
        config["hostname"] = json!("the-pod");
        config["linux"]["sysctls"] =
            json!({ "net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1" });
        config["dns_config"] = json!({ "servers": ["10.0.0.53"], "searches": ["e2e.test"], "options": ["ndots:2"] });
        let pod = pods.run(config);
        let (a, b) = (pod.sleeper(), pod.sleeper());
        // Names.
        assert_eq!(a.sh("hostname"), "the-pod");
        assert_eq!(b.sh("cat /etc/hostname"), "the-pod");
        assert_eq!(a.sh("cat /etc/resolv.conf"), "search e2e.test\nnameserver 10.0.0.53\noptions ndots:2");
        // Network and shared memory are the pod's, processes and mounts are not.
        a.sh("echo shared > /dev/shm/file; mount | grep -q ' /dev/shm '");
        assert_eq!(b.sh("cat /dev/shm/file"), "shared");
        for kind in ["net", "ipc", "uts"] {
            let link = format!("readlink /proc/self/ns/{kind}");
            assert_eq!(a.sh(&link), b.sh(&link), "{kind}");
        }
        for kind in ["pid", "mnt"] {
            let link = format!("readlink /proc/self/ns/{kind}");
            assert_ne!(a.sh(&link), b.sh(&link), "{kind}");
        }
        assert_eq!(b.sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"), "80\n1");
        a.sh("nc -ll -p 8080 -e echo through > /dev/null 2>&1 < /dev/null &
              until netstat -ltn | grep -q :8080; do sleep 0.1; done");
        assert_eq!(b.sh("nc 127.0.0.1 8080 < /dev/null"), "through");
    });
}

#[test]
fn processes_are_shared_where_the_pod_says_so() {
    pods("cri-pid", |pods| {
        let pod = pods.pod();
        let shared = |script: &str| {
            let mut config = pod.sh(script);
            config["linux"]["security_context"]["namespace_options"] = json!({ "pid": "POD" });
            config
        };
        let a = pod.start(&shared("exec sleep 4711"));
        let b = pod.start(&shared("trap 'exit 0' TERM; sleep 100000 & wait"));
        let link = "readlink /proc/self/ns/pid";
        assert_eq!(a.sh(link), b.sh(link));
        assert!(b.sh("grep -l 4711 /proc/[0-9]*/cmdline | wc -l").parse::<u32>().unwrap() >= 1);
        // One container of several ends, and the rest do not.
        a.stop(0);
        assert_eq!(b.sh("echo alive"), "alive");
    });
}
