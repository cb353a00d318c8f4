//! The source of a bind mount, the options that the host applies to the mount, and the key of the mount in the share.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
};

use husk_vmm::config::{LOCAL_SUFFIX, PRIVATE_SUFFIX};
use nix::sys::{
    stat::fstat,
    statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC,
        TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
    },
    statvfs::{FsFlags, fstatvfs},
};

use crate::oci::id_mappings::IdMappings;
use crate::oci::spec::Mount;
use crate::volumes::mount_api;

/// The source of a bind mount.
pub struct Source<'a> {
    /// The directory or file.
    pub file: &'a OwnedFd,
    /// Whether the source is a directory.
    pub directory: bool,
    /// Id mappings, if the mount is id-mapped.
    pub id_mappings: Option<&'a IdMappings>,
    /// Mount options that the host applies.
    pub flags: Flags,
    /// Whether sources that are the same file or directory share a mount even if their mount ids differ.
    pub ignores_mount_id: bool,
    /// Whether the host's later mounts propagate to the guest.
    pub receives_mounts: bool,
    /// Whether only this pod uses the source. The guest then keeps the locks of its files to itself, and caches their
    /// attributes longer.
    pub private: bool,
}

/// The flags of the host's mounts that every mount of the share has.
pub const IGNORED_FLAGS: FsFlags = FsFlags::ST_NOSUID.union(FsFlags::ST_NODEV).union(FsFlags::ST_NOEXEC);

/// File systems on which two files of one device never have the same inode number. ext2 and ext3 have the number of
/// ext4. The numbers of CephFS and ZFS are from their own sources (fs/ceph/super.h, include/sys/fs/zfs.h).
const UNIQUE_INODES: [FsType; 8] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    F2FS_SUPER_MAGIC,
    TMPFS_MAGIC,
    NFS_SUPER_MAGIC,
    FsType(0x00c3_6400),
    FsType(0x2fc1_2fc1),
];

/// File systems that do nothing when a program closes a file. Others can report an error of an earlier write. ZFS has the
/// number of [`UNIQUE_INODES`].
const LOCAL: [FsType; 7] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    F2FS_SUPER_MAGIC,
    TMPFS_MAGIC,
    OVERLAYFS_SUPER_MAGIC,
    FsType(0x2fc1_2fc1),
];

/// How the VMM joins a mount with other mounts of the share ([`husk_vmm::config::JoinedMount`]).
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// Whether the host allows writes.
    pub writable: bool,
    /// Mounts with the same text are joined.
    pub text: String,
}

/// Key of a mount in the share. Sources with equal keys share a mount.
#[derive(Debug, PartialEq, Eq)]
pub struct MountKey {
    device: u64,
    inode: u64,
    /// The host's mount, or its flags.
    mount: String,
    flags: u8,
    /// The id mappings, whether the file system is local, and whether the mount is private.
    rest: String,
}

impl MountKey {
    const RECURSIVE: u8 = 1;
    const READ_ONLY: u8 = 2;
    const READ_ONLY_SUBMOUNTS: u8 = 4;
    const SLAVE: u8 = 8;

    /// Returns the key of the source's mount.
    ///
    /// # Errors
    /// The errors of fstat(2), fstatfs(2) and fstatvfs(2).
    pub fn of(source: &Source<'_>) -> io::Result<Self> {
        let stat = fstat(source.file)?;
        // With `ignores_mount_id`, the key contains the mount's flags, such as read-only, instead of the mount id.
        let mount = match source.ignores_mount_id {
            true => format!("m{:x}", fstatvfs(source.file)?.flags().bits()),
            false => format!("{:x}", mount_api::mount_id(source.file.as_fd())?),
        };
        let Flags { recursive, read_only, read_only_submounts, slave } = source.flags;
        let flags = [
            (recursive, Self::RECURSIVE),
            (read_only, Self::READ_ONLY),
            (read_only_submounts, Self::READ_ONLY_SUBMOUNTS),
            (slave, Self::SLAVE),
        ];
        let flags = flags.iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag);
        let id_mappings = source.id_mappings.map_or_else(String::new, |id_mappings| format!("-{}", id_mappings.tag()));
        let is_local = LOCAL.contains(&fstatfs(source.file)?.filesystem_type());
        let local = if is_local { LOCAL_SUFFIX } else { "" };
        let private = if source.private { PRIVATE_SUFFIX } else { "" };
        let rest = format!("{id_mappings}{local}{private}");
        Ok(Self { device: stat.st_dev, inode: stat.st_ino, mount, flags, rest })
    }

    /// Returns how the VMM joins the mount with other mounts of the share, if it does. The caller must have checked that
    /// the mount has no submounts, and that the host's mount of the source is not id-mapped.
    ///
    /// Mounts are joined if they differ only in what the guest enforces for each container. Therefore, the group
    /// contains the flags of the host's mount, as in [`crate::volumes::reuse`]. A container that mounts the source
    /// read-only may use a writable mount.
    ///
    /// # Errors
    /// The errors of fstatfs(2) and fstatvfs(2).
    pub fn group(&self, source: &Source<'_>) -> io::Result<Option<Group>> {
        // The host can later mount a file below a volume that is a slave. virtiofsd does not mark a file as a mount, and
        // the file could have the inode number of another.
        let is_slave = self.flags & Self::SLAVE != 0;
        let joins = source.directory && !source.private && source.flags.recursive && !is_slave;
        if !joins || !UNIQUE_INODES.contains(&fstatfs(source.file)?.filesystem_type()) {
            return Ok(None);
        }
        let mut host = fstatvfs(source.file)?.flags() - IGNORED_FLAGS;
        let writable = !source.flags.read_only && !host.contains(FsFlags::ST_RDONLY);
        if source.flags.read_only {
            host -= FsFlags::ST_RDONLY;
        }
        let (host, device) = (host.bits(), self.device);
        Ok(Some(Group { writable, text: format!("{host:x}-{device:x}{}", self.rest) }))
    }

    /// Parses the text of a key. Returns `None` if the text is not the text of a key.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, '-');
        let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
        let (device, inode) = (number()?, number()?);
        let (mount, last) = (parts.next()?.to_owned(), parts.next()?);
        let (flags, rest) = last.split_at(last.find('-').unwrap_or(last.len()));
        Some(Self { device, inode, mount, flags: u8::from_str_radix(flags, 16).ok()?, rest: rest.to_owned() })
    }

    /// Returns whether the source may be a part of the mount with the key `whole`: it is on the same file system, and
    /// has the same id mappings and the same propagation.
    pub fn may_be_part_of(&self, whole: &Self) -> bool {
        let properties = |key: &Self| (key.device, key.flags & Self::SLAVE);
        properties(self) == properties(whole) && self.rest == whole.rest
    }

    /// Returns whether the mount is read-only.
    pub fn is_read_only(&self) -> bool {
        self.flags & Self::READ_ONLY != 0
    }
}

impl fmt::Display for MountKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, inode, mount, flags, rest } = self;
        write!(formatter, "{device:x}-{inode:x}-{mount}-{flags:x}{rest}")
    }
}

/// The options that the host applies to a bind mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    /// Whether the mount has the submounts of its source.
    pub recursive: bool,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// Whether the submounts are read-only, too.
    pub read_only_submounts: bool,
    /// Whether the mount is a slave, which receives the host's later mounts (mount_namespaces(7)).
    pub slave: bool,
}

impl Flags {
    /// Returns the flags that the options of `mount` request.
    pub fn of(mount: &Mount) -> Self {
        let mut flags = Self { recursive: false, read_only: false, read_only_submounts: false, slave: false };
        for option in mount.options() {
            match option.as_str() {
                "rbind" => flags.recursive = true,
                "ro" => flags.read_only = true,
                "rw" => flags.read_only = false,
                "rro" => (flags.read_only, flags.read_only_submounts) = (true, true),
                // `slave` has the same effect as `rslave`: the guest receives later mounts at every depth.
                "slave" | "rslave" => flags.slave = true,
                _ => {}
            }
        }
        flags
    }

    /// Returns the flags of a mount that all containers of the pod share. For each container, the guest applies the
    /// read-only option and the propagation.
    pub fn enforced_by_guest() -> Self {
        Self { recursive: true, read_only: false, read_only_submounts: false, slave: false }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use husk_vmm::config::{MountKind, MountProperties, mount_properties};
    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::volumes::test_support::{isolated, tmpfs};

    #[test]
    fn vmm_recognizes_the_kind_of_a_mount_by_its_key() {
        let key = |path: &str, private| {
            let file = mount_api::open_path(Path::new(path), false).unwrap();
            let flags = Flags::enforced_by_guest();
            let (directory, ignores_mount_id, receives_mounts) = (true, false, false);
            let source =
                Source { file: &file, directory, id_mappings: None, flags, ignores_mount_id, receives_mounts, private };
            let key = MountKey::of(&source).unwrap();
            assert_eq!(MountKey::parse(&key.to_string()).as_ref(), Some(&key));
            mount_properties(&format!("7.{key}"))
        };
        let properties = |kind, local| Some(MountProperties { kind, local });
        assert_eq!(key("/dev/shm", true), properties(MountKind::EmptyDir, true));
        assert_eq!(key("/dev/shm", false), properties(MountKind::Volume, true));
        assert_eq!(key("/proc", true), properties(MountKind::EmptyDir, false));
        assert_eq!(key("/proc", false), properties(MountKind::Volume, false));
    }

    #[test]
    fn key_contains_all_properties() {
        let key = |text: &str| MountKey::parse(text).unwrap();
        for text in
            ["fe-1a-m1000-3", "fe-1a-7-9-u0-1-2-g0-1-2", "fe-1a-7-1-private", "fe-1a-7-1-u0-1-2-g0-1-2-local-private"]
        {
            assert_eq!(key(text).to_string(), text);
        }
        for text in ["", "fe", "fe-1a-7", "fe-1a-7-x", "x-1a-7-1", "fe-1a-7-"] {
            assert_eq!(MountKey::parse(text), None, "{text}");
        }
        for whole in ["fe-2-9-1", "fe-2-9-2"] {
            assert!(key("fe-1a-7-3").may_be_part_of(&key(whole)), "{whole}");
        }
        for other in ["ff-2-9-1", "fe-2-9-9", "fe-2-9-1-private", "fe-2-9-1-u0-1-2-g0-1-2"] {
            assert!(!key("fe-1a-7-3").may_be_part_of(&key(other)), "{other}");
        }
    }

    #[test]
    fn group_is_equal_for_mounts_that_differ_in_what_the_guest_enforces() {
        isolated(|dir| {
            let root = dir.join("volume");
            tmpfs(&root);
            let sub = root.join("sub");
            std::fs::create_dir(&sub).unwrap();
            let group = |path: &Path, options: &[&str], private: bool| {
                let file = mount_api::open_path(path, false).unwrap();
                let options = Some(options.iter().map(ToString::to_string).collect());
                let flags = Flags::of(&Mount { options, ..Mount::default() });
                let source = Source {
                    file: &file,
                    directory: path.is_dir(),
                    id_mappings: None,
                    flags,
                    ignores_mount_id: false,
                    receives_mounts: false,
                    private,
                };
                MountKey::of(&source).unwrap().group(&source).unwrap()
            };
            let text = |group: &Option<Group>| group.as_ref().map(|group| group.text.clone());
            let whole = group(&root, &["rbind"], false);
            assert!(whole.as_ref().is_some_and(|group| group.writable));
            let read_only = group(&sub, &["rbind", "ro"], false);
            assert_eq!((text(&read_only), read_only.unwrap().writable), (text(&whole), false));
            let file = root.join("file");
            std::fs::write(&file, "").unwrap();
            assert_eq!(
                [
                    group(&sub, &["bind"], false),
                    group(&sub, &["rbind"], true),
                    group(&sub, &["rbind", "rslave"], false),
                    group(&file, &["rbind"], false),
                    group(Path::new("/proc"), &["rbind"], false),
                ],
                [const { None }; 5]
            );
            // The guest does not enforce the flags of the host's mount.
            let (none, flags) = (None::<&Path>, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
            mount(none, &root, none, flags, none).unwrap();
            let of_host = group(&root, &["rbind"], false);
            assert!(text(&of_host) != text(&whole) && of_host.is_some_and(|group| !group.writable));
            assert_eq!(text(&group(&root, &["rbind", "ro"], false)), text(&whole));
        });
    }

    #[test]
    fn flags_contain_the_options_that_the_host_applies() {
        let of = |options: &[&str]| {
            let options = Some(options.iter().map(ToString::to_string).collect());
            let (kind, source) = (Some("bind".into()), Some("/a".into()));
            Flags::of(&Mount { destination: "/b".into(), kind, source, options, ..Mount::default() })
        };
        let plain = Flags { recursive: true, read_only: false, read_only_submounts: false, slave: false };
        assert_eq!(of(&["rbind", "rw", "nosuid", "rprivate"]), plain);
        assert!(of(&["bind", "ro", "rslave"]).slave);
        assert!(of(&["bind", "ro"]).read_only && !of(&["bind", "ro"]).read_only_submounts && !of(&["bind"]).recursive);
        assert!(of(&["rbind", "rro"]).read_only_submounts);
    }
}
