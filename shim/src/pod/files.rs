//! Files that all containers of a pod share: `hostname`, `hosts` and `resolv.conf` in `/etc`, and the pod's `/dev/shm`.

use std::io;
use std::path::{Path, PathBuf};

use husk_proto::cri::{DNSConfig, PodSandboxConfig};
use serde_json::{Value, json};

use crate::oci::Bundle;

/// Names of the pod's files in the sandbox's state directory. Each file is mounted into `/etc` of the containers.
pub const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
/// Mount point of shared memory in a container.
const SHM: &str = "/dev/shm";
/// Mount source that stands for the pod's shared memory. The path does not exist. The path has the form that containerd
/// uses for shared memory. Later, `volumes::plan` replaces a source of this form with the path of the guest's shared
/// memory.
const SHM_SOURCE: &str = "/run/husk/sandboxes/pod/shm";

/// Why the pod's files cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file of the node cannot be read.
    #[error("failed to read the node's {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file of the pod cannot be written.
    #[error("failed to write the pod's {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Writes the pod's files into `dir`.
///
/// # Errors
/// [`FilesError`]. Files that were written before the error stay in `dir` until `dir` is removed.
pub fn write(dir: &Path, config: &PodSandboxConfig, hostname: &str) -> Result<(), FilesError> {
    let read_node_file = |path: &str| match std::fs::read(path) {
        // If the node does not have the file, the pod gets an empty file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|source| FilesError::Read { path: path.into(), source }),
    };
    let resolv = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns).into_bytes(),
        None => read_node_file("/etc/resolv.conf")?,
    };
    let contents = [format!("{hostname}\n").into_bytes(), read_node_file("/etc/hosts")?, resolv];
    for (name, content) in FILES.iter().zip(contents) {
        let path = dir.join(name);
        std::fs::write(&path, content).map_err(|source| FilesError::Write { path, source })?;
    }
    Ok(())
}

fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// Adds mounts of the files in `dir`, and a mount of the pod's shared memory. With `sandboxer = "shim"`, containerd
/// expects the shim to add these mounts.
///
/// If the specification already has a mount at one of these paths, keeps the existing mount. A tmpfs at `/dev/shm` is
/// the exception. The pod's shared memory replaces this tmpfs, because the pod's other containers could not use the
/// tmpfs.
pub fn add_mounts(bundle: &mut Bundle, dir: &Path) {
    let read_only = bundle.raw.pointer("/root/readonly").and_then(Value::as_bool).unwrap_or_default();
    let access = if read_only { "ro" } else { "rw" };
    let mut add: Vec<Value> = Vec::new();
    for name in FILES {
        let destination = format!("/etc/{name}");
        if !bundle.spec.mounts.iter().any(|mount| mount.destination == destination) {
            let source = dir.join(name);
            let options = ["rbind", "rprivate", access];
            add.push(json!({ "destination": destination, "type": "bind", "source": source, "options": options }));
        }
    }
    let shm = json!({ "destination": SHM, "type": "bind", "source": SHM_SOURCE, "options": ["rbind", "rw"] });
    let raw = bundle.raw.get_mut("mounts").and_then(Value::as_array_mut);
    match bundle.spec.mounts.iter_mut().zip(raw.into_iter().flatten()).find(|(mount, _)| mount.destination == SHM) {
        // A volume at /dev/shm stays.
        Some((mount, _)) if mount.is_bind() => {}
        Some((mount, raw)) => {
            if let Ok(shared) = serde_json::from_value(shm.clone()) {
                (*mount, *raw) = (shared, shm);
            }
        }
        None => add.push(shm),
    }
    let Some(raw) = bundle.raw.as_object_mut() else { return };
    // A `mounts` list that is `null` counts as absent.
    if raw.get("mounts").is_none_or(Value::is_null) {
        raw.insert("mounts".into(), Value::Array(Vec::new()));
    }
    let Some(Value::Array(mounts)) = raw.get_mut("mounts") else { return };
    for mount in add {
        // The parsed list and the raw list must have the same order.
        if let Ok(parsed) = serde_json::from_value(mount.clone()) {
            bundle.spec.mounts.push(parsed);
            mounts.push(mount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(mounts: Value) -> Bundle {
        let config = PodSandboxConfig::default();
        let mut spec = crate::pod::specification("c", &config, "");
        if !mounts.is_null() {
            spec["mounts"] = mounts;
        }
        Bundle::from_value(Path::new("/"), spec).unwrap()
    }

    fn destinations(bundle: &Bundle) -> Vec<String> {
        let raw: Vec<_> = bundle.raw["mounts"].as_array().unwrap().iter().collect();
        assert_eq!(raw.len(), bundle.spec.mounts.len());
        for (raw, parsed) in raw.iter().zip(&bundle.spec.mounts) {
            assert_eq!(raw["destination"], parsed.destination);
        }
        raw.iter().map(|mount| format!("{}={}", mount["destination"], mount["source"]).replace('"', "")).collect()
    }

    #[test]
    fn add_mounts_adds_missing_files_and_shared_memory() {
        let mut bundle = bundle(Value::Null);
        add_mounts(&mut bundle, Path::new("/d"));
        let expected = [
            "/etc/hostname=/d/hostname",
            "/etc/hosts=/d/hosts",
            "/etc/resolv.conf=/d/resolv.conf",
            "/dev/shm=/run/husk/sandboxes/pod/shm",
        ];
        assert_eq!(destinations(&bundle), expected);
        assert_eq!(bundle.raw["mounts"][0]["options"][2], "ro");
    }

    #[test]
    fn add_mounts_keeps_existing_mounts_but_replaces_a_tmpfs_at_dev_shm() {
        let mut bundle = bundle(json!([
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
            { "destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts", "options": ["rbind"] },
        ]));
        add_mounts(&mut bundle, Path::new("/d"));
        assert_eq!(destinations(&bundle)[..2], ["/dev/shm=/run/husk/sandboxes/pod/shm", "/etc/hosts=/kubelet/hosts"]);
        assert_eq!(destinations(&bundle).len(), 4);
        let mut volume = self::bundle(json!([
            { "destination": "/dev/shm", "type": "bind", "source": "/vol", "options": ["rbind"] },
        ]));
        add_mounts(&mut volume, Path::new("/d"));
        assert_eq!(destinations(&volume)[0], "/dev/shm=/vol");
    }

    #[test]
    fn resolv_conf_has_the_same_format_as_in_containerd() {
        let dns = DNSConfig {
            servers: vec!["10.0.0.53".into(), "::1".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec!["ndots:2".into()],
            ..Default::default()
        };
        assert_eq!(resolv_conf(&dns), "search a b\nnameserver 10.0.0.53\nnameserver ::1\noptions ndots:2\n");
        assert_eq!(resolv_conf(&DNSConfig::default()), "");
    }
}
