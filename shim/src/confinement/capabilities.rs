//! The capabilities that the shim keeps (capabilities(7)).

use std::io;

use husk_base::sys::capabilities::{self, Capabilities};

/// The capabilities that the shim keeps, if it has them. Each entry has the Linux number
/// (include/uapi/linux/capability.h) and the reason.
///
/// overlayfs works on its layers with the capabilities of the process that has mounted it. Therefore, when a guest
/// writes to its rootfs, overlayfs needs capabilities of the shim.
pub const KEPT: [(u32, &str); 12] = [
    (0, "CAP_CHOWN: overlayfs copies files of all users to the upper directory"),
    (1, "CAP_DAC_OVERRIDE: opens volumes, fifos and bundles of any user; overlayfs accesses files of any user"),
    (3, "CAP_FOWNER: overlayfs changes files of all users"),
    (4, "CAP_FSETID: overlayfs keeps set-group-ID bits"),
    (5, "CAP_KILL: ends a logger or a hook that has switched to another user"),
    (6, "CAP_SETGID: writes the gid map of a user namespace for an id-mapped mount"),
    (7, "CAP_SETUID: writes the uid map of a user namespace for an id-mapped mount"),
    (12, "CAP_NET_ADMIN: creates taps and filters in the pod's network namespace"),
    (21, "CAP_SYS_ADMIN: mounts file systems; enters the pod's network namespace; overlayfs sets trusted.* attributes"),
    (24, "CAP_SYS_RESOURCE: lowers the VMM's oom_score_adj"),
    (27, "CAP_MKNOD: overlayfs creates whiteouts and copies device nodes"),
    (31, "CAP_SETFCAP: maps user 0 in the user namespace for an id-mapped mount; overlayfs copies file capabilities"),
];

/// Drops all capabilities that are not in [`KEPT`] from all sets of this thread. Threads that this thread starts later
/// inherit the sets.
pub fn reduce() -> io::Result<()> {
    // The bounding set comes first, because a change of this set needs CAP_SETPCAP.
    (0..capabilities::count()?)
        .filter(|number| kept() & 1 << number == 0)
        .try_for_each(capabilities::drop_from_bounding_set)?;
    let left = capabilities::get()?.permitted & kept();
    capabilities::set(Capabilities { effective: left, permitted: left, inheritable: 0 })
}

/// Returns [`KEPT`] as a bit set.
fn kept() -> u64 {
    KEPT.iter().fold(0, |bits, (number, _)| bits | 1 << number)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::sched::{CloneFlags, setns, unshare};

    use super::*;
    use crate::confinement::mounts;
    use crate::oci::IdMappings;
    use crate::volumes::test_support::isolated;

    #[test]
    fn reduce_leaves_only_the_kept_capabilities_and_affects_only_this_thread() {
        let before = capabilities::get().unwrap();
        let sets = std::thread::spawn(|| {
            reduce().expect("this test needs root, because it reduces the bounding set");
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(|name| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                u64::from_str_radix(line.trim(), 16).unwrap()
            })
        });
        let left = before.permitted & kept();
        assert_eq!(sets.join().unwrap(), [0, left, left, left, 0]);
        assert_eq!(capabilities::get().unwrap(), before);
    }

    #[test]
    fn kept_has_no_capability_twice() {
        assert_eq!(kept().count_ones() as usize, KEPT.len());
        assert!(KEPT.iter().all(|(_, reason)| reason.starts_with("CAP_")));
    }

    #[test]
    fn kept_capabilities_suffice_for_namespaces_and_mounts() {
        isolated(|_| {
            reduce().unwrap();
            IdMappings::from_options(["uidmap=0:0:65536", "gidmap=0:0:65536"]).unwrap().unwrap().namespace().unwrap();
            let network = File::open("/proc/thread-self/ns/net").unwrap();
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            setns(network.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            mounts::protect().unwrap();
        });
    }
}
