//! Configures network interfaces and taps with ioctls (netdevice(7), linux/if_tun.h).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

// include/uapi/linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// `struct ifreq` with a name and flags.
struct Request(libc::ifreq);

impl Request {
    /// Creates a request. The name is cut to 15 bytes, because the field has 16 bytes and must end with NUL.
    fn new(name: &str, flags: libc::c_int) -> Self {
        // SAFETY: ifreq is a C structure of numbers and pointers. A structure of all zero bytes is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        // Flags are 16 unsigned bits in a signed type.
        request.ifr_ifru.ifru_flags = ((flags.cast_unsigned() & 0xffff) as u16).cast_signed();
        Self(request)
    }

    fn flags(&self) -> libc::c_int {
        // SAFETY: `new` has initialized the flags. The kernel writes either flags or nothing to the union.
        libc::c_int::from(unsafe { self.0.ifr_ifru.ifru_flags }) & 0xffff
    }

    /// Performs one of the ioctls SIOCSIFFLAGS, TUNSETIFF, TUNGETIFF and TUNSETQUEUE.
    fn ioctl(&mut self, fd: impl AsFd, number: libc::c_ulong) -> io::Result<()> {
        // SAFETY: these ioctls read and write an ifreq, and the argument is a valid pointer to an ifreq. The ioctls use
        // its names, numbers and flags, but no pointers.
        match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number as _, &raw mut self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Sets the flags (IFF_…) of an interface of the current network namespace.
///
/// # Errors
/// ENODEV if there is no such interface, and the other errors of the ioctl SIOCSIFFLAGS.
pub fn set_flags(name: &str, flags: libc::c_int) -> io::Result<()> {
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    Request::new(name, flags).ioctl(control, libc::SIOCSIFFLAGS)
}

/// Attaches an open `/dev/net/tun` to the tap `name`, with `flags` (IFF_TAP and others). Creates the tap if it does not
/// exist.
///
/// # Errors
/// The errors of the ioctl TUNSETIFF.
pub fn set_tap(tun: impl AsFd, name: &str, flags: libc::c_int) -> io::Result<()> {
    Request::new(name, flags).ioctl(tun, libc::TUNSETIFF)
}

/// Returns the flags of a tap, as TUNSETIFF takes them.
///
/// # Errors
/// ENOTTY or EBADFD if the fd is not a tap.
pub fn tap_flags(tap: impl AsFd) -> io::Result<libc::c_int> {
    let mut request = Request::new("", 0);
    request.ioctl(tap, libc::TUNGETIFF)?;
    Ok(request.flags())
}

/// Attaches or detaches a queue of a multi-queue tap. The kernel puts frames only into attached queues.
///
/// # Errors
/// The errors of the ioctl TUNSETQUEUE.
pub fn set_queue_attached(tap: impl AsFd, attached: bool) -> io::Result<()> {
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    Request::new("", flags).ioctl(tap, libc::TUNSETQUEUE)
}

/// Sets the size, in bytes, of the virtio-net header that precedes each frame of a tap.
///
/// # Errors
/// The errors of the ioctl TUNSETVNETHDRSZ.
pub fn set_header_size(tap: impl AsFd, size: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int, and the argument is a valid pointer to an int.
    match unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the offloads (TUN_F_…) that the reader of a tap accepts.
///
/// # Errors
/// The errors of the ioctl TUNSETOFFLOAD.
pub fn set_offload(tap: impl AsFd, offloads: libc::c_ulong) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes an integer and no pointer.
    match unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), TUNSETOFFLOAD as _, offloads) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_keep_flags_and_cut_long_names() {
        let request = Request::new("a-name-that-is-too-long", 0x9100);
        assert_eq!(request.flags(), 0x9100);
        assert_eq!(request.0.ifr_name[14], b'-' as libc::c_char);
        assert_eq!(request.0.ifr_name[15], 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no ioctl for pipes")]
    fn calls_for_taps_reject_a_pipe() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(tap_flags(&reader).is_err());
        assert!(set_queue_attached(&reader, true).is_err());
        assert!(set_header_size(&reader, 12).is_err());
        assert!(set_offload(&reader, 0).is_err());
        assert!(set_tap(&reader, "husk0", libc::IFF_TAP).is_err());
        let error = set_flags("no-such-if", 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV), "this test needs root to set flags: {error}");
    }
}
