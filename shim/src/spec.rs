//! The parts of a container's `config.json` that the shim itself acts on. `bundle` translates the rest for the guest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::bundle::BundleError;

/// containerd's annotation with the id of a container's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// CRI-O's equivalent of [`SANDBOX_ID`].
const SANDBOX_ID_CRIO: &str = "io.kubernetes.cri-o.SandboxID";
/// containerd's annotation that tells a pod's sandbox container from its other containers.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// CRI-O's equivalent of [`CONTAINER_TYPE`].
const CONTAINER_TYPE_CRIO: &str = "io.kubernetes.cri-o.ContainerType";
/// containerd's and CRI-O's annotations with the pod's namespace and name.
const POD_NAMESPACE: [&str; 2] = ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"];
const POD_NAME: [&str; 2] = ["io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"];
/// Maximum size of a `config.json`, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// The shim's view of a `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Spec {
    /// Version of the OCI runtime specification.
    #[serde(rename = "ociVersion")]
    pub version: String,
    /// Arbitrary metadata.
    #[serde(deserialize_with = "nullable")]
    pub annotations: HashMap<String, String>,
    /// The container's host name.
    pub hostname: String,
    /// OCI hooks.
    #[serde(deserialize_with = "nullable")]
    pub hooks: Hooks,
    /// The Linux-specific part.
    #[serde(deserialize_with = "nullable")]
    pub linux: Linux,
}

/// OCI hooks by their point in a container's lifecycle.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    /// Deprecated form of `createRuntime`.
    #[serde(deserialize_with = "nullable")]
    pub prestart: Vec<Hook>,
    /// Run after the namespaces exist and before the root is pivoted.
    #[serde(deserialize_with = "nullable")]
    pub create_runtime: Vec<Hook>,
    /// Run after the process was started.
    #[serde(deserialize_with = "nullable")]
    pub poststart: Vec<Hook>,
    /// Run after the container was deleted.
    #[serde(deserialize_with = "nullable")]
    pub poststop: Vec<Hook>,
}

/// A hook: a program that the shim runs on the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// Absolute path.
    pub path: PathBuf,
    /// Arguments, beginning with argv[0].
    #[serde(deserialize_with = "nullable")]
    pub args: Vec<String>,
    /// The complete environment.
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// Timeout in seconds.
    pub timeout: Option<u64>,
}

/// The Linux-specific part of a specification.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// Namespaces to create or join.
    #[serde(deserialize_with = "nullable")]
    pub namespaces: Vec<Namespace>,
    /// The container's cgroup.
    #[serde(deserialize_with = "nullable")]
    pub cgroups_path: String,
    /// The container's resource limits.
    #[serde(deserialize_with = "nullable")]
    pub resources: crate::bundle::Resources,
    /// Sysctls of the container's namespaces.
    #[serde(deserialize_with = "nullable")]
    pub sysctl: HashMap<String, String>,
}

/// A namespace to create, or to join if it has a path.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// `network`, `pid`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// Path of the namespace to join; empty for a new one.
    #[serde(deserialize_with = "nullable")]
    pub path: String,
}

/// Accepts `null` for a default value: Go writes `null` for an empty slice or map.
fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The network namespace that a specification requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// A new namespace, which the VMM process creates.
    New,
    /// An existing namespace, made by CNI.
    Path(PathBuf),
}

/// A `config.json` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("failed to read the bundle's specification {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not an OCI runtime specification.
    #[error("failed to parse {path} as an OCI runtime specification")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The annotation with the sandbox id has a value that is not valid as an id.
    #[error("invalid sandbox id {0:?} in annotation {SANDBOX_ID}")]
    SandboxId(String),
    /// The specification has no network namespace: the container would use the host's network.
    #[error("{}", BundleError::host_network())]
    HostNetwork,
}

impl Spec {
    /// Reads the `config.json` of a bundle.
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let text = read(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?;
        // Parses an object first: serde would also deserialize the struct from a JSON array.
        serde_json::from_slice(&text)
            .and_then(|object| serde_json::from_value(serde_json::Value::Object(object)))
            .map_err(|source| SpecError::Parse { path, source })
    }

    /// Returns the id of the container's sandbox; for a container without a pod, its own id.
    ///
    /// # Errors
    /// [`SpecError::SandboxId`] if the annotation is not a plain file name.
    pub fn group<'a>(&'a self, id: &'a str) -> Result<&'a str, SpecError> {
        let group = [SANDBOX_ID, SANDBOX_ID_CRIO].iter().find_map(|key| self.annotations.get(*key));
        match group {
            None => Ok(id),
            Some(group) if crate::cli::is_name(group) => Ok(group),
            Some(group) => Err(SpecError::SandboxId(group.clone())),
        }
    }

    /// Returns whether this is a pod's sandbox container, which represents the pod and runs nothing.
    pub fn is_sandbox(&self) -> bool {
        [CONTAINER_TYPE, CONTAINER_TYPE_CRIO]
            .iter()
            .any(|key| self.annotations.get(*key).is_some_and(|kind| kind == "sandbox"))
    }

    /// Returns the Kubernetes pod as `namespace/name`; empty for a container without a pod.
    pub fn pod_name(&self) -> String {
        let part = |names: [&str; 2]| names.iter().find_map(|name| self.annotations.get(*name));
        match (part(POD_NAMESPACE), part(POD_NAME)) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => String::new(),
        }
    }

    /// Returns the network namespace of the sandbox.
    ///
    /// # Errors
    /// [`SpecError::HostNetwork`] if the specification has none.
    pub fn network(&self) -> Result<Network, SpecError> {
        let namespace = self.linux.namespaces.iter().find(|n| n.kind == "network").ok_or(SpecError::HostNetwork)?;
        Ok(if namespace.path.is_empty() { Network::New } else { Network::Path(PathBuf::from(&namespace.path)) })
    }
}

/// Reads a file of at most [`MAX_SIZE`] bytes.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(std::io::Error::other("larger than 16 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn sandbox_id_and_container_type_come_from_annotations() {
        assert_eq!(spec("{}").group("c").unwrap(), "c");
        let pod = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#);
        assert_eq!(pod.group("c").unwrap(), "pod");
        let bad = spec(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../../etc"}}"#);
        assert!(bad.group("c").is_err());
        assert!(!pod.is_sandbox());
        assert!(spec(r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#).is_sandbox());
        assert!(!spec(r#"{"annotations":{"io.kubernetes.cri.container-type":"container"}}"#).is_sandbox());
    }

    #[test]
    fn network_distinguishes_host_new_and_existing_namespaces() {
        assert!(matches!(spec("{}").network(), Err(SpecError::HostNetwork)));
        let own = spec(r#"{"linux":{"namespaces":[{"type":"network"}],"cgroupsPath":"/a/b"}}"#);
        assert_eq!(own.network().unwrap(), Network::New);
        let cni = spec(r#"{"annotations":null,"linux":{"namespaces":[{"type":"network","path":"/var/run/netns/x"}]}}"#);
        assert_eq!(cni.network().unwrap(), Network::Path("/var/run/netns/x".into()));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text: String) {
            let _ = serde_json::from_str::<Spec>(&text);
        }
    }
}
