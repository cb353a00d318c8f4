//! Reads a bundle's `config.json`, and rejects specifications that cannot run in a VM.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use husk_proto::annotations::SANDBOX_ID;
use serde::{Deserialize, de};
use serde_json::Value;

use crate::host_view;
use crate::oci::id_mappings::{IdMappingError, IdMappings};
use crate::oci::spec::{Network, Spec};

/// Maximum size of `config.json` in bytes. containerd sends specifications in messages of at most 16 MiB.
const MAX_LEN: u64 = 16 << 20;

/// A bundle with its specification.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Directory of the bundle.
    pub dir: PathBuf,
    /// The whole `config.json`.
    pub raw: Value,
    /// The parts of `config.json` that the shim reads.
    pub spec: Spec,
}

/// Why a bundle cannot be read or is rejected.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// `config.json` cannot be read.
    #[error("failed to read the bundle's specification {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// `config.json` is too large.
    #[error("invalid bundle: {} is larger than {MAX_LEN} bytes", path.display())]
    TooLarge {
        /// Path of the file.
        path: PathBuf,
    },
    /// `config.json` is not an OCI runtime specification.
    #[error("invalid bundle: {} is not an OCI runtime specification", path.display())]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// Position and cause.
        #[source]
        source: serde_json::Error,
    },
    /// The sandbox id in the annotations is invalid.
    #[error("invalid sandbox id {0:?} in annotation {SANDBOX_ID}")]
    SandboxId(String),
    /// A value in the specification is missing or invalid.
    #[error("invalid bundle: {0}")]
    Invalid(String),
    /// The id mappings of the user namespace are invalid.
    #[error("invalid bundle")]
    IdMappings(#[source] IdMappingError),
    /// The specification has an SELinux label, but the guest's kernel does not support SELinux.
    #[error(
        "SELinux label {0:?} cannot be applied: the guest's kernel does not support SELinux; run the pod privileged, \
         or set enable_selinux = false in containerd's configuration"
    )]
    Selinux(String),
    /// The container would share a namespace with the host.
    #[error("{what}: the container's specification has no {kind} namespace; {remedy}")]
    HostNamespace {
        /// What is impossible, such as "a container in a VM cannot use the host's PID namespace".
        what: &'static str,
        /// Type of the namespace.
        kind: &'static str,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The path of the network namespace leads to the host's network namespace.
    #[error("{what}: {0} is the host's network namespace; {remedy}", what = NETWORK.what, remedy = NETWORK.remedy)]
    HostNetwork(String),
    /// The path of a namespace does not exist, or is not accessible.
    #[error("invalid bundle: failed to access the {kind} namespace {path}")]
    Namespace {
        /// Type of the namespace.
        kind: &'static str,
        /// Path of the namespace.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl BundleError {
    /// Returns the error for a specification without a network namespace.
    pub fn host_network() -> Self {
        NETWORK.missing()
    }
}

impl Spec {
    /// Returns the id of the container's sandbox. If the container has no pod, returns `id`, the container's id.
    ///
    /// # Errors
    /// [`BundleError::SandboxId`] if the sandbox id in the annotations is not a valid id.
    pub fn group<'a>(&'a self, id: &'a str) -> Result<&'a str, BundleError> {
        match self.annotations.cri(SANDBOX_ID) {
            None => Ok(id),
            Some(group) if crate::ids::is_name(group) => Ok(group),
            Some(group) => Err(BundleError::SandboxId(group.into())),
        }
    }

    /// Returns the network namespace of the sandbox.
    ///
    /// # Errors
    /// [`BundleError::HostNamespace`] if the specification has no network namespace.
    pub fn network(&self) -> Result<Network, BundleError> {
        let namespace = self.linux.namespaces.iter().find(|namespace| namespace.kind == "network");
        Ok(match namespace.ok_or_else(BundleError::host_network)?.joined() {
            None => Network::New,
            Some(path) => Network::Path(path.into()),
        })
    }
}

impl Bundle {
    /// Reads `config.json` in `dir`. Does not call [`Bundle::check`].
    ///
    /// # Errors
    /// [`BundleError`] if the file cannot be read, is too large, or is not an OCI runtime specification.
    pub fn read(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        let read = |source| BundleError::Read { path: path.clone(), source };
        let mut bytes = Vec::new();
        let reached = host_view::of_process().reach(&path).map_err(read)?;
        std::fs::File::open(&reached.path).map_err(read)?.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_LEN {
            return Err(BundleError::TooLarge { path });
        }
        Self::parse(dir, &bytes)
    }

    /// Returns the bundle for the specification `raw`, which is not in a file. Does not call [`Bundle::check`].
    ///
    /// # Errors
    /// [`BundleError::Parse`] if `raw` is not an OCI runtime specification.
    pub fn from_value(dir: &Path, raw: Value) -> Result<Self, BundleError> {
        let parse = |source| BundleError::Parse { path: dir.join("config.json"), source };
        // Without this check, serde would accept an array in place of the object.
        if !raw.is_object() {
            return Err(parse(de::Error::custom("the specification is not a JSON object")));
        }
        let spec = Spec::deserialize(&raw).map_err(parse)?;
        Ok(Self { dir: dir.into(), raw, spec })
    }

    fn parse(dir: &Path, bytes: &[u8]) -> Result<Self, BundleError> {
        let parse = |source| BundleError::Parse { path: dir.join("config.json"), source };
        let raw: Value = serde_json::from_slice(bytes).map_err(parse)?;
        Self::from_value(dir, raw).map_err(|error| match serde_json::from_slice::<Spec>(bytes) {
            // Parse the text again to get an error with a line and a column. An error from `Spec::deserialize` has
            // neither.
            Err(source) => parse(source),
            Ok(_) => error,
        })
    }

    /// Rejects the specification of a container that cannot run in a VM.
    ///
    /// # Errors
    /// [`BundleError`] with the reason.
    pub fn check(&self) -> Result<(), BundleError> {
        self.check_spec()?;
        self.check_network()?;
        self.check_selinux(Path::new("/sys/fs/selinux/enforce").exists())
    }

    /// Variant of [`Bundle::check`] for a container of a running sandbox, whose VMM has the PID `vmm`. The confined
    /// shim may not inspect the namespaces of the VMM. Therefore, the sandbox's network namespace is recognized by its
    /// path, and is not checked for the sandbox's own specification, because the launch has checked it.
    ///
    /// # Errors
    /// [`BundleError`] with the reason.
    pub fn check_in_sandbox(&self, is_of_sandbox: bool, vmm: u32) -> Result<(), BundleError> {
        self.check_spec()?;
        let of_vmm = PathBuf::from(format!("/proc/{vmm}/ns/net"));
        if !is_of_sandbox && !matches!(self.spec.network()?, Network::Path(path) if path == of_vmm) {
            self.check_network()?;
        }
        self.check_selinux(Path::new("/sys/fs/selinux/enforce").exists())
    }

    /// Returns the id mappings of the user namespace, or `None` if the specification has no user namespace.
    ///
    /// # Errors
    /// [`BundleError::IdMappings`] if the mappings are invalid.
    pub fn id_mappings(&self) -> Result<Option<IdMappings>, BundleError> {
        let linux = &self.spec.linux;
        let has_namespace = linux.namespaces.iter().any(|namespace| namespace.kind == "user");
        IdMappings::from_namespace(has_namespace, &linux.uid_mappings, &linux.gid_mappings)
            .map_err(BundleError::IdMappings)
    }

    /// Rejects SELinux labels on a node with SELinux, because the guest cannot apply these labels. Ignores the labels
    /// on a node without SELinux, as runc does.
    fn check_selinux(&self, enabled: bool) -> Result<(), BundleError> {
        let labels = [&self.spec.process.selinux_label, &self.spec.linux.mount_label];
        match labels.into_iter().flatten().find(|label| !label.is_empty()) {
            Some(label) if enabled => Err(BundleError::Selinux(label.clone())),
            _ => Ok(()),
        }
    }

    /// Makes the checks that do not need access to the host.
    fn check_spec(&self) -> Result<(), BundleError> {
        let Spec { process, root, linux, oci_version, .. } = &self.spec;
        let invalid = |message: &str| Err(BundleError::Invalid(message.into()));
        if !oci_version.starts_with("1.") {
            return invalid(&format!("ociVersion {oci_version:?} is not supported: it must be 1.x"));
        }
        if process.args.is_empty() {
            return invalid("process.args is empty: it must name a program");
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
                return Err(host.missing());
            }
        }
        if linux.namespaces.iter().any(|ns| ns.kind == "mount" && ns.joined().is_some()) {
            return invalid("a mount namespace cannot be joined: it is on the host, but the container runs in a VM");
        }
        if linux.namespaces.iter().any(|ns| ns.kind == "time" && ns.joined().is_some()) {
            return invalid("a time namespace cannot be joined: it is on the host, but the container runs in a VM");
        }
        // Check the id mappings even if the user namespace has a path. The guest does not use the path, but creates a
        // user namespace from the id mappings.
        self.id_mappings().map(drop)
    }

    /// Rejects a path to the host's network namespace, in which this process runs.
    fn check_network(&self) -> Result<(), BundleError> {
        let Network::Path(path) = self.spec.network()? else { return Ok(()) };
        let stat = |path: &Path| {
            let opened = host_view::of_process().open(path, true);
            let stat = opened.and_then(|file| Ok(nix::sys::stat::fstat(&file)?)).map(|stat| (stat.st_dev, stat.st_ino));
            stat.map_err(|source| BundleError::Namespace { kind: "network", path: path.display().to_string(), source })
        };
        if stat(&path)? == stat(Path::new("/proc/self/ns/net"))? {
            return Err(BundleError::HostNetwork(path.display().to_string()));
        }
        Ok(())
    }
}

/// A type of namespace that a specification must have, and the texts of the error for a missing namespace.
struct HostNamespace {
    kind: &'static str,
    what: &'static str,
    remedy: &'static str,
}

impl HostNamespace {
    fn missing(&self) -> BundleError {
        let Self { kind, what, remedy } = *self;
        BundleError::HostNamespace { what, kind, remedy }
    }
}

const NETWORK: HostNamespace = HostNamespace {
    kind: "network",
    what: "a container in a VM cannot use the host's network namespace",
    remedy: "use a pod network (without hostNetwork or --net-host), or another runtime for this pod",
};

/// If one of these namespaces is missing, the specification asks for the host's namespace.
const HOST_NAMESPACES: [HostNamespace; 4] = [
    NETWORK,
    HostNamespace {
        kind: "pid",
        what: "a container in a VM cannot use the host's PID namespace",
        remedy: "drop hostPID (--pid=host), or use another runtime for this pod",
    },
    HostNamespace {
        kind: "ipc",
        what: "a container in a VM cannot use the host's IPC namespace",
        remedy: "drop hostIPC (--ipc=host), or use another runtime for this pod",
    },
    HostNamespace { kind: "mount", what: "the host's mounts are not visible in a VM", remedy: "add a mount namespace" },
];

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Returns a shortened specification from `ctr run`.
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
        let bundle = Bundle::parse(Path::new("/bundle"), value.to_string().as_bytes())?;
        bundle.check_spec().map(|()| bundle)
    }

    fn without(kind: &str) -> String {
        bundle(|v| {
            v["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind);
        })
        .unwrap_err()
        .to_string()
    }

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn group_is_the_sandbox_id_or_the_container_id() {
        assert_eq!(spec("{}").group("c").unwrap(), "c");
        assert_eq!(spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#).group("c").unwrap(), "pod");
        let bad = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../../etc"}}"#);
        assert!(bad.group("c").unwrap_err().to_string().contains("../../etc"));
    }

    #[test]
    fn network_distinguishes_host_new_and_existing_namespaces() {
        assert!(spec("{}").network().unwrap_err().to_string().contains("host's network namespace"));
        let new = spec(r#"{"linux":{"namespaces":[{"type":"network"}],"cgroupsPath":"/a/b"}}"#);
        assert_eq!(new.network().unwrap(), Network::New);
        let cni = spec(r#"{"annotations":null,"linux":{"namespaces":[{"type":"network","path":"/var/run/netns/x"}]}}"#);
        assert_eq!(cni.network().unwrap(), Network::Path("/var/run/netns/x".into()));
    }

    #[test]
    fn specification_from_ctr_is_accepted() {
        let bundle = bundle(|_| ()).unwrap();
        assert_eq!((bundle.spec.network().unwrap(), bundle.spec.hostname.as_str()), (Network::New, ""));
        assert_eq!(bundle.spec.process.args, ["true"]);
    }

    #[test]
    fn null_fields_count_as_absent() {
        let bundle = bundle(|v| {
            v["annotations"] = Value::Null;
            v["mounts"] = Value::Null;
            v["linux"]["resources"] = Value::Null;
        });
        assert!(bundle.unwrap().spec.mounts.is_empty());
    }

    #[test]
    fn selinux_labels_are_rejected_only_where_selinux_is_enabled() {
        let refused = |enabled: bool, change: fn(&mut Value)| bundle(change).unwrap().check_selinux(enabled).is_err();
        let process: fn(&mut Value) = |v| v["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
        let mount: fn(&mut Value) = |v| v["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0".into();
        assert!(refused(true, process) && refused(true, mount));
        assert!(!refused(false, process) && !refused(false, mount));
        assert!(!refused(true, |v| v["process"]["selinuxLabel"] = "".into()));
        let text = BundleError::Selinux("a:b:c:s0".into()).to_string();
        assert!(!text.contains("  ") && text.contains("enable_selinux"), "{text}");
    }

    #[test]
    fn host_network_errors_name_the_same_reason_and_remedy() {
        let text = without("network");
        assert_eq!(Spec::default().network().unwrap_err().to_string(), text);
        let by_path = BundleError::HostNetwork("/proc/1/ns/net".into()).to_string();
        assert!(by_path.starts_with(NETWORK.what) && by_path.ends_with(NETWORK.remedy), "{by_path}");
        assert!(text.starts_with(NETWORK.what) && text.ends_with(NETWORK.remedy), "{text}");
    }

    #[test]
    fn host_namespaces_are_rejected_with_a_remedy() {
        assert!(without("network").starts_with("a container in a VM cannot use the host's network namespace: "));
        assert!(without("network").contains("hostNetwork"));
        assert!(without("pid").contains("hostPID"));
        assert!(without("ipc").contains("hostIPC"));
        assert!(without("mount").contains("mount namespace"));
        // A specification without a UTS or cgroup namespace is valid.
        for kind in ["uts", "cgroup"] {
            bundle(|v| v["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind)).unwrap();
        }
        let add = json!({ "type": "time", "path": "/proc/7/ns/x" });
        let error = bundle(|v| v["linux"]["namespaces"].as_array_mut().unwrap().push(add)).unwrap_err();
        assert!(error.to_string().contains("cannot be joined"), "{error}");
    }

    #[test]
    fn user_namespace_needs_valid_mappings() {
        let with = |uids: Value, gids: Value| {
            bundle(|v| {
                let add = json!({ "type": "user", "path": "/proc/7/ns/user" });
                v["linux"]["namespaces"].as_array_mut().unwrap().push(add);
                v["linux"]["uidMappings"] = uids;
                v["linux"]["gidMappings"] = gids;
            })
        };
        let all_ids = || json!([{ "containerID": 0, "hostID": 65536, "size": 65536 }]);
        let id_mappings = with(all_ids(), all_ids()).unwrap().id_mappings().unwrap().unwrap();
        assert_eq!(
            (id_mappings.uid(0), id_mappings.uid(65535), id_mappings.uid(65536)),
            (Some(65536), Some(131_071), None)
        );
        let error = crate::chain(&with(all_ids(), Value::Null).unwrap_err());
        assert!(error.contains("gidMappings"), "{error}");
        let other = json!([{ "containerID": 1, "hostID": 65536, "size": 65536 }]);
        let error = crate::chain(&with(other, all_ids()).unwrap_err());
        assert!(error.contains("root"), "{error}");
    }

    #[test]
    fn path_to_the_host_network_namespace_is_rejected() {
        let path = |path: &str| bundle(|v| v["linux"]["namespaces"][4]["path"] = path.into()).unwrap().check_network();
        assert!(matches!(path("/proc/self/ns/net"), Err(BundleError::HostNetwork(_))));
        assert!(matches!(path("/nonexistent/net"), Err(BundleError::Namespace { .. })));
    }

    #[test]
    fn network_namespace_of_the_sandbox_is_recognized_by_its_path() {
        let of = |path: &str| bundle(|v| v["linux"]["namespaces"][4]["path"] = path.into()).unwrap();
        // This process does not exist. Therefore, a check of its namespace fails.
        let bundle = of("/proc/4194305/ns/net");
        bundle.check_in_sandbox(false, 4_194_305).unwrap();
        bundle.check_in_sandbox(true, 1).unwrap();
        assert!(matches!(bundle.check_in_sandbox(false, 1), Err(BundleError::Namespace { .. })));
        let of_host = of("/proc/self/ns/net").check_in_sandbox(false, 1);
        assert!(matches!(of_host, Err(BundleError::HostNetwork(_))));
    }

    #[test]
    fn error_for_an_invalid_bundle_names_the_cause() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::read(dir.path()), Err(BundleError::Read { .. })));
        std::fs::write(dir.path().join("config.json"), "{\n\"ociVersion\": 1}").unwrap();
        let error = Bundle::read(dir.path()).unwrap_err();
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
        assert!(Bundle::parse(Path::new("/"), b"[]").is_err());
        std::fs::write(dir.path().join("config.json"), vec![b' '; MAX_LEN as usize + 1]).unwrap();
        assert!(matches!(Bundle::read(dir.path()), Err(BundleError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn parsing_arbitrary_bytes_never_panics(bytes: Vec<u8>) {
            let _ = Bundle::parse(Path::new("/bundle"), &bytes);
        }
    }
}
