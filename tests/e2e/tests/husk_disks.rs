//! Block devices in VMs: the maximum number of hot-plugged disks, and whether written data is on the disk after the VM
//! has ended.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, expect_error, pods};
use husk_e2e::disk::{Disk, WRITER_PROGRAM};
use husk_e2e::{PYTHON, node, vm};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Maximum number of disks of a pod. Some slots are reserved for hot-plugged interfaces.
const MAX_DISKS: usize = 5;

/// Returns the configuration of a sleeping container with `disks`.
fn config_with_disks(pod: &Pod, disks: &[Disk]) -> Value {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    let devices = (b'a'..).zip(disks).map(|(letter, disk)| {
        let path = format!("/dev/xvd{}", char::from(letter));
        json!({ "container_path": path, "host_path": disk.device, "permissions": "rwm" })
    });
    config["devices"] = devices.collect();
    config
}

/// Returns whether a process has a block device open.
fn has_open(pid: i32, disk: &Disk) -> bool {
    let number = fs::metadata(&disk.device).unwrap().rdev();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    fds.filter_map(|fd| fs::metadata(fd.path()).ok()).any(|meta| meta.rdev() == number)
}

#[test]
fn disk_without_free_slot_is_rejected_and_memory_can_still_be_hot_plugged() {
    pods("husk-disk-slots", |pods| {
        let new = |number| Disk::new(&pods.dir().join(format!("disk{number}")), 1 + number as u64);
        let disks: Vec<Disk> = (0..MAX_DISKS).map(new).collect();
        let extra_disk = [new(MAX_DISKS)];
        let pod = pods.pod();
        let first = pod.start(&config_with_disks(&pod, &disks));
        let sizes = first.sh("for disk in a b c d e; do blockdev --getsize64 /dev/xvd$disk; done");
        let expected: Vec<String> = (1..=MAX_DISKS).map(|mib| (mib << 20).to_string()).collect();
        assert_eq!(sizes, expected.join("\n"));
        for disk in &disks {
            assert!(has_open(pod.pid(), disk), "the VMM does not have {} open", disk.device);
        }
        let rejected = pod.create(&config_with_disks(&pod, &extra_disk));
        let error = expect_error("StartContainer", &json!({ "container_id": rejected.id }));
        for part in ["hot-plug the block device", "all slots for disks and interfaces are in use"] {
            assert!(error.contains(part), "{error}");
        }
        rejected.remove();
        assert!(!has_open(pod.pid(), &extra_disk[0]), "the VMM has the rejected disk open");
        // A disk that is already attached needs no further slot.
        let second = pod.start(&config_with_disks(&pod, &disks[2..3]));
        assert_eq!(second.sh("blockdev --getsize64 /dev/xvda"), (3 << 20).to_string());
        // Memory has slots of its own. Therefore memory can still be hot-plugged.
        let memory_mib = || second.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse::<u64>().unwrap();
        let before = memory_mib();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 600 << 20 });
        let large = pod.start(&config);
        assert!(
            memory_mib() > before + 400,
            "the guest had {before} MiB and has {} MiB now, expected at least 400 MiB more",
            memory_mib()
        );
        assert_eq!(large.sh("echo runs"), "runs");
        pod.stop();
    });
}

#[test]
fn written_data_is_on_disk_after_vm_ends() {
    need_image(PYTHON);
    pods("husk-disk-end", |pods| {
        let disks = [Disk::new(&pods.dir().join("disk"), 4)];
        let pod = pods.pod();
        let mut config = pod.python(WRITER_PROGRAM);
        config["devices"] = config_with_disks(&pod, &disks)["devices"].clone();
        let writer = pod.start(&config);
        writer.wait_for("written");
        // SIGTERM ends the pod, as a shutdown of the node does. The program ignores SIGTERM, because it is PID 1 and
        // has no handler. Therefore, it gets SIGKILL after the grace period.
        let shims = vm::shim_pids_of(&pod.id);
        assert_eq!(shims.len(), 1);
        node::send_signal(shims[0], Signal::SIGTERM);
        let gone = node::eventually(Duration::from_secs(30), || vm::shim_pids_of(&pod.id).is_empty().then_some(()));
        assert!(gone.is_some(), "the shim did not exit");
        assert_eq!(disks[0].read_written(), "changed");
        // containerd 1.7 first sends a request to the shim that has ended. containerd records the container's exit only
        // when it retries this request. Therefore the test waits for the container's exit.
        writer.wait();
        pod.stop();
    });
}
