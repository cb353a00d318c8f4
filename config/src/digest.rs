//! SHA-256 digests of the guest kernel and the initrd.

use std::fmt::Write as _;
use std::io::{self, Read};

use sha2::{Digest, Sha256};

/// Size of the blocks in which a file is read, in bytes.
const BLOCK: usize = 256 * 1024;

/// Reads all of `file`, passes each block to `block`, and returns the SHA-256 digest of the blocks as 64 hexadecimal
/// digits.
///
/// # Errors
/// Fails if reading `file` fails, or if `block` returns an error.
pub fn sha256(mut file: impl Read, mut block: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BLOCK];
    loop {
        let length = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        hash.update(bytes);
        block(bytes)?;
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

/// Returns whether `text` has the form of the digests that [`sha256`] returns: 64 lower-case hexadecimal digits.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_returns_the_digest_of_the_blocks_that_it_passes_on() {
        let data = vec![b'a'; 1_000_000];
        let mut copy = Vec::new();
        let digest = sha256(data.as_slice(), |block| {
            copy.extend_from_slice(block);
            Ok(())
        });
        // FIPS 180-2, appendix B.3.
        assert_eq!(digest.unwrap(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
        assert!(copy == data);
        let error = sha256(data.as_slice(), |_| Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn is_sha256_accepts_64_lower_case_digits() {
        assert!(is_sha256(&"0f".repeat(32)));
        for text in
            ["", "0f", &"0F".repeat(32), &"0g".repeat(32), &"0f".repeat(33), &format!("sha256:{}", "0f".repeat(32))]
        {
            assert!(!is_sha256(text), "{text}");
        }
    }
}
