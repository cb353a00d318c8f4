//! `-info` (containerd 2.0 and later) and `-v`.

use std::io::{Read, Write};

use husk_proto::containerd::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

/// Prints the version, as containerd's own shims do.
pub fn version() {
    println!("containerd-shim-husk-v2:");
    println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
}

/// Reads the runtime options from stdin, which Husk has none of, and prints the RuntimeInfo message.
///
/// # Errors
/// When stdin or stdout fail.
pub fn info() -> std::io::Result<()> {
    let mut options = Vec::new();
    std::io::stdin().lock().take(super::bootstrap::MAX_INPUT).read_to_end(&mut options)?;
    let info = RuntimeInfo {
        name: "io.containerd.husk.v2".to_owned(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() }).into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)?;
    out.flush()
}
