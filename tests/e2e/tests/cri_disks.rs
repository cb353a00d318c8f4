//! The node's disks in pods: a volume on a file system that fills up, raw block devices and mounted block devices.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};

use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::cri::{Pod, PodContainer};
use husk_e2e::disk::{Disk, WRITER_PROGRAM};
use husk_e2e::{PYTHON, node};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Fills the volume in every way that allocates space, expects ENOSPC each time, and keeps using the volume.
const FILL: &str = r#"
import errno, mmap, os
def full(write):
    try:
        write()
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False
kept = os.open("/data/kept", os.O_CREAT | os.O_RDWR)
os.write(kept, b"k" * (1 << 20))
os.fsync(kept)
# write(2) itself fails as soon as the volume is full. The error is not delayed until fsync(2).
fd = os.open("/data/large", os.O_CREAT | os.O_WRONLY)
written = 0
try:
    while True:
        written += os.write(fd, b"x" * (1 << 20))
except OSError as error:
    assert error.errno == errno.ENOSPC, error
os.fsync(fd)
assert os.fstat(fd).st_size == written, (os.fstat(fd).st_size, written)
os.close(fd)
free = os.statvfs("/data")
assert free.f_bavail * free.f_frsize < 1 << 20, free
# Other calls that allocate space also fail with ENOSPC.
def allocate():
    fd = os.open("/data/more", os.O_CREAT | os.O_WRONLY)
    try:
        os.posix_fallocate(fd, 0, 8 << 20)
    finally:
        os.close(fd)
assert full(allocate), "fallocate did not fail with ENOSPC"
os.unlink("/data/more")
def append():
    fd = os.open("/data/kept", os.O_WRONLY | os.O_APPEND)
    try:
        for _ in range(16):
            os.write(fd, b"y" * (1 << 20))
    finally:
        os.close(fd)
assert full(append), "an append did not fail with ENOSPC"
# The existing data is intact. pwrite(2) and mmap(2) can change it in place.
os.pwrite(kept, b"K", 0)
shared = mmap.mmap(kept, 1 << 20)
shared[1:2] = b"M"
shared.flush()
os.fsync(kept)
assert os.pread(kept, 1 << 20, 0)[:1 << 20] == b"KM" + b"k" * ((1 << 20) - 2)
names = 0
def names_until_full():
    global names
    while True:
        os.close(os.open("/data/name-" + "n" * 200 + str(names), os.O_CREAT | os.O_WRONLY))
        names += 1
assert full(names_until_full), "creating files did not fail with ENOSPC"
# Removing a file frees its space.
os.unlink("/data/large")
fd = os.open("/data/again", os.O_CREAT | os.O_WRONLY)
os.write(fd, b"z" * (4 << 20))
os.fsync(fd)
print("done", written >> 20, names, flush=True)
"#;

#[test]
fn writes_to_a_full_volume_fail_with_enospc() {
    need_image(PYTHON);
    pods("cri-full", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 64);
        // The emptyDir has its own file system, which is mounted at the volume's path.
        let volume = pods.dir().join("volumes/kubernetes.io~empty-dir/data");
        let mounted = disk.format().mount(&volume, "defaults");
        let pod = pods.pod();
        let mounts = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] = mounts.clone();
        let other = pod.start(&config);
        let size = |text: String| text.lines().last().unwrap().split_whitespace().nth(1).unwrap().to_owned();
        let on_node = husk_e2e::disk::run_on_node(&["df", "-k", &volume.to_string_lossy()]);
        assert_eq!(size(other.sh("df -k /data")), size(on_node));
        let mut config = pod.python(FILL);
        config["mounts"] = mounts;
        let filling = pod.start(&config);
        assert_eq!(filling.wait().0, 0, "{}", filling.log());
        assert!(filling.log().contains("done"), "{}", filling.log());
        // The pod's other container and the node see the files that remain.
        assert_eq!(other.sh("wc -c < /data/again; head -c 2 /data/kept"), "4194304\nKM");
        assert_eq!(fs::metadata(volume.join("again")).unwrap().len(), 4 * MIB);
        pod.stop();
        drop(mounted);
    });
}

/// Returns the CRI device list of a container that gets the disk.
fn devices(disk: &Disk, permissions: &str) -> Value {
    json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": permissions }])
}

/// Starts a container that has the disk as `/dev/xvda`. `privileged` makes the container privileged.
#[track_caller]
fn start_with_device(pod: &Pod, disk: &Disk, permissions: &str, privileged: bool) -> PodContainer {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["devices"] = devices(disk, permissions);
    config["linux"]["security_context"]["privileged"] = privileged.into();
    pod.start(&config)
}

#[test]
fn privileged_containers_format_and_mount_a_shared_block_device() {
    pods("cri-disk-mounted", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 48);
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = pods.run(config);
        let (one, two) = (start_with_device(&pod, &disk, "mrw", true), start_with_device(&pod, &disk, "mrw", true));
        let size = "blockdev --getsize64 /dev/xvda";
        assert_eq!((one.sh(size), two.sh(size)), ((48 * MIB).to_string(), (48 * MIB).to_string()));
        one.sh("mke2fs -L inside /dev/xvda > /dev/null && mkdir /data && mount -t ext4 /dev/xvda /data");
        one.sh("mkdir /data/dir && echo by one > /data/dir/file && dd if=/dev/urandom of=/data/large bs=1M count=8 2> /dev/null");
        let sum = one.sh("sha256sum < /data/large");
        // Both containers have the same device. Therefore the second container can mount the file system of the first.
        two.sh("mkdir /data && mount -t ext4 /dev/xvda /data");
        assert_eq!(two.sh("cat /data/dir/file; sha256sum < /data/large"), format!("by one\n{sum}"));
        two.sh("echo by two > /data/dir/other && sync && umount /data");
        assert_eq!(one.sh("cat /data/dir/other; umount /data"), "by two");
        // After the unmount the data is on the node's disk, although the containers still run.
        let point = pods.dir().join("mounted");
        let mounted = disk.mount(&point, "ro");
        assert_eq!(fs::read_to_string(point.join("dir/file")).unwrap(), "by one\n");
        assert_eq!(fs::read_to_string(point.join("dir/other")).unwrap(), "by two\n");
        let large = point.join("large");
        assert_eq!(husk_e2e::disk::run_on_node(&["sh", "-c", &format!("sha256sum < {}", large.display())]), sum);
        drop(mounted);
        pod.stop();
    });
}

/// A program that overwrites a part of the device, and calls fsync(2) to make the data durable.
const WRITE_AND_SYNC: &str = r#"
import os, time
fd = os.open("/dev/xvda", os.O_RDWR)
os.pwrite(fd, b"made to last", 1 << 20)
os.fsync(fd)
print("synced", flush=True)
time.sleep(100000)
"#;

#[test]
fn containers_share_raw_block_device_and_fsync_makes_data_durable() {
    need_image(PYTHON);
    pods("cri-disk-raw", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 16);
        let pod = pods.pod();
        let mut config = pod.python(WRITE_AND_SYNC);
        config["devices"] = devices(&disk, "rw");
        let writing = pod.start(&config);
        writing.wait_for("synced");
        let mut seen = [0; 12];
        let mut file = File::open(&disk.device).unwrap();
        file.seek(SeekFrom::Start(MIB)).unwrap();
        file.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"made to last");
        // After the writer is killed, the next container still reads the data.
        writing.stop(0);
        writing.remove();
        let other = start_with_device(&pod, &disk, "mrw", false);
        let read = "dd if=/dev/xvda bs=1M skip=1 count=1 2> /dev/null | head -c 12";
        assert_eq!(other.sh(read), "made to last");
        assert_eq!(other.sh("test -b /dev/xvda && echo block"), "block");
        // The device is as large as the disk.
        let beyond = other.exec(&["sh", "-c", "dd if=/dev/zero of=/dev/xvda bs=1M seek=15 count=2"]);
        assert!(beyond.err.contains("No space left"), "{beyond:?}");
        // Without write permission, writes fail and reads return the disk's current data.
        let reading = start_with_device(&pod, &disk, "r", false);
        assert_eq!(reading.sh(read), "made to last");
        for script in ["echo x > /dev/xvda", "echo x 1<> /dev/xvda"] {
            let denied = reading.exec(&["sh", "-c", script]);
            assert!(denied.code != 0 && denied.err.contains("not permitted"), "{script} must fail: {denied:?}");
        }
        other.sh("printf changed | dd of=/dev/xvda bs=1M seek=1 conv=notrunc 2> /dev/null; sync");
        let seen = node::eventually(std::time::Duration::from_secs(20), || {
            (reading.sh("dd if=/dev/xvda bs=1M skip=1 count=1 2> /dev/null | head -c 7") == "changed").then_some(())
        });
        assert!(seen.is_some(), "the container still reads {:?}, expected \"changed\"", reading.sh(read));
        pod.stop();
        assert_eq!(disk.read_written(), "changed");
    });
}

#[test]
fn unsynced_writes_are_on_the_disk_after_the_pod_is_removed() {
    need_image(PYTHON);
    pods("cri-disk-end", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 4);
        let pod = pods.pod();
        let mut config = pod.python(WRITER_PROGRAM);
        config["devices"] = devices(&disk, "rw");
        pod.start(&config).wait_for("written");
        pod.stop();
        pod.remove();
        assert_eq!(disk.read_written(), "changed");
    });
}

/// First bytes of the disk that the test creates on the node.
const MARK: &str = "the node's own";

#[test]
fn privileged_container_cannot_open_devices_of_the_node() {
    pods("cri-none-of-the-nodes", |pods| {
        // The content of this disk begins with `MARK`. No pod gets the disk.
        let disk = Disk::new(&pods.dir().join("disk"), 8);
        fs::write(&disk.device, MARK).unwrap();
        let marked: String = MARK.bytes().map(|byte| format!("{byte:02x}")).collect();
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = pods.run(config);
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["linux"]["security_context"]["privileged"] = json!(true);
        let container = pod.start(&config);
        // Get the names and device numbers of all block devices of the node.
        let names: Vec<String> = fs::read_dir("/sys/class/block")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let number = |name: &String| fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
        let numbers: Vec<String> = names.iter().map(|name| number(name).trim().replace(':', " ")).collect();
        // For each device number, the script prints one line with the device's first bytes in hexadecimal.
        let script = format!(
            "for number in '{}'; do
                 rm -f /tmp/node; mknod /tmp/node b $number && head -c 64 /tmp/node | od -An -v -tx1 | tr -d ' \\n'; echo
             done",
            numbers.join("' '")
        );
        let read = container.exec(&["sh", "-c", &script]);
        assert_eq!(read.out.lines().count(), names.len(), "{read:?}");
        for (name, found) in names.iter().zip(read.out.lines()) {
            // The guest may have a device with the same number. That device is the guest's own and does not hold the
            // node's data.
            let mut head = Vec::new();
            File::open(format!("/dev/{name}")).unwrap().take(64).read_to_end(&mut head).unwrap();
            let head: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(found.is_empty() || found != head, "the pod can read the node's device {name}: {read:?}");
            assert!(!found.contains(&marked), "the pod can read the test's disk on the node: {read:?}");
        }
        assert!(
            names.iter().any(|name| disk.device.ends_with(name.as_str())),
            "the test's disk is not among {names:?}"
        );
        let listed = container.sh("ls /dev /sys/block; cat /proc/partitions");
        // Loop devices are skipped, because the guest kernel has its own loop devices, which are empty.
        for name in names.iter().filter(|name| !name.starts_with("loop")) {
            assert!(
                !listed.split_whitespace().any(|word| word == name),
                "the guest lists the node's device {name}:\n{listed}"
            );
        }
        assert_eq!(container.sh("cat /sys/block/loop*/size 2> /dev/null | sort -u | grep -v '^0$'; true"), "");
        // The guest has no other devices of the node, such as KVM, vhost and virtio ports.
        assert_eq!(container.sh("ls -d /dev/kvm /dev/vhost-* /dev/vport* /dev/disk 2> /dev/null; true"), "");
        pod.stop();
    });
}
