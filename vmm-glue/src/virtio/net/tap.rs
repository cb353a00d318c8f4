//! The settings of a tap.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use husk_base::sys::interface;

// include/uapi/linux/if_tun.h
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;

/// Sets the length of the virtio-net header that precedes each frame, and the offloads that the guest accepts.
pub fn set_offload(tap: &File, header: usize, csum: bool, tso4: bool, tso6: bool) -> io::Result<()> {
    let size = libc::c_int::try_from(header).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    interface::set_header_size(tap, size)?;
    let mut flags = 0;
    if csum {
        flags |= TUN_F_CSUM;
        // Segmentation offload needs checksum offload, because segments have partial checksums (virtio 1.2, 5.1.3.1).
        flags |= if tso4 { TUN_F_TSO4 } else { 0 };
        flags |= if tso6 { TUN_F_TSO6 } else { 0 };
    }
    interface::set_offload(tap, flags)
}

/// Returns the flags of TUNSETIFF, or 0 if the fd is not a tap.
pub fn flags(tap: impl AsFd) -> libc::c_int {
    interface::tap_flags(tap).unwrap_or(0)
}
