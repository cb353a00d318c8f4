//! Collects what the agent policy checks: the properties of a container or exec.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use husk_policy::Container;
use husk_proto::annotations::{CRIO_IMAGE_NAME, IMAGE_NAME};
use husk_proto::containerd::api::CreateTaskRequest;
use husk_proto::{GUEST_MIRRORS, GUEST_SHARE, GUEST_SHM, GUEST_SUBPATHS, GUEST_VOLUMES, SHARED_VOLUMES};
use libcontainer::oci_spec::runtime::{Linux, LinuxNamespaceType, Mount, Process, Spec};

use crate::helper::devices::allows_device_type;

/// File system types that expose neither a device nor another file system of the guest.
const HARMLESS_TYPES: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Paths in procfs with which root can control the guest's kernel, even without any capability.
const KERNEL_CONTROLS: [&str; 2] = ["/proc/sys", "/proc/sysrq-trigger"];

/// Returns the properties of the container that `request` creates.
pub fn container<'a>(spec: &'a Spec, request: &'a CreateTaskRequest, rootfs: &str) -> Container<'a> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    Container {
        id: &request.id,
        image: image(spec),
        input: match (request.terminal, request.stdin.is_empty()) {
            (true, _) => Some("a terminal"),
            (false, false) => Some("stdin"),
            (false, true) => None,
        },
        privilege: privilege(spec, mounts, rootfs),
        capabilities: spec.process().as_ref().map(capabilities).unwrap_or_default(),
        mounts: mounts.iter().filter(|mount| is_bind(mount)).map(|mount| mount.destination().as_path()).collect(),
    }
}

/// Returns the reference of the container's image, as containerd or CRI-O reports it.
///
/// CRI-O, and containerd with `pod_annotations`, copy annotations of the pod to its containers. Therefore, a tenant may
/// be able to add the key of the CRI implementation that the node does not use. If the specification has both keys with
/// different values, the reference is unknown.
fn image(spec: &Spec) -> Option<&str> {
    let annotation = |key: &str| spec.annotations().as_ref()?.get(key).map(String::as_str);
    let reference = match (annotation(IMAGE_NAME), annotation(CRIO_IMAGE_NAME)) {
        (Some(of_containerd), Some(of_crio)) if of_containerd != of_crio => None,
        (of_containerd, of_crio) => of_containerd.or(of_crio),
    };
    reference.filter(|reference| !reference.is_empty())
}

/// Returns the names of the capabilities that are in any capability set of the process.
pub fn capabilities(process: &Process) -> Vec<String> {
    let Some(all) = process.capabilities() else { return Vec::new() };
    let sets = [all.bounding(), all.effective(), all.permitted(), all.inheritable(), all.ambient()];
    let names: BTreeSet<String> =
        sets.into_iter().flatten().flatten().map(|capability| format!("CAP_{capability}")).collect();
    names.into_iter().collect()
}

/// Returns the first difference between an exec and the container's init process. Ignores arguments, terminal, `TERM`
/// and OOM score.
pub fn difference(own: &Process, exec: &Process) -> Option<&'static str> {
    // containerd's CRI sets TERM for an exec with a terminal.
    let environment = |process: &Process| -> Vec<String> {
        process.env().iter().flatten().filter(|one| !one.starts_with("TERM=")).cloned().collect()
    };
    let rest = |process: &Process| {
        let mut rest = process.clone();
        rest.set_args(None).set_command_line(None).set_env(None).set_terminal(None).set_console_size(None);
        // The OOM score is not a privilege. The agent itself sets the score if the request has none.
        rest.set_oom_score_adj(None);
        rest
    };
    if own.user() != exec.user() {
        Some("the exec's user differs from the container's")
    } else if environment(own) != environment(exec) {
        Some("the exec's environment differs from the container's")
    } else if own.cwd() != exec.cwd() {
        Some("the exec's working directory differs from the container's")
    } else if own.capabilities() != exec.capabilities() {
        Some("the exec's capabilities differ from the container's")
    } else if rest(own) != rest(exec) {
        Some("the exec's other settings differ from the container's")
    } else {
        None
    }
}

/// Returns what makes a container privileged.
fn privilege(spec: &Spec, mounts: &[Mount], rootfs: &str) -> Option<&'static str> {
    let linux = spec.linux().as_ref()?;
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_ref());
    if rules.is_some_and(allows_device_type) {
        return Some("the container has access to all devices, or to all devices of a type");
    }
    if hooks.is_some_and(|hooks| !hooks.is_empty()) {
        return Some("the container has a createContainer hook, which would run with the agent's privileges");
    }
    if !matches!(names_below(Path::new(rootfs), GUEST_SHARE).as_deref(), Some([_, "rootfs" | "host-rootfs"])) {
        return Some("the container's rootfs is not at a path at which the share holds rootfs mounts");
    }
    let is_isolated = has_user_namespace(linux);
    mounts.iter().find_map(|mount| privilege_of_mount(mount, is_isolated)).or_else(|| {
        let has_proc = mounts.iter().any(|mount| mount.typ().as_deref() == Some("proc"));
        let protected = [linux.readonly_paths(), linux.masked_paths()];
        // A read-only `/` does not make /proc read-only, because /proc is a separate mount.
        let covers = |one: &String, path: &str| one.starts_with("/proc") && Path::new(path).starts_with(one);
        let is_protected = |path: &str| protected.iter().copied().flatten().flatten().any(|one| covers(one, path));
        (has_proc && !is_isolated && !KERNEL_CONTROLS.iter().all(|path| is_protected(path)))
            .then_some("/proc/sys or /proc/sysrq-trigger is neither read-only nor masked")
    })
}

/// Returns what makes a container with this mount privileged. `is_isolated` says whether the container has a user
/// namespace.
fn privilege_of_mount(mount: &Mount, is_isolated: bool) -> Option<&'static str> {
    let has_option = |name: &str| mount.options().iter().flatten().any(|option| option == name);
    let is_read_only = has_option("ro") && !has_option("rw");
    let kind = mount.typ().as_deref().unwrap_or_default();
    if is_bind(mount) {
        let source = mount.source().as_deref().unwrap_or_else(|| Path::new(""));
        if !is_volume(source) {
            return Some("the container mounts a directory or device of the guest");
        }
    } else if !HARMLESS_TYPES.contains(&kind) {
        return Some("the container mounts a file system that may be on a device");
    }
    // The type counts even if the mount has the option `bind`, because libcontainer handles some types specially.
    match kind {
        _ if is_isolated => None,
        "proc" if mount.destination() != Path::new("/proc") => Some("proc is mounted at a path other than /proc"),
        "sysfs" | "cgroup" | "cgroup2" if !is_read_only => Some("sysfs or a cgroup file system is writable"),
        _ => None,
    }
}

fn has_user_namespace(linux: &Linux) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

/// Returns whether a mount is a bind mount. libcontainer uses the same rule.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// Returns whether `path` is the path of a volume, not a path inside a volume. Inside a volume, a container or client
/// can create a symbolic link to any file of the guest. At the path of the volume itself, neither can create a link.
fn is_volume(path: &Path) -> bool {
    let names = |directory| names_below(path, directory);
    let is_number = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    path == Path::new(GUEST_SHM)
        || matches!(names(GUEST_SHARE).as_deref(), Some([SHARED_VOLUMES, _]))
        || matches!(names(GUEST_VOLUMES).as_deref(), Some([_]))
        || matches!(names(GUEST_SUBPATHS).as_deref(), Some([_, _]))
        // In a container's directory of mirrored volumes, each volume has a number as its name. Temporary files have
        // other names.
        || matches!(names(GUEST_MIRRORS).as_deref(), Some([_, number]) if is_number(number))
}

/// Returns the components of `path` below `directory`. Returns `None` if `path` is not below `directory`, or if a
/// component is not a normal UTF-8 name.
fn names_below<'a>(path: &'a Path, directory: &str) -> Option<Vec<&'a str>> {
    let name = |part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    };
    path.strip_prefix(directory).ok()?.components().map(name).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ROOTFS: &str = "/run/husk/share/c/rootfs";

    /// A specification as containerd's CRI makes it for an unprivileged container.
    fn sample() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "annotations": { IMAGE_NAME: "example.com/app:1" },
            "process": {
                "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["app"], "env": ["A=1", "TERM=xterm", "B=2"],
                "capabilities": { "bounding": ["CAP_CHOWN", "CAP_NET_RAW"], "effective": ["CAP_CHOWN"] },
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts" },
                { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue" },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
                { "destination": "/dev/shm", "type": "bind", "source": GUEST_SHM, "options": ["rbind"] },
                { "destination": "/data", "source": "/run/husk/share/.volumes/1", "options": ["rbind", "rw"] },
            ],
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "mount" }],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
                "resources": { "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "c", "major": 136, "access": "rwm" },
                    { "allow": true, "type": "c", "access": "m" },
                ] },
            },
        })
    }

    fn parse(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = sample();
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn privilege_of(change: impl FnOnce(&mut Value)) -> Option<&'static str> {
        container(&parse(change), &CreateTaskRequest::default(), ROOTFS).privilege
    }

    #[test]
    fn container_returns_image_input_capabilities_and_volumes() {
        let spec = parse(|_| {});
        let mut request = CreateTaskRequest { id: "c".into(), ..Default::default() };
        let found = container(&spec, &request, ROOTFS);
        assert_eq!((found.id, found.image, found.input), ("c", Some("example.com/app:1"), None));
        assert_eq!(found.capabilities, ["CAP_CHOWN", "CAP_NET_RAW"]);
        assert_eq!(found.mounts, [Path::new("/dev/shm"), Path::new("/data")]);
        assert_eq!(found.privilege, None);
        request.stdin = "7".into();
        assert_eq!(container(&spec, &request, ROOTFS).input, Some("stdin"));
        request.terminal = true;
        assert_eq!(container(&spec, &request, ROOTFS).input, Some("a terminal"));
        let spec = parse(|value| value["annotations"] = json!({}));
        assert_eq!(container(&spec, &request, ROOTFS).image, None);
    }

    #[test]
    fn image_is_unknown_if_containerd_and_crio_annotations_differ() {
        let of = |annotations: Value| {
            let spec = parse(|value| value["annotations"] = annotations);
            image(&spec).map(str::to_owned)
        };
        let both =
            |of_containerd: &str, of_crio: &str| of(json!({ IMAGE_NAME: of_containerd, CRIO_IMAGE_NAME: of_crio }));
        assert_eq!(of(json!({ CRIO_IMAGE_NAME: "example.com/app:1" })).unwrap(), "example.com/app:1");
        assert_eq!(both("example.com/app:1", "example.com/app:1").unwrap(), "example.com/app:1");
        assert_eq!(both("example.com/app:1", "example.com/app:2"), None);
        assert_eq!(both("example.com/app:1", ""), None);
        assert_eq!(both("", "example.com/app:1"), None);
        assert_eq!(of(json!({ CRIO_IMAGE_NAME: "" })), None);
    }

    #[test]
    fn access_to_device_types_is_a_privilege() {
        let with = |rules: Value| privilege_of(|value| value["linux"]["resources"]["devices"] = rules).is_some();
        let deny = json!({ "allow": false, "access": "rwm" });
        assert!(with(json!([{ "allow": true, "access": "rwm" }])));
        assert!(with(json!([deny, { "allow": true, "type": "b", "access": "r" }])));
        assert!(with(json!([deny, { "allow": true, "type": "a" }])));
        assert!(!with(json!([{ "allow": true, "access": "rwm" }, deny])));
        assert!(!with(json!([deny, { "allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm" }])));
        assert!(!with(json!([])));
    }

    #[test]
    fn mounting_guest_directories_or_devices_is_a_privilege() {
        let with = |mount: Value| privilege_of(|value| value["mounts"].as_array_mut().unwrap().push(mount));
        let bind = |source: &str| with(json!({ "destination": "/x", "type": "bind", "source": source }));
        for source in [
            "/run/husk/share/.volumes/3.fe-1-2",
            "/run/husk/mirrors/c/12",
            "/run/husk/volumes/v",
            "/run/husk/subpaths/c/1@3.fe",
            GUEST_SHM,
        ] {
            assert_eq!(bind(source), None, "{source}");
        }
        for source in [
            "",
            "/",
            "/proc",
            "/sys",
            "/dev",
            "/dev/null",
            "/run/husk",
            "/run/husk/share",
            "/run/husk/share/.volumes",
            "/run/husk/share/c/rootfs",
            "/run/husk/tasks/c",
            "/run/husk/share/.volumes/..",
            "/run/husk/share/../tasks",
            "/run/husk/share/.volumes/../../tasks",
            // A path inside a volume may lead through a symbolic link.
            "/run/husk/share/.volumes/1/link",
            "/run/husk/mirrors/c/1/link",
            "/run/husk/mirrors/c/1.new",
            "/run/husk/volumes/v/link",
            "/run/husk/subpaths/c/1/link",
        ] {
            assert_eq!(bind(source), Some("the container mounts a directory or device of the guest"), "{source}");
        }
        let option = json!({ "destination": "/x", "type": "proc", "source": "/", "options": ["bind"] });
        assert!(with(option).is_some());
        for kind in ["ext4", "overlay", "virtiofs", "devtmpfs", "", "bpf"] {
            let mount = json!({ "destination": "/x", "type": kind, "source": "husk" });
            assert_eq!(with(mount), Some("the container mounts a file system that may be on a device"), "{kind}");
        }
        assert!(with(json!({ "destination": "/x", "type": "proc", "source": "proc" })).is_some());
        assert_eq!(with(json!({ "destination": "/x", "type": "tmpfs", "source": "tmpfs" })), None);
    }

    #[test]
    fn writable_kernel_settings_are_a_privilege_without_a_user_namespace() {
        let user =
            |value: &mut Value| value["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        for (pointer, change) in [
            ("/mounts/0/destination", json!("/p")),
            ("/mounts/4/options", json!(["nosuid"])),
            ("/mounts/5/options", json!(["rw"])),
            ("/mounts/5/options", json!(["ro", "rw"])),
            ("/linux/readonlyPaths", json!(["/"])),
            ("/linux/readonlyPaths", json!(["/proc/sys"])),
            ("/linux/readonlyPaths", json!(["/proc/sys/net", "/proc/sysrq-trigger"])),
            ("/linux/readonlyPaths", Value::Null),
        ] {
            let set = |value: &mut Value| *value.pointer_mut(pointer).unwrap() = change.clone();
            assert!(privilege_of(set).is_some(), "{pointer}: {change}");
            let isolated = privilege_of(|value| {
                set(value);
                user(value);
            });
            assert_eq!(isolated, None, "{pointer}: {change}");
        }
        assert_eq!(privilege_of(|value| value["linux"]["readonlyPaths"] = json!(["/proc"])), None);
        let masked = privilege_of(|value| {
            value["linux"]["readonlyPaths"] = json!([]);
            value["linux"]["maskedPaths"] = json!(["/proc/sys", "/proc/sysrq-trigger"]);
        });
        assert_eq!(masked, None);
    }

    #[test]
    fn wrong_rootfs_path_or_create_container_hook_is_a_privilege() {
        let spec = parse(|_| {});
        for rootfs in ["/run/husk/share/c/rootfs", "/run/husk/share/c/host-rootfs"] {
            assert_eq!(container(&spec, &CreateTaskRequest::default(), rootfs).privilege, None, "{rootfs}");
        }
        for rootfs in ["/", "/run/husk/share", "/run/husk/share/../rootfs", "/run/husk/share/c/rootfs/x", "rootfs", ""]
        {
            let found = container(&spec, &CreateTaskRequest::default(), rootfs).privilege;
            assert_eq!(
                found,
                Some("the container's rootfs is not at a path at which the share holds rootfs mounts"),
                "{rootfs}"
            );
        }
        let hook = json!({ "createContainer": [{ "path": "/bin/x" }] });
        assert!(privilege_of(|value| value["hooks"] = hook).unwrap().contains("createContainer"));
        let hook = json!({ "startContainer": [{ "path": "/bin/x" }], "createContainer": [] });
        assert_eq!(privilege_of(|value| value["hooks"] = hook), None);
    }

    #[test]
    fn difference_ignores_only_arguments_terminal_and_oom_score() {
        let own = parse(|_| {}).process().clone().unwrap();
        let with = |change: &dyn Fn(&mut Value)| {
            let exec = parse(|value| change(&mut value["process"])).process().clone().unwrap();
            difference(&own, &exec)
        };
        assert_eq!(with(&|_| {}), None);
        let allowed = |process: &mut Value| {
            process["args"] = json!(["date"]);
            process["terminal"] = json!(true);
            process["consoleSize"] = json!({ "height": 1, "width": 1 });
            process["env"] = json!(["TERM=vt100", "A=1", "B=2"]);
            process["oomScoreAdj"] = json!(5);
        };
        assert_eq!(with(&allowed), None);
        for (key, value, expected) in [
            ("user", json!({ "uid": 1, "gid": 0 }), "the exec's user"),
            ("user", json!({ "uid": 0, "gid": 0, "additionalGids": [7] }), "the exec's user"),
            ("env", json!(["A=1", "B=2", "LD_PRELOAD=/x"]), "environment"),
            ("env", json!(["A=1"]), "environment"),
            ("cwd", json!("/tmp"), "working directory"),
            ("capabilities", json!({ "bounding": ["CAP_SYS_ADMIN"] }), "capabilities"),
            ("capabilities", Value::Null, "capabilities"),
            ("apparmorProfile", json!("unconfined"), "other settings"),
            ("noNewPrivileges", json!(true), "other settings"),
            ("rlimits", json!([{ "type": "RLIMIT_NOFILE", "hard": 1, "soft": 1 }]), "other settings"),
        ] {
            let found = with(&|process| process[key] = value.clone());
            assert!(found.is_some_and(|text| text.contains(expected)), "{key}={value}: {found:?}");
        }
    }
}
