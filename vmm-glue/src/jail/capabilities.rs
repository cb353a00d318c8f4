//! Capabilities of the VMM's threads (capabilities(7)). Threads that serve files keep a few capabilities, and all other
//! threads have none.

use std::io;

use husk_base::sys::capabilities::{self, Capabilities};
use husk_base::sys::process::{secure_bits, set_secure_bits};

/// Keeps a thread's capabilities when the thread switches to another user (include/uapi/linux/securebits.h).
const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;

/// The capabilities that a virtio-fs worker thread keeps if the process has them. Each entry has the capability's
/// number (include/uapi/linux/capability.h), its name, and the reason why the thread needs the capability.
///
/// All other capabilities are dropped, because a hostile guest could use them. With CAP_DAC_READ_SEARCH, a thread can
/// open any inode of a file system by its file handle. CAP_SYS_RESOURCE allows writes beyond quotas and into reserved
/// blocks. CAP_SYS_PTRACE and CAP_SYS_RAWIO allow access to files of other processes in /proc.
///
/// CAP_SYS_ADMIN would leave only the seccomp filter between an attacker and the host. The attacker could clear `nodev`
/// of the share, and then open a device node that CAP_MKNOD allows, or a device node of the image. The attacker could
/// also mount the host's devtmpfs and disks, and load BPF programs. Landlock stops only some of these steps. For the
/// only requests that need CAP_SYS_ADMIN, the file server uses other names of extended attributes
/// (`virtio/fs/xattr_names.rs`). Alternatives would be weaker: flags of mounts that a user namespace locks, or a device
/// cgroup, do not stop BPF programs and new mounts.
const KEPT: [(u32, &str); 8] = [
    (0, "CAP_CHOWN: SETATTR gives files to other users"),
    (1, "CAP_DAC_OVERRIDE: the guest's kernel has already checked a user's permissions"),
    (3, "CAP_FOWNER: SETATTR and SETXATTR change files of all users"),
    (4, "CAP_FSETID: SETATTR keeps the set-group-ID bit"),
    (6, "CAP_SETGID: new files get the requesting user's group"),
    (7, "CAP_SETUID: new files get the requesting user as their owner"),
    (27, "CAP_MKNOD: MKNOD creates devices, which images can contain"),
    (31, "CAP_SETFCAP: SETXATTR sets security.capability"),
];

/// Drops every capability of this thread that is not in [`KEPT`].
///
/// To create a file, the thread switches to the user of the FUSE request, so that the file has the right owner. The
/// thread keeps the capabilities of [`KEPT`] during the switch, because the guest's kernel has already checked the
/// user's permissions. The host's kernel cannot check the permissions, because a request does not contain the user's
/// capabilities in the guest. For example, root in a user namespace of the guest may write to a directory although the
/// directory's mode denies the write. On the host, the same user is an ordinary user, and the mode would deny the
/// write.
pub fn keep_for_files() -> io::Result<()> {
    match secure_bits().and_then(|bits| set_secure_bits(bits | SECBIT_NO_SETUID_FIXUP)) {
        // Setting the bit requires CAP_SETPCAP. A thread without CAP_SETPCAP does not run as root. Such a thread does
        // not need the bit, because it cannot switch to another user.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        result => result?,
    }
    let kept = capabilities::get()?.permitted & kept();
    capabilities::set(Capabilities { effective: kept, permitted: kept, inheritable: 0 })
}

/// Drops every capability of this thread.
pub fn drop_all() -> io::Result<()> {
    capabilities::set(Capabilities { effective: 0, permitted: 0, inheritable: 0 })
}

/// Reduces the bounding set of this thread to the capabilities in [`KEPT`]. Threads that this thread starts later
/// inherit the bounding set.
pub fn bound() -> io::Result<()> {
    (0..capabilities::count()?)
        .filter(|number| kept() & 1 << number == 0)
        .try_for_each(capabilities::drop_from_bounding_set)
}

/// Returns [`KEPT`] as a bit set.
fn kept() -> u64 {
    KEPT.iter().fold(0, |bits, (number, _)| bits | 1 << number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets() -> Vec<u64> {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let set = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"].map(set).to_vec()
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no capset")]
    fn keep_for_files_changes_only_the_capabilities_of_this_thread() {
        let before = sets();
        let limited = std::thread::spawn(|| {
            keep_for_files().unwrap();
            sets()
        });
        let left = before[1] & kept();
        assert_eq!(limited.join().unwrap(), [left, left, 0, 0]);
        assert_eq!(sets(), before);
    }

    #[test]
    fn kept_lists_each_capability_once() {
        assert_eq!(kept().count_ones() as usize, KEPT.len());
        assert!(KEPT.iter().all(|(_, reason)| reason.starts_with("CAP_")));
    }
}
