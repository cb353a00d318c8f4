//! Binds host directories and files into the share. If several containers of a pod use the same source, or parts of one
//! source, these containers share one mount.
//!
//! The virtio-fs server identifies a file by its inode and mount id (virtiofsd, `passthrough::InodeIds`). With two
//! mounts of one directory, the guest would see two inodes for each file. A fifo, a socket, a shared mapping, or a lock
//! of an emptyDir's file would then not work between containers. If two mounts are necessary, the VMM joins them
//! ([`MountKey::group`]).

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use crate::host_view::HostView;
use crate::oci::spec::Mount;
use crate::volumes::error::VolumeError;
use crate::volumes::reuse::Part;
use crate::volumes::shared_mounts::Step;
use crate::volumes::source::{MountKey, Source};
use crate::volumes::staging_dir::{CopiedTree, CopyContext, StagingDir};
use crate::volumes::{mount_api, reuse, shared_mounts};

/// Binds `source` into the share for container `id`, unless the share has a mount that contains `source`. Returns the
/// part of a mount that is the source.
///
/// If the copy of the source omits mounts, adds a note to `notes`.
pub fn bind(
    mount: &Mount,
    source: &Source<'_>,
    (share, id): (&Path, &str),
    context: CopyContext<'_>,
    notes: &mut Vec<String>,
) -> Result<Part, VolumeError> {
    let host = |step| {
        move |source| VolumeError::Host {
            mount_source: mount.source.clone().unwrap_or_default(),
            destination: mount.destination.clone(),
            step,
            source,
        }
    };
    let key = MountKey::of(source).map_err(host("stat the source"))?;
    let part = acquire_part(source, &key, (share, id), context.host);
    if let Some(part) = part.map_err(|(step, source)| host(step)(source))? {
        return Ok(part);
    }
    let mut left_out = Vec::new();
    let name = shared_mounts::acquire((share, id), &key.to_string(), source.directory, || {
        let copied = copy(source, context, &StagingDir::for_share(share))?;
        left_out = copied.left_out;
        let group = if copied.is_single { key.group(source) } else { Ok(None) };
        Ok((copied.tree, group.map_err(|error| ("stat the source", error))?))
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
    Ok(Part { name, below: Vec::new() })
}

/// Creates a marker of container `id` for a mount in the share that contains `source`. Returns `None` if `source` needs
/// a mount of its own, or if the share already has a mount with this key.
fn acquire_part(
    source: &Source<'_>,
    key: &MountKey,
    (share, id): (&Path, &str),
    host: &HostView,
) -> Result<Option<Part>, Step> {
    if shared_mounts::is_present(share, &key.to_string())? {
        return Ok(None);
    }
    // After an error, the source gets a mount of its own.
    for part in reuse::find(share, source, key, host).unwrap_or_default() {
        if shared_mounts::acquire_named((share, id), &part.name)? {
            return Ok(Some(part));
        }
    }
    Ok(None)
}

/// Returns a detached, private copy of the source's mount tree. The copy has the source's id mappings and read-only
/// flags.
fn copy(source: &Source<'_>, context: CopyContext<'_>, stage: &StagingDir) -> Result<CopiedTree, Step> {
    let (at, flags) = (|step| move |error| (step, error), &source.flags);
    // A file has no submounts.
    let recursive = flags.recursive && source.directory;
    let tree = clone_source(source, recursive, libc::MS_PRIVATE, context.host)?;
    let copied = match recursive {
        true => stage.copy(&tree, source.file, context).map_err(at("copy the submounts"))?,
        false => CopiedTree { tree, left_out: Vec::new(), is_single: false },
    };
    let tree = &copied.tree;
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
    Ok(copied)
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
