//! Fuzzes packets on the VMM's control socket. The target decodes each input as a `Request`, as a `Reply` and as a
//! `Notice`. If the request is to create a VM, the target also checks the VM's configuration and fds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_base::sys::scm_rights;
use husk_vmm::config_check::{CheckedSource, check};
use husk_vmm::control::{Call, Notice, Reply, Request, wire};

use crate::driver::memory_file;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let (ours, theirs) = wire::pair().expect("create a socket pair");
    husk_base::sys::fd::set_nonblocking(&ours).expect("set non-blocking mode");
    let send = |fds: &[BorrowedFd<'_>]| scm_rights::send(&ours, bytes, fds).is_ok();
    // The list of fds consists of /dev/kvm, a kernel, an initrd and a console. `check` accepts any character device, so
    // /dev/null can replace /dev/kvm.
    let device = std::fs::File::open("/dev/null").expect("open /dev/null");
    let (file, (_reader, console)) = (memory_file(1), std::io::pipe().expect("create a pipe"));
    let console = OwnedFd::from(console);
    if send(&[device.as_fd(), file.as_fd(), file.as_fd(), console.as_fd()])
        && let Ok((Request { call: Call::Create(config), .. }, fds)) = wire::recv::<Request>(&theirs)
        && let Ok(checked) = check(*config, fds)
    {
        let (CheckedSource::Kernel(files) | CheckedSource::Saved { otherwise: files, .. }) = &checked.source;
        assert!((1..=64).contains(&checked.config.vcpus) && files.initrd_len == 1);
    }
    if send(&[]) {
        let _ = wire::recv::<Reply>(&theirs);
    }
    if send(&[]) {
        let _ = wire::recv::<Notice>(&theirs);
    }
}
