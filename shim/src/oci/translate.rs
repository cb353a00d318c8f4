//! Translates a specification for the guest: removes, replaces or rejects references to the host.
//!
//! Fields that this code does not know reach the guest unchanged, because this code edits the JSON in place.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, array, object, present, unsupported};
use crate::oci::{devices, hooks, host_devices, update};

/// Translates a specification, except for mount sources, which [`crate::volumes::plan`] translates. `rootfs` is the path
/// of the root file system in the guest. `pids` maps PIDs on the host to ids of the pod's containers. Adds texts for the
/// log to `notes`, for example about omitted fields.
pub fn spec(
    raw: &mut Value,
    (id, rootfs): (&str, &str),
    pids: &HashMap<u32, String>,
    notes: &mut Vec<String>,
) -> Result<(), TranslateError> {
    let spec = raw.as_object_mut().ok_or(TranslateError::Type("the specification"))?;
    if let Some(hooks) = object(spec, "hooks")? {
        hooks::keep_guest_hooks(hooks)?;
    }
    if let Some(root) = spec.get_mut("root").and_then(Value::as_object_mut) {
        root.insert("path".into(), rootfs.into());
    }
    if let Some(process) = object(spec, "process")? {
        self::process(process, notes)?;
    }
    if let Some(linux) = object(spec, "linux")? {
        self::linux(linux, id, pids, notes)?;
    }
    Ok(())
}

/// Returns the path of a container's root file system in the guest. `name` is the name of its mount in the share.
pub fn guest_rootfs(id: &str, name: &str) -> String {
    format!("{}/{id}/{name}", husk_proto::GUEST_SHARE)
}

/// Translates the process of an exec request (OCI `Process` as JSON). Returns the translated process and the name of
/// the AppArmor profile.
///
/// # Errors
/// [`TranslateError`] if `raw` is not a JSON object.
pub fn exec_process(raw: &[u8]) -> Result<(Vec<u8>, String), TranslateError> {
    let parse = |source| TranslateError::Parse { what: "process of the exec request", source };
    let mut value: Value = serde_json::from_slice(raw).map_err(parse)?;
    let process = value.as_object_mut().ok_or(TranslateError::Type("the process"))?;
    self::process(process, &mut Vec::new())?;
    let profile = process.get("apparmorProfile").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok((serde_json::to_vec(&value).map_err(parse)?, profile))
}

fn process(process: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), TranslateError> {
    // Keep the AppArmor profile, because the shim loads the profile into the guest. Remove the SELinux label, because
    // the guest's kernel does not support SELinux.
    process.remove("selinuxLabel");
    if process.remove("execCPUAffinity").is_some() {
        notes.push("omitted execCPUAffinity, because the host's CPU numbers have no meaning in the guest".into());
    }
    Ok(())
}

fn linux(
    linux: &mut Map<String, Value>,
    id: &str,
    pids: &HashMap<u32, String>,
    notes: &mut Vec<String>,
) -> Result<(), TranslateError> {
    linux.insert("cgroupsPath".into(), format!("/husk/{id}").into());
    linux.remove("mountLabel");
    if linux.remove("memoryPolicy").is_some() {
        notes.push("omitted linux.memoryPolicy, because the host's NUMA nodes have no meaning in the guest".into());
    }
    if present(linux, "intelRdt") {
        return Err(unsupported("linux.intelRdt", "cache and bandwidth classes of the host cannot be used in a VM"));
    }
    if present(linux, "netDevices") {
        return Err(unsupported("linux.netDevices", "the host's network devices cannot be moved into the guest"));
    }
    if let Some(seccomp) = object(linux, "seccomp")?
        && present(seccomp, "listenerPath")
    {
        return Err(unsupported(
            "linux.seccomp.listenerPath",
            "a listener on the host cannot serve processes in the guest",
        ));
    }
    // Accept slave propagation. In the guest, slave propagation has the same effect as private propagation, because the
    // root mount has no peer on the host.
    if let Some(mode @ ("shared" | "rshared")) = linux.get("rootfsPropagation").and_then(Value::as_str) {
        let message = format!("{mode} mounts of the guest cannot propagate to the host; use rslave or rprivate");
        return Err(unsupported("linux.rootfsPropagation", message));
    }
    namespaces(linux, pids, notes)?;
    host_devices::remove(linux, notes)?;
    for device in array(linux, "devices", "linux.devices")? {
        let number = |key: &str| device.get(key).and_then(Value::as_u64).unwrap_or_default();
        let kind = device.get("type").and_then(Value::as_str).unwrap_or_default();
        let path = device.get("path").and_then(Value::as_str).unwrap_or_default();
        if kind == "p" || kind == "b" {
            continue; // The guest creates a FIFO itself. The shim hot-plugs a disk.
        }
        devices::guest_path(kind == "c" || kind == "u", number("major"), number("minor"))
            .map_err(|message| unsupported(format!("linux.devices: {path}"), message))?;
    }
    if let Some(resources) = object(linux, "resources")? {
        update::resources(resources, notes)?;
    }
    Ok(())
}

/// Replaces the paths of host namespaces with paths in the guest. Each new path leads to the sandbox's namespace
/// (`husk_proto::GUEST_NAMESPACES`) or to a container's PID namespace (`husk_proto::GUEST_PID_NAMESPACES`).
fn namespaces(
    linux: &mut Map<String, Value>,
    pids: &HashMap<u32, String>,
    notes: &mut Vec<String>,
) -> Result<(), TranslateError> {
    let Some(Value::Array(namespaces)) = linux.get_mut("namespaces") else { return Ok(()) };
    for namespace in namespaces.iter_mut() {
        let namespace = namespace.as_object_mut().ok_or(TranslateError::Type("linux.namespaces"))?;
        let path = namespace.remove("path").and_then(|path| path.as_str().map(str::to_owned)).unwrap_or_default();
        let joins = !path.is_empty();
        let kind = namespace.get("type").and_then(Value::as_str).unwrap_or_default();
        // With CRI's `NamespaceMode` TARGET, a container joins the PID namespace of a target container. containerd then
        // writes the PID of the target's task into the path (1.7, pkg/cri/sbserver).
        let target = pid_of(&path).and_then(|pid| pids.get(&pid));
        match (kind, target) {
            // The guest creates the pod's user namespace from the id mappings, even if the specification has a path.
            ("user", _) => {
                namespace.insert("path".into(), format!("{}/user", husk_proto::GUEST_NAMESPACES).into());
            }
            ("cgroup", _) if joins => {
                notes.push("the cgroup namespace is not joined; the container gets a new cgroup namespace".into());
            }
            ("pid", Some(id)) => {
                namespace.insert("path".into(), format!("{}/{id}", husk_proto::GUEST_PID_NAMESPACES).into());
            }
            (kind, _) if joins => {
                let path = format!("{}/{kind}", husk_proto::GUEST_NAMESPACES);
                namespace.insert("path".into(), path.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Adds a cgroup namespace if the specification has no cgroup namespace. The container then sees its own cgroup at
/// `/sys/fs/cgroup`.
///
/// On a host with cgroup v1, clients do not request a cgroup namespace, because runc does not need the namespace there.
/// In the guest, the container needs the namespace, because the guest has cgroup v2.
pub fn add_cgroup_namespace(raw: &mut Value) {
    if let Some(Value::Array(namespaces)) = raw.pointer_mut("/linux/namespaces")
        && !namespaces.iter().any(|namespace| namespace.get("type").is_some_and(|kind| kind == "cgroup"))
    {
        namespaces.push(serde_json::json!({ "type": "cgroup" }));
    }
}

/// Returns the PID in a path of the form `/proc/PID/ns/pid`.
fn pid_of(path: &str) -> Option<u32> {
    path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::oci::bundle::tests::sample;

    fn translated(change: impl FnOnce(&mut Value)) -> Result<(Value, Vec<String>), TranslateError> {
        let mut value = sample();
        let mut notes = Vec::new();
        change(&mut value);
        spec(&mut value, ("c1", "/run/husk/share/c1/rootfs"), &HashMap::from([(77, "c0".to_owned())]), &mut notes)
            .map(|()| (value, notes))
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        translated(change).unwrap_err().to_string()
    }

    #[test]
    fn host_paths_are_replaced_and_unknown_fields_stay() {
        let (value, notes) = translated(|v| {
            v["linux"]["namespaces"][2]["path"] = "/proc/7/ns/uts".into();
            v["linux"]["namespaces"][4]["path"] = "/var/run/netns/x".into();
            v["linux"]["namespaces"][5]["path"] = "/proc/7/ns/cgroup".into();
            v["linux"]["somethingNew"] = json!({"a": 1});
            v["process"]["unknown"] = true.into();
        })
        .unwrap();
        assert_eq!(value["root"]["path"], "/run/husk/share/c1/rootfs");
        assert_eq!(value["linux"]["cgroupsPath"], "/husk/c1");
        assert_eq!(value["linux"]["somethingNew"]["a"], 1);
        assert_eq!(value["process"]["unknown"], true);
        assert_eq!(value["linux"]["maskedPaths"], sample()["linux"]["maskedPaths"]);
        let expected = json!([
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts", "path": "/run/husk/ns/uts"}, {"type": "mount"},
            {"type": "network", "path": "/run/husk/ns/network"}, {"type": "cgroup"}
        ]);
        assert_eq!(value["linux"]["namespaces"], expected);
        assert_eq!(notes.len(), 1, "{notes:?}");
    }

    #[test]
    fn add_cgroup_namespace_keeps_an_existing_cgroup_namespace() {
        let mut value = sample();
        add_cgroup_namespace(&mut value);
        assert_eq!(value, sample());
        value["linux"]["namespaces"] = json!([{ "type": "pid" }]);
        add_cgroup_namespace(&mut value);
        assert_eq!(value["linux"]["namespaces"], json!([{ "type": "pid" }, { "type": "cgroup" }]));
        add_cgroup_namespace(&mut json!({}));
    }

    #[test]
    fn pid_in_a_namespace_path_is_translated_to_the_container_id() {
        let pid = |path: &str| {
            let (value, _) = translated(|v| v["linux"]["namespaces"][0]["path"] = path.into()).unwrap();
            value["linux"]["namespaces"][0]["path"].clone()
        };
        assert_eq!(pid("/proc/77/ns/pid"), "/run/husk/pids/c0");
        assert_eq!(pid("/proc/78/ns/pid"), "/run/husk/ns/pid");
        assert_eq!(pid("/proc/77/ns/net"), "/run/husk/ns/pid");
    }

    #[test]
    fn selinux_labels_are_removed() {
        let (value, notes) = translated(|v| {
            v["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
            v["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0".into();
        })
        .unwrap();
        assert!(value["process"].get("selinuxLabel").is_none() && value["linux"].get("mountLabel").is_none());
        assert!(notes.is_empty(), "{notes:?}");
    }

    #[test]
    fn exec_process_keeps_unknown_fields_and_the_profile() {
        let text = br#"{"args":["a"],"apparmorProfile":"docker-default","selinuxLabel":"l","x":1}"#;
        let (process, profile) = exec_process(text).unwrap();
        let expected = json!({"args": ["a"], "apparmorProfile": "docker-default", "x": 1});
        assert_eq!(serde_json::from_slice::<Value>(&process).unwrap(), expected);
        assert_eq!(profile, "docker-default");
        assert!(exec_process(b"[]").is_err() && exec_process(b"{").is_err());
    }

    #[test]
    fn host_resources_are_rejected() {
        let device = |kind: &str, major: u64, minor: u64| {
            let device = json!([{"path": "/dev/x", "type": kind, "major": major, "minor": minor}]);
            translated(|v| v["linux"]["devices"] = device)
        };
        device("c", 1, 3).unwrap();
        device("p", 0, 0).unwrap();
        device("b", 8, 0).unwrap();
        assert!(device("c", 8, 0).unwrap_err().to_string().starts_with("linux.devices: /dev/x: character device 8:0"));
        assert!(device("c", 10, 232).unwrap_err().to_string().contains("no KVM"));
        assert!(refused(|v| v["linux"]["intelRdt"] = json!({"closID": "a"})).starts_with("linux.intelRdt"));
        assert!(refused(|v| v["linux"]["netDevices"] = json!({"eth1": {}})).starts_with("linux.netDevices"));
        let listener = json!({"listenerPath": "/run/x.sock"});
        assert!(refused(|v| v["linux"]["seccomp"] = listener).starts_with("linux.seccomp.listenerPath"));
        assert!(refused(|v| v["linux"]["rootfsPropagation"] = "rshared".into()).contains("rslave"));
        translated(|v| v["linux"]["rootfsPropagation"] = "rslave".into()).unwrap();
        assert!(refused(|v| v["linux"]["devices"] = 1.into()).contains("wrong type"));
        assert!(refused(|v| v["linux"] = 1.into()).contains("wrong type"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let keys = "process|linux|resources|namespaces|type|path|devices|hooks|memory|unified|x";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            keys.prop_map(Value::from)
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(keys, inner, 0..6).prop_map(|map| map.into_iter().collect::<Value>()),
            ]
        })
    }

    proptest! {
        #[test]
        fn translating_arbitrary_json_never_panics(mut value in any_json()) {
            let _ = spec(&mut value, ("c1", "/run/husk/share/c1/rootfs"), &HashMap::new(), &mut Vec::new());
        }
    }
}
