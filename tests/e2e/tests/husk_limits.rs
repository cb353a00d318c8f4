//! Limits on what one pod can use of the node: rate limits, and limits on threads, open files, memory and disk.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_e2e::cri::pods;
use husk_e2e::disk::{Disk, run_on_node};
use husk_e2e::{node, vm};
use nix::sys::quota::{Dqblk, QuotaType, QuotaValidFlags, quotactl_set};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const MIB: u64 = 1 << 20;

/// The configuration limits the share and the interface to 2 MB per second each. An annotation halves the limit of the
/// share.
#[test]
fn rate_limits_of_the_configuration_and_of_annotations_reach_the_devices() {
    pods("husk-rate-limits", |pods| {
        let _config = node::Config::set(
            "virtio_fs_rate_limit = { bytes_per_sec = 2000000 }\n\
             net_transmit_rate_limit = { bytes_per_sec = 2000000 }\n\
             allowed_annotations = [\"io.husk.virtio_fs_rate_limit\"]\n",
        );
        let with = |value: &str| {
            let mut config = pods.config();
            config["annotations"] = json!({ "io.husk.virtio_fs_rate_limit": value });
            config
        };
        let error = pods.expect_error(&with("bytes_per_sec=2000001"));
        assert!(error.contains("allows at most 2000000"), "{error}");
        let mut config = pods.config();
        config["annotations"] = json!({ "io.husk.net_transmit_rate_limit": "bytes_per_sec=1000000" });
        let error = pods.expect_error(&config);
        assert!(error.contains("net_transmit_rate_limit") && error.contains("allowed"), "{error}");

        let pod = pods.run(with("bytes_per_sec=1000000"));
        let container = pod.sleeper();
        // The test checks only minimum durations, because a busy node can be slow. The burst is a tenth of the rate.
        let begin = Instant::now();
        container.sh("dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null");
        let least = Duration::from_secs_f64((3 * MIB - 100_000) as f64 / 1e6);
        assert!(begin.elapsed() >= least, "writing 3 MiB took {:?}, expected at least {least:?}", begin.elapsed());
        let listener = std::net::TcpListener::bind("10.88.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let receiver = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
        });
        let begin = Instant::now();
        container.sh(&format!("dd if=/dev/zero bs=1M count=4 2>/dev/null | nc 10.88.0.1 {port}"));
        assert_eq!(receiver.join().unwrap(), 4 * MIB);
        let least = Duration::from_secs_f64((4 * MIB - 200_000) as f64 / 2e6);
        assert!(begin.elapsed() >= least, "transmitting 4 MiB took {:?}, expected at least {least:?}", begin.elapsed());
    });
}

/// When a thread that waits with a timeout is stopped and continued, the kernel restarts the wait with the system call
/// restart_syscall. If the seccomp filter of a disk's thread did not allow this system call, the VMM would end.
#[test]
fn disk_with_a_rate_limit_survives_sigstop_and_sigcont_of_its_vmm() {
    pods("husk-stop", |pods| {
        let _config = node::Config::set("disk_rate_limit = { ops_per_sec = 4, burst_ops = 1 }\n");
        let disk = Disk::new(&pods.dir().join("disk"), 16);
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "rw" }]);
        let container = pod.start(&config);
        let [vmm] = vm::vmm_pids()[..] else { panic!("expected one VMM") };
        // Each of the 20 reads is one request, and the limit is 4 requests per second. Therefore, the disk's thread
        // waits for the rate limit most of the time.
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| container.sh("dd if=/dev/xvda of=/dev/null bs=4k count=20 iflag=direct 2>&1"));
            while !reader.is_finished() {
                for signal in [Signal::SIGSTOP, Signal::SIGCONT] {
                    kill(Pid::from_raw(vmm), signal).unwrap();
                    std::thread::sleep(Duration::from_millis(300));
                }
            }
        });
        assert!(
            begin.elapsed() >= Duration::from_secs(4),
            "20 requests took {:?}, expected at least 4 s",
            begin.elapsed()
        );
    });
}

/// Returns the directory of a process's cgroup. The node has cgroup v2.
fn cgroup(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    Path::new("/sys/fs/cgroup").join(path)
}

/// Returns the soft and the hard fd limit of a process.
fn fd_limits(pid: i32) -> [u64; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let mut words = files.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX));
    [words.next().unwrap(), words.next().unwrap()]
}

#[test]
fn pod_without_limits_has_bounded_threads_files_memory_and_state() {
    pods("husk-bounds", |pods| {
        let pod = pods.pod();
        let containers = [pod.sleeper(), pod.sleeper()];
        let [vmm] = vm::vmm_pids()[..] else { panic!("expected one VMM") };
        let group = cgroup(vmm);
        let number = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().parse::<u64>();
        assert_eq!(number("pids.max"), Ok(2048));
        let tasks = number("pids.current").unwrap();
        assert!(tasks < 64, "an idle pod has {tasks} threads on the node, expected fewer than 64");
        // The shim sets the limit while the VM boots. The VM has 1024 MiB by default. The limit also covers the
        // overhead and, because the containers have no memory limit, 2 GiB more (`UNLIMITED_EXTRA` of
        // shim/src/resources/limits.rs).
        let limit = node::eventually(Duration::from_secs(20), || number("memory.max").ok());
        let limit = limit.unwrap_or_else(|| panic!("the pod has no memory limit on the node\n{}", node::log_tail(20)));
        assert!((3072 * MIB..3200 * MIB).contains(&limit), "memory.max is {limit} bytes, expected 3072 to 3200 MiB");
        // containerd has no fd limit of its own, and the node's sysctls can allow a billion fds.
        let sysctl = |name: &str| fs::read_to_string(format!("/proc/sys/fs/{name}")).unwrap().trim().parse::<u64>();
        let most = 1_000_000.min(sysctl("nr_open").unwrap()).min(sysctl("file-max").unwrap() / 4);
        assert_eq!(fd_limits(vmm), [most; 2], "the fd limits of the VMM");
        assert_eq!(fd_limits(vm::shim_pids_of(&pod.id)[0]), [16_384; 2], "the fd limits of the shim");
        // The number of the shim's state files does not grow with containers or execs. The directory's other entries
        // are mount points, which `state` does not count.
        let state = || {
            let entries = fs::read_dir(format!("/run/husk/k8s.io/{}", pod.id)).unwrap();
            let metadata = entries.map(|entry| entry.unwrap().metadata().unwrap());
            let lengths: Vec<u64> = metadata.filter(fs::Metadata::is_file).map(|metadata| metadata.len()).collect();
            (lengths.len(), lengths.iter().sum::<u64>())
        };
        let (files, _) = state();
        for number in 0..5 {
            containers[number % 2].sh("true");
        }
        let (files_after, bytes) = state();
        assert!(
            files == files_after && bytes < 64 << 10,
            "expected {files} state files with less than 64 KiB after the execs, got {files_after} with {bytes} bytes"
        );
    });
}

/// The kubelet sets the pids limit in the pod's cgroup on the node. The pod's processes run in the guest. Therefore,
/// the guest has to enforce this limit.
#[test]
fn pod_pids_limit_of_the_kubelet_applies_in_the_guest() {
    const LIMIT: usize = 100;
    pods("husk-pids", |pods| {
        let config = pods.config();
        let parent = config["linux"]["cgroup_parent"].as_str().unwrap();
        let parent = Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/'));
        fs::create_dir_all(&parent).unwrap();
        for controlled in [Path::new("/sys/fs/cgroup"), parent.parent().unwrap()] {
            fs::write(controlled.join("cgroup.subtree_control"), "+pids").unwrap();
        }
        fs::write(parent.join("pids.max"), LIMIT.to_string()).unwrap();
        let pod = pods.run(config);
        let container = pod.sleeper();
        // The exec ends only when no process has the exec's output open. Therefore, the background processes write to
        // /dev/null.
        let script =
            format!("n=0; while [ $n -lt {LIMIT} ]; do sleep 1000 > /dev/null 2>&1 & n=$((n + 1)); echo $n; done");
        let done = container.exec(&["sh", "-c", &script]);
        let started = done.out.lines().count();
        assert!(
            done.code != 0 && (LIMIT / 2..LIMIT).contains(&started),
            "the exec must fail after 50 to 99 processes, but started {started}: {done:?}"
        );
    });
}

/// A process with CAP_SYS_RESOURCE could exceed the quota. Therefore, the VMM must not have this capability when it
/// serves the share.
#[test]
fn disk_quota_of_the_node_holds_for_a_pods_users() {
    pods("husk-quota", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 32);
        run_on_node(&["mkfs.ext4", "-q", "-O", "quota", &disk.device]);
        let volume = pods.dir().join("volume");
        // Without the option usrquota, ext4 counts the blocks of each user, but does not enforce the quota
        // (ext4_enable_quotas() in fs/ext4/super.c).
        let _mounted = disk.mount(&volume, "usrquota");
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
        let mut quota = Dqblk::default();
        // The limit is a number of blocks of 1 KiB.
        quota.set_blocks_hard_limit(1024);
        quotactl_set(QuotaType::USRQUOTA, Path::new(&disk.device), 1000, &quota, QuotaValidFlags::QIF_BLIMITS).unwrap();
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
        config["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        let container = pod.start(&config);
        let done = container.exec(&["dd", "if=/dev/zero", "of=/data/file", "bs=64k", "count=32"]);
        assert!(done.code != 0 && done.err.contains("quota"), "{done:?}");
        let length = fs::metadata(volume.join("file")).unwrap().len();
        assert!((MIB / 2..=MIB).contains(&length), "{length} bytes were written, but the quota is 1 MiB");
        pod.stop();
    });
}
