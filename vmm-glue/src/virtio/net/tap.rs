//! System calls on a tap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// include/uapi/linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;

/// Makes reads and writes non-blocking.
pub fn set_nonblocking(tap: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes no pointer, and the fd is open because `tap` is borrowed.
    let flags = unsafe { libc::fcntl(tap.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: F_SETFL takes an integer and no pointer, and the fd is open because `tap` is borrowed.
    if flags < 0 || unsafe { libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the length of the header, and the offloads that the reader accepts.
pub fn set_offload(tap: &File, header: usize, csum: bool, tso4: bool, tso6: bool) -> io::Result<()> {
    let size = libc::c_int::try_from(header).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: TUNSETVNETHDRSZ reads an int, to which the argument is a valid pointer.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut flags = 0;
    if csum {
        flags |= TUN_F_CSUM;
        // Segmentation offload needs checksum offload, because segments have partial checksums (virtio 1.2, 5.1.3.1).
        flags |= if tso4 { TUN_F_TSO4 } else { 0 };
        flags |= if tso6 { TUN_F_TSO6 } else { 0 };
    }
    // SAFETY: TUNSETOFFLOAD takes an integer and no pointer.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Attaches or detaches a queue of a multi-queue tap. Frames for the guest go to attached queues.
pub fn set_queue(tap: &File, used: bool) -> io::Result<()> {
    // SAFETY: ifreq is a C structure for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETQUEUE reads an ifreq, to which the argument is a valid pointer. Its flags are initialized.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the flags of TUNSETIFF, or 0 if the fd is not a tap.
pub fn flags(tap: &impl AsRawFd) -> libc::c_int {
    // SAFETY: ifreq is a C structure for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes an ifreq, to which the argument is a valid pointer. For another fd than a tap, the ioctl
    // fails.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) } {
        // SAFETY: TUNGETIFF has written the flags, which are the active field of the union. They are 16 unsigned bits
        // in a signed type.
        0 => libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff,
        _ => 0,
    }
}
