//! Fuzzes the two headers that the shim sends to the agent: the header that opens a stream, and the header that opens a
//! forwarded connection.

use husk_proto::{port_forwarding, stream};

/// Runs one input.
pub fn run(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<{ stream::HEADER_LEN }>()
        && let Ok(header) = stream::Header::decode(*bytes)
    {
        assert_eq!(header.encode(), *bytes);
    }
    if let Some(bytes) = bytes.first_chunk::<{ port_forwarding::HEADER_LEN }>()
        && let Ok(address) = port_forwarding::decode(*bytes)
    {
        assert_eq!(port_forwarding::decode(port_forwarding::encode(address)).expect("decode the header"), address);
    }
}
