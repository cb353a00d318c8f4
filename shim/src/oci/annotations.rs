//! Annotations that containerd's CRI plugin and CRI-O set. Husk's own annotations are in [`husk_config::annotation`].

use std::collections::BTreeMap;

/// Annotations of a specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(transparent)]
pub struct Annotations(pub BTreeMap<String, String>);

/// Id of the container's sandbox.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Type of the container: `sandbox` for the pod's sandbox container, `container` for every other container in the pod.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Namespace of the pod.
pub const POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// Name of the pod.
pub const POD_NAME: &str = "io.kubernetes.cri.sandbox-name";
/// UID of the pod.
pub const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// CFS period in microseconds, for [`CPU_QUOTA`].
pub const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// CFS quota in microseconds, the sum of the containers' CPU limits.
pub const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// CPU shares, the sum of the containers' CPU requests.
pub const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Memory in bytes, the sum of the containers' memory limits.
pub const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// containerd's keys, each with the key that CRI-O uses for the same value. CRI-O itself defines the CRI-O keys of the
/// first two pairs (pkg/annotations/internal.go). The CRI-O keys of the other pairs are names of labels that the
/// kubelet sets. CRI-O has no keys for the pod's CPU and memory.
const CRIO: [(&str, &str); 5] = [
    (SANDBOX_ID, "io.kubernetes.cri-o.SandboxID"),
    (CONTAINER_TYPE, "io.kubernetes.cri-o.ContainerType"),
    (POD_NAMESPACE, "io.kubernetes.pod.namespace"),
    (POD_NAME, "io.kubernetes.pod.name"),
    (POD_UID, "io.kubernetes.pod.uid"),
];

impl Annotations {
    /// Returns the value of `key`, which is a constant of this module. If `key` is absent, returns the value of the key
    /// that CRI-O uses in place of `key`.
    pub fn cri(&self, key: &str) -> Option<&str> {
        let of_crio =
            || CRIO.iter().find(|(of_containerd, _)| *of_containerd == key).and_then(|(_, key)| self.get(key));
        self.get(key).or_else(of_crio)
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Returns whether the specification has no annotations.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a CRI implementation made the specification.
    pub fn is_cri(&self) -> bool {
        self.cri(CONTAINER_TYPE).is_some()
    }

    /// Returns whether the container is a pod's sandbox container, which represents the pod and runs no program.
    pub fn is_sandbox(&self) -> bool {
        self.cri(CONTAINER_TYPE) == Some("sandbox")
    }

    /// Returns the Kubernetes pod as `namespace/name`. The result is empty for a container without a pod.
    pub fn pod(&self) -> String {
        match (self.cri(POD_NAMESPACE), self.cri(POD_NAME)) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_of_both_cri_implementations_are_read() {
        let of = |pairs: &[(&str, &str)]| {
            Annotations(pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
        };
        let containerd = of(&[(CONTAINER_TYPE, "sandbox"), (POD_NAMESPACE, "n"), (POD_NAME, "p"), (POD_UID, "u")]);
        let crio = of(&[
            ("io.kubernetes.cri-o.ContainerType", "sandbox"),
            ("io.kubernetes.pod.namespace", "n"),
            ("io.kubernetes.pod.name", "p"),
            ("io.kubernetes.pod.uid", "u"),
        ]);
        for annotations in [containerd, crio] {
            assert!(annotations.is_cri() && annotations.is_sandbox());
            assert_eq!((annotations.pod().as_str(), annotations.cri(POD_UID)), ("n/p", Some("u")));
            assert_eq!(annotations.cri(SANDBOX_ID), None);
        }
        let container = of(&[("io.kubernetes.cri-o.ContainerType", "container")]);
        assert!(container.is_cri() && !container.is_sandbox());
        assert!(!of(&[]).is_cri() && of(&[]).pod().is_empty());
    }
}
