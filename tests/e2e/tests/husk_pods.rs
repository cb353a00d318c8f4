//! Pods in VMs: the death of a VMM or shim, failed requests, limits, VM sizes and host namespaces.
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::Duration;

use husk_e2e::cri::{self, PodContainer, expect_error, number, pods};
use husk_e2e::events::{Events, number_exec_ids};
use husk_e2e::{node, vm};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

#[test]
fn pod_is_not_ready_after_its_vmm_dies() {
    pods("cri-death", |pods| {
        let events = Events::watch();
        let pod = pods.pod();
        let (container, other) = (pod.sleeper(), pod.sleeper());
        let exec = json!({ "container_id": container.id, "cmd": ["sleep", "100000"], "timeout": 100 });
        thread::scope(|scope| {
            let executing = scope.spawn(|| cri::try_call("ExecSync", &exec));
            events.wait_for(&container.id, 4);
            node::send_signal(pod.pid(), Signal::SIGKILL);
            assert_eq!(number(&executing.join().unwrap().unwrap()["exit_code"]), 137);
        });
        assert_eq!(container.wait(), (137, "Error".into()));
        let gone = node::eventually(Duration::from_secs(20), || (!pod.is_ready()).then_some(()));
        assert!(gone.is_some(), "the pod is still ready");
        pod.stop();
        pod.remove();
        // Each process has one exit event. At the end, each container has one delete event.
        let expected =
            ["create", "start", "exec-added 1", "exec-started 1", "exec-exit 1 137", "exit 137", "delete 137"];
        assert_eq!(number_exec_ids(&events.for_container(&container.id)), expected);
        assert_eq!(events.for_container(&other.id), ["create", "start", "exit 137", "delete 137"]);
        let sandbox = events.for_container(&pod.id);
        assert!(sandbox.is_empty() || sandbox == ["create", "start", "exit 137", "delete 137"], "{sandbox:?}");
    });
}

/// Returns the number of mounts in the namespaces of the shim and the VMM of a pod.
fn mounts_of(pod: &str) -> [usize; 2] {
    let ([shim], [vmm]) = (&vm::shim_pids_of(pod)[..], &vm::vmm_pids_of(pod)[..]) else {
        panic!("expected one shim and one VMM of {pod}")
    };
    [shim, vmm].map(|pid| fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().lines().count())
}

#[test]
fn mounts_of_shim_and_vmm_do_not_depend_on_other_pods() {
    pods("cri-mounts", |pods| {
        let witness = pods.pod();
        let _container = witness.sleeper();
        let before = mounts_of(&witness.id);
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vm::shim_pids_of(&witness.id)[0])).unwrap();
        let foreign =
            |line: &&str| line.contains("/run/netns/") || line.contains("/sandboxes/") && !line.contains(&witness.id);
        assert_eq!(mounts.lines().find(foreign), None);
        let others = [pods.pod(), pods.pod()];
        let _containers = others.each_ref().map(|pod| pod.sleeper());
        assert_eq!(mounts_of(&witness.id), before, "the mounts of the first pod");
        for other in &others {
            assert_eq!(mounts_of(&other.id), before, "the mounts of a later pod");
        }
    });
}

#[test]
fn exec_timeout_kills_all_descendants() {
    pods("cri-timeout", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let count =
            |number: &str| container.sh(&format!("grep -lE '{number}' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"));
        // If an exec ends before its timeout, its background processes keep running, as with runc.
        container.sh("setsid sleep 4712 > /dev/null 2>&1 &");
        // The exec's descendants run in the background, run in other sessions, or are reparented to init. One of them
        // forks all the time.
        let script = "sleep 4713 & setsid sleep 4713 & (setsid sh -c 'sleep 4713 & sleep 4713; :' &)
            (while :; do setsid sh -c 'sleep 0.01; : 4713'; done &) ; sleep 4713; :";
        let request = json!({ "container_id": container.id, "cmd": ["sh", "-c", script], "timeout": 2 });
        let error = cri::try_call("ExecSync", &request).unwrap_err();
        assert!(error.message.contains("timeout"), "{error}");
        let gone = node::eventually(Duration::from_secs(10), || (count("471[3]") == "0").then_some(()));
        assert!(gone.is_some(), "{}", container.sh("ps"));
        assert_eq!(count("471[2]"), "1");
        // Tracking the descendants adds no cgroup that the container can see.
        assert_eq!(container.sh("cat /proc/self/cgroup; find /sys/fs/cgroup -mindepth 1 -type d"), "0::/");
    });
}

#[test]
fn port_forwarding_resumes_after_fd_exhaustion() {
    pods("cri-descriptors", |pods| {
        let pod = pods.pod();
        let container = pod.start(&pod.sh("mkdir /w; echo heard > /w/x; httpd -f -p 127.0.0.1:8080 -h /w"));
        let netns = pod.netns();
        let get = || {
            let command = ["wget", "-q", "-T", "20", "-O", "-", "http://127.0.0.1:8080/x"];
            let mut nsenter = Command::new("nsenter");
            nsenter.arg(format!("--net={}", netns.display())).arg("busybox").args(command);
            String::from_utf8_lossy(&nsenter.output().unwrap().stdout).into_owned()
        };
        let found = node::eventually(Duration::from_secs(20), || (get() == "heard\n").then_some(()));
        assert!(found.is_some(), "{}", container.log());
        let shim = vm::shim_pids_of(&pod.id)[0];
        let limit = vm::set_fd_limit(shim, 3);
        // The connection stays in the backlog until the shim can accept it.
        let answer = thread::scope(|scope| {
            let request = scope.spawn(get);
            let logged = node::eventually(Duration::from_secs(20), || {
                node::log_tail(200).contains("failed to accept a connection in the pod").then_some(())
            });
            vm::set_fd_limit(shim, limit);
            assert!(logged.is_some(), "{}", node::log_tail(20));
            request.join().unwrap()
        });
        assert_eq!(answer, "heard\n");
        assert_eq!(get(), "heard\n");
    });
}

#[test]
fn failed_create_leaves_nothing_in_guest() {
    pods("cri-fails", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        // The guest keeps copies of mirrored volumes in a tmpfs.
        let tmpfs_kib = || container.sh("awk '/^Shmem:/ {print $2}' /proc/meminfo").parse::<u64>().unwrap();
        // Copying this volume to the guest fails midway, because the volume exceeds the maximum depth.
        let volume = pods.volume(&pod, "secret", "deep");
        fs::create_dir_all(volume.join("z/".repeat(70))).unwrap();
        fs::write(volume.join("large"), vec![1; 32 << 20]).unwrap();
        let before = tmpfs_kib();
        let mut config = pod.sh("true");
        config["mounts"] =
            json!([{ "host_path": volume.to_string_lossy(), "container_path": "/secret", "readonly": true }]);
        let failing = pod.create(&config);
        let error = expect_error("StartContainer", &json!({ "container_id": failing.id }));
        assert!(error.contains("too deep"), "{error}");
        // The guest may remove the copy of 32 MiB shortly after the error.
        let freed = node::eventually(Duration::from_secs(20), || (tmpfs_kib() < before + 1024).then_some(()));
        assert!(
            freed.is_some(),
            "the guest's tmpfs used {before} KiB before the failed create, and use {} KiB after it",
            tmpfs_kib()
        );
        failing.remove();
        // After the volume is corrected, another container can mount the volume.
        fs::remove_dir_all(volume.join("z")).unwrap();
        let working = pod.start(&config);
        assert_eq!(working.wait().0, 0);
    });
}

#[test]
fn pod_with_killed_shim_can_be_stopped_and_removed() {
    pods("cri-shim", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let shims = vm::shim_pids_of(&pod.id);
        assert_eq!(shims.len(), 1, "a pod must have exactly one shim");
        node::send_signal(shims[0], Signal::SIGKILL);
        // containerd 2.x does not ask the runtime for this exit status, and reports 255, which means "unknown".
        assert!([137, 255].contains(&container.wait().0));
        let gone = node::eventually(Duration::from_secs(20), || vm::vmm_pids().is_empty().then_some(()));
        assert!(gone.is_some(), "the VMM outlives its shim");
        pod.stop();
        pod.remove();
    });
}

#[test]
fn frames_with_spoofed_mac_are_dropped() {
    pods("cri-mac", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN"] });
        let container = pod.start(&config);
        let listener = TcpListener::bind("10.88.0.1:0").unwrap();
        let dial = format!("nc -w 4 10.88.0.1 {} < /dev/null", listener.local_addr().unwrap().port());
        let own = container.sh("cat /sys/class/net/eth0/address");
        let set_mac = |mac: &str| container.sh(&format!("ip link set eth0 address {mac}; ip neigh flush dev eth0"));
        set_mac("02:00:00:00:00:77");
        assert_ne!(container.exec(&["sh", "-c", &dial]).code, 0, "a connection with a spoofed MAC was accepted");
        set_mac(&own);
        let accept = thread::spawn(move || listener.accept().unwrap().0.write_all(b"heard"));
        assert_eq!(container.sh(&dial), "heard");
        accept.join().unwrap().unwrap();
    });
}

#[test]
fn pod_pids_limit_is_shared_by_its_containers() {
    pods("cri-pids", |pods| {
        // Creates the pod's cgroup as the kubelet does with `podPidsLimit`.
        let config = pods.config();
        let (root, parent) = ("/sys/fs/cgroup", config["linux"]["cgroup_parent"].as_str().unwrap());
        let group = format!("{root}{parent}");
        fs::create_dir_all(&group).unwrap();
        for above in [root.to_owned(), format!("{root}/kubepods")] {
            fs::write(format!("{above}/cgroup.subtree_control"), "+pids").unwrap();
        }
        fs::write(format!("{group}/pids.max"), "150").unwrap();
        let pod = pods.run(config);
        let (one, other) = (pod.sleeper(), pod.sleeper());
        let fork = |container: &PodContainer, count: u32| {
            let script =
                format!("i=0; while [ $i -lt {count} ]; do sleep 1000 > /dev/null 2>&1 & i=$((i+1)); done; echo $i");
            container.exec(&["sh", "-c", &script])
        };
        // The limit covers both containers together.
        assert_eq!(fork(&one, 100).out, "100\n");
        let failed = fork(&other, 100);
        assert!(failed.code != 0 && failed.err.contains("fork"), "{failed:?}");
        assert!(pod.is_ready());
    });
}

#[test]
fn annotations_take_effect_only_if_allowed() {
    pods("cri-annotations", cri::annotations::check_allow_list);
}

#[test]
fn limits_set_vm_size_and_husk_ps_lists_vm() {
    pods("cri-size", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] =
            json!({ "cpu_quota": 150_000, "cpu_period": 100_000, "memory_limit_in_bytes": 200 << 20 });
        let pod = pods.run(config);
        // The container has a limit, because a container without a limit would make the VM grow.
        let mut limited = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        limited["linux"]["resources"] = pod.config["linux"]["resources"].clone();
        let container = pod.start(&limited);
        assert_eq!(container.sh("nproc"), "2");
        let mib: u64 = container.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse().unwrap();
        assert!((200..264).contains(&mib), "the guest has {mib} MiB of memory, expected 200 to 264 MiB");
        let output = Command::new("husk").args(["ps", "--output", "json"]).output().unwrap();
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        let listed = list.as_array().unwrap().iter().find(|one| one["id"] == pod.id.as_str()).unwrap();
        assert_eq!(listed["pod"], format!("e2e/{}", pod.config["metadata"]["name"].as_str().unwrap()));
        assert_eq!((&listed["vcpus"], &listed["running"]), (&json!(2), &json!(true)));
        assert_eq!(listed["vmm_pid"], pod.pid());
        assert!(listed["used_kib"].as_u64().unwrap() > 10_000, "{listed}");
        let shim_jail = &listed["shim_jail"];
        assert_eq!(shim_jail["own_namespaces"], json!(["mnt"]), "{shim_jail}");
        for thread in shim_jail["threads"].as_array().unwrap() {
            assert!(thread["no_new_privs"] == true && thread["seccomp_filter"] == true, "{thread}");
            assert_eq!(thread["capabilities"].as_array().unwrap().len(), 12, "{thread}");
        }
        let jail = &listed["jail"];
        assert_eq!(jail["own_namespaces"], json!(["cgroup", "ipc", "mnt", "net", "pid", "uts"]), "{jail}");
        // The VMM's root is the share, which is a tmpfs.
        assert_eq!((&jail["root"], &jail["root_source"]), (&json!("/"), &json!("husk")), "{jail}");
        assert_eq!(jail["core_limit"], 1, "{jail}");
        for thread in jail["threads"].as_array().unwrap() {
            assert_eq!((&thread["no_new_privs"], &thread["seccomp_filter"]), (&json!(true), &json!(true)), "{thread}");
            // Only the threads that serve files have capabilities.
            let count = thread["capabilities"].as_array().unwrap().len();
            assert!(count == 0 || count == 8, "{thread}");
        }
        let text = Command::new("husk").arg("ps").output().unwrap();
        assert!(String::from_utf8_lossy(&text.stdout).contains("running"));
        let trace = Command::new("husk").args(["trace", listed["pod"].as_str().unwrap()]).output().unwrap();
        let waterfall = String::from_utf8_lossy(&trace.stdout);
        assert!(waterfall.starts_with(&format!("k8s.io/{}\n", pod.id)), "{waterfall}");
        assert!(waterfall.contains("agent ready") && waterfall.contains('█'), "{waterfall}");
        // Husk rejects an annotation that the operator has not allowed.
        let mut config = pods.config();
        config["annotations"] = json!({ "io.husk.kernel_params": "quiet" });
        let error = expect_error("RunPodSandbox", &json!({ "config": config, "runtime_handler": cri::handler() }));
        assert!(error.contains("io.husk.kernel_params") && error.contains("allowed"), "{error}");
    });
}

#[test]
fn run_pod_rejects_host_namespaces() {
    pods("cri-host", |pods| {
        for (namespace, word) in [("network", "host's network"), ("pid", "host's pid"), ("ipc", "host's ipc")] {
            let mut config = pods.config();
            config["linux"]["security_context"]["namespace_options"] = json!({ namespace: "NODE" });
            let error = expect_error("RunPodSandbox", &json!({ "config": config, "runtime_handler": cri::handler() }));
            assert!(error.contains(word) && error.contains("not"), "{error}");
        }
        // Other pods still run after the refusals.
        let pod = pods.pod();
        assert_eq!(pod.sleeper().sh("echo ok"), "ok");
    });
}
