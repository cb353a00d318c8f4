//! Binds host directories and files into the share. If several containers of a pod use the same source with the same
//! options, these containers share one mount.
//!
//! The virtio-fs server identifies a file by its inode and mount id (virtiofsd, `passthrough::InodeIds`). With two
//! mounts of one directory, the guest would see two inodes for each file. A fifo, a socket or a lock would then not
//! work between containers.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use husk_vmm::config::PRIVATE_SUFFIX;
use nix::sys::{stat::fstat, statvfs::fstatvfs};

use crate::host_view::HostView;
use crate::oci::id_mappings::IdMappings;
use crate::oci::spec::Mount;
use crate::volumes::error::VolumeError;
use crate::volumes::shared_mounts::{Step, VOLUMES};
use crate::volumes::staging_dir::{CopyContext, StagingDir};
use crate::volumes::{mount_api, shared_mounts};

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
    /// Whether only this pod uses the source. File locks in this volume then stay in the guest's kernel.
    pub private: bool,
}

/// Binds `source` into the share for container `id`, unless the share contains a matching mount. Returns the path of
/// the mount in the guest.
///
/// If the copy of the source omits mounts, adds a note to `notes`.
pub fn bind(
    mount: &Mount,
    source: &Source<'_>,
    (share, id): (&Path, &str),
    context: CopyContext<'_>,
    notes: &mut Vec<String>,
) -> Result<String, VolumeError> {
    let host = |step| {
        move |source| VolumeError::Host {
            mount_source: mount.source.clone().unwrap_or_default(),
            destination: mount.destination.clone(),
            step,
            source,
        }
    };
    let key = mount_key(source).map_err(host("stat the source"))?;
    let mut left_out = Vec::new();
    let name = shared_mounts::acquire((share, id), &key, source.directory, || {
        let tree;
        (tree, left_out) = copy(source, context, &StagingDir::for_share(share))?;
        Ok(tree)
    })
    .map_err(|(step, source)| host(step)(source))?;
    if !left_out.is_empty() {
        let source = mount.source.as_deref().unwrap_or_default();
        notes.push(format!("host-only or inaccessible mounts are left out of {source}: {}", left_out.join(", ")));
    }
    if source.receives_mounts {
        // `propagate::update` later copies mounts from the receiving tree to the share.
        add_receiving(source, context, (share, id), &name).map_err(|(step, source)| host(step)(source))?;
    }
    Ok(format!("{}/{VOLUMES}/{name}", husk_proto::GUEST_SHARE))
}

/// Returns a detached, private copy of the source's mount tree. The copy has the source's id mappings and read-only
/// flags. Also returns the path of each omitted mount, with the reason.
fn copy(source: &Source<'_>, context: CopyContext<'_>, stage: &StagingDir) -> Result<(OwnedFd, Vec<String>), Step> {
    let (at, flags) = (|step| move |error| (step, error), &source.flags);
    // A file has no submounts.
    let recursive = flags.recursive && source.directory;
    let mut tree = clone_source(source, recursive, libc::MS_PRIVATE, context.host)?;
    let mut left_out = Vec::new();
    if recursive {
        (tree, left_out) = stage.copy(&tree, source.file, context).map_err(at("copy the submounts"))?;
    }
    if let Some(id_mappings) = source.id_mappings {
        let user_namespace = id_mappings.namespace().map_err(at("create a user namespace with the id mappings"))?;
        // As under runc, this call fails if a submount's file system does not support id-mapped mounts.
        mount_api::set_id_mapping(tree.as_fd(), user_namespace.as_fd(), recursive)
            .map_err(at("set the id mappings"))?;
    }
    if flags.read_only {
        // The guest makes the mount read-only, too. But a compromised guest kernel could ignore this restriction.
        mount_api::set_attributes(tree.as_fd(), mount_api::MOUNT_ATTR_RDONLY, 0, flags.read_only_submounts)
            .map_err(at("make the mount read-only"))?;
    }
    Ok((tree, left_out))
}

/// Attaches a slave copy of the source's mount tree as the receiving tree of mount `name`. Does nothing if the mount
/// already has a receiving tree.
fn add_receiving(
    source: &Source<'_>,
    context: CopyContext<'_>,
    (share, id): (&Path, &str),
    name: &str,
) -> Result<(), Step> {
    let tree = clone_source(source, source.flags.recursive && source.directory, libc::MS_SLAVE, context.host)?;
    let added = shared_mounts::add_receiving((share, id), name, source.directory, &tree);
    if added.map_err(|error| ("attach a copy that receives the host's later mounts", error))? {
        StagingDir::for_share(share).detach_sandbox_mounts(name, context.host_only);
    }
    Ok(())
}

/// Returns a detached copy of the source's mount, with submounts if `recursive`. The copy has the given propagation.
fn clone_source(source: &Source<'_>, recursive: bool, propagation: u64, host: &HostView) -> Result<OwnedFd, Step> {
    host.clone_tree(source.file, recursive, propagation).map_err(|error| ("copy the source's mounts", error))
}

/// Returns the key of the source's mount in the share. Sources with equal keys share a mount.
fn mount_key(source: &Source<'_>) -> io::Result<String> {
    let stat = fstat(source.file)?;
    // With `ignores_mount_id`, the key contains the mount's flags, such as read-only, instead of the mount id.
    let mount = match source.ignores_mount_id {
        true => format!("m{:x}", fstatvfs(source.file)?.flags().bits()),
        false => format!("{:x}", mount_api::mount_id(source.file.as_fd())?),
    };
    let Flags { recursive, read_only, read_only_submounts, slave } = &source.flags;
    let flags: u8 = u8::from(*recursive) | u8::from(*read_only) << 1 | u8::from(*read_only_submounts) << 2;
    let flags = flags | u8::from(*slave) << 3;
    let id_mappings = source.id_mappings.map_or_else(String::new, |id_mappings| format!("-{}", id_mappings.tag()));
    let private = if source.private { PRIVATE_SUFFIX } else { "" };
    Ok(format!("{:x}-{:x}-{mount}-{flags:x}{id_mappings}{private}", stat.st_dev, stat.st_ino))
}

/// The options that the host applies to a bind mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Flags {
    recursive: bool,
    /// Whether the mount is read-only.
    pub read_only: bool,
    read_only_submounts: bool,
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
    use super::*;

    #[test]
    fn vmm_recognizes_private_mounts_by_their_keys() {
        let file = mount_api::open_path(Path::new("/"), false).unwrap();
        let key = |private| {
            let flags = Flags::enforced_by_guest();
            let (directory, ignores_mount_id, receives_mounts) = (true, false, false);
            let source =
                Source { file: &file, directory, id_mappings: None, flags, ignores_mount_id, receives_mounts, private };
            format!("7.{}", mount_key(&source).unwrap())
        };
        assert!(husk_vmm::config::is_private_mount(&key(true)));
        assert!(!husk_vmm::config::is_private_mount(&key(false)));
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
