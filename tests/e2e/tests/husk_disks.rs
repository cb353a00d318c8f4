//! Disks of the node's in Husk's machines: how many there may be, and what becomes of data when a machine is ended.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, pods, refused};
use husk_e2e::disk::{Disk, WRITES};
use husk_e2e::{PYTHON, node, vm};
use serde_json::{Value, json};

/// As many as a pod may have, and interfaces that come later beside them.
const MOST: usize = 5;

/// A container that sleeps, with these disks of the node's.
fn with(pod: &Pod, disks: &[Disk]) -> Value {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    let devices = (b'a'..).zip(disks).map(|(letter, disk)| {
        let path = format!("/dev/xvd{}", char::from(letter));
        json!({ "container_path": path, "host_path": disk.device, "permissions": "rwm" })
    });
    config["devices"] = devices.collect();
    config
}

/// Whether a process has a block device open.
fn holds(pid: i32, disk: &Disk) -> bool {
    let number = fs::metadata(&disk.device).unwrap().rdev();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    fds.filter_map(|fd| fs::metadata(fd.path()).ok()).any(|meta| meta.rdev() == number)
}

#[test]
fn one_disk_too_many_is_refused_and_memory_still_grows() {
    pods("husk-disk-slots", |pods| {
        let new = |number| Disk::new(&pods.dir().join(format!("disk{number}")), 1 + number as u64);
        let disks: Vec<Disk> = (0..MOST).map(new).collect();
        let one_more = [new(MOST)];
        let pod = pods.pod();
        let full = pod.start(&with(&pod, &disks));
        let sizes = full.sh("for disk in a b c d e; do blockdev --getsize64 /dev/xvd$disk; done");
        let expected: Vec<String> = (1..=MOST).map(|mib| (mib << 20).to_string()).collect();
        assert_eq!(sizes, expected.join("\n"));
        for disk in &disks {
            assert!(holds(pod.pid(), disk), "{} is not open", disk.device);
        }
        let refused_one = pod.create(&with(&pod, &one_more));
        let error = refused("StartContainer", &json!({ "container_id": refused_one.id }));
        for part in
            ["hot-plug the block device", "no free slot: the limit of hot-plugged disks and interfaces is reached"]
        {
            assert!(error.contains(part), "{error}");
        }
        refused_one.remove();
        assert!(!holds(pod.pid(), &one_more[0]), "the machine holds a disk that it did not take");
        // What has its disk already may have it again.
        let again = pod.start(&with(&pod, &disks[2..3]));
        assert_eq!(again.sh("blockdev --getsize64 /dev/xvda"), (3 << 20).to_string());
        // And what the disks do not take is memory.
        let size = || again.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse::<u64>().unwrap();
        let before = size();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 600 << 20 });
        let large = pod.start(&config);
        assert!(size() > before + 400, "{before} and {} MiB", size());
        assert_eq!(large.sh("echo runs"), "runs");
        pod.stop();
    });
}

#[test]
fn what_was_written_is_on_the_disk_when_the_machine_ends() {
    need_image(PYTHON);
    pods("husk-disk-end", |pods| {
        let disks = [Disk::new(&pods.dir().join("disk"), 4)];
        let pod = pods.pod();
        let mut config = pod.python(WRITES);
        config["devices"] = with(&pod, &disks)["devices"].clone();
        let writer = pod.start(&config);
        writer.wait_for("written");
        // The shim is told to end, as by a node that goes down: nothing ends the container before its machine.
        let shims = vm::shims_of(&pod.id);
        assert_eq!(shims.len(), 1);
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(shims[0], libc::SIGTERM) }, 0);
        let gone = node::eventually(Duration::from_secs(30), || vm::shims_of(&pod.id).is_empty().then_some(()));
        assert!(gone.is_some(), "the shim does not end");
        assert_eq!(disks[0].changed(), "changed");
        // containerd 1.7 asks the shim that is gone first, and takes the exit as one at its second try.
        writer.wait();
        pod.stop();
    });
}
