//! Random bytes and entropy of the kernel (getrandom(2), random(4)).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Maximum number of bytes that [`add_entropy`] passes to the kernel.
const MAX_CREDIT: usize = 512;
/// Constant from linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// Constant from linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Writes random bytes to the beginning of `bytes`, and returns their number. Never blocks. A signal can interrupt a
/// request for more than 256 bytes. The call then returns only a part of the bytes.
///
/// # Errors
/// Fails with [`io::ErrorKind::WouldBlock`] early in the kernel's boot, before the kernel's pool is initialized.
pub fn get(bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of a writable slice.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    usize::try_from(filled).map_err(|_| io::Error::last_os_error())
}

/// Adds `bytes` to the kernel's pool and credits them as entropy. Ignores the bytes after the first 512. `device` is
/// `/dev/urandom`, open for writing. The ioctl takes a `struct rand_pool_info` of linux/random.h.
///
/// # Errors
/// The errors of the ioctl RNDADDENTROPY, which needs CAP_SYS_ADMIN.
pub fn add_entropy(device: &File, bytes: &[u8]) -> io::Result<()> {
    let bytes = bytes.get(..bytes.len().min(MAX_CREDIT)).unwrap_or_default();
    let length = i32::try_from(bytes.len()).unwrap_or(0);
    let pool = [&(length * 8).to_ne_bytes()[..], &length.to_ne_bytes(), bytes].concat();
    // SAFETY: the ioctl reads two integers, and as many bytes as the second integer says. Integers and bytes are in
    // `pool`, which outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, pool.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the kernel's random number generator use the pool's entropy from now on. `device` is `/dev/urandom`.
///
/// # Errors
/// The errors of the ioctl RNDRESEEDCRNG, which needs CAP_SYS_ADMIN.
pub fn reseed(device: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_fills_a_short_buffer() {
        let mut bytes = [0; 64];
        assert_eq!(get(&mut bytes).unwrap(), 64);
        assert_ne!(bytes, [0; 64]);
        assert_eq!(get(&mut []).unwrap(), 0);
    }

    #[test]
    fn add_entropy_to_another_file_fails() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(add_entropy(&file, b"x").unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
