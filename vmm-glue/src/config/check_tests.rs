//! Tests of the configuration's check: every rule refuses what breaks it, before anything is made.

use std::io;

use super::*;

/// A good configuration and its descriptors: a character device, two files, a pipe.
fn good() -> (VmConfig, Vec<OwnedFd>, io::PipeReader) {
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        OwnedFd::from(file)
    };
    let (reader, writer) = io::pipe().unwrap();
    let config = VmConfig {
        id: "test".to_owned(),
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 128,
        max_memory_mib: 0,
        huge_mib: 0,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: FdIndex(2),
        kernel_params: String::new(),
        console: FdIndex(3),
        share: None,
        vsock_cid: 3,
        net: Vec::new(),
        blk: Vec::new(),
        balloon: false,
        spare_slots: 0,
    };
    let fds = vec![File::open("/dev/null").unwrap().into(), file(), file(), writer.into()];
    (config, fds, reader)
}

fn refused(change: impl FnOnce(&mut VmConfig, &mut Vec<OwnedFd>)) -> String {
    let (mut config, mut fds, _reader) = good();
    change(&mut config, &mut fds);
    check(config, fds).unwrap_err().to_string()
}

#[test]
fn good_passes() {
    let (config, fds, _reader) = good();
    let checked = check(config, fds).unwrap();
    assert_eq!((checked.memory, checked.initrd_len), (128 << 20, 100));
}

#[test]
fn numbers_have_ranges() {
    assert!(refused(|config, _| config.vcpus = 0).contains("vcpus is 0"));
    assert!(refused(|config, _| config.vcpus = 65).contains("vcpus is 65"));
    assert!(refused(|config, _| config.memory_mib = 63).contains("memory_mib"));
    assert!(refused(|config, _| config.memory_mib = u64::MAX).contains("memory_mib"));
    assert!(refused(|config, _| config.vsock_cid = 2).contains("vsock_cid"));
    let blk = BlkConfig { file: FdIndex(9), read_only: true, serial: String::new() };
    assert!(refused(|config, _| config.blk = vec![blk; 17]).contains("virtio devices is 19"));
    assert!(refused(|config, _| config.kernel_params = "a\nb".to_owned()).contains("printable"));
}

#[test]
fn descriptors_are_there_and_of_their_kind() {
    assert!(refused(|config, _| config.kernel = FdIndex(9)).contains("no descriptor 9"));
    assert!(refused(|config, _| config.initrd = FdIndex(1)).contains("no descriptor 1"));
    assert!(refused(|_, fds| fds.push(tempfile::tempfile().unwrap().into())).contains("1 descriptors"));
    assert!(refused(|config, _| config.kernel = FdIndex(3)).contains("kernel"));
    assert!(refused(|_, fds| fds.swap(2, 3)).contains("initrd: the descriptor is not a regular file"));
    assert!(refused(|_, fds| fds[0] = tempfile::tempfile().unwrap().into()).contains("/dev/kvm"));
    assert!(refused(|_, fds| fds[2] = tempfile::tempfile().unwrap().into()).contains("length of initrd"));
}

#[test]
fn devices_are_checked() {
    let share = |tag: &str, root: &str| ShareConfig { tag: tag.to_owned(), root: root.to_owned(), workers: 1 };
    assert!(refused(|config, _| config.share = Some(share("", "/"))).contains("share.tag"));
    assert!(refused(|config, _| config.share = Some(share("husk", "tmp"))).contains("share.root"));
    assert!(refused(|config, _| config.share = Some(share("husk", "/nowhere"))).contains("share.root"));
    let disk = |serial: &str| BlkConfig { file: FdIndex(4), read_only: false, serial: serial.to_owned() };
    assert!(
        refused(|config, fds| {
            config.blk.push(disk("s"));
            fds.push(File::open("/dev/null").unwrap().into());
        })
        .contains("block device")
    );
    assert!(
        refused(|config, fds| {
            config.blk.push(disk("012345678901234567890"));
            fds.push(tempfile::tempfile().unwrap().into());
        })
        .contains("blk.serial")
    );
    let tap = NetConfig { taps: vec![FdIndex(4)], vhost: None, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
    assert!(
        refused(|config, fds| {
            config.net.push(tap.clone());
            fds.push(File::open("/dev/null").unwrap().into());
        })
        .contains("tap with")
    );
}
