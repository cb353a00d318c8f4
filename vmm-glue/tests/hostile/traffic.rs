//! Sends frames to the guest, so that a device's receive queue always has work.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::machine::{MAC, TAP};

/// Pause between two groups of frames.
const PAUSE: Duration = Duration::from_millis(2);
/// Lengths of the frames in a group. The longest frame has the tap's MTU and an Ethernet header.
const LENGTHS: [usize; 4] = [60, 61, 1000, 1514];

/// A thread that sends frames until the value is dropped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Traffic {
    pub fn start() -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                send().expect("send frames to the tap");
                std::thread::sleep(PAUSE);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            println!("FAILED: the thread that sends frames panicked");
        }
    }
}

/// Sends a group of frames. A full queue of the tap is no error, because the guest may have no receive buffers.
fn send() -> io::Result<()> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, None)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: if_nametoindex(TAP)? as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    for len in LENGTHS {
        let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &[0x88, 0xb5]].concat();
        frame.resize(len, 0x5a);
        // SAFETY: both pointers refer to initialized memory of the lengths that the call gets.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        let error = io::Error::last_os_error();
        if sent < 0 && !matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) {
            return Err(error);
        }
    }
    Ok(())
}
