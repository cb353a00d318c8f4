//! The types of host-only file systems, which are interfaces to the host's kernel, devices or processes.

use std::{io, os::fd::OwnedFd};

use nix::sys::statfs::fstatfs;

/// Host-only file system types in Linux 6.12, each with its `f_type` (statfs(2)). The values are from
/// include/uapi/linux/magic.h and from the file systems' sources. devtmpfs has `None`, because tmpfs has the same
/// `f_type`. cpuset has `None`, because cgroup has the same `f_type`.
const TYPES: [(&str, Option<i64>); 32] = [
    ("binder", Some(0x6c6f_6f70)),
    ("binfmt_misc", Some(0x4249_4e4d)),
    ("bpf", Some(0xcafe_4a11)),
    ("cgroup", Some(0x27_e0eb)),
    ("cgroup2", Some(0x6367_7270)),
    ("configfs", Some(0x6265_6570)),
    ("cpuset", None),
    ("debugfs", Some(0x6462_6720)),
    ("devpts", Some(0x1cd1)),
    ("devtmpfs", None),
    ("efivarfs", Some(0xde5e_81e4)),
    ("functionfs", Some(0xa64_7361)),
    ("fusectl", Some(0x6573_5543)),
    ("gadgetfs", Some(0xaee7_1ee7)),
    ("ibmasmfs", Some(0x6672_6f67)),
    ("ipathfs", Some(0x72_6a77)),
    ("mqueue", Some(0x1980_0202)),
    ("nfsd", Some(0x6e66_7364)),
    ("nsfs", Some(0x6e73_6673)),
    ("ocfs2_dlmfs", Some(0x76a9_f425)),
    ("pidfs", Some(0x5049_4446)),
    ("proc", Some(0x9fa0)),
    ("pstore", Some(0x6165_676c)),
    ("resctrl", Some(0x765_5821)),
    ("rpc_pipefs", Some(0x6759_6969)),
    ("s390_hypfs", Some(0x68_7970)),
    ("securityfs", Some(0x7363_6673)),
    ("selinuxfs", Some(0xf97c_ff8c)),
    ("smackfs", Some(0x4341_5d53)),
    ("sysfs", Some(0x6265_6572)),
    ("tracefs", Some(0x7472_6163)),
    ("xenfs", Some(0xabba_1974)),
];

/// Types of host-only file systems that stay writable for the shim ([`crate::confinement`]). The shim writes to some of
/// these file systems. The other file systems contain special files, for example devices and namespaces, which a
/// read-only mount does not protect.
const WRITABLE: [&str; 7] = ["cgroup", "cgroup2", "cpuset", "devpts", "devtmpfs", "mqueue", "nsfs"];

/// Returns the file system type `kind` if it is host-only.
pub fn host_only(kind: &str) -> Option<&'static str> {
    TYPES.iter().find(|(of_type, _)| *of_type == kind).map(|(of_type, _)| *of_type)
}

/// Returns the host-only type that has the given `f_type`. Returns `None` for devtmpfs and cpuset.
pub fn by_magic(magic: i64) -> Option<&'static str> {
    TYPES.iter().find(|(_, of_type)| *of_type == Some(magic)).map(|(kind, _)| *kind)
}

/// Returns whether the file system type `kind` is read-only in the shim's mount namespace.
pub fn is_protected_type(kind: &str) -> bool {
    host_only(kind).is_some() && !WRITABLE.contains(&kind)
}

/// Returns whether `file` is on a file system that is read-only in the shim's mount namespace.
///
/// # Errors
/// The error of fstatfs(2).
pub fn is_protected(file: &OwnedFd) -> io::Result<bool> {
    Ok(by_magic(fstatfs(file)?.filesystem_type().0).is_some_and(is_protected_type))
}
