//! Handles the flags `-info` (containerd 2.0 and later) and `-v`.

use std::io::{Read, Write};

use husk_proto::containerd::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// Prints the version in the format of containerd's own shims.
pub fn version() {
    println!("containerd-shim-husk-v2:");
    println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
}

/// Returns the shim's features in the OCI format (features.md of the OCI runtime specification).
///
/// containerd 2.x tells the kubelet which features the handler supports (internal/cri/server/service.go). containerd
/// reports user namespaces if the result contains the namespace `user` and id-mapped mounts. containerd reports
/// recursive read-only mounts if the result contains the mount option `rro`.
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

/// Writes the RuntimeInfo message to stdout. Ignores the runtime options on stdin, because Husk has no runtime options.
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
