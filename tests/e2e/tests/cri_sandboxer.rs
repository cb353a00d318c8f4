//! Pods whose sandbox controller is the shim: containerd 2.x with `sandboxer = "shim"`.
//!
//! Requires: containerd 2

use std::time::Duration;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use husk_e2e::cri::{Pod, annotations, expect_error, is_containerd_2, pod::Pods, pods_with_handler, stats, try_call};
use husk_e2e::{KUBERNETES, Running, command::Input, containerd, node, shim, vm};
use nix::sys::signal::Signal;
use protobuf::Message;
use serde_json::{Value, json};

/// The handler of deploy/containerd/husk-2.toml.
const HANDLER: &str = "husk-sandbox";

#[track_caller]
fn pods(name: &str, body: impl FnOnce(&Pods)) {
    pods_with_handler(name, HANDLER, body);
}

/// Waits until CRI reports that the pod is not ready. Repeats requests that fail, because a request
/// fails just after the shim's death.
#[track_caller]
fn wait_until_not_ready(pod: &Pod) {
    let request = json!({ "pod_sandbox_id": pod.id });
    let gone = node::eventually(Duration::from_secs(20), || {
        let answer = try_call("PodSandboxStatus", &request).ok()?;
        (answer["status"]["state"] == "SANDBOX_NOTREADY").then_some(())
    });
    assert!(gone.is_some(), "the pod is still ready");
}

#[test]
fn pod_and_container_statistics_are_those_of_the_guest() {
    pods("sb-stats", |pods| {
        let pod = pods.pod();
        stats::check_cpu_memory_and_pids(&pod);
        stats::check_network(&pod);
    });
}

#[test]
fn configuration_of_the_node_limits_annotations() {
    pods("sb-annotations", annotations::check_allow_list);
}

#[test]
fn husk_ps_lists_pod_that_runs_without_sandbox_container_or_task() {
    pods("sb-life", |pods| {
        let pod = pods.pod();
        assert!(pod.is_ready());
        let vmms = vm::vmm_pids();
        assert_eq!(vmms, [pod.pid()]);
        // containerd has neither a container nor a task for the sandbox.
        assert_eq!(containerd::containers(KUBERNETES).unwrap(), Vec::<String>::new());
        assert_eq!(containerd::tasks(KUBERNETES).unwrap(), []);
        assert!(is_containerd_2());
        assert_listed(&pod);
        // The pod stays after its only container is removed, and accepts new containers.
        let first = pod.start(&pod.sh("echo one; exit 3"));
        assert_eq!(first.wait(), (3, "Error".into()));
        assert!(first.log().contains("stdout F one"), "{}", first.log());
        first.remove();
        assert!(pod.is_ready());
        let (a, b) = (pod.sleeper(), pod.sleeper());
        assert_eq!(a.sh("echo hello"), "hello");
        let failed = b.exec(&["sh", "-c", "echo bad >&2; exit 4"]);
        assert_eq!((failed.code, failed.err.as_str()), (4, "bad\n"));
        a.stop(10);
        assert_eq!(a.wait().0, 0);
        b.stop(0);
        assert_eq!(b.wait().0, 137);
        a.remove();
        b.remove();
        let again = pod.sleeper();
        assert_eq!(again.sh("echo again"), "again");
        assert_eq!(vm::vmm_pids(), vmms, "the pod no longer has its first VM");
        pod.create(&pod.sh("true")).remove();
        // The pod is stopped while a container runs.
        pod.stop();
        assert!(!pod.is_ready());
        assert_eq!(again.wait().0, 137);
        assert!(vm::vmm_pids().is_empty(), "a stopped pod still has a VM");
        pod.stop();
        pod.remove();
        assert!(vm::shim_pids_of(&pod.id).is_empty(), "a removed pod still has a shim");
        pod.remove();
    });
}

#[test]
fn sandbox_configures_hostname_dns_sysctls_size_and_network() {
    pods("sb-files", |pods| {
        let mut config = pods.config();
        config["hostname"] = json!("the-pod");
        config["linux"]["sysctls"] = json!({ "net.ipv4.ip_unprivileged_port_start": "80" });
        config["linux"]["resources"] = json!({ "cpu_quota": 150_000, "cpu_period": 100_000 });
        config["annotations"] = json!({ "io.husk.memory_mib": "300" });
        config["dns_config"] = json!({ "servers": ["10.0.0.53"], "searches": ["e2e.test"], "options": ["ndots:2"] });
        let pod = pods.run(config);
        let (a, b) = (pod.sleeper(), pod.sleeper());
        let namespaces = "for kind in net ipc uts; do readlink /proc/self/ns/$kind; done";
        let address = pod.addresses()[0].to_string();
        let of_a = a.sh(&format!(
            "{namespaces}; hostname; cat /etc/hostname; echo shared > /dev/shm/file; cat /etc/resolv.conf /etc/hosts"
        ));
        let (links, files) = of_a.split_at(of_a.find("the-pod").unwrap_or_default());
        let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        let expected = format!("the-pod\nthe-pod\nsearch e2e.test\nnameserver 10.0.0.53\noptions ndots:2\n{hosts}");
        assert_eq!(files, expected.trim_end());
        let of_b = b.sh(&format!(
            "{namespaces}; cat /dev/shm/file /proc/sys/net/ipv4/ip_unprivileged_port_start
             nproc; awk '/MemTotal/ {{print int($2 / 1024)}}' /proc/meminfo"
        ));
        let seen = of_b.strip_prefix(links).and_then(|rest| rest.strip_prefix("shared\n80\n"));
        let seen = seen.unwrap_or_else(|| {
            panic!("expected the namespaces {links} first, but the second container printed {of_b}")
        });
        let (cpus, mib) = seen.split_once('\n').unwrap();
        assert!(cpus == "2" && (250..300).contains(&mib.parse::<u64>().unwrap()), "{seen}");
        // The pod has the network that CNI configured.
        let seen = a.sh("ip -o addr show dev eth0
             nc -l -p 8080 -e echo through > /dev/null 2>&1 &
             until netstat -ltn | grep -q :8080; do sleep 0.1; done");
        assert!(seen.contains(&address), "{seen}");
        let mut command = std::process::Command::new("busybox");
        command.args(["nc", &address, "8080"]);
        Running::start(command, Input::Null).wait().expect_out("through");
    });
}

#[test]
fn sandbox_service_implements_all_requests() {
    pods("sb-service", |pods| {
        let pod = pods.pod();
        let (client, sandbox_id) = (shim::sandbox_client(&pod.id), pod.id.clone());
        let id = || sandbox_id.clone();
        let ping = |sandbox_id| {
            client.ping_sandbox(shim::context(), &PingRequest { sandbox_id, ..Default::default() }).map(drop)
        };
        ping(id()).unwrap();
        assert!(ping("other".into()).unwrap_err().to_string().contains("not found"));
        let request = PlatformRequest { sandbox_id: id(), ..Default::default() };
        let platform = client.platform(shim::context(), &request).unwrap().platform;
        assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));
        let request = SandboxMetricsRequest { sandbox_id: id(), ..Default::default() };
        let metric = client.sandbox_metrics(shim::context(), &request).unwrap().metrics;
        assert_eq!(
            (metric.id.as_str(), metric.data.type_url.as_str()),
            (id().as_str(), "io.containerd.cgroups.v2.Metrics")
        );
        let metrics = Metrics::parse_from_bytes(&metric.data.value).unwrap();
        assert!(metrics.memory.usage > 1 << 20 && metrics.cpu.usage_usec > 0, "{metrics:?}");
        // Sandbox metrics have the same fields as a container's.
        assert!(metrics.io.is_some() && metrics.memory_events.is_some(), "{metrics:?}");
        assert!(metrics.memory.swap_limit > 0 && metrics.pids.current > 0 && metrics.memory.anon > 0, "{metrics:?}");
        let request = CreateSandboxRequest { sandbox_id: id(), ..Default::default() };
        let error = client.create_sandbox(shim::context(), &request).unwrap_err();
        assert!(error.to_string().contains("already exists"), "{error}");
        // A second StartSandbox request returns the pid and time of the first start.
        let request = StartSandboxRequest { sandbox_id: id(), ..Default::default() };
        let started = client.start_sandbox(shim::context(), &request).unwrap();
        assert_eq!(started.pid, pod.pid().unsigned_abs());
        assert!((now() - 300..=now()).contains(&started.created_at.seconds), "{started:?}");
        let request = StartSandboxRequest { sandbox_id: "other".into(), ..Default::default() };
        assert!(client.start_sandbox(shim::context(), &request).unwrap_err().to_string().contains("not found"));
        let request = SandboxStatusRequest { sandbox_id: id(), verbose: true, ..Default::default() };
        let status = client.sandbox_status(shim::context(), &request).unwrap();
        assert_eq!((status.sandbox_id.as_str(), status.state.as_str()), (id().as_str(), "SANDBOX_READY"));
        assert_eq!((status.pid, &status.created_at), (started.pid, &started.created_at));
        assert!(status.exited_at.is_none() && status.info["info"].contains("runtimeSpec"), "{status:?}");
        // A WaitSandbox request returns the sandbox's exit status and exit time. A requested stop has exit status 0.
        let waiter = {
            let request = WaitSandboxRequest { sandbox_id: id(), ..Default::default() };
            let client = shim::sandbox_client(&pod.id);
            std::thread::spawn(move || client.wait_sandbox(shim::context(), &request).unwrap())
        };
        pod.stop();
        let exit = waiter.join().unwrap();
        assert!(exit.exit_status == 0 && exit.exited_at.seconds > 0, "{exit:?}");
        assert!(ping(id()).is_err());
        let request = SandboxStatusRequest { sandbox_id: id(), ..Default::default() };
        let status = client.sandbox_status(shim::context(), &request).unwrap();
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));
        assert_eq!((&status.created_at, &status.exited_at), (&started.created_at, &exit.exited_at));
        // Further StopSandbox and WaitSandbox requests succeed.
        let request = StopSandboxRequest { sandbox_id: id(), ..Default::default() };
        client.stop_sandbox(shim::context(), &request).unwrap();
        client.stop_sandbox(shim::context(), &request).unwrap();
        let request = WaitSandboxRequest { sandbox_id: id(), ..Default::default() };
        assert_eq!(client.wait_sandbox(shim::context(), &request).unwrap().exited_at, exit.exited_at);
        pod.remove();
    });
}

/// Returns the seconds since 1970.
fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

#[test]
fn shutdown_sandbox_returns_after_the_vm_and_its_state_are_removed() {
    pods("sb-shutdown", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let vmm = pod.pid();
        let requests: Vec<_> = (0..4)
            .map(|_| {
                let (client, sandbox_id) = (shim::sandbox_client(&pod.id), pod.id.clone());
                std::thread::spawn(move || {
                    let state = format!("/run/husk/{KUBERNETES}/{sandbox_id}");
                    let request = ShutdownSandboxRequest { sandbox_id, ..Default::default() };
                    let answer = client.shutdown_sandbox(shim::context(), &request).map(drop);
                    (answer.map_err(|error| error.to_string()), std::path::Path::new(&state).exists())
                })
            })
            .collect();
        for thread in requests {
            assert_eq!(
                thread.join().unwrap(),
                (Ok(()), false),
                "the request must succeed, and the state directory must no longer exist"
            );
        }
        assert!(!vm::vmm_pids().contains(&vmm), "the VMM still runs");
        wait_until_not_ready(&pod);
        assert!([137, 255].contains(&container.wait().0));
        pod.stop();
        pod.remove();
    });
}

/// Asserts that `husk ps` and `husk trace` show a pod that has no container yet.
#[track_caller]
fn assert_listed(pod: &Pod) {
    let husk = |args: &[&str]| {
        let output = std::process::Command::new("husk").args(args).output().unwrap();
        assert!(output.status.success(), "husk {args:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let list: serde_json::Value = serde_json::from_str(&husk(&["ps", "--output", "json"])).unwrap();
    let listed = list.as_array().unwrap().iter().find(|one| one["id"] == pod.id.as_str()).unwrap();
    let name = format!("e2e/{}", pod.config["metadata"]["name"].as_str().unwrap());
    assert_eq!(
        (&listed["pod"], &listed["vmm_pid"], &listed["running"]),
        (&json!(name), &json!(pod.pid()), &json!(true))
    );
    let waterfall = husk(&["trace", &name]);
    assert!(waterfall.starts_with(&format!("k8s.io/{}\n", pod.id)), "{waterfall}");
    assert!(waterfall.contains("agent connected") && waterfall.contains("sandbox started"), "{waterfall}");
}

#[test]
fn pod_is_not_ready_and_status_names_the_reason_after_its_vmm_is_killed() {
    pods("sb-death", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        node::send_signal(pod.pid(), Signal::SIGKILL);
        assert_eq!(container.wait(), (137, "Error".into()));
        wait_until_not_ready(&pod);
        let info: Value = serde_json::from_str(pod.status()["info"]["info"].as_str().unwrap()).unwrap();
        let reason = info["vmEndReason"].as_str().unwrap_or_default();
        assert!(reason.starts_with("the VMM process ended with signal: 9 (SIGKILL)"), "{info}");
        pod.stop();
        pod.remove();
    });
}

#[test]
fn vm_ends_and_pod_is_not_ready_after_its_shim_is_killed() {
    pods("sb-shim", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let shims = vm::shim_pids_of(&pod.id);
        assert_eq!(shims.len(), 1, "a pod must have exactly one shim");
        node::send_signal(shims[0], Signal::SIGKILL);
        let gone = node::eventually(Duration::from_secs(20), || vm::vmm_pids().is_empty().then_some(()));
        assert!(gone.is_some(), "the VM outlives its shim");
        wait_until_not_ready(&pod);
        // containerd may report the end of the pod before the end of the container. containerd does not
        // remove a running container. Therefore the test waits for the container's exit.
        assert!([137, 255].contains(&container.wait().0));
        pod.stop();
        pod.remove();
    });
}

#[test]
fn run_pod_sandbox_rejects_host_namespaces_and_disallowed_annotations() {
    pods("sb-refused", |pods| {
        // The test does not request the host's network. With `sandboxer = "shim"`, containerd 2.1.9 would crash on this
        // request, because its `NewBundle` gets no specification (docs/install.md).
        for (namespace, word) in [("pid", "host's pid namespace"), ("ipc", "host's ipc namespace")] {
            let mut config = pods.config();
            config["linux"]["security_context"]["namespace_options"] = json!({ namespace: "NODE" });
            let error = expect_error("RunPodSandbox", &json!({ "config": config, "runtime_handler": HANDLER }));
            assert!(error.contains(word) && error.contains("not"), "{error}");
        }
        let mut config = pods.config();
        config["annotations"] = json!({ "io.husk.kernel_params": "quiet" });
        let error = expect_error("RunPodSandbox", &json!({ "config": config, "runtime_handler": HANDLER }));
        assert!(error.contains("io.husk.kernel_params") && error.contains("allowed"), "{error}");
    });
}
