//! Adapts a specification to the guest and to libcontainer: the pod's namespaces, the container's cgroup, and settings
//! that libcontainer interprets differently from runc.

use std::path::{Path, PathBuf};

use husk_proto::unified;
use libcontainer::oci_spec::runtime::{
    LinuxCapabilities, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Process, Spec,
};

use crate::cgroup::Cgroup;
use crate::error::{ServiceError, failed, malformed};
use crate::helper::devices::allows_all_devices;
use crate::id_mappings::IdMappings;
use crate::sandbox::{IPC_NAMESPACE, NET_NAMESPACE, PID_NAMESPACE, Sandbox, USER_NAMESPACE, UTS_NAMESPACE};

/// Adapts `spec` to the guest. `target` returns the path of another container's PID namespace.
///
/// # Errors
/// Fails if the specification requests something that a guest cannot provide.
pub fn adapt(
    spec: &mut Spec,
    rootfs: &str,
    cgroup: &Cgroup,
    sandbox: &Sandbox,
    target: impl FnOnce(&str) -> Result<PathBuf, ServiceError>,
) -> Result<(), ServiceError> {
    let invalid = |text: &str| ServiceError::InvalidArgument(text.to_owned());
    spec.root_mut().as_mut().ok_or_else(|| invalid("no root in the specification"))?.set_path(PathBuf::from(rootfs));
    let process = spec.process_mut().as_mut().ok_or_else(|| invalid("no process in the specification"))?;
    adapt_process(process);
    if process.oom_score_adj().is_none() {
        // Without a value, the container would inherit the agent's lower score.
        process.set_oom_score_adj(Some(0));
    }
    if let Some(hooks) = spec.hooks_mut() {
        // The shim runs these hooks on the host.
        #[allow(deprecated)]
        hooks.set_prestart(None);
        hooks.set_create_runtime(None).set_poststart(None).set_poststop(None);
    }
    let linux = spec.linux_mut().as_mut().ok_or_else(|| invalid("no linux section in the specification"))?;
    linux.set_cgroups_path(Some(cgroup.name().to_owned()));
    // The guest has neither SELinux nor Intel RDT.
    linux.set_mount_label(None).set_intel_rdt(None);
    // libcontainer accepts only propagation names without the leading r, such as `private` for `rprivate`. Like runc,
    // it always changes the whole mount tree.
    if let Some(name) = linux.rootfs_propagation().as_deref().and_then(|name| name.strip_prefix('r')) {
        let name = name.to_owned();
        linux.set_rootfs_propagation(Some(name));
    }
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(ServiceError::Unimplemented("seccomp notifications to a listener on the host are not supported"));
    }
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
    if rules.is_some_and(allows_all_devices) {
        super::devices::add_all(linux).map_err(failed("add the guest's devices"))?;
    }
    let id_mappings = IdMappings::from_spec(linux);
    check_id_mappings(id_mappings.as_ref(), sandbox.id_mappings().as_ref())?;
    if let Some(mounts) = spec.mounts_mut() {
        // The shim has already mounted the sources with these id mappings.
        for mount in mounts {
            mount.set_uid_mappings(None).set_gid_mappings(None);
            let options = mount.options().clone();
            let remove_idmap_options =
                |options: Vec<String>| options.into_iter().filter(|o| o != "idmap" && o != "ridmap").collect();
            mount.set_options(options.map(remove_idmap_options));
        }
    }
    let linux = spec.linux_mut().as_mut().ok_or_else(|| invalid("no linux section in the specification"))?;
    let namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default(), target)?;
    linux.set_namespaces(Some(namespaces));
    if let Some(resources) = linux.resources_mut() {
        adapt_resources(resources, cgroup)?;
    }
    Ok(())
}

/// Whether the container joins the pod's shared PID namespace. The namespace must exist before [`adapt`] is called.
pub fn joins_shared_pid_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().iter().filter_map(|linux| linux.namespaces().as_ref()).flatten();
    let mut paths = namespaces.filter(|one| one.typ() == LinuxNamespaceType::Pid).filter_map(|one| one.path().as_ref());
    paths.any(|path| pid_namespace_owner(path).is_none())
}

/// Returns the id of the container to which the PID namespace `path` belongs, or `None` for the shared PID namespace.
fn pid_namespace_owner(path: &Path) -> Option<&str> {
    path.strip_prefix(husk_proto::GUEST_PID_NAMESPACES).ok().and_then(Path::to_str)
}

fn namespaces(
    requested: &[LinuxNamespace],
    target: impl FnOnce(&str) -> Result<PathBuf, ServiceError>,
) -> Result<Vec<LinuxNamespace>, ServiceError> {
    let find = |kind| requested.iter().find(|namespace| namespace.typ() == kind);
    let make = |kind, path: Option<PathBuf>| {
        let builder = LinuxNamespaceBuilder::default().typ(kind);
        let builder = match path {
            Some(path) => builder.path(path),
            None => builder,
        };
        builder.build().map_err(malformed("invalid namespaces"))
    };
    let refused = |kind_name: &str| {
        ServiceError::InvalidArgument(format!(
            "invalid namespaces: the host's {kind_name} namespace is not available in a VM"
        ))
    };
    for (kind, name) in [
        (LinuxNamespaceType::Network, "network"),
        (LinuxNamespaceType::Ipc, "IPC"),
        (LinuxNamespaceType::Pid, "PID"),
        (LinuxNamespaceType::Mount, "mount"),
    ] {
        if find(kind).is_none() {
            return Err(refused(name));
        }
    }
    let pid = match find(LinuxNamespaceType::Pid).and_then(|namespace| namespace.path().as_ref()) {
        None => None,
        Some(path) => Some(match pid_namespace_owner(path) {
            Some(id) => target(id)?,
            None => PathBuf::from(PID_NAMESPACE),
        }),
    };
    // A container without its own UTS namespace joins the pod's UTS namespace. Otherwise the container would have the
    // agent's UTS namespace, which does not have the pod's host name.
    let new_uts = find(LinuxNamespaceType::Uts).is_some_and(|namespace| namespace.path().is_none());
    let mut all = vec![
        make(LinuxNamespaceType::Pid, pid)?,
        make(LinuxNamespaceType::Network, Some(PathBuf::from(NET_NAMESPACE)))?,
        make(LinuxNamespaceType::Ipc, Some(PathBuf::from(IPC_NAMESPACE)))?,
        make(LinuxNamespaceType::Uts, (!new_uts).then(|| PathBuf::from(UTS_NAMESPACE)))?,
        make(LinuxNamespaceType::Mount, None)?,
    ];
    for kind in [LinuxNamespaceType::Cgroup, LinuxNamespaceType::Time] {
        if find(kind).is_some() {
            all.push(make(kind, None)?);
        }
    }
    if find(LinuxNamespaceType::User).is_some() {
        all.push(make(LinuxNamespaceType::User, Some(PathBuf::from(USER_NAMESPACE)))?);
    }
    Ok(all)
}

/// Checks that a container has the pod's id mappings. The container joins namespaces that the pod's user namespace
/// owns. Therefore the container must be in the same user namespace.
fn check_id_mappings(requested: Option<&IdMappings>, pod: Option<&IdMappings>) -> Result<(), ServiceError> {
    let text = match (requested, pod) {
        (requested, pod) if requested == pod => return Ok(()),
        (Some(_), Some(_)) => "the id mappings of the container differ from those of the pod",
        (Some(_), None) => "the container has a user namespace, but the pod has no user namespace",
        (None, _) => "the pod has a user namespace, but the container has no user namespace",
    };
    Err(ServiceError::InvalidArgument(format!(
        "invalid user namespace: {text}; all containers of a pod must share one user namespace"
    )))
}

/// Adapts the process of a container or of an exec.
pub fn adapt_process(process: &mut Process) {
    // If a capability set is absent, libcontainer leaves the process's set unchanged, but runc empties the
    // set. Therefore add an empty set.
    let mut capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
    let empty = || Some(Default::default());
    if capabilities.bounding().is_none() {
        capabilities.set_bounding(empty());
    }
    if capabilities.effective().is_none() {
        capabilities.set_effective(empty());
    }
    if capabilities.permitted().is_none() {
        capabilities.set_permitted(empty());
    }
    if capabilities.inheritable().is_none() {
        capabilities.set_inheritable(empty());
    }
    if capabilities.ambient().is_none() {
        capabilities.set_ambient(empty());
    }
    process.set_capabilities(Some(capabilities));
    // If `noNewPrivileges` is `false`, libcontainer drops capabilities before it loads the seccomp filter. Loading then
    // fails, because it requires CAP_SYS_ADMIN. If `noNewPrivileges` is absent, libcontainer loads the filter first.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    process.set_selinux_label(None);
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
    none
}

/// Removes limits that make sense only on the host, such as limits for CPUs and huge pages that the guest lacks.
///
/// Limits for the host's block and RDMA devices do not reach the agent, because the shim rejects such limits. If a
/// request contains such limits nevertheless, this function removes them.
///
/// # Errors
/// Fails if [`unified::check`] refuses a key of `unified`. libcontainer would write to any path, with the agent's
/// privileges.
pub fn adapt_resources(resources: &mut LinuxResources, cgroup: &Cgroup) -> Result<(), ServiceError> {
    for key in resources.unified().iter().flat_map(|files| files.keys()) {
        unified::check(key)
            .map_err(|error| ServiceError::InvalidArgument(format!("invalid resources.unified.{key}: {error}")))?;
    }
    resources.set_block_io(None).set_rdma(None).set_network(None);
    if let Some(pages) = resources.hugepage_limits().clone() {
        let known = pages
            .into_iter()
            .filter(|limit| cgroup.path().join(format!("hugetlb.{}.max", limit.page_size())).exists())
            .collect();
        resources.set_hugepage_limits(Some(known));
    }
    // If the memory and swap limits are equal, the container must not use swap. libcontainer would allow unlimited
    // swap. Therefore set `memory.swap.max` to 0.
    let memory = resources.memory().as_ref().map(|memory| (memory.limit(), memory.swap()));
    if let Some((Some(limit), Some(swap))) = memory
        && limit == swap
        && limit > 0
    {
        let mut unified = resources.unified().clone().unwrap_or_default();
        unified.entry("memory.swap.max".to_owned()).or_insert_with(|| "0".to_owned());
        resources.set_unified(Some(unified));
    }
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_realtime_period(None).set_realtime_runtime(None);
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        if let Some(requested) = cpu.cpus().clone() {
            cpu.set_cpus(guest_cpuset(&requested, online.trim()));
        }
        if cpu.mems().as_deref().is_some_and(|mems| mems != "0") {
            cpu.set_mems(None);
        }
    }
    Ok(())
}

/// Converts the cpuset `requested` of the host to a cpuset of the guest. If the guest has all requested CPUs, returns
/// `requested`. The fallback is the same number of CPUs, starting with the guest's first CPU. `online` is the list of
/// the guest's CPUs, in the form `0-3,7`. Returns `None`, which means no limit, if either list is invalid.
fn guest_cpuset(requested: &str, online: &str) -> Option<String> {
    let ranges = |list: &str| -> Option<Vec<(u32, u32)>> {
        list.split(',')
            .map(|part| {
                let (low, high) = part.split_once('-').unwrap_or((part, part));
                Some((low.trim().parse().ok()?, high.trim().parse().ok()?)).filter(|(low, high)| low <= high)
            })
            .collect()
    };
    let (requested_ranges, online_ranges) = (ranges(requested)?, ranges(online)?);
    if requested_ranges.iter().all(|(low, high)| online_ranges.iter().any(|(from, to)| from <= low && high <= to)) {
        return Some(requested.to_owned());
    }
    let count =
        requested_ranges.iter().fold(0u32, |sum, (low, high)| sum.saturating_add((high - low).saturating_add(1)));
    let first: Vec<String> = online_ranges
        .iter()
        .flat_map(|&(from, to)| from..=to)
        .take(usize::try_from(count).unwrap_or(usize::MAX))
        .map(|cpu| cpu.to_string())
        .collect();
    Some(first.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_cpuset_maps_host_cpus() {
        assert_eq!(guest_cpuset("0", "0-1").as_deref(), Some("0"));
        assert_eq!(guest_cpuset("0,1", "0-7").as_deref(), Some("0,1"));
        assert_eq!(guest_cpuset("4-5", "0-3").as_deref(), Some("0,1"));
        assert_eq!(guest_cpuset("0-3", "0-1").as_deref(), Some("0,1"));
        assert_eq!(guest_cpuset("0-4294967295,7", "0,2").as_deref(), Some("0,2"));
        assert_eq!(guest_cpuset("", "0-1"), None);
        assert_eq!(guest_cpuset("2-1", "0-1"), None);
    }

    #[test]
    fn equal_memory_and_swap_limits_disable_swap() {
        let adapted = |memory: &str| {
            let mut resources: LinuxResources = serde_json::from_str(&format!(r#"{{"memory":{memory}}}"#)).unwrap();
            adapt_resources(&mut resources, &Cgroup::below("/none".as_ref(), "none")).unwrap();
            resources.unified().as_ref().and_then(|unified| unified.get("memory.swap.max").cloned())
        };
        assert_eq!(adapted(r#"{"limit":100,"swap":100}"#).as_deref(), Some("0"));
        assert_eq!(adapted(r#"{"limit":100,"swap":150}"#), None);
        assert_eq!(adapted(r#"{"limit":-1,"swap":-1}"#), None);
        assert_eq!(adapted(r#"{"limit":100}"#), None);
    }

    #[test]
    fn adapt_resources_refuses_paths_as_keys_of_unified() {
        let text = r#"{"unified":{"/proc/sys/kernel/core_pattern":"|/bin/x"}}"#;
        let error = adapt_resources(&mut serde_json::from_str(text).unwrap(), &Cgroup::below("/none".as_ref(), "none"))
            .unwrap_err();
        assert!(
            error.to_string().contains("unified./proc/sys/kernel/core_pattern: the key must be a file name"),
            "{error}"
        );
    }

    #[test]
    fn check_id_mappings_requires_the_mappings_of_the_pod() {
        let id_mappings = |host: u32| {
            let ids = format!(r#"[{{"containerID":0,"hostID":{host},"size":9}}]"#);
            let text = format!(r#"{{"namespaces":[{{"type":"user"}}],"uidMappings":{ids},"gidMappings":{ids}}}"#);
            IdMappings::from_spec(&serde_json::from_str(&text).unwrap())
        };
        let refused = |requested: Option<IdMappings>, pod: Option<IdMappings>| {
            format!("{:?}", check_id_mappings(requested.as_ref(), pod.as_ref()).unwrap_err())
        };
        check_id_mappings(id_mappings(7).as_ref(), id_mappings(7).as_ref()).unwrap();
        check_id_mappings(None, None).unwrap();
        assert!(refused(id_mappings(7), id_mappings(8)).contains("mappings"));
        assert!(refused(id_mappings(7), None).contains("the pod has no user namespace"));
        assert!(refused(None, id_mappings(7)).contains("the container has no user namespace"));
    }

    #[test]
    fn absent_capability_sets_become_empty() {
        let mut process: Process =
            serde_json::from_str(r#"{"user":{"uid":0,"gid":0},"cwd":"/","args":["x"]}"#).unwrap();
        adapt_process(&mut process);
        let capabilities = process.capabilities().clone().unwrap();
        assert!(capabilities.effective().as_ref().unwrap().is_empty());
        assert!(capabilities.bounding().as_ref().unwrap().is_empty());
    }

    #[test]
    fn namespaces_returns_the_namespaces_of_the_pod() {
        let requested: Vec<LinuxNamespace> = serde_json::from_str(
            r#"[{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"},{"type":"ipc"},{"type":"uts"},
                {"type":"mount"},{"type":"cgroup"}]"#,
        )
        .unwrap();
        let target = |id: &str| Ok(PathBuf::from(format!("/proc/{id}")));
        let all = namespaces(&requested, target).unwrap();
        let path = |kind| all.iter().find(|n| n.typ() == kind).unwrap().path().clone();
        assert_eq!(path(LinuxNamespaceType::Network), Some(PathBuf::from(NET_NAMESPACE)));
        assert_eq!(path(LinuxNamespaceType::Ipc), Some(PathBuf::from(IPC_NAMESPACE)));
        assert_eq!(path(LinuxNamespaceType::Uts), None);
        assert!(namespaces(&requested[1..], target).is_err());
    }
}
