//! Devices of privileged containers. A privileged container gets the guest's devices, even if the client lists the
//! node's devices in the specification. If a user names a block device of the node, the container gets the device. Husk
//! rejects character devices that a user names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use husk_e2e::case;
use husk_e2e::disk::{Disk, run_on_node};
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

/// The first bytes of the test's disk on the node.
const MARK: &str = "a disk of the node";
const PRIVILEGED: &str = "--privileged";
/// With `--privileged`, ctr lists all devices of the node in the specification, unless this option is also set.
const NO_LIST: &str = "--privileged-without-host-devices";

/// Returns the device nodes below `dir`, as containerd lists them for a privileged container.
fn devices_below(dir: &Path) -> Vec<Value> {
    let mut devices = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let (metadata, name) = (entry.metadata().unwrap(), entry.file_name());
        let kind = metadata.file_type();
        if kind.is_dir() && !["pts", "shm", "fd", "mqueue"].iter().any(|skipped| name == *skipped) {
            devices.extend(devices_below(&entry.path()));
        } else if name != "console" && (kind.is_char_device() || kind.is_block_device()) {
            devices.push(json!({
                "path": entry.path(),
                "type": if kind.is_char_device() { "c" } else { "b" },
                "major": major(metadata.rdev()),
                "minor": minor(metadata.rdev()),
            }));
        }
    }
    devices
}

#[test]
fn privileged_container_gets_the_guests_devices_in_place_of_the_nodes() {
    case("devices-all", |case| {
        let disk = Disk::new(&case.dir().join("disk"), 8);
        fs::write(&disk.device, MARK).unwrap();
        let image = case.dir().join("image");
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        run_on_node(&["mkfs.ext4", "-q", "-F", &image.to_string_lossy()]);
        let mount = format!("type=bind,src={},dst=/v,options=rbind:rw", case.dir().display());
        let list = "find /dev -type c -o -type b | sort";
        // This specification does not list the node's devices. Therefore, the container has only the devices that every
        // container has.
        let in_every_container = case.sh(list).flags(&[PRIVILEGED, NO_LIST]).output().expect_clean().out();
        let names: Vec<String> = fs::read_dir("/sys/class/block")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let number = |name: &String| fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
        let numbers: Vec<String> = names.iter().map(|name| number(name).trim().replace(':', " ")).collect();
        let script = format!(
            "{list}; echo ---
             for number in '{}'; do
                 rm -f /dev/node; mknod /dev/node b $number && head -c 64 /dev/node 2> /dev/null | od -An -c
             done; rm /dev/node
             mknod /dev/mem c 1 1; cat /dev/mem > /dev/null 2>&1 && echo read memory; rm /dev/mem
             mkdir -p /mnt
             mount -t tmpfs t /mnt && touch /mnt/file && umount /mnt && echo tmpfs
             mount -t ext4 -o loop /v/image /mnt && ls /mnt && umount /mnt && echo loop",
            numbers.join("' '")
        );
        let output = case.sh(&script).flags(&[PRIVILEGED, "--mount", &mount]).output().expect_code(0);
        let out = output.out();
        let (devices, rest) = out.split_once("\n---\n").unwrap();
        let of_the_guest = ["/dev/fuse", "/dev/kmsg", "/dev/loop0", "/dev/loop-control", "/dev/net/tun", "/dev/ttyS0"];
        for expected in in_every_container.lines().chain(of_the_guest) {
            assert!(
                devices.lines().any(|device| device == expected),
                "the container lacks {expected}; it has\n{devices}"
            );
        }
        assert_eq!(rest.trim_end(), "tmpfs\nlost+found\nloop", "{}", output.describe());
        // Loop devices are skipped, because the guest has its own loop devices.
        for name in names.iter().filter(|name| !name.starts_with("loop")).map(String::as_str).chain(["kvm", "mem"]) {
            assert!(
                !devices.lines().any(|device| device == format!("/dev/{name}")),
                "the container has the node's device {name}:\n{devices}"
            );
        }
    });
}

#[test]
fn privileged_container_gets_the_block_devices_that_the_user_names() {
    case("devices-named", |case| {
        let disk = Disk::new(&case.dir().join("disk"), 8);
        fs::write(&disk.device, MARK).unwrap();
        // ctr adds the named device and a device rule for this device to the specification.
        let script = format!("head -c {} {device}; echo; ls -l {device}", MARK.len(), device = disk.device);
        let output = case.sh(&script).flags(&[PRIVILEGED, "--device", &disk.device]).output().expect_clean();
        assert!(output.out().starts_with(&format!("{MARK}\n")), "{}", output.describe());
        // containerd's CRI adds the device at another path, and replaces all device rules with one rule that
        // allows all devices.
        let number = fs::metadata(&disk.device).unwrap().rdev();
        let run = case.with_spec(&format!("head -c {} /dev/xvda", MARK.len()), |spec| {
            let mut devices = devices_below(Path::new("/dev"));
            let (major, minor) = (major(number), minor(number));
            devices.insert(0, json!({ "path": "/dev/xvda", "type": "b", "major": major, "minor": minor }));
            spec["linux"]["devices"] = devices.into();
            spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        });
        run.output().expect_clean().expect_out(MARK);
    });
}

#[test]
fn create_rejects_character_devices_that_the_user_names() {
    case("devices-refused", |case| {
        for privileged in [&[][..], &[PRIVILEGED], &[PRIVILEGED, NO_LIST]] {
            let run = case.sh("true").flags(privileged).flags(&["--device", "/dev/kmsg"]);
            run.output().expect_error(&["/dev/kmsg", "character device 1:11", "belongs to the host"]);
        }
    });
}
