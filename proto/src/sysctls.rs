//! Checks the names of a pod's sysctls. Only sysctls of a namespace may be set, as under runc.

/// Sysctls of the IPC namespace outside `fs.mqueue` (ipc_namespaces(7)).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Why a sysctl is refused. The texts are those of runc (libcontainer/configs/validate).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SysctlError {
    /// The sysctl belongs to the whole kernel. With such a sysctl, for example `kernel.core_pattern`, a client could
    /// run programs with the privileges of the guest's root.
    #[error("sysctl {0:?} is not in a separate kernel namespace")]
    NotInNamespace(String),
    /// The sysctl sets the host name, which has a field of its own in the specification.
    #[error("sysctl {0:?} is not allowed as it conflicts with the OCI \"hostname\" field")]
    HostName(String),
}

/// Checks the name of a sysctl. The separators in the name may be dots or slashes. `has_user_namespace` says whether
/// the pod has a user namespace.
///
/// # Errors
/// Fails if the sysctl does not belong to the pod's network, IPC, UTS or user namespace.
pub fn check(name: &str, has_user_namespace: bool) -> Result<(), SysctlError> {
    let dotted = name.replace('/', ".");
    let is_path = dotted.split('.').any(str::is_empty);
    match dotted.as_str() {
        _ if is_path => Err(SysctlError::NotInNamespace(dotted)),
        "kernel.hostname" => Err(SysctlError::HostName(dotted)),
        "kernel.domainname" => Ok(()),
        of_ipc if IPC.contains(&of_ipc) || of_ipc.starts_with("fs.mqueue.") => Ok(()),
        of_net if of_net.starts_with("net.") => Ok(()),
        of_user if of_user.starts_with("user.") && has_user_namespace => Ok(()),
        _ => Err(SysctlError::NotInNamespace(dotted)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_accepts_only_sysctls_of_the_pods_namespaces() {
        for name in [
            "net.core.somaxconn",
            "net/ipv4/conf/eth0.5/forwarding",
            "kernel.sem",
            "kernel/shmmax",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            assert_eq!(check(name, false), Ok(()), "{name}");
        }
        for name in [
            "kernel.core_pattern",
            "kernel/modprobe",
            "vm.overcommit_memory",
            "fs.suid_dumpable",
            "net",
            "",
            "net/../kernel/core_pattern",
            "net..x",
            "kernel.shm",
            "user.max_user_namespaces",
        ] {
            assert!(matches!(check(name, false), Err(SysctlError::NotInNamespace(_))), "{name}");
        }
        assert_eq!(check("user.max_user_namespaces", true), Ok(()));
        let error = check("kernel/hostname", false).unwrap_err().to_string();
        assert_eq!(error, "sysctl \"kernel.hostname\" is not allowed as it conflicts with the OCI \"hostname\" field");
    }
}
