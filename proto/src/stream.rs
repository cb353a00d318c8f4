//! The header that opens a stdio stream on [`crate::ports::STREAM`].
//!
//! The shim connects, writes this header, and then passes the token in the create or exec request. A vsock connection
//! carries one of stdin, stdout and stderr. For a process with a terminal, one connection carries both directions. A
//! half-close means end of file.

/// Magic number at the start of every stream: "HSK1".
const MAGIC: [u8; 4] = *b"HSK1";

/// Bit of the tokens that the agent chooses (`crate::host_socket`). The shim chooses tokens without this bit. The agent
/// waits for a stream before it tells the shim the token. Therefore it closes a stream with this bit for which it does
/// not wait.
pub const AGENT_TOKEN: u64 = 1 << 63;

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 12;

/// Identifies a stream, so that a create or exec request can refer to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header {
    /// Random number that is unique within the sandbox and cannot be guessed. Never 0.
    pub token: u64,
}

/// The bytes are not a valid stream header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Wrong magic number.
    #[error("invalid stream header: wrong magic number")]
    Magic,
    /// Token 0 is reserved.
    #[error("invalid stream header: token 0 is reserved")]
    ZeroToken,
}

impl Header {
    /// Encodes the header for the wire.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..].copy_from_slice(&self.token.to_le_bytes());
        bytes
    }

    /// Decodes a header.
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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_reverses_encode(token in 1u64..) {
            prop_assert_eq!(Header::decode(Header { token }.encode()), Ok(Header { token }));
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes: [u8; HEADER_LEN]) {
            let _ = Header::decode(bytes);
        }
    }
}
