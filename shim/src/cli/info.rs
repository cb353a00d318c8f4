//! `-info` (containerd 2.0 and later) and `-v`.

use std::io::{Read, Write};

use husk_proto::containerd::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// Prints the version, as containerd's own shims do.
pub fn version() {
    println!("containerd-shim-husk-v2:");
    println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
}

/// The features of the OCI runtime specification (features.md there) that callers ask for. containerd tells the kubelet
/// by these which runtime can run pods with user namespaces (`user` and mapped mounts) and which has recursive
/// read-only mounts (`rro`) (containerd 2.x, internal/cri/server/service.go).
fn features() -> Any {
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": [
            "bind", "defaults", "dev", "exec", "idmap", "noatime", "nodev", "noexec", "nosuid", "private", "rbind",
            "relatime", "ridmap", "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime", "suid", "tmpcopyup"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": false, "v2": true },
            "seccomp": { "enabled": true },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    });
    Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: features.to_string().into_bytes(),
        ..Default::default()
    }
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
        features: Some(features()).into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)?;
    out.flush()
}
