//! Pods whose VMM or guest hangs: requests end, nothing runs twice, and nothing stays.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use husk_e2e::case::{case, remove};
use husk_e2e::command::{Input, Running};
use husk_e2e::cri::restart::restart_containerd;
use husk_e2e::cri::{Pod, expect_error, pods, try_call_within};
use husk_e2e::disk::Disk;
use husk_e2e::{KUBERNETES, containerd, node, vm};
use nix::mount::umount;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The limit of each request that ends a container or a pod, on the test node.
const BUDGET: Duration = Duration::from_secs(45);
/// containerd's error if it has not yet handled the exit of a container (`setContainerRemoving` in container_remove.go).
const STILL_RUNNING: &str = "container is still running, to stop first";

/// A VMM process that is stopped until this value is dropped.
struct Stopped(i32);

impl Stopped {
    fn stop(pod: &Pod) -> Self {
        let pid = pod.pid();
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: kill takes two integers. If the VMM has ended, the call fails, unless the kernel has reused the PID.
        // The kernel reuses a PID only after all other PIDs.
        unsafe { libc::kill(self.0, libc::SIGCONT) };
    }
}

/// Makes a request that has to succeed within `limit`. Repeats the request only if containerd has not yet handled the
/// exit of a container. A kubelet also repeats such a request.
#[track_caller]
fn within(limit: Duration, method: &str, request: &Value) -> Duration {
    let begin = Instant::now();
    loop {
        let left = limit.saturating_sub(begin.elapsed());
        match try_call_within(left, "RuntimeService", method, request) {
            Ok(_) => return begin.elapsed(),
            Err(error) if error.to_string().contains(STILL_RUNNING) && begin.elapsed() < limit => {}
            Err(error) => panic!("{method}: {error}"),
        }
        thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn pod_with_a_stopped_vmm_can_be_stopped_and_removed() {
    pods("cri-hang", |pods| {
        let (pod, witness) = (pods.pod(), pods.pod());
        let (container, other, neighbour) = (pod.sleeper(), pod.sleeper(), witness.sleeper());
        let stopped = Stopped::stop(&pod);
        // The statistics of the hung pod do not hold up the statistics of the neighbour.
        let stats = try_call_within(BUDGET, "RuntimeService", "ListContainerStats", &json!({})).unwrap();
        assert!(stats["stats"].to_string().contains(&neighbour.id), "{stats}");
        // A kubelet sends SIGTERM first, and does not send SIGKILL if SIGTERM fails.
        let request = json!({ "container_id": container.id, "timeout": 2 });
        let stop = within(BUDGET, "StopContainer", &request);
        assert_eq!(container.wait().0, 137);
        assert_eq!(other.wait().0, 137);
        let pod_id = json!({ "pod_sandbox_id": pod.id });
        let stop_pod = within(BUDGET, "StopPodSandbox", &pod_id);
        let remove_pod = within(BUDGET, "RemovePodSandbox", &pod_id);
        println!("StopContainer {stop:.1?}, StopPodSandbox {stop_pod:.1?}, RemovePodSandbox {remove_pod:.1?}");
        let gone = node::eventually(BUDGET, || vm::vmm_pids_of(&pod.id).is_empty().then_some(()));
        assert!(gone.is_some(), "the VMM process still runs");
        assert_eq!(neighbour.sh("echo here"), "here");
        drop(stopped);
    });
}

#[test]
#[ignore = "long: a part of pod_with_a_stopped_vmm_can_be_stopped_and_removed"]
fn pod_with_a_stopped_vmm_can_be_removed_at_once() {
    pods("cri-hang-remove", |pods| {
        let pod = pods.pod();
        let _container = pod.sleeper();
        let _stopped = Stopped::stop(&pod);
        let pod_id = json!({ "pod_sandbox_id": pod.id });
        within(BUDGET, "StopPodSandbox", &pod_id);
        within(BUDGET, "RemovePodSandbox", &pod_id);
    });
}

#[test]
fn container_of_a_stopped_vmm_survives_a_restart_of_containerd() {
    pods("cri-hang-restart", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let before = vm::vmm_pids_of(&pod.id);
        let stopped = Stopped::stop(&pod);
        restart_containerd();
        drop(stopped);
        // containerd still knows the container. Otherwise the kubelet would start a second copy beside the first one.
        let state = || container.status()["state"].clone();
        assert_eq!(state(), json!("CONTAINER_RUNNING"));
        // The agent answers the requests that it got while the VMM was stopped before it starts the exec.
        assert_eq!(container.sh("echo here"), "here");
        assert_eq!((state(), vm::vmm_pids_of(&pod.id)), (json!("CONTAINER_RUNNING"), before));
    });
}

#[test]
fn container_that_containerd_has_given_up_is_dead() {
    pods("cri-hang-shim", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let [shim] = vm::shim_pids_of(&pod.id)[..] else { panic!("expected exactly one shim") };
        node::send_signal(shim, Signal::SIGSTOP);
        restart_containerd();
        // The kubelet may now start a second copy of the container.
        let state = container.status()["state"].clone();
        assert_ne!(state, json!("CONTAINER_RUNNING"), "containerd has not given the container up");
        let dead = node::eventually(BUDGET, || vm::vmm_pids_of(&pod.id).is_empty().then_some(()));
        let _ = kill(Pid::from_raw(shim), Signal::SIGCONT);
        assert!(dead.is_some(), "the container runs on, although containerd has given it up\n{}", node::log_tail(60));
    });
}

#[test]
fn client_that_is_killed_during_create_or_start_leaves_nothing() {
    case("hang-client", |case| {
        let fifos = || fs::read_dir("/run/containerd/fifo").into_iter().flatten().map(|entry| entry.unwrap().path());
        let before: Vec<_> = fifos().collect();
        // A start takes a few seconds on the test node. The last client is killed when its container runs.
        for step in 0..6 {
            let run = case.sh("sleep 100000");
            let mut client = run.command().spawn().unwrap();
            thread::sleep(Duration::from_millis(800 * step));
            client.kill().unwrap();
            client.wait().unwrap();
            // The client would have deleted its container.
            remove(run.id());
            let gone = node::eventually(BUDGET, || {
                let left = vm::vmm_pids_of(run.id()).len() + vm::shim_pids_of(run.id()).len();
                (left == 0).then_some(())
            });
            assert!(gone.is_some(), "a client that was killed after {} ms left a shim or a VMM", 800 * step);
        }
        // To read the image's files, a client mounts the image for a moment (WithTempMount of containerd's client).
        for line in fs::read_to_string("/proc/mounts").unwrap().lines() {
            let point = line.split_whitespace().nth(1).unwrap();
            if point.starts_with("/tmp/containerd-mount") {
                umount(point).unwrap();
                fs::remove_dir(point).unwrap();
            }
        }
        // A client makes the fifos of its container, and removes them at its end.
        fifos().filter(|path| !before.contains(path)).for_each(|path| fs::remove_dir_all(path).unwrap());
    });
}

#[test]
fn volume_that_hangs_stops_only_the_container_that_uses_it() {
    pods("cri-hang-volume", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 64);
        let (frozen, other) = (pods.dir().join("frozen"), pods.dir().join("other"));
        let mounted = disk.format().mount(&frozen, "defaults");
        fs::create_dir(&other).unwrap();
        let pod = pods.pod();
        let with_volume = |script: &str, volume: &Path| {
            let mut config = pod.sh(script);
            config["mounts"] = json!([{ "container_path": "/volume", "host_path": volume }]);
            config
        };
        // There are more writers than the share has threads.
        let writers = "for i in 0 1 2 3 4 5 6 7; do while :; do echo x >> /volume/$i; sleep 0.1; done & done; wait";
        let writer = pod.start(&with_volume(writers, &frozen));
        let worker = pod.start(&with_volume("trap 'exit 0' TERM; sleep 100000 & wait", &other));
        let all_write = node::eventually(BUDGET, || frozen.join("7").exists().then_some(()));
        assert!(all_write.is_some(), "the writers do not run");
        let hang = mounted.freeze();
        // More threads hang than the share has at its start.
        let vmm = pod.pid();
        let hung = || vm::waiting_threads(vmm) > usize::from(husk_config::Config::default().virtio_fs_workers);
        let all_hang = node::eventually(BUDGET, || hung().then_some(()));
        assert!(all_hang.is_some(), "the writers do not hang");
        let begin = Instant::now();
        for number in 0..3 {
            let script = format!("echo {number} > /volume/f && mv /volume/f /file && cat /file && ls -lR /bin > /list");
            assert_eq!(worker.sh(&script), number.to_string());
        }
        assert_eq!(pod.sleeper().sh("echo here"), "here");
        assert!(begin.elapsed() < BUDGET, "the work of other containers took {:?}", begin.elapsed());
        let cgroup = cgroup(&pod);
        let request = json!({ "container_id": writer.id, "timeout": 1 });
        let stop = within(BUDGET, "StopContainer", &request);
        assert_eq!(writer.wait().0, 137);
        let pod_id = json!({ "pod_sandbox_id": pod.id });
        let stop_pod = within(BUDGET, "StopPodSandbox", &pod_id);
        let remove_pod = within(BUDGET, "RemovePodSandbox", &pod_id);
        println!("StopContainer {stop:.1?}, StopPodSandbox {stop_pod:.1?}, RemovePodSandbox {remove_pod:.1?}");
        drop(hang);
        let gone =
            node::eventually(BUDGET, || (vm::shim_pids_of(&pod.id).is_empty() && !cgroup.exists()).then_some(()));
        assert!(gone.is_some(), "the shim, the VMM process or their cgroup is still there");
    });
}

#[test]
fn exec_in_a_container_that_has_frozen_itself_can_be_killed() {
    pods("cri-hang-frozen", |pods| {
        let privileged = |mut config: Value| {
            config["linux"]["security_context"]["privileged"] = json!(true);
            config
        };
        let pod = pods.run(privileged(pods.config()));
        // A privileged container has no cgroup namespace.
        let freeze =
            "echo up; echo 1 > /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cgroup.freeze; exec sleep 100000";
        let container = pod.start(&privileged(pod.sh(freeze)));
        container.wait_for("up");
        // `ctr` and not ExecSync: if the client gives up while the start hangs, containerd does not send SIGKILL.
        let tasks = |args: &[&str]| {
            let mut ctr = Command::new("ctr");
            ctr.args(["-n", KUBERNETES, "tasks"]).args(args);
            Running::start(ctr, Input::Null)
        };
        let exec = tasks(&["exec", "--exec-id", "stuck", &container.id, "sleep", "100000"]);
        let pids = || containerd::pids(KUBERNETES, &container.id).unwrap();
        let stuck = node::eventually(BUDGET, || (pids() == 2).then_some(()));
        assert!(stuck.is_some(), "the exec has no process: {} PIDs", pids());
        tasks(&["kill", "--signal", "SIGKILL", "--exec-id", "stuck", &container.id]).wait().expect_clean();
        exec.wait_within(BUDGET).expect_code(137);
        let killed = node::eventually(BUDGET, || (pids() == 1).then_some(()));
        assert!(killed.is_some(), "the exec still has a process: {} PIDs", pids());
        within(BUDGET, "StopContainer", &json!({ "container_id": container.id, "timeout": 1 }));
        assert_eq!(container.wait().0, 137);
        // The shim has not ended the pod.
        assert_eq!(pod.sleeper().sh("echo here"), "here");
    });
}

/// Returns the directory of the pod's cgroup.
fn cgroup(pod: &Pod) -> PathBuf {
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", vm::shim_pids_of(&pod.id)[0])).unwrap();
    Path::new("/sys/fs/cgroup").join(cgroup.trim().trim_start_matches("0::/"))
}

#[test]
fn pod_whose_vmm_is_killed_by_the_oom_killer_says_so() {
    pods("cri-hang-oom", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        // The limit is above the current use. A write of a lower limit would kill the shim, too: the kernel goes on to
        // the next process before the first one has released its memory (`memory_max_write` in mm/memcontrol.c).
        let used: u64 = fs::read_to_string(cgroup(&pod).join("memory.current")).unwrap().trim().parse().unwrap();
        fs::write(cgroup(&pod).join("memory.max"), (used + (8 << 20)).to_string()).unwrap();
        let _ = container.try_exec(&["dd", "if=/dev/zero", "of=/dev/shm/fill", "bs=1M", "count=100"]);
        assert_eq!(container.wait(), (137, "OOMKilled".to_owned()));
        let reason = "the node's OOM killer killed the VMM process";
        assert!(node::log_tail(100).contains(reason), "{}", node::log_tail(40));
    });
}

/// Returns the number of threads that run blocking calls of the shim (`shim/src/blocking.rs`).
fn worker_threads(shim: i32) -> usize {
    let threads = fs::read_dir(format!("/proc/{shim}/task")).unwrap().flatten();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    names.filter(|name| name.trim() == "husk-shim").count()
}

#[test]
fn pod_without_free_pids_refuses_a_container_and_runs_on() {
    pods("cri-hang-pids", |pods| {
        let pod = pods.pod();
        let first = pod.sleeper();
        let second = pod.create(&pod.sh("exec sleep 100000"));
        let cgroup = cgroup(&pod);
        // Idle threads of the shim end after a second. Without them, the shim needs a new thread.
        let no_thread = || worker_threads(vm::shim_pids_of(&pod.id)[0]) == 0;
        let ended = node::eventually(BUDGET, || no_thread().then_some(()));
        assert!(ended.is_some(), "the idle threads of the shim do not end");
        let limit = fs::read_to_string(cgroup.join("pids.max")).unwrap();
        fs::write(cgroup.join("pids.max"), fs::read(cgroup.join("pids.current")).unwrap()).unwrap();
        let error = expect_error("StartContainer", &json!({ "container_id": second.id }));
        fs::write(cgroup.join("pids.max"), limit).unwrap();
        assert!(error.contains("failed to start a thread"), "{error}");
        assert_eq!(first.sh("echo here"), "here");
    });
}
