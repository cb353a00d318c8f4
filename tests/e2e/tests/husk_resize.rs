//! In-place resize: the size of a running VM follows its containers' limits. The tests check the size in the guest and
//! on the node.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::pod::text;
use husk_e2e::cri::{Pod, PodContainer, call, pods};
use husk_e2e::figures::print_figure;
use husk_e2e::{node, vm};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Timeout for reclaim. Reclaim takes a long time because the guest has to search for free memory, and reports freed
/// memory only after a delay.
const TIMEOUT: Duration = Duration::from_secs(60);

fn limits(millis: u64, mib: u64) -> Value {
    json!({ "cpu_quota": millis * 100, "cpu_period": 100_000, "memory_limit_in_bytes": mib * MIB })
}

/// Starts a sleeping container with limits.
fn container(pod: &Pod, millis: u64, mib: u64) -> PodContainer {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["linux"]["resources"] = limits(millis, mib);
    pod.start(&config)
}

fn update(container: &PodContainer, millis: u64, mib: u64) {
    call("UpdateContainerResources", &json!({ "container_id": container.id, "linux": limits(millis, mib) }));
}

/// Returns the number of vCPUs and the MiB of memory that the guest's kernel has.
fn size(container: &PodContainer) -> (u64, u64) {
    let seen = container.sh("nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo");
    let (cpus, mib) = seen.split_once('\n').unwrap();
    (cpus.parse().unwrap(), mib.parse().unwrap())
}

/// Waits until the guest has `cpus` vCPUs and an amount of memory within `mib`.
#[track_caller]
fn wait_for_size(container: &PodContainer, cpus: u64, mib: std::ops::Range<u64>) {
    let reached = |seen: (u64, u64)| seen.0 == cpus && mib.contains(&seen.1);
    let found = node::eventually(TIMEOUT, || reached(size(container)).then_some(()));
    assert!(
        found.is_some(),
        "the guest has {:?} (vCPUs, MiB), expected {cpus} vCPUs and {mib:?} MiB\n{}",
        size(container),
        node::log_tail(40)
    );
}

/// Returns the cgroup of the pod's VMM on the node.
fn cgroup(pod: &Pod) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pod.pid())).unwrap();
    Path::new("/sys/fs/cgroup").join(text.trim().strip_prefix("0::/").unwrap())
}

fn read(cgroup: &Path, file: &str) -> String {
    let path = cgroup.join(file);
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("failed to read {}: {error}", path.display()))
        .trim()
        .to_owned()
}

/// Returns the MiB of guest memory that are resident in the VMM.
fn resident_mib(pod: &Pod) -> u64 {
    vm::memory(pod.pid()).unwrap().guest / 1024
}

/// Returns the number of vCPUs and the MiB of memory that `husk ps` prints for a pod.
fn listed(pod: &Pod) -> (u64, u64) {
    let output = Command::new("husk").args(["ps", "--output", "json"]).output().unwrap();
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    let one = list.as_array().unwrap().iter().find(|one| one["id"] == pod.id.as_str()).unwrap();
    (one["vcpus"].as_u64().unwrap(), one["memory_mib"].as_u64().unwrap())
}

#[test]
fn update_grows_and_shrinks_vm_with_container() {
    pods("cri-resize", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = limits(1000, 128);
        let pod = pods.run(config);
        let one = container(&pod, 1000, 128);
        wait_for_size(&one, 1, 120..193);
        let vmm = pod.pid();
        let (vcpus, boot_mib) = listed(&pod);
        assert_eq!(vcpus, 1);
        update(&one, 2000, 320);
        // The test does not wait here, because the update returns after the VM has grown.
        let (cpus, mib) = size(&one);
        assert!(
            cpus == 2 && (320..385).contains(&mib),
            "the guest has {cpus} vCPUs and {mib} MiB, expected 2 vCPUs and 320 to 385 MiB\n{}",
            node::log_tail(40)
        );
        assert_eq!(one.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "335544320\n200000 100000");
        let (vcpus, grown) = listed(&pod);
        assert!(
            vcpus == 2 && (boot_mib + 120..boot_mib + 300).contains(&grown),
            "husk ps lists {vcpus} vCPUs and {grown} MiB, expected 2 vCPUs and {boot_mib} MiB plus 120 to 300 MiB"
        );
        let host = cgroup(&pod);
        let limit = |file: &str| read(&host, file);
        let bytes: u64 = limit("memory.max").parse().unwrap();
        assert!((384 * MIB..448 * MIB).contains(&bytes), "memory.max is {bytes} bytes, expected 384 to 448 MiB");
        assert_eq!(limit("cpu.max"), "225000 100000");
        // Both vCPUs run, and hot-plugged memory is used.
        one.sh("grep -q ^processor.*1 /proc/cpuinfo");
        // dd keeps its buffer of 250 MiB until the reader of the pipe ends. If dd ended at once, the guest could
        // return the memory to the host before this test reads the resident memory.
        one.sh("(dd if=/dev/zero bs=250M count=1 | sh -c 'echo $$ > /tmp/reader; exec sleep 4321') > /dev/null 2>&1 &");
        let used = node::eventually(TIMEOUT, || Some(resident_mib(&pod)).filter(|used| *used > 250));
        let used = used.unwrap_or_else(|| panic!("only {} MiB are resident while dd uses 250 MiB", resident_mib(&pod)));
        one.sh("kill $(cat /tmp/reader)");
        update(&one, 1000, 128);
        wait_for_size(&one, 1, 120..193);
        assert_eq!(one.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "134217728\n100000 100000");
        let back = node::eventually(TIMEOUT, || (resident_mib(&pod) < 200).then_some(()));
        assert!(
            back.is_some(),
            "{} MiB are resident after shrinking ({used} MiB before), expected fewer than 200 MiB",
            resident_mib(&pod)
        );
        let lowered =
            node::eventually(TIMEOUT, || (limit("memory.max").parse::<u64>().unwrap() < 240 * MIB).then_some(()));
        assert!(lowered.is_some(), "memory.max is still {} bytes, expected less than 240 MiB", limit("memory.max"));
        assert_eq!(limit("cpu.max"), "125000 100000");
        assert_eq!(listed(&pod), (1, boot_mib));
        // The same VM grows a second time.
        update(&one, 2000, 256);
        wait_for_size(&one, 2, 256..321);
        assert_eq!(pod.pid(), vmm);
        assert!(read(&host, "memory.events").contains("oom_kill 0"), "{}", read(&host, "memory.events"));
    });
}

#[test]
fn vm_grows_for_later_container_unless_annotations_fix_its_size() {
    pods("cri-room", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = limits(1000, 128);
        let pod = pods.run(config);
        let one = container(&pod, 500, 128);
        wait_for_size(&one, 1, 120..193);
        let two = container(&pod, 1000, 192);
        wait_for_size(&one, 2, 320..385);
        // The container can use its whole limit.
        two.sh("dd if=/dev/zero of=/dev/null bs=150M count=1 2> /dev/null");
        two.stop(0);
        two.remove();
        // The VM does not become smaller than its boot size, because further containers of the pod may be created.
        wait_for_size(&one, 1, 120..193);
        // This pod's annotations set the size of its VM. containerd passes them to the shim, because the drop-in lists
        // them in `pod_annotations`. The default is one vCPU.
        let fixed_pod = {
            let mut config = pods.config();
            config["annotations"] = json!({ "io.husk.vcpus": "2", "io.husk.memory_mib": "300" });
            pods.run(config)
        };
        let container = container(&fixed_pod, 3000, 600);
        wait_for_size(&container, 2, 250..301);
    });
}

/// Creates the pod's cgroup as the kubelet does: `memory.max` is the sum of the limits and the overhead of the
/// RuntimeClass. Returns the cgroup's directory and its `memory.max` in bytes.
fn create_kubelet_cgroup(config: &Value, mib: u64) -> (PathBuf, u64) {
    let class = include_str!("../../../deploy/kubernetes/runtimeclass.yaml");
    let overhead = class.lines().find_map(|line| line.trim().strip_prefix("memory: ")?.strip_suffix("Mi")).unwrap();
    let parent = Path::new("/sys/fs/cgroup").join(text(&config["linux"]["cgroup_parent"]).trim_start_matches('/'));
    fs::create_dir_all(&parent).unwrap();
    for above in [parent.parent().unwrap().parent().unwrap(), parent.parent().unwrap()] {
        fs::write(above.join("cgroup.subtree_control"), "+memory").unwrap();
    }
    let allowed = (mib + overhead.parse::<u64>().unwrap()) * MIB;
    fs::write(parent.join("memory.max"), allowed.to_string()).unwrap();
    (parent, allowed)
}

#[test]
fn oom_kill_at_pod_limit_stays_in_guest() {
    pods("cri-whole", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = limits(1000, 256);
        let (parent, allowed) = create_kubelet_cgroup(&config, 256);
        let pod = pods.run(config);
        let other = container(&pod, 500, 128);
        let inside: u64 = other.sh("cat /sys/fs/cgroup/memory.current").parse().unwrap();
        let outside: u64 = read(&parent, "memory.current").parse().unwrap();
        print_figure(format_args!(
            "memory of the idle pod outside the container's cgroup: {} MiB",
            outside.saturating_sub(inside) / MIB
        ));
        // The script also writes a file, because the host's page cache for the file is charged to the pod.
        let script = "dd if=/dev/zero of=/file bs=1M count=64; exec dd if=/dev/zero of=/dev/null bs=300M count=1";
        let mut config = pod.sh(script);
        config["linux"]["resources"] = limits(500, 128);
        let greedy = pod.start(&config);
        assert_eq!(greedy.wait(), (137, "OOMKilled".into()));
        // The other container can use its whole limit.
        let full =
            other.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=110M count=1; cat /file > /dev/null; true"]);
        assert_eq!(full.code, 0, "{full:?}");
        assert!(pod.is_ready());
        assert_eq!(other.sh("echo alive"), "alive");
        let events = read(&parent, "memory.events");
        assert!(events.contains("oom_kill 0"), "{events}");
        print_figure(format_args!(
            "peak {} MiB of {} MiB, PSS of the VMM in KiB: {:?}",
            read(&parent, "memory.peak").parse::<u64>().unwrap() / MIB,
            allowed / MIB,
            vm::memory(pod.pid()).unwrap()
        ));
        pod.stop();
        pod.remove();
    });
}

/// Number of files. At 1.5 KiB of host memory for each open file, the VMM would need 29 MiB to keep all of them open.
/// This does not fit, because a pod with 32 MiB has only 16 MiB for the VMM and the shim in addition to VM memory.
const FILES: usize = 20_000;

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn vm_survives_walk_over_many_files() {
    let dir = Path::new("/var/lib/husk-e2e-many");
    for n in 0..FILES {
        if n % 1000 == 0 {
            fs::create_dir_all(dir.join((n / 1000).to_string())).unwrap();
        }
        fs::write(dir.join(format!("{}/{n}", n / 1000)), "x").unwrap();
    }
    // The test drops the node's caches, so that the pod's cgroup is charged when the VMM opens the files. Before that,
    // sync(2) writes the dirty pages, because they cannot be dropped.
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    pods("cri-many-files", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = limits(1000, 32);
        let (parent, allowed) = create_kubelet_cgroup(&config, 32);
        let pod = pods.run(config);
        let mut config =
            pod.sh("for n in $(seq 20); do echo walked $n: $(ls -l /data/$((n - 1)) | wc -l); done; sleep 100000");
        config["linux"]["resources"] = limits(1000, 32);
        config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/data" }]);
        let walker = pod.start(&config);
        for n in 1..=FILES / 1000 {
            walker.wait_for(&format!("walked {n}: 1001"));
        }
        let events = read(&parent, "memory.events");
        assert!(pod.is_ready() && events.contains("oom_kill 0"), "{events}");
        let peak: u64 = read(&parent, "memory.peak").parse().unwrap();
        print_figure(format_args!("{FILES} files, peak {} MiB of {} MiB", peak / MIB, allowed / MIB));
        // The guest has forgotten files (FUSE FORGET), and can look up these files again.
        assert_eq!(walker.sh("cat /data/1/* | wc -c; ls /data/0 | wc -l"), "1000\n1000");
    });
    fs::remove_dir_all(dir).unwrap();
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn update_reclaims_memory_below_boot_size() {
    pods("cri-below", |pods| {
        let mut config = pods.config();
        config["linux"]["resources"] = limits(2000, 512);
        let pod = pods.run(config);
        let one = container(&pod, 2000, 512);
        wait_for_size(&one, 2, 512..577);
        one.sh("dd if=/dev/zero of=/dev/null bs=300M count=1 2> /dev/null; dd if=/dev/zero of=/file bs=1M count=260 2> /dev/null");
        let used = resident_mib(&pod);
        update(&one, 1000, 128);
        // The guest's memory size does not change. The memory beyond the container's new limit is reclaimed.
        wait_for_size(&one, 1, 512..577);
        assert_eq!(one.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "134217728\n100000 100000");
        // Before the update, the guest has 260 MiB of page cache in addition to its other memory. After the
        // update, the container has at most 128 MiB.
        let back = node::eventually(TIMEOUT, || (resident_mib(&pod) + 50 < used).then_some(()));
        assert!(
            back.is_some(),
            "{} MiB are resident after shrinking, expected 50 MiB less than the {used} MiB before",
            resident_mib(&pod)
        );
        assert_eq!(read(&cgroup(&pod), "cpu.max"), "125000 100000");
        assert_eq!(listed(&pod).0, 1);
    });
}
