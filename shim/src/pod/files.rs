//! The files every container of a pod sees as its own: host name, hosts and resolv.conf, and the pod's shared memory.

use std::io;
use std::path::{Path, PathBuf};

use husk_proto::cri::{DNSConfig, PodSandboxConfig};
use serde_json::{Value, json};

use crate::bundle::Bundle;

/// Their names in the sandbox's directory, each mounted at `/etc` of a container.
pub const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
/// Where containers have shared memory.
const SHM: &str = "/dev/shm";
/// What the pod's shared memory is called in a specification: a name of containerd's form, which the bundle's
/// translation takes for the guest's own. There is nothing at that path.
const SHM_SOURCE: &str = "/run/husk/sandboxes/pod/shm";

/// Why they cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One of the node's cannot be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One of the pod's cannot be written.
    #[error("writing {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes the files into `dir`.
///
/// # Errors
/// [`FilesError`]; those written until then stay, and go with the directory.
pub fn write(dir: &Path, config: &PodSandboxConfig, hostname: &str) -> Result<(), FilesError> {
    let node = |path: &str| match std::fs::read(path) {
        // A node without one has nothing to hand on.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|source| FilesError::Read { path: path.into(), source }),
    };
    let resolv = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns).into_bytes(),
        None => node("/etc/resolv.conf")?,
    };
    let contents = [format!("{hostname}\n").into_bytes(), node("/etc/hosts")?, resolv];
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

/// Adds to a container's specification what containerd leaves to the sandbox, where the container has nothing of its
/// own there: the files in `dir`, and the pod's shared memory instead of the container's.
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
        // A volume that the pod has put there stays.
        Some((mount, _)) if mount.is_bind() => {}
        Some((mount, raw)) => {
            if let Ok(shared) = serde_json::from_value(shm.clone()) {
                (*mount, *raw) = (shared, shm);
            }
        }
        None => add.push(shm),
    }
    let Some(raw) = bundle.raw.as_object_mut() else { return };
    let Value::Array(mounts) = raw.entry("mounts").or_insert_with(|| Value::Array(Vec::new())) else { return };
    for mount in add {
        // Both lists have the same order.
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
        Bundle::of_text(Path::new("/"), spec.to_string().as_bytes()).unwrap()
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
    fn what_is_missing_is_added() {
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
    fn what_the_container_has_stays() {
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
    fn resolv_conf_as_containerd_writes_it() {
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
