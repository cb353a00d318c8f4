//! Tests of the configuration check, which must reject every configuration that violates a rule.

use std::io;

use super::*;
use crate::config::{Rate, SeccompMode};

fn kernel(kernel: usize, initrd: usize) -> Source {
    Source::Kernel { kernel: FdIndex(kernel), initrd: FdIndex(initrd) }
}

/// Returns a valid configuration and its fds: a character device, two files and a pipe.
fn valid() -> (VmConfig, Vec<OwnedFd>, io::PipeReader) {
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
        source: Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
        kernel_params: String::new(),
        console: FdIndex(3),
        share: None,
        require_landlock: false,
        vsock_cid: 3,
        vsock_rate_limit: RateLimit::default(),
        net: Vec::new(),
        blk: Vec::new(),
        balloon: false,
        spare_slots: 0,
        saveable: false,
        seccomp: SeccompMode::Enforce,
    };
    let fds = vec![File::open("/dev/null").unwrap().into(), file(), file(), writer.into()];
    (config, fds, reader)
}

fn check_error(change: impl FnOnce(&mut VmConfig, &mut Vec<OwnedFd>)) -> String {
    let (mut config, mut fds, _reader) = valid();
    change(&mut config, &mut fds);
    check(config, fds).unwrap_err().to_string()
}

fn disk(file: usize, read_only: bool, serial: &str) -> BlkConfig {
    BlkConfig { file: FdIndex(file), read_only, serial: serial.to_owned(), rate_limit: RateLimit::default() }
}

fn tap() -> NetConfig {
    NetConfig {
        taps: vec![FdIndex(4)],
        vhost: false,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        receive_rate_limit: RateLimit::default(),
        transmit_rate_limit: RateLimit::default(),
    }
}

#[test]
fn check_accepts_valid_configuration() {
    let (config, fds, _reader) = valid();
    let checked = check(config, fds).unwrap();
    assert_eq!(checked.memory, 128 << 20);
}

#[test]
fn check_rejects_values_out_of_range() {
    assert!(check_error(|config, _| config.vcpus = 0).contains("vcpus: 0"));
    assert!(check_error(|config, _| config.vcpus = 65).contains("vcpus: 65"));
    assert!(check_error(|config, _| config.memory_mib = 63).contains("memory_mib"));
    assert!(check_error(|config, _| config.memory_mib = u64::MAX).contains("memory_mib"));
    assert!(check_error(|config, _| config.vsock_cid = 2).contains("vsock_cid"));
    let blk = disk(9, true, "");
    assert!(check_error(|config, _| config.blk = vec![blk; 17]).contains("virtio devices: 19"));
    assert!(check_error(|config, _| config.kernel_params = "a\nb".to_owned()).contains("printable"));
}

#[test]
fn check_rejects_missing_unused_and_wrong_fds() {
    assert!(check_error(|config, _| config.source = kernel(9, 2)).contains("position 9"));
    assert!(check_error(|config, _| config.source = kernel(1, 1)).contains("position 1"));
    assert!(check_error(|_, fds| fds.push(tempfile::tempfile().unwrap().into())).contains("use 1 of the received fds"));
    assert!(check_error(|config, _| config.source = kernel(3, 2)).contains("kernel"));
    assert!(check_error(|_, fds| fds.swap(2, 3)).contains("initrd: the fd is not a regular file"));
    assert!(check_error(|_, fds| fds[0] = tempfile::tempfile().unwrap().into()).contains("/dev/kvm"));
    assert!(check_error(|_, fds| fds[2] = tempfile::tempfile().unwrap().into()).contains("length of initrd"));
}

#[test]
fn check_rejects_invalid_devices() {
    let share = |tag: &str, root: &str| ShareConfig {
        tag: tag.to_owned(),
        root: root.to_owned(),
        workers: 1,
        volume_cache_ms: 1000,
        rate_limit: RateLimit::default(),
    };
    assert!(check_error(|config, _| config.share = Some(share("", "/"))).contains("share.tag"));
    let slow = ShareConfig { volume_cache_ms: 60_001, ..share("husk", "/") };
    assert!(check_error(|config, _| config.share = Some(slow)).contains("share.volume_cache_ms"));
    assert!(check_error(|config, _| config.share = Some(share("husk", "tmp"))).contains("share.root"));
    assert!(check_error(|config, _| config.share = Some(share("husk", "/nowhere"))).contains("share.root"));
    assert!(
        check_error(|config, fds| {
            config.blk.push(disk(4, false, "s"));
            fds.push(File::open("/dev/null").unwrap().into());
        })
        .contains("block device")
    );
    assert!(
        check_error(|config, fds| {
            config.blk.push(disk(4, false, "012345678901234567890"));
            fds.push(tempfile::tempfile().unwrap().into());
        })
        .contains("blk.serial")
    );
    let tap = tap();
    assert!(
        check_error(|config, fds| {
            config.net.push(tap.clone());
            fds.push(File::open("/dev/null").unwrap().into());
        })
        .contains("tap with")
    );
}

#[test]
fn check_rejects_invalid_rate_limits() {
    let limit = |per_second, burst| RateLimit { bytes: None, operations: Some(Rate { per_second, burst }) };
    assert!(check_error(|config, _| config.vsock_rate_limit = limit(0, 1)).contains("vsock_rate_limit"));
    let mut disk = disk(4, true, "");
    disk.rate_limit = limit(1, 0);
    assert!(
        check_error(|config, fds| {
            config.blk.push(disk);
            fds.push(tempfile::tempfile().unwrap().into());
        })
        .contains("blk.rate_limit")
    );
    let limited = NetConfig { transmit_rate_limit: limit(1, 1), ..tap() };
    let several = NetConfig { taps: vec![FdIndex(4), FdIndex(5)], ..limited.clone() };
    assert!(check_error(|config, _| config.net.push(several)).contains("number of net.taps: 2, must be 1"));
    let vhost = NetConfig { vhost: true, ..limited };
    assert!(check_error(|config, _| config.net.push(vhost)).contains("net.vhost"));
}
