//! Packets on the VMM's control socket, read as each kind of message.
#![no_main]

use std::os::fd::AsRawFd;

use husk_vmm::control::{Notice, Reply, Request, wire};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (ours, theirs) = wire::pair().expect("a pair of sockets");
    let send = || {
        // SAFETY: the bytes live through the call and have the length that is told.
        unsafe { libc::send(ours.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) >= 0 }
    };
    if send() {
        let _ = wire::recv::<Request>(&theirs);
    }
    if send() {
        let _ = wire::recv::<Reply>(&theirs);
    }
    if send() {
        let _ = wire::recv::<Notice>(&theirs);
    }
});
