//! What is asked of a tap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// include/uapi/linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;

/// Makes reads and writes return rather than wait.
pub fn set_nonblocking(tap: &File) -> io::Result<()> {
    // SAFETY: takes a descriptor and a number.
    let flags = unsafe { libc::fcntl(tap.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the header's size, and what the reader can do without.
pub fn set_offload(tap: &File, header: usize, csum: bool, tso4: bool, tso6: bool) -> io::Result<()> {
    let size = libc::c_int::try_from(header).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the ioctl reads the integer it is pointed to.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut flags = 0;
    if csum {
        flags |= TUN_F_CSUM;
        // Segments have partial checksums, so these need the other (virtio 1.2, 5.1.3.1).
        flags |= if tso4 { TUN_F_TSO4 } else { 0 };
        flags |= if tso6 { TUN_F_TSO6 } else { 0 };
    }
    // SAFETY: takes a descriptor and a number.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes a queue of a tap that has several into use, or out of it: frames to the guest go to those in use.
pub fn set_queue(tap: &File, used: bool) -> io::Result<()> {
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request lives through the call, which reads its flags.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The flags of TUNSETIFF, or none for what is no tap.
pub fn flags(tap: &impl AsRawFd) -> libc::c_int {
    // SAFETY: an all-zero ifreq is valid; TUNGETIFF fills it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the request lives until the call returns. A descriptor that is no tap answers with an error.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) } {
        // SAFETY: TUNGETIFF has set the flags. They are 16 bits, of which the sign is one.
        0 => libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff,
        _ => 0,
    }
}
