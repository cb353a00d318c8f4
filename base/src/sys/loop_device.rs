//! Requests to loop devices (loop(4)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Constants from linux/loop.h.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// Returns the number of a free loop device. If there is none, the kernel creates one. `control` is the open
/// `/dev/loop-control`.
///
/// # Errors
/// The errors of the ioctl LOOP_CTL_GET_FREE.
pub fn free_number(control: &File) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Attaches the file `backing` to the loop device `device` (Linux 5.8). The kernel detaches the file when the device is
/// closed and not mounted (LO_FLAGS_AUTOCLEAR).
///
/// # Errors
/// EBUSY if the device has a file, and the other errors of the ioctl LOOP_CONFIGURE.
pub fn configure(device: &File, backing: impl AsFd, read_only: bool) -> io::Result<()> {
    let config = LoopConfig {
        fd: backing.as_fd().as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`. `config` has that layout and outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_kernel() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no ioctl for files")]
    fn requests_to_other_files_fail() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(free_number(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(configure(&file, &file, true).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
