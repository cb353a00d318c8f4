//! Gets random bytes from the kernel, and adds entropy to the kernel's pool.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Maximum number of bytes that [`credit`] passes to the kernel.
const MAX_CREDIT: usize = 512;

/// Fills `bytes` with random bytes (getrandom(2)). Never blocks.
///
/// # Errors
/// Fails with [`io::ErrorKind::WouldBlock`] early in the kernel's boot, before the kernel's pool is initialized.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of a writable slice.
        let filled = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), libc::GRND_NONBLOCK) };
        match usize::try_from(filled) {
            // A signal can interrupt a request for more than 256 bytes. The call then returns only a part of the bytes.
            Ok(filled) => rest = rest.get_mut(filled..).unwrap_or_default(),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Returns random bytes, as [`fill`] does.
///
/// # Errors
/// The errors of [`fill`].
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

/// Adds `bytes` to the kernel's pool and credits them as entropy. Ignores the bytes after the first 512. Uses the ioctl
/// RNDADDENTROPY with `struct rand_pool_info` of linux/random.h.
///
/// # Errors
/// The errors of opening `/dev/urandom` and of the ioctl, which needs CAP_SYS_ADMIN.
pub fn credit(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let bytes = bytes.get(..bytes.len().min(MAX_CREDIT)).unwrap_or_default();
    let length = i32::try_from(bytes.len()).unwrap_or(0);
    let pool = [&(length * 8).to_ne_bytes()[..], &length.to_ne_bytes(), bytes].concat();
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the ioctl reads two integers, and as many bytes as the second integer says. Integers and bytes are in
    // `pool`, which outlives the call.
    match unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_changes_every_part_of_a_long_buffer() {
        let mut buffer = vec![0; 100_000];
        fill(&mut buffer).unwrap();
        // 100 zero bytes in a row have a probability of 2^-800.
        assert!(buffer.chunks(100).all(|part| part.iter().any(|byte| *byte != 0)));
        fill(&mut []).unwrap();
    }

    #[test]
    fn bytes_differ_between_calls() {
        assert_ne!(bytes::<32>().unwrap(), bytes::<32>().unwrap());
    }
}
