//! The header that opens a forwarded TCP connection on [`crate::ports::PORT_FORWARDING`].
//!
//! The shim connects, writes the header and reads a one-byte reply: 0 if the guest has connected, otherwise the errno
//! of connect(2). After the reply, the vsock connection carries the TCP connection's data. A half-close means end of
//! file.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Magic number at the start: "HSKF".
const MAGIC: [u8; 4] = *b"HSKF";

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 22;

/// The bytes are not a valid header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid port forwarding header: wrong magic number")]
pub struct HeaderError;

/// Encodes the header for a connection to `address` in the pod's network namespace.
pub fn encode(address: SocketAddr) -> [u8; HEADER_LEN] {
    let ip = match address.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut bytes = [0; HEADER_LEN];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&address.port().to_be_bytes());
    bytes[6..].copy_from_slice(&ip.octets());
    bytes
}

/// Decodes a header.
pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<SocketAddr, HeaderError> {
    let [a, b, c, d, high, low, ip @ ..] = bytes;
    if [a, b, c, d] != MAGIC {
        return Err(HeaderError);
    }
    Ok(SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), u16::from_be_bytes([high, low])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decode_reverses_encode(port: u16, v4: u32, v6: u128) {
            for ip in [IpAddr::V4(v4.into()), Ipv6Addr::from(v6).to_canonical()] {
                let address = SocketAddr::new(ip, port);
                prop_assert_eq!(decode(encode(address)), Ok(address));
            }
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes: [u8; HEADER_LEN]) {
            let _ = decode(bytes);
        }
    }
}
