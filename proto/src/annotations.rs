//! Keys of the annotations that containerd's CRI plugin and CRI-O set.
//!
//! Shim and agent read these annotations from a container's specification. Husk's own annotations are in the crate
//! `husk-config`.

/// Id of the container's sandbox.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Type of the container: `sandbox` for the pod's sandbox container, `container` for every other container in the pod.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Reference of the container's image.
pub const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";
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
/// The signal that asks the container to end (OCI image specification, conversion.md). containerd
/// does not set this key.
pub const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

/// CRI-O's key for [`SANDBOX_ID`].
pub const CRIO_SANDBOX_ID: &str = "io.kubernetes.cri-o.SandboxID";
/// CRI-O's key for [`CONTAINER_TYPE`].
pub const CRIO_CONTAINER_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
/// CRI-O's key for [`IMAGE_NAME`]. The value is one of the names that the image has on the node. The value is empty if
/// the image has no name.
pub const CRIO_IMAGE_NAME: &str = "io.kubernetes.cri-o.ImageName";
/// CRI-O's key for [`POD_NAMESPACE`].
pub const CRIO_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// CRI-O's key for [`POD_NAME`].
pub const CRIO_POD_NAME: &str = "io.kubernetes.pod.name";
/// CRI-O's key for [`POD_UID`].
pub const CRIO_POD_UID: &str = "io.kubernetes.pod.uid";

/// containerd's keys, each with the key that CRI-O uses for the same value. CRI-O itself defines the CRI-O keys of the
/// first three pairs (pkg/annotations/internal.go). The CRI-O keys of the other pairs are names of labels that the
/// kubelet sets. CRI-O has no keys for the pod's CPU and memory.
const CRIO: [(&str, &str); 6] = [
    (SANDBOX_ID, CRIO_SANDBOX_ID),
    (CONTAINER_TYPE, CRIO_CONTAINER_TYPE),
    (IMAGE_NAME, CRIO_IMAGE_NAME),
    (POD_NAMESPACE, CRIO_POD_NAMESPACE),
    (POD_NAME, CRIO_POD_NAME),
    (POD_UID, CRIO_POD_UID),
];

/// Returns the key that CRI-O uses in place of containerd's key.
pub fn crio_key(of_containerd: &str) -> Option<&'static str> {
    CRIO.iter().find(|(key, _)| *key == of_containerd).map(|(_, of_crio)| *of_crio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crio_key_returns_the_key_of_the_same_value() {
        assert_eq!(crio_key(IMAGE_NAME), Some("io.kubernetes.cri-o.ImageName"));
        assert_eq!(crio_key(POD_UID), Some("io.kubernetes.pod.uid"));
        assert_eq!(crio_key(MEMORY), None);
        assert_eq!(crio_key(CRIO_POD_UID), None);
    }
}
