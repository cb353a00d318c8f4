//! Tests the VMM's jail and the shim's confinement through the node's /proc.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::Command;
use std::thread;
use std::time::Duration;

use husk_e2e::command::run_ctr;
use husk_e2e::cri::pod::pods;
use husk_e2e::events::Events;
use husk_e2e::{NAMESPACE, case, containerd, node, vm};
use nix::sys::ptrace;
use nix::sys::stat::makedev;
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

#[test]
fn vmm_sees_only_the_share_and_its_threads_have_few_capabilities() {
    case("jail", |case| {
        let container = case.sleeper();
        let vmm = container.pid();
        // The VMM's root is the share, which contains nothing of the node.
        let root = fs::read_dir(format!("/proc/{vmm}/root")).unwrap();
        let names: Vec<String> = root.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| ["bin", "etc", "proc", "sys", "dev"].contains(&name.as_str())), "{names:?}");
        let mounts = fs::read_to_string(format!("/proc/{vmm}/mountinfo")).unwrap();
        assert!(!mounts.contains(" - proc ") && !mounts.contains(" - sysfs "), "{mounts}");
        for namespace in ["mnt", "pid", "ipc", "uts", "net", "cgroup"] {
            let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
            assert_ne!(of(&vmm.to_string()), of("self"), "the VMM is in the node's {namespace} namespace");
        }
        let limits = fs::read_to_string(format!("/proc/{vmm}/limits")).unwrap();
        for (name, expected) in [("Max core file size", "1"), ("Max locked memory", "0"), ("Max msgqueue size", "0")] {
            let values = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap().split_whitespace();
            assert!(values.take(2).eq([expected, expected]), "{name} in {limits}");
        }
        let mut file_servers = 0;
        for thread in fs::read_dir(format!("/proc/{vmm}/task")).unwrap() {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
            };
            assert_eq!(field("NoNewPrivs"), "1", "{status}");
            // 2 means that the thread has a seccomp filter (proc(5)).
            assert_eq!(field("Seccomp"), "2", "{status}");
            // CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD and SETFCAP (capabilities(7)).
            let allowed = "00000000880000db";
            assert_eq!(field("CapBnd"), allowed, "{status}");
            // The supervisor starts further file servers, which inherit its capabilities.
            let file_server = field("Name").starts_with("virtio-fs") || field("Name") == "fs-supervisor";
            file_servers += usize::from(file_server);
            let expected = if file_server { allowed } else { "0000000000000000" };
            assert_eq!((field("CapEff"), field("CapPrm")), (expected.to_owned(), expected.to_owned()), "{status}");
        }
        assert!(file_servers > 0);
        // The VMM holds the container's memory. Therefore the VMM has the container's OOM score, which is 0 by default.
        assert_eq!(fs::read_to_string(format!("/proc/{vmm}/oom_score_adj")).unwrap().trim(), "0");
        container.kill();
    });
}

/// Returns whether the VMM of a pod without disks may have this fd open. `file` is the target of the fd's link in
/// /proc. Returns true if the VMM has closed the fd.
fn is_expected_fd(vmm: i32, fd: i32, file: &str) -> bool {
    let path = format!("/proc/{vmm}/fd/{fd}");
    let Ok(metadata) = fs::metadata(&path) else { return true };
    // The VMM opens /dev/null before it enters the jail. Afterwards, this path does not exist in the VMM's root.
    let is_null = metadata.file_type().is_char_device() && metadata.rdev() == makedev(1, 3);
    let is_in_share = fs::symlink_metadata(format!("/proc/{vmm}/root{file}"))
        .is_ok_and(|share| (share.dev(), share.ino()) == (metadata.dev(), metadata.ino()));
    // The directory of the VMM's own fds, which is on a mount of its own.
    let is_fd_directory = file == "/" && statfs(path.as_str()).unwrap().filesystem_type() == PROC_SUPER_MAGIC;
    let is_pipe = file.starts_with("pipe:[");
    match fd {
        0 => is_null,
        1 | 2 => is_pipe || is_null,
        3 => file.starts_with("socket:["),
        _ if file == "/dev/kvm" || file == "/dev/net/tun" => true,
        _ if file.starts_with("anon_inode:") || file.starts_with("socket:[") || file.starts_with("/memfd:") => true,
        _ => is_pipe || is_null || is_in_share || is_fd_directory,
    }
}

#[test]
fn vmm_has_a_clean_environment_and_only_its_own_fds() {
    case("clean", |case| {
        let container = case.sleeper();
        let vmm = container.pid();
        let environment = fs::read_to_string(format!("/proc/{vmm}/environ")).unwrap();
        let mut variables = environment.split('\0').filter(|variable| !variable.is_empty());
        assert!(variables.all(|variable| variable.starts_with("HUSK_VMM_LOG=")), "{environment:?}");
        let fds = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().filter_map(|fd| {
            let path = fd.unwrap().path();
            // The VMM may close fds that the guest no longer uses.
            let file = fs::read_link(&path).ok()?.into_os_string().into_string().unwrap();
            Some((path.file_name()?.to_str()?.parse().unwrap(), file))
        });
        let fds: Vec<(i32, String)> = fds.collect();
        let unexpected: Vec<_> = fds.iter().filter(|(fd, file)| !is_expected_fd(vmm, *fd, file)).collect();
        assert!(fds.len() > 4 && unexpected.is_empty(), "the VMM has unexpected fds: {unexpected:?}, all fds: {fds:?}");
        container.kill();
    });
}

#[test]
fn shim_is_confined_but_its_launcher_is_not() {
    case("confined-shim", |case| {
        let container = case.sleeper();
        let [shim] = vm::shim_pids_of(&container.id)[..] else { panic!("expected one shim of the container") };
        let [launcher] = vm::launcher_pids_of(&container.id)[..] else { panic!("expected one launcher of the shim") };
        let field = |status: &str, name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
        };
        for thread in fs::read_dir(format!("/proc/{shim}/task")).unwrap() {
            // An idle thread may end before the test reads its status.
            let Ok(status) = fs::read_to_string(thread.unwrap().path().join("status")) else { continue };
            assert_eq!((field(&status, "NoNewPrivs"), field(&status, "Seccomp")), ("1".into(), "2".into()), "{status}");
            // shim/src/confinement/capabilities.rs lists these capabilities.
            for set in ["CapPrm", "CapEff", "CapBnd"] {
                assert_eq!(field(&status, set), "00000000892010fb", "{set}: {status}");
            }
        }
        let status = fs::read_to_string(format!("/proc/{launcher}/status")).unwrap();
        let node = fs::read_to_string("/proc/1/status").unwrap();
        assert_eq!((field(&status, "NoNewPrivs"), field(&status, "Seccomp")), ("0".into(), "0".into()), "{status}");
        assert_eq!(field(&status, "CapEff"), field(&node, "CapEff"));
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        assert_ne!(namespace(shim), namespace(1));
        assert_eq!(namespace(launcher), namespace(1));
        // In the shim's mount namespace, the directories to which the shim never writes are read-only.
        let mounts = fs::read_to_string(format!("/proc/{shim}/mountinfo")).unwrap();
        let is_read_only = |point: &str| {
            let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            fields.filter(|fields| fields[4] == point).any(|fields| fields[5].split(',').any(|flag| flag == "ro"))
        };
        for point in ["/sys", "/proc/sys"] {
            assert!(is_read_only(point), "{point} is not read-only: {mounts}");
        }
        assert!(!is_read_only("/proc") && !is_read_only("/sys/fs/cgroup"), "{mounts}");
        container.kill();
        let ended = node::eventually(Duration::from_secs(20), || {
            (!std::path::Path::new(&format!("/proc/{launcher}")).exists()).then_some(())
        });
        assert!(ended.is_some(), "the launcher still runs after its shim has ended");
        let log = node::log_tail(400);
        assert!(!log.contains("refused system call"), "{log}");
    });
}

#[test]
fn vmm_has_the_lowest_oom_score_of_its_containers() {
    pods("jail-oom", |pods| {
        let pod = pods.run(pods.config());
        let score = || {
            let vmm = vm::vmm_pids();
            assert_eq!(vmm.len(), 1);
            fs::read_to_string(format!("/proc/{}/oom_score_adj", vmm[0])).unwrap().trim().to_owned()
        };
        let start = |score: i32| {
            let mut config = pod.sh("sleep 1000");
            config["linux"]["resources"]["oom_score_adj"] = json!(score);
            pod.start(&config)
        };
        let _best_effort = start(1000);
        assert_eq!(score(), "1000");
        let burstable = start(500);
        assert_eq!(score(), "500");
        burstable.stop(0);
        burstable.remove();
        assert_eq!(score(), "1000");
    });
}

/// A stopped thread of a VMM.
struct Stopped(Pid);

impl Stopped {
    /// Stops the thread with this name.
    #[track_caller]
    fn thread(vmm: i32, name: &str) -> Self {
        let found = fs::read_dir(format!("/proc/{vmm}/task")).unwrap().find_map(|thread| {
            let path = thread.unwrap().path();
            let comm = fs::read_to_string(path.join("comm")).unwrap();
            (comm.trim() == name).then(|| path.file_name().unwrap().to_str().unwrap().parse().unwrap())
        });
        let thread = Self(Pid::from_raw(found.unwrap_or_else(|| panic!("the VMM has no thread {name}"))));
        ptrace::seize(thread.0, ptrace::Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(thread.0).unwrap();
        thread.wait();
        thread
    }

    fn wait(&self) -> WaitStatus {
        waitpid(self.0, Some(WaitPidFlag::__WALL)).unwrap()
    }

    /// Lets the thread continue. Replaces its next system call with `call`, as an attacker who controls the thread
    /// could.
    fn continue_with(self, call: i64) {
        // The first stop at a system call is before the call, because the interrupted call has ended.
        loop {
            ptrace::syscall(self.0, None).unwrap();
            if matches!(self.wait(), WaitStatus::PtraceSyscall(_)) {
                break;
            }
        }
        let mut registers = ptrace::getregs(self.0).unwrap();
        registers.orig_rax = call.cast_unsigned();
        ptrace::setregs(self.0, registers).unwrap();
        ptrace::detach(self.0, None).unwrap();
    }
}

/// One thread of each kind that every VMM has: the control thread, the device loop, a worker thread of virtio-fs and a
/// vCPU.
const THREADS: [&str; 4] = ["husk-vmm", "devices", "virtio-fs0", "vcpu0"];

#[test]
fn seccomp_violation_ends_the_vm_and_later_requests_name_thread_and_call() {
    case("violation", |case| {
        for name in THREADS {
            // `ctr run` without --detach would delete the task when the task ends.
            let run = case.sh("exec sleep 1000").keep_container().flags(&["--detach", "--null-io"]);
            let id = run.id().to_owned();
            run.output().expect_code(0);
            Stopped::thread(vm::vmm_pids_of(&id)[0], name).continue_with(libc::SYS_socket);
            let stopped = node::eventually(Duration::from_secs(20), || {
                let tasks = containerd::tasks(NAMESPACE).unwrap();
                tasks.iter().any(|task| task.id == id && task.status == "STOPPED").then_some(())
            });
            assert!(stopped.is_some(), "the task still runs: {}", node::log_tail(40));
            let reason = format!("thread {name} made system call 41 (socket)");
            assert!(node::log_tail(200).contains(&reason), "the log lacks {reason:?}: {}", node::log_tail(40));
            run_ctr(&["tasks", "exec", "--exec-id", "e", &id, "true"])
                .expect_error(&["cannot exec in a stopped state", &reason]);
            run_ctr(&["tasks", "pause", &id]).expect_error(&["cannot pause a stopped container", &reason]);
            run_ctr(&["tasks", "resume", &id]).expect_error(&["cannot resume a stopped container", &reason]);
            // As without a violation, a client can delete the task and gets the exit status.
            let deleted = run_ctr(&["tasks", "delete", &id]).expect_code(0);
            assert!(deleted.err().contains("exit code 137"), "{}", deleted.describe());
            run_ctr(&["containers", "rm", &id]).expect_code(0);
        }
    });
}

#[test]
fn exec_in_pod_during_seccomp_violation_fails_and_names_thread_and_call() {
    pods("violation-pod", |pods| {
        let events = Events::watch();
        for name in THREADS {
            let pod = pods.pod();
            let container = pod.sleeper();
            // When the exec begins, the thread is stopped. Therefore the exec cannot end before the violation.
            let stopped = Stopped::thread(vm::vmm_pids()[0], name);
            let failed = thread::scope(|scope| {
                let executing = scope.spawn(|| container.try_exec(&["sh", "-c", "sleep 100000"]));
                let seen = events.wait_for(&container.id, 3);
                assert!(seen[2].starts_with("exec-added "), "{seen:?}");
                stopped.continue_with(libc::SYS_socket);
                executing.join().unwrap()
            });
            let reason = format!("thread {name} made system call 41 (socket)");
            match failed {
                Err(status) => assert!(status.message.contains(&reason), "the error lacks {reason:?}: {status}"),
                Ok(done) => panic!("the exec did not fail: {done:?}"),
            }
            assert_eq!(container.wait(), (137, "Error".into()));
            let ended = node::eventually(Duration::from_secs(20), || (!pod.is_ready()).then_some(()));
            assert!(ended.is_some(), "the pod is still ready");
            pod.stop();
            pod.remove();
        }
    });
}

/// Runs a command of `husk`, and returns its JSON output.
fn husk(command: &str) -> Value {
    let output = Command::new("husk").args([command, "--output", "json"]).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn seccomp_mode_is_reported_by_husk_and_mode_log_is_logged_once_for_each_pod() {
    let warnings =
        || node::log_tail(usize::MAX).matches("the seccomp filters of the VMM and the shim only log").count();
    for (mode, status, expected) in [("enforce", "ok", 0), ("log", "warn", 1)] {
        let _config = node::Config::set(&format!("seccomp = {mode:?}\n"));
        let report = husk("check");
        let findings = report["findings"].as_array().unwrap();
        let status_of = |name: &str| &findings.iter().find(|finding| finding["name"] == name).unwrap()["status"];
        assert_eq!((status_of("seccomp"), status_of("seccomp mode")), (&json!("ok"), &json!(status)), "{report}");
        let before = warnings();
        case(&format!("seccomp-{mode}"), |case| {
            let container = case.sleeper();
            let list = husk("ps");
            let pod = list.as_array().unwrap().iter().find(|pod| pod["id"] == container.id.as_str());
            assert_eq!(pod.unwrap()["configured_seccomp"], mode, "{list}");
            container.kill();
        });
        assert_eq!(warnings() - before, expected, "mode {mode}: {}", node::log_tail(40));
    }
}
