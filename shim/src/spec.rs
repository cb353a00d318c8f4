//! The few things of a container's `config.json` that the shim itself acts on; the rest is the bundle's translation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::bundle::BundleError;

/// containerd's annotation that names a container's sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// The same by CRI-O.
const SANDBOX_ID_CRIO: &str = "io.kubernetes.cri-o.SandboxID";
/// containerd's annotation that tells a pod's sandbox container from its others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The same by CRI-O.
const CONTAINER_TYPE_CRIO: &str = "io.kubernetes.cri-o.ContainerType";
/// Annotations of containerd's and CRI-O's that name the pod.
const POD_NAMESPACE: [&str; 2] = ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"];
const POD_NAME: [&str; 2] = ["io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"];
/// Most bytes of a configuration that are read.
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
    /// Programs to run on the host.
    #[serde(deserialize_with = "nullable")]
    pub hooks: Hooks,
    /// What is Linux' own.
    #[serde(deserialize_with = "nullable")]
    pub linux: Linux,
}

/// OCI hooks by their point in a container's life.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    /// Deprecated form of `createRuntime`.
    #[serde(deserialize_with = "nullable")]
    pub prestart: Vec<Hook>,
    /// After the namespaces exist, before the root is pivoted; on the host.
    #[serde(deserialize_with = "nullable")]
    pub create_runtime: Vec<Hook>,
    /// After the process was started.
    #[serde(deserialize_with = "nullable")]
    pub poststart: Vec<Hook>,
    /// After the container was deleted.
    #[serde(deserialize_with = "nullable")]
    pub poststop: Vec<Hook>,
}

/// A program to run on the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// Absolute path.
    pub path: PathBuf,
    /// With argv[0].
    #[serde(deserialize_with = "nullable")]
    pub args: Vec<String>,
    /// The whole environment.
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// In seconds.
    pub timeout: Option<u64>,
}

/// The Linux part.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Linux {
    /// Namespaces to make or join.
    #[serde(deserialize_with = "nullable")]
    pub namespaces: Vec<Namespace>,
    /// The container's cgroup.
    #[serde(deserialize_with = "nullable")]
    pub cgroups_path: String,
    /// The container's limits.
    #[serde(deserialize_with = "nullable")]
    pub resources: crate::bundle::Resources,
    /// Kernel settings of the container's namespaces.
    #[serde(deserialize_with = "nullable")]
    pub sysctl: HashMap<String, String>,
}

/// A namespace to make or, with a path, to join.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// `network`, `pid`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The namespace to join.
    #[serde(deserialize_with = "nullable")]
    pub path: String,
}

/// Go writes `null` for an empty slice or map.
fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Which network namespace a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// One of its own, which the VMM's process makes.
    New,
    /// This one, made by CNI.
    Path(PathBuf),
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("reading the bundle's configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no OCI runtime configuration.
    #[error("{path} is no OCI runtime configuration")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The sandbox it names cannot be one.
    #[error("annotation {SANDBOX_ID} names no sandbox: {0:?}")]
    SandboxId(String),
    /// The host's network.
    #[error("{}", BundleError::host_network())]
    HostNetwork,
}

impl Spec {
    /// Reads `config.json` of a bundle.
    ///
    /// # Errors
    /// [`SpecError`] when it cannot be read or is no JSON of that form.
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let text = read(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?;
        // By way of a map: serde would read a struct from a JSON array as well.
        serde_json::from_slice(&text)
            .and_then(|object| serde_json::from_value(serde_json::Value::Object(object)))
            .map_err(|source| SpecError::Parse { path, source })
    }

    /// The sandbox a container belongs to.
    ///
    /// # Errors
    /// [`SpecError::SandboxId`] when the annotation would not be a plain file name.
    pub fn group<'a>(&'a self, id: &'a str) -> Result<&'a str, SpecError> {
        let group = [SANDBOX_ID, SANDBOX_ID_CRIO].iter().find_map(|key| self.annotations.get(*key));
        match group {
            None => Ok(id),
            Some(group) if crate::cli::is_name(group) => Ok(group),
            Some(group) => Err(SpecError::SandboxId(group.clone())),
        }
    }

    /// Whether this is a pod's sandbox container: the one that stands for the pod and runs nothing.
    pub fn is_sandbox(&self) -> bool {
        [CONTAINER_TYPE, CONTAINER_TYPE_CRIO]
            .iter()
            .any(|key| self.annotations.get(*key).is_some_and(|kind| kind == "sandbox"))
    }

    /// The Kubernetes pod, as `namespace/name`; empty for a container by itself.
    pub fn pod_name(&self) -> String {
        let part = |names: [&str; 2]| names.iter().find_map(|name| self.annotations.get(*name));
        match (part(POD_NAMESPACE), part(POD_NAME)) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => String::new(),
        }
    }

    /// The network namespace of the sandbox.
    ///
    /// # Errors
    /// [`SpecError::HostNetwork`] when there is none.
    pub fn network(&self) -> Result<Network, SpecError> {
        let namespace = self.linux.namespaces.iter().find(|n| n.kind == "network").ok_or(SpecError::HostNetwork)?;
        Ok(if namespace.path.is_empty() { Network::New } else { Network::Path(PathBuf::from(&namespace.path)) })
    }
}

/// Reads a file that somebody else wrote, no more of it than is sensible.
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
    fn groups() {
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
    fn networks() {
        assert!(matches!(spec("{}").network(), Err(SpecError::HostNetwork)));
        let own = spec(r#"{"linux":{"namespaces":[{"type":"network"}],"cgroupsPath":"/a/b"}}"#);
        assert_eq!(own.network().unwrap(), Network::New);
        let cni = spec(r#"{"annotations":null,"linux":{"namespaces":[{"type":"network","path":"/var/run/netns/x"}]}}"#);
        assert_eq!(cni.network().unwrap(), Network::Path("/var/run/netns/x".into()));
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = serde_json::from_str::<Spec>(&text);
        }
    }
}
