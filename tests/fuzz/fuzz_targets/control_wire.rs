//! Fuzzes packets on the VMM's control socket. Each packet is decoded as each message type.
#![no_main]

use std::os::fd::AsRawFd;

use husk_vmm::control::{Notice, Reply, Request, wire};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (ours, theirs) = wire::pair().expect("create a socket pair");
    let send = || {
        // SAFETY: `bytes` outlives the call, and the length passed is the slice's length.
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
