//! Pods through containerd's CRI: the lifecycle of sandboxes and containers, and what the containers of a pod share.
//!
//! Runs: containerd 1.7 and 2
use husk_e2e::cri::{self, pods};
use husk_e2e::vm;
use serde_json::json;

fn husk() -> bool {
    cri::handler() != "runc"
}

#[test]
fn pod_and_its_vm_outlive_their_containers() {
    pods("cri-life", |pods| {
        let pod = pods.pod();
        assert!(pod.is_ready());
        let vmms = vm::vmm_pids();
        if husk() {
            assert_eq!(vmms.len(), 1, "a pod must have exactly one VM");
            assert_eq!(vmms, [pod.pid()]);
        }
        // The pod stays after its only container has exited and is removed.
        let first = pod.start(&pod.sh("echo one; exit 3"));
        assert_eq!(first.wait(), (3, "Error".into()));
        assert!(first.log().contains("stdout F one"), "{}", first.log());
        first.remove();
        assert!(pod.is_ready());
        // After one of two containers is stopped, the second container continues to run.
        let (a, b) = (pod.sleeper(), pod.sleeper());
        assert_eq!(a.sh("hostname"), b.sh("hostname"));
        a.stop(10);
        assert_eq!(a.wait().0, 0, "the exit code is not that of the container's SIGTERM handler");
        assert_eq!(b.sh("echo still here"), "still here");
        // Like a restart by the kubelet, the test replaces the removed container with one of the same configuration.
        a.remove();
        let again = pod.sleeper();
        assert_eq!(again.sh("echo again"), "again");
        // A stop with timeout 0 sends SIGKILL.
        again.stop(0);
        assert_eq!(again.wait().0, 137);
        b.stop(0);
        assert!(pod.is_ready());
        assert_eq!(vm::vmm_pids(), vmms, "the pod no longer has its first VM");
        // Removes a container that was created but never started.
        pod.create(&pod.sh("true")).remove();
        pod.stop();
        assert!(!pod.is_ready());
        assert!(vm::vmm_pids().is_empty(), "a stopped pod still has a VM");
        // Stopping and removing are idempotent.
        pod.stop();
        pod.remove();
        pod.remove();
    });
}

#[test]
fn containers_share_network_ipc_uts_and_sysctls_but_not_pid_and_mount() {
    pods("cri-shared", |pods| {
        let mut config = pods.config();
        config["hostname"] = json!("the-pod");
        config["linux"]["sysctls"] =
            json!({ "net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1" });
        config["dns_config"] = json!({ "servers": ["10.0.0.53"], "searches": ["e2e.test"], "options": ["ndots:2"] });
        let pod = pods.run(config);
        let (a, b) = (pod.sleeper(), pod.sleeper());
        // The containers have the pod's host name and DNS configuration. They share the network and /dev/shm, but not
        // processes and mounts.
        let namespaces = "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done";
        let of_a = a.sh(&format!(
            "{namespaces}; hostname; cat /etc/resolv.conf
             echo shared > /dev/shm/file; mount | grep -q ' /dev/shm ' || echo no mount >&2
             nc -ll -p 8080 -e echo through > /dev/null 2>&1 < /dev/null &
             until netstat -ltn | grep -q :8080; do sleep 0.1; done"
        ));
        let of_b = b.sh(&format!(
            "{namespaces}; cat /etc/hostname /dev/shm/file
             cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced
             nc 127.0.0.1 8080 < /dev/null"
        ));
        let (of_a, of_b): (Vec<&str>, Vec<&str>) = (of_a.lines().collect(), of_b.lines().collect());
        let same: Vec<bool> = of_a.iter().zip(&of_b).take(5).map(|(one, other)| one == other).collect();
        assert_eq!(
            same,
            [true, true, true, false, false],
            "only the net, ipc and uts namespaces must be the same: {of_a:?} {of_b:?}"
        );
        assert_eq!(of_a[5..], ["the-pod", "search e2e.test", "nameserver 10.0.0.53", "options ndots:2"]);
        assert_eq!(of_b[5..], ["the-pod", "shared", "80", "1", "through"]);
    });
}

#[test]
fn containers_with_pid_mode_pod_share_a_pid_namespace() {
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
        // If one container ends, the others run on.
        a.stop(0);
        assert_eq!(b.sh("echo alive"), "alive");
    });
}
