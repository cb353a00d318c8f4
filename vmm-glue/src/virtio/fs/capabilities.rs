//! Limits the capabilities of virtio-fs worker threads (capabilities(7)).

use std::io;

/// The capabilities that a worker thread keeps if the process has them, by their Linux numbers
/// (include/uapi/linux/capability.h), with the reason for each.
///
/// Dropped on purpose: CAP_DAC_READ_SEARCH opens any inode of a file system by its file handle. CAP_SYS_RESOURCE allows
/// writes beyond quotas and into reserved blocks. CAP_SYS_PTRACE and CAP_SYS_RAWIO open files of other processes in
/// /proc.
const KEPT: [(u32, &str); 9] = [
    (0, "CAP_CHOWN: SETATTR gives files to other users"),
    (1, "CAP_DAC_OVERRIDE: the guest's kernel has already checked a user's permissions"),
    (3, "CAP_FOWNER: SETATTR and SETXATTR change files of all users"),
    (4, "CAP_FSETID: SETATTR keeps the set-group-ID bit"),
    (6, "CAP_SETGID: new files get the requesting user's group"),
    (7, "CAP_SETUID: new files get the requesting user as their owner"),
    (27, "CAP_MKNOD: MKNOD creates devices, which images can contain"),
    (31, "CAP_SETFCAP: SETXATTR sets security.capability"),
    (21, "CAP_SYS_ADMIN: trusted.* attributes, for overlayfs in the guest with its upper directory on the share"),
];

/// _LINUX_CAPABILITY_VERSION_3: two words of 32 bits each.
const VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Drops every capability of this thread that is not in [`KEPT`].
pub fn limit() -> io::Result<()> {
    let mut sets = [Sets::default(); 2];
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: the kernel reads the header and fills the two structures of version 3; all live through the call.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for (set, kept) in sets.iter_mut().zip([kept(), kept() >> 32]) {
        // Truncated on purpose: each structure has 32 bits of the set.
        set.permitted &= kept as u32;
        *set = Sets { effective: set.permitted, permitted: set.permitted, inheritable: 0 };
    }
    // SAFETY: the kernel reads the header and the two structures, which live through the call.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// [`KEPT`] as a bit set.
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
    fn limit_drops_other_capabilities_of_this_thread_alone() {
        let before = sets();
        let limited = std::thread::spawn(|| {
            limit().unwrap();
            sets()
        });
        let left = before[1] & kept();
        assert_eq!(limited.join().unwrap(), [left, left, 0, 0]);
        assert_eq!(sets(), before);
    }

    #[test]
    fn kept_has_no_capability_twice() {
        assert_eq!(kept().count_ones() as usize, KEPT.len());
        assert!(KEPT.iter().all(|(_, reason)| reason.starts_with("CAP_")));
    }
}
