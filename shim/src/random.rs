//! Random bytes from the host's kernel.

use std::io;

/// Returns `N` random bytes.
///
/// `N` is at most 256: once the kernel's pool is initialised, getrandom(2) returns up to 256 bytes at once, without
/// blocking.
///
/// # Errors
/// Early in the host's boot, before the kernel's pool is initialised.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    // SAFETY: getrandom writes at most `N` bytes, the length of the buffer.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, libc::GRND_NONBLOCK) };
    match usize::try_from(filled) {
        Ok(filled) if filled == N => Ok(bytes),
        Ok(_) => Err(io::ErrorKind::Interrupted.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Returns an unpredictable number that is never 0.
///
/// # Errors
/// As [`bytes`].
pub fn token() -> io::Result<u64> {
    Ok(u64::from_ne_bytes(bytes()?).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn tokens_are_distinct_and_not_consecutive() {
        let tokens: Vec<u64> = (0..64).map(|_| token().unwrap()).collect();
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len());
        assert!(tokens.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 1 << 20));
    }
}
