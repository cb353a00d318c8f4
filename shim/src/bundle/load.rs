//! Reading a bundle's `config.json` and refusing what a virtual machine cannot give.

use super::{spec::Spec, users::Users};
use serde_json::Value;
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A `config.json` larger than this, in bytes, is none: containerd's messages end at 16 MiB, specifications at kilobytes.
const MAX_LEN: u64 = 16 << 20;

/// A bundle that was read and can run in a virtual machine.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The bundle's directory.
    pub dir: PathBuf,
    /// All of `config.json`.
    pub raw: Value,
    /// The parts the shim looks at.
    pub spec: Spec,
}

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// `config.json` cannot be read.
    #[error("bad bundle: cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `config.json` is far too large.
    #[error("bad bundle: {} has {len} bytes, at most {MAX_LEN} can be a specification", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// `config.json` is no OCI runtime specification.
    #[error("bad bundle: {} is no OCI runtime specification", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The specification contradicts itself or lacks something.
    #[error("bad bundle: {0}")]
    Invalid(String),
    /// A label of a policy that is the host's.
    #[error(
        "SELinux label {0:?}: the guest's kernel has no SELinux, and the virtual machine is not confined by labels; run          the pod privileged, or without SELinux in containerd's configuration (enable_selinux = false)"
    )]
    Selinux(String),
    /// The container shares a namespace with the host.
    #[error("{what}: the container's specification has no {kind} namespace of its own; {remedy}")]
    HostNamespace {
        /// Such as "host network is not possible in a virtual machine".
        what: &'static str,
        /// The namespace's type.
        kind: &'static str,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The network namespace named is the host's own.
    #[error(
        "host network is not possible in a virtual machine: {0} is the host's network namespace; use a pod network, or another runtime for this pod"
    )]
    HostNetwork(String),
    /// A namespace named by its path is not there.
    #[error("bad bundle: {kind} namespace {path}")]
    Namespace {
        /// The namespace's type.
        kind: &'static str,
        /// Its path.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Bundle {
    /// Reads `config.json` in `dir` and checks it.
    ///
    /// # Errors
    /// [`BundleError`] for what cannot be read or cannot run in a virtual machine.
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        let read = |source| BundleError::Read { path: path.clone(), source };
        let len = std::fs::metadata(&path).map_err(read)?.len();
        if len > MAX_LEN {
            return Err(BundleError::TooLarge { path, len });
        }
        let bytes = std::fs::read(&path).map_err(read)?;
        Self::of_text(dir, &bytes)
    }

    /// The same of a specification that is no file.
    ///
    /// # Errors
    /// [`BundleError`] as [`Bundle::load`].
    pub fn of_text(dir: &Path, text: &[u8]) -> Result<Self, BundleError> {
        let bundle = Self::parse(dir, text)?;
        bundle.check_network()?;
        bundle.check_selinux(Path::new("/sys/fs/selinux/enforce").exists())?;
        Ok(bundle)
    }

    /// Parses and checks the specification, without a look at the host.
    pub(super) fn parse(dir: &Path, bytes: &[u8]) -> Result<Self, BundleError> {
        let parse = |source| BundleError::Parse { path: dir.join("config.json"), source };
        // Twice from the text, so that an error of either pass names its line and column.
        let spec: Spec = serde_json::from_slice(bytes).map_err(parse)?;
        let raw: Value = serde_json::from_slice(bytes).map_err(parse)?;
        let bundle = Self { dir: dir.into(), raw, spec };
        bundle.check()?;
        Ok(bundle)
    }

    /// The value of an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.spec.annotations.get(key).map(String::as_str)
    }

    /// The network namespace the specification names, none where it asks for a new one.
    pub fn network_namespace(&self) -> Option<&str> {
        self.spec.linux.namespaces.iter().find(|ns| ns.kind == "network")?.joined()
    }

    /// The users of the specification's user namespace, none where it has no such namespace.
    ///
    /// # Errors
    /// [`BundleError::Invalid`] for mappings that cannot be.
    pub fn users(&self) -> Result<Option<Users>, BundleError> {
        Users::of(&self.spec.linux).map_err(|error| BundleError::Invalid(error.to_string()))
    }

    /// The host name the specification sets.
    pub fn hostname(&self) -> Option<&str> {
        self.spec.hostname.as_deref().filter(|name| !name.is_empty())
    }

    /// A label on a node without SELinux says nothing, under runc as well; on one with it the guest cannot have it.
    fn check_selinux(&self, enabled: bool) -> Result<(), BundleError> {
        let labels = [&self.spec.process.selinux_label, &self.spec.linux.mount_label];
        match labels.into_iter().flatten().find(|label| !label.is_empty()) {
            Some(label) if enabled => Err(BundleError::Selinux(label.clone())),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), BundleError> {
        let Spec { process, root, linux, oci_version, .. } = &self.spec;
        let invalid = |message: &str| Err(BundleError::Invalid(message.into()));
        if !oci_version.starts_with("1.") {
            return invalid(&format!("ociVersion {oci_version:?} is not supported, only 1.x"));
        }
        if process.args.is_empty() {
            return invalid("process.args is empty: there is nothing to run");
        }
        if !process.cwd.starts_with('/') {
            return invalid("process.cwd is not an absolute path");
        }
        if root.path.is_empty() {
            return invalid("root.path is empty");
        }
        for (index, namespace) in linux.namespaces.iter().enumerate() {
            if linux.namespaces.iter().take(index).any(|other| other.kind == namespace.kind) {
                return invalid(&format!("linux.namespaces names {:?} twice", namespace.kind));
            }
        }
        for host in &HOST_NAMESPACES {
            if !linux.namespaces.iter().any(|ns| ns.kind == host.kind) {
                return Err(BundleError::HostNamespace { what: host.what, kind: host.kind, remedy: host.remedy });
            }
        }
        if linux.namespaces.iter().any(|ns| ns.kind == "mount" && ns.joined().is_some()) {
            return invalid(
                "a mount namespace cannot be joined: it is the host's, the container is in a virtual machine",
            );
        }
        if linux.namespaces.iter().any(|ns| ns.kind == "time" && ns.joined().is_some()) {
            return invalid("a time namespace of the host cannot be joined from a virtual machine");
        }
        // One that is joined has its mappings beside it, as containerd's CRI writes them: the guest makes one like it.
        self.users().map(drop)
    }

    /// A path that leads to the network namespace this process is in is host network in disguise.
    fn check_network(&self) -> Result<(), BundleError> {
        let Some(path) = self.network_namespace() else { return Ok(()) };
        let stat = |path: &str| {
            std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).map_err(|source| BundleError::Namespace {
                kind: "network",
                path: path.into(),
                source,
            })
        };
        if stat(path)? == stat("/proc/self/ns/net")? {
            return Err(BundleError::HostNetwork(path.into()));
        }
        Ok(())
    }
}

struct HostNamespace {
    kind: &'static str,
    what: &'static str,
    remedy: &'static str,
}

/// The namespaces without which a container would share them with the host.
const HOST_NAMESPACES: [HostNamespace; 4] = [
    HostNamespace {
        kind: "network",
        what: "host network is not possible in a virtual machine",
        remedy: "drop hostNetwork (--net-host), or use another runtime for this pod",
    },
    HostNamespace {
        kind: "pid",
        what: "host PID is not possible in a virtual machine",
        remedy: "drop hostPID (--pid=host), or use another runtime for this pod",
    },
    HostNamespace {
        kind: "ipc",
        what: "host IPC is not possible in a virtual machine",
        remedy: "drop hostIPC (--ipc=host), or use another runtime for this pod",
    },
    HostNamespace {
        kind: "mount",
        what: "the host's mounts are not visible in a virtual machine",
        remedy: "ask for a mount namespace",
    },
];

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A specification as `ctr run` makes it, cut short.
    pub fn sample() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": { "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "noNewPrivileges": true },
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"] }
            ],
            "linux": {
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "cgroupsPath": "/default/x",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" },
                    { "type": "cgroup" }
                ],
                "maskedPaths": ["/proc/acpi"]
            }
        })
    }

    pub fn bundle(change: impl FnOnce(&mut Value)) -> Result<Bundle, BundleError> {
        let mut value = sample();
        change(&mut value);
        Bundle::parse(Path::new("/bundle"), value.to_string().as_bytes())
    }

    fn without(kind: &str) -> String {
        bundle(|v| {
            v["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind);
        })
        .unwrap_err()
        .to_string()
    }

    #[test]
    fn what_ctr_makes_is_taken() {
        let bundle = bundle(|_| ()).unwrap();
        assert_eq!(bundle.network_namespace(), None);
        assert_eq!(bundle.hostname(), None);
        assert_eq!(bundle.spec.process.args, ["true"]);
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let bundle = bundle(|v| {
            v["annotations"] = Value::Null;
            v["mounts"] = Value::Null;
            v["linux"]["resources"] = Value::Null;
        });
        assert!(bundle.unwrap().spec.mounts.is_empty());
    }

    #[test]
    fn labels_are_refused_where_they_mean_something() {
        let refused = |enabled: bool, change: fn(&mut Value)| bundle(change).unwrap().check_selinux(enabled).is_err();
        let process: fn(&mut Value) = |v| v["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
        let mount: fn(&mut Value) = |v| v["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0".into();
        assert!(refused(true, process) && refused(true, mount));
        assert!(!refused(false, process) && !refused(false, mount));
        assert!(!refused(true, |v| v["process"]["selinuxLabel"] = "".into()));
    }

    #[test]
    fn host_namespaces_are_refused_with_a_remedy() {
        assert!(without("network").starts_with("host network is not possible in a virtual machine"));
        assert!(without("network").contains("hostNetwork"));
        assert!(without("pid").contains("hostPID"));
        assert!(without("ipc").contains("hostIPC"));
        assert!(without("mount").contains("mount namespace"));
        // These are the guest's own then.
        for kind in ["uts", "cgroup"] {
            bundle(|v| v["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind)).unwrap();
        }
        let add = json!({ "type": "time", "path": "/proc/7/ns/x" });
        let error = bundle(|v| v["linux"]["namespaces"].as_array_mut().unwrap().push(add)).unwrap_err();
        assert!(error.to_string().contains("cannot be joined"), "{error}");
    }

    #[test]
    fn a_user_namespace_comes_with_its_mappings() {
        let with = |uids: Value, gids: Value| {
            bundle(|v| {
                let add = json!({ "type": "user", "path": "/proc/7/ns/user" });
                v["linux"]["namespaces"].as_array_mut().unwrap().push(add);
                v["linux"]["uidMappings"] = uids;
                v["linux"]["gidMappings"] = gids;
            })
        };
        let whole = || json!([{ "containerID": 0, "hostID": 65536, "size": 65536 }]);
        let users = with(whole(), whole()).unwrap().users().unwrap().unwrap();
        assert_eq!((users.uid(0), users.uid(65535), users.uid(65536)), (Some(65536), Some(131_071), None));
        let error = with(whole(), Value::Null).unwrap_err().to_string();
        assert!(error.contains("gidMappings"), "{error}");
        let other = json!([{ "containerID": 1, "hostID": 65536, "size": 65536 }]);
        let error = with(other, whole()).unwrap_err().to_string();
        assert!(error.contains("root"), "{error}");
    }

    #[test]
    fn the_hosts_network_namespace_by_path_is_refused() {
        let path = |path: &str| bundle(|v| v["linux"]["namespaces"][4]["path"] = path.into()).unwrap().check_network();
        assert!(matches!(path("/proc/self/ns/net"), Err(BundleError::HostNetwork(_))));
        assert!(matches!(path("/nowhere/net"), Err(BundleError::Namespace { .. })));
    }

    #[test]
    fn bad_bundles_say_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::load(dir.path()), Err(BundleError::Read { .. })));
        std::fs::write(dir.path().join("config.json"), "{\n\"ociVersion\": 1}").unwrap();
        let error = Bundle::load(dir.path()).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("line 2"), "{source}");
        for (change, expected) in [
            (Box::new(|v: &mut Value| v["process"]["args"] = json!([])) as Box<dyn Fn(&mut Value)>, "process.args"),
            (Box::new(|v| v["process"]["cwd"] = "tmp".into()), "process.cwd"),
            (Box::new(|v| v["root"]["path"] = "".into()), "root.path"),
            (Box::new(|v| v["ociVersion"] = "2.0".into()), "ociVersion"),
            (Box::new(|v| v["linux"]["namespaces"][0]["type"] = "ipc".into()), "twice"),
        ] {
            let error = bundle(change).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(bundle(|v| drop(v.as_object_mut().unwrap().remove("process"))).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Bundle::parse(Path::new("/bundle"), &bytes);
        }
    }
}
