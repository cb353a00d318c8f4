//! Makes a sandbox's specification from the pod's configuration. The model is the specification that containerd makes
//! for a sandbox container (containerd 2.1, internal/cri/server/podsandbox/sandbox_run_linux.go).

use husk_config::annotation;
use husk_proto::annotations::{
    CONTAINER_TYPE, CPU_PERIOD, CPU_QUOTA, CPU_SHARES, MEMORY, POD_NAME, POD_NAMESPACE, POD_UID, SANDBOX_ID,
};
use husk_proto::cri::{IDMapping, NamespaceMode, PodSandboxConfig};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Map, Value, json};

/// Protobuf message name of the pod's configuration. containerd uses this name, without a host, as the type URL.
const MESSAGE: &str = "runtime.v1.PodSandboxConfig";
/// Sysctls that containerd 2.x sets in a pod by default (enable_unprivileged_ports and enable_unprivileged_icmp).
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Why the pod's configuration cannot be decoded from a sandbox's options.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The options have a type other than `MESSAGE`.
    #[error("invalid type {0:?} of the sandbox's options: expected {MESSAGE}")]
    Type(String),
    /// The options cannot be decoded.
    #[error("failed to decode the sandbox's options as {MESSAGE}")]
    Decode(#[source] protobuf::Error),
}

/// Decodes the pod's configuration from a sandbox's options. Without options, returns an empty configuration.
pub fn config(options: Option<&Any>) -> Result<PodSandboxConfig, PodError> {
    match options {
        None => Ok(PodSandboxConfig::default()),
        Some(any) if any.type_url.rsplit('/').next() == Some(MESSAGE) => {
            PodSandboxConfig::parse_from_bytes(&any.value).map_err(PodError::Decode)
        }
        Some(any) => Err(PodError::Type(any.type_url.clone())),
    }
}

/// Makes the sandbox's specification.
///
/// If the pod shares the node's network, PID or IPC namespace, the specification lacks a namespace of this type.
/// `Bundle::check` later rejects the specification.
pub fn specification(id: &str, config: &PodSandboxConfig, netns: &str) -> Value {
    let options = &config.linux.security_context.namespace_options;
    let mut namespaces = vec![json!({ "type": "mount" }), json!({ "type": "uts" })];
    let is_private = |mode: &protobuf::EnumOrUnknown<NamespaceMode>| mode.enum_value() != Ok(NamespaceMode::NODE);
    if is_private(&options.network) {
        namespaces.push(match netns {
            "" => json!({ "type": "network" }),
            path => json!({ "type": "network", "path": path }),
        });
    }
    for (kind, mode) in [("pid", &options.pid), ("ipc", &options.ipc)] {
        if is_private(mode) {
            namespaces.push(json!({ "type": kind }));
        }
    }
    let users = &options.userns_options;
    let has_user_namespace = users.is_some() && users.mode.enum_value() == Ok(NamespaceMode::POD);
    if has_user_namespace {
        namespaces.push(json!({ "type": "user" }));
    }
    let mut sysctls: Map<String, Value> = SYSCTLS.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    if has_user_namespace {
        // Omit this sysctl, as containerd does. The upper end of the sysctl's range is a gid that the user namespace
        // does not map.
        sysctls.remove("net.ipv4.ping_group_range");
    }
    sysctls.extend(config.linux.sysctls.iter().map(|(key, value)| (key.clone(), value.clone().into())));
    json!({
        "ociVersion": "1.2.0",
        "hostname": config.hostname,
        // A specification must have a process. Nothing runs this process.
        "process": { "args": ["sandbox"], "cwd": "/" },
        "root": { "path": "rootfs", "readonly": true },
        "annotations": annotations(id, config),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroups_path(&config.linux.cgroup_parent, id),
            "sysctl": sysctls,
            "uidMappings": mappings(has_user_namespace, &users.uids),
            "gidMappings": mappings(has_user_namespace, &users.gids),
        },
    })
}

fn mappings(has_user_namespace: bool, ids: &[IDMapping]) -> Vec<Value> {
    let of = |ids: &IDMapping| json!({ "containerID": ids.container_id, "hostID": ids.host_id, "size": ids.length });
    ids.iter().filter(|_| has_user_namespace).map(of).collect()
}

fn annotations(id: &str, config: &PodSandboxConfig) -> Map<String, Value> {
    // `boot_size` later rejects the annotations that Husk's configuration does not allow.
    let husk = config.annotations.iter().filter(|(key, _)| key.starts_with(annotation::PREFIX));
    let mut all: Map<String, Value> = husk.map(|(key, value)| (key.clone(), value.clone().into())).collect();
    let mut put = |key: &str, value: String| all.insert(key.into(), value.into());
    put(CONTAINER_TYPE, "sandbox".into());
    put(SANDBOX_ID, id.into());
    put(POD_NAME, config.metadata.name.clone());
    put(POD_NAMESPACE, config.metadata.namespace.clone());
    put(POD_UID, config.metadata.uid.clone());
    if let Some(resources) = config.linux.resources.as_ref() {
        put(CPU_PERIOD, resources.cpu_period.to_string());
        put(CPU_QUOTA, resources.cpu_quota.to_string());
        put(CPU_SHARES, resources.cpu_shares.to_string());
        put(MEMORY, resources.memory_limit_in_bytes.to_string());
    }
    all
}

/// Returns the `cgroupsPath` of the sandbox. If `parent` is a systemd slice, the result names a scope in this slice.
/// Otherwise, the result is a path below `parent`. If `parent` is empty, the result is empty.
fn cgroups_path(parent: &str, id: &str) -> String {
    let name = parent.rsplit('/').next().unwrap_or_default();
    match parent {
        "" => String::new(),
        _ if name.ends_with(".slice") => format!("{name}:cri-containerd:{id}"),
        parent => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::cri::{LinuxContainerResources, LinuxPodSandboxConfig};

    use super::*;
    use crate::oci::{Bundle, Network};

    fn spec(change: impl FnOnce(&mut PodSandboxConfig)) -> Value {
        let mut config = PodSandboxConfig::default();
        change(&mut config);
        specification("pod", &config, "/proc/self/ns/ipc")
    }

    fn checked(spec: &Value) -> Result<Bundle, String> {
        let bundle = Bundle::from_value(std::path::Path::new("/"), spec.clone());
        bundle.and_then(|bundle| bundle.check().map(|()| bundle)).map_err(|e| crate::chain(&e))
    }

    #[test]
    fn empty_configuration_gets_containerd_defaults() {
        let value = spec(|_| ());
        let bundle = checked(&value).unwrap();
        let spec = bundle.spec;
        assert_eq!(spec.network().unwrap(), Network::Path("/proc/self/ns/ipc".into()));
        assert!(spec.annotations.is_sandbox() && spec.linux.cgroups_path.is_empty());
        assert_eq!(spec.linux.sysctl["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(spec.group("pod").unwrap(), "pod");
    }

    #[test]
    fn specification_contains_annotations_cgroup_path_and_sysctls() {
        let value = spec(|config| {
            config.annotations.insert("io.husk.vcpus".into(), "2".into());
            config.annotations.insert("other".into(), "x".into());
            let linux = LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods.slice/kubepods-pod1.slice".into(),
                sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "80".into())].into(),
                resources: Some(LinuxContainerResources { memory_limit_in_bytes: 7, ..Default::default() }).into(),
                ..Default::default()
            };
            config.linux = Some(linux).into();
        });
        let annotations = &value["annotations"];
        assert_eq!(annotations["io.husk.vcpus"], "2");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "7");
        assert!(annotations.get("other").is_none());
        assert_eq!(value["linux"]["cgroupsPath"], "kubepods-pod1.slice:cri-containerd:pod");
        assert_eq!(value["linux"]["sysctl"]["net.ipv4.ip_unprivileged_port_start"], "80");
        assert_eq!(cgroups_path("/kubepods/x", "pod"), "/kubepods/x/pod");
    }

    #[test]
    fn user_namespace_gets_id_mappings_and_no_ping_group_range() {
        let value = spec(|config| {
            let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            let users = options.namespace_options.mut_or_insert_default().userns_options.mut_or_insert_default();
            users.mode = NamespaceMode::POD.into();
            let ids = IDMapping { host_id: 65536, container_id: 0, length: 65536, ..Default::default() };
            (users.uids, users.gids) = (vec![ids.clone()], vec![ids]);
        });
        assert!(value["linux"]["sysctl"].get("net.ipv4.ping_group_range").is_none());
        let id_mappings = checked(&value).unwrap().id_mappings().unwrap().unwrap();
        assert_eq!((id_mappings.uid(0), id_mappings.gid(65535)), (Some(65536), Some(131_071)));
        assert_eq!(checked(&spec(|_| ())).unwrap().id_mappings().unwrap(), None);
    }

    #[test]
    fn node_namespaces_are_rejected() {
        for (kind, word) in [("network", "host's network"), ("pid", "host's PID"), ("ipc", "host's IPC")] {
            let value = spec(|config| {
                let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
                let options = options.namespace_options.mut_or_insert_default();
                let mode = match kind {
                    "network" => &mut options.network,
                    "pid" => &mut options.pid,
                    _ => &mut options.ipc,
                };
                *mode = NamespaceMode::NODE.into();
            });
            let error = checked(&value).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn config_rejects_options_of_another_type() {
        assert!(config(None).is_ok());
        let mut any = Any { type_url: "x/runtime.v1.PodSandboxConfig".into(), value: vec![8], ..Default::default() };
        assert!(matches!(config(Some(&any)), Err(PodError::Decode(_))));
        any.value.clear();
        assert!(config(Some(&any)).is_ok());
        any.type_url = "containerd.runc.v1.Options".into();
        assert!(matches!(config(Some(&any)), Err(PodError::Type(_))));
    }
}
