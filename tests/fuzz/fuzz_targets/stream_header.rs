//! Fuzzes the header that opens a stream to the agent.
#![no_main]

use husk_proto::stream::{HEADER_LEN, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: [u8; HEADER_LEN]| {
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(header.encode(), bytes);
    }
});
