//! The specification of a sandbox by its pod's configuration, as containerd's podsandbox controller makes one for the
//! sandbox container (containerd 2.1, internal/cri/server/podsandbox/sandbox_run_linux.go).

use husk_config::annotation;
use husk_proto::cri::{IDMapping, NamespaceMode, PodSandboxConfig};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Map, Value, json};

/// How the configuration's message is named; containerd's type URLs have no host.
const MESSAGE: &str = "runtime.v1.PodSandboxConfig";
/// Settings containerd 2.x gives a pod unless it is told otherwise (enable_unprivileged_ports and _icmp).
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Options of another kind.
    #[error("the sandbox's options are of type {0:?}, not {MESSAGE}")]
    Type(String),
    /// It cannot be decoded.
    #[error("the sandbox's options are no {MESSAGE}")]
    Decode(#[source] protobuf::Error),
}

/// The configuration that came as a sandbox's options; without any, one that asks for nothing.
///
/// # Errors
/// [`PodError`] for options that are something else.
pub fn config(options: Option<&Any>) -> Result<PodSandboxConfig, PodError> {
    match options {
        None => Ok(PodSandboxConfig::default()),
        Some(any) if any.type_url.rsplit('/').next() == Some(MESSAGE) => {
            PodSandboxConfig::parse_from_bytes(&any.value).map_err(PodError::Decode)
        }
        Some(any) => Err(PodError::Type(any.type_url.clone())),
    }
}

/// The sandbox's specification. What a pod shares with its node is left out, and so refused where it is checked.
pub fn specification(id: &str, config: &PodSandboxConfig, netns: &str) -> Value {
    let wants = &config.linux.security_context.namespace_options;
    let mut namespaces = vec![json!({ "type": "mount" }), json!({ "type": "uts" })];
    let own = |mode: &protobuf::EnumOrUnknown<NamespaceMode>| mode.enum_value() != Ok(NamespaceMode::NODE);
    if own(&wants.network) {
        namespaces.push(match netns {
            "" => json!({ "type": "network" }),
            path => json!({ "type": "network", "path": path }),
        });
    }
    for (kind, mode) in [("pid", &wants.pid), ("ipc", &wants.ipc)] {
        if own(mode) {
            namespaces.push(json!({ "type": kind }));
        }
    }
    let users = &wants.userns_options;
    let mapped = users.is_some() && users.mode.enum_value() == Ok(NamespaceMode::POD);
    if mapped {
        namespaces.push(json!({ "type": "user" }));
    }
    let mut sysctls: Map<String, Value> = SYSCTLS.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    if mapped {
        // Its upper end is no group of the namespace (containerd leaves it out as well).
        sysctls.remove("net.ipv4.ping_group_range");
    }
    sysctls.extend(config.linux.sysctls.iter().map(|(key, value)| (key.clone(), value.clone().into())));
    json!({
        "ociVersion": "1.2.0",
        "hostname": config.hostname,
        // Nothing of this runs: a specification has to have it.
        "process": { "args": ["sandbox"], "cwd": "/" },
        "root": { "path": "rootfs", "readonly": true },
        "annotations": annotations(id, config),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroups_path(&config.linux.cgroup_parent, id),
            "sysctl": sysctls,
            "uidMappings": mappings(mapped, &users.uids),
            "gidMappings": mappings(mapped, &users.gids),
        },
    })
}

fn mappings(mapped: bool, ids: &[IDMapping]) -> Vec<Value> {
    let of = |ids: &IDMapping| json!({ "containerID": ids.container_id, "hostID": ids.host_id, "size": ids.length });
    ids.iter().filter(|_| mapped).map(of).collect()
}

fn annotations(id: &str, config: &PodSandboxConfig) -> Map<String, Value> {
    // Which of these a pod may use is Husk's own configuration to say.
    let own = config.annotations.iter().filter(|(key, _)| key.starts_with(annotation::PREFIX));
    let mut all: Map<String, Value> = own.map(|(key, value)| (key.clone(), value.clone().into())).collect();
    let mut put = |key: &str, value: String| all.insert(format!("io.kubernetes.cri.{key}"), value.into());
    put("container-type", "sandbox".into());
    put("sandbox-id", id.into());
    put("sandbox-name", config.metadata.name.clone());
    put("sandbox-namespace", config.metadata.namespace.clone());
    put("sandbox-uid", config.metadata.uid.clone());
    if let Some(resources) = config.linux.resources.as_ref() {
        put("sandbox-cpu-period", resources.cpu_period.to_string());
        put("sandbox-cpu-quota", resources.cpu_quota.to_string());
        put("sandbox-cpu-shares", resources.cpu_shares.to_string());
        put("sandbox-memory", resources.memory_limit_in_bytes.to_string());
    }
    all
}

/// A slice of systemd's and a scope in it, or a plain path below the parent.
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
    use super::*;
    use crate::bundle::Bundle;
    use husk_proto::cri::{LinuxContainerResources, LinuxPodSandboxConfig};

    fn spec(change: impl FnOnce(&mut PodSandboxConfig)) -> Value {
        let mut config = PodSandboxConfig::default();
        change(&mut config);
        specification("pod", &config, "/proc/self/ns/ipc")
    }

    fn checked(spec: &Value) -> Result<Bundle, String> {
        Bundle::of_text(std::path::Path::new("/"), spec.to_string().as_bytes()).map_err(|e| crate::chain(&e))
    }

    #[test]
    fn a_pod_that_asks_for_nothing() {
        let value = spec(|_| ());
        let bundle = checked(&value).unwrap();
        assert_eq!(bundle.network_namespace(), Some("/proc/self/ns/ipc"));
        let spec: crate::spec::Spec = serde_json::from_value(value).unwrap();
        assert!(spec.is_sandbox() && spec.linux.cgroups_path.is_empty());
        assert_eq!(spec.linux.sysctl["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(spec.group("pod").unwrap(), "pod");
    }

    #[test]
    fn what_a_pod_may_ask_for() {
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
    fn a_pod_with_a_user_namespace() {
        let value = spec(|config| {
            let wants = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            let users = wants.namespace_options.mut_or_insert_default().userns_options.mut_or_insert_default();
            users.mode = NamespaceMode::POD.into();
            let ids = IDMapping { host_id: 65536, container_id: 0, length: 65536, ..Default::default() };
            (users.uids, users.gids) = (vec![ids.clone()], vec![ids]);
        });
        assert!(value["linux"]["sysctl"].get("net.ipv4.ping_group_range").is_none());
        let users = checked(&value).unwrap().users().unwrap().unwrap();
        assert_eq!((users.uid(0), users.gid(65535)), (Some(65536), Some(131_071)));
        assert_eq!(checked(&spec(|_| ())).unwrap().users().unwrap(), None);
    }

    #[test]
    fn what_is_the_nodes_is_refused() {
        for (kind, word) in [("network", "host network"), ("pid", "host PID"), ("ipc", "host IPC")] {
            let value = spec(|config| {
                let wants = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
                let wants = wants.namespace_options.mut_or_insert_default();
                let mode = match kind {
                    "network" => &mut wants.network,
                    "pid" => &mut wants.pid,
                    _ => &mut wants.ipc,
                };
                *mode = NamespaceMode::NODE.into();
            });
            let error = checked(&value).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn options_of_another_kind() {
        assert!(config(None).is_ok());
        let mut any = Any { type_url: "x/runtime.v1.PodSandboxConfig".into(), value: vec![8], ..Default::default() };
        assert!(matches!(config(Some(&any)), Err(PodError::Decode(_))));
        any.value.clear();
        assert!(config(Some(&any)).is_ok());
        any.type_url = "containerd.runc.v1.Options".into();
        assert!(matches!(config(Some(&any)), Err(PodError::Type(_))));
    }
}
