//! Gets random bytes from the kernel, and adds entropy to the kernel's pool.

use std::fs::File;
use std::io;

use crate::sys::random;

/// Fills `bytes` with random bytes (getrandom(2)). Never blocks.
///
/// # Errors
/// Fails with [`io::ErrorKind::WouldBlock`] early in the kernel's boot, before the kernel's pool is initialized.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match random::get(rest) {
            Ok(filled) => rest = rest.get_mut(filled..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
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

/// Adds `bytes` to the kernel's pool, credits them as entropy, and makes the kernel use them at once. Without this, the
/// random numbers of two VMs that were one VM before would be equal for up to a minute (CRNG_RESEED_INTERVAL in
/// drivers/char/random.c). Ignores the bytes after the first 512.
///
/// # Errors
/// The errors of opening `/dev/urandom` and of the ioctls, which need CAP_SYS_ADMIN.
pub fn credit(bytes: &[u8]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    random::add_entropy(&device, bytes)?;
    random::reseed(&device)
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
