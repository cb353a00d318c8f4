//! The header that opens a stdio stream on [`crate::ports::STREAM`].
//!
//! The shim dials, writes this header, then names the token in the create or exec request. One stream carries
//! one direction of one standard stream (a terminal's stream carries both). End of file is a half-close.

/// Magic number at the start of every stream: "HSK1".
const MAGIC: [u8; 4] = *b"HSK1";

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 12;

/// Names a stream for the request that uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header {
    /// Random, so that it is unique within the sandbox and cannot be guessed; never 0.
    pub token: u64,
}

/// Why bytes are no stream header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The first bytes are not the magic number.
    #[error("not a stream header: bad magic number")]
    Magic,
    /// Token 0 names nothing.
    #[error("not a stream header: token 0")]
    ZeroToken,
}

impl Header {
    /// The header's bytes on the wire.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..].copy_from_slice(&self.token.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`HeaderError`] when the bytes are anything else.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let [a, b, c, d, token @ ..] = bytes;
        if [a, b, c, d] != MAGIC {
            return Err(HeaderError::Magic);
        }
        match u64::from_le_bytes(token) {
            0 => Err(HeaderError::ZeroToken),
            token => Ok(Self { token }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(token in 1u64..) {
            prop_assert_eq!(Header::decode(Header { token }.encode()), Ok(Header { token }));
        }

        #[test]
        fn any_bytes_never_panic(bytes: [u8; HEADER_LEN]) {
            let _ = Header::decode(bytes);
        }
    }
}
