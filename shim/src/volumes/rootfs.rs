//! Mounts a container's rootfs. The mounts come from containerd's snapshotter.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::mount::MsFlags;

use crate::fs_types;
use crate::host_view::{HostView, path_of};
use crate::oci::id_mappings::IdMappings;
use crate::volumes::mount_api;
use crate::volumes::overlay::Layers;
use crate::volumes::staging_dir::{CopiedTree, CopyContext, StagingDir};

/// One mount of a rootfs, as in containerd's request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootMount {
    /// File system type, or `bind`.
    pub kind: String,
    /// Device or directory.
    pub source: String,
    /// Path below the rootfs. Only an empty path or `/` is supported.
    pub target: String,
    /// Options, as in fstab(5).
    pub options: Vec<String>,
}

impl From<&husk_proto::containerd::types::mount::Mount> for RootMount {
    fn from(mount: &husk_proto::containerd::types::mount::Mount) -> Self {
        Self {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            target: mount.target.clone(),
            options: mount.options.clone(),
        }
    }
}

/// Error from mounting a rootfs.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A mount failed.
    #[error("failed to mount the rootfs ({kind} of {mount_source:?} with options {options:?})")]
    Mount {
        /// File system type.
        kind: String,
        /// Device or directory.
        mount_source: String,
        /// The options, shortened.
        options: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The mount is not supported.
    #[error("failed to mount the rootfs: {0}")]
    Unsupported(String),
}

/// Stacks `mounts` at `target`, in order. Returns notes for the log about omitted mounts.
pub fn mount_all(
    mounts: &[RootMount],
    target: &Path,
    stage: &StagingDir,
    context: CopyContext<'_>,
) -> Result<Vec<String>, RootfsError> {
    let left_out = mounts.iter().map(|mount| mount_one(mount, target, stage, context));
    Ok(left_out.collect::<Result<Vec<_>, _>>()?.concat())
}

fn mount_one(
    root: &RootMount,
    target: &Path,
    stage: &StagingDir,
    context: CopyContext<'_>,
) -> Result<Vec<String>, RootfsError> {
    if !root.target.is_empty() && root.target != "/" {
        // A symlink in the image could redirect this mount to any directory of the host.
        let message = format!("a mount at {:?} inside the rootfs is not supported", root.target);
        return Err(RootfsError::Unsupported(message));
    }
    let mut options = Options::parse(&root.options);
    if fs_types::host_only(&root.kind).is_some() {
        return Err(is_host_only("the rootfs", &root.kind));
    }
    let id_mappings = IdMappings::from_options(options.data.iter().copied()).map_err(RootfsError::Unsupported)?;
    options.data.retain(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="));
    let failed = |source| RootfsError::Mount {
        kind: root.kind.clone(),
        mount_source: root.source.clone(),
        options: shorten(&root.options.join(",")),
        source,
    };
    if root.kind == "bind" || options.flags.contains(MsFlags::MS_BIND) {
        let source = Path::new(&root.source);
        return bind(source, target, (stage, context), &options, id_mappings.as_ref()).map_err(failed);
    }
    if root.kind == "overlay" {
        let layers = Layers::open(&options.data, context.host).map_err(failed)?;
        for layer in layers.directories() {
            if let Some(kind) = context.host_only.type_of(layer, context.host).map_err(failed)? {
                let path = std::fs::read_link(path_of(layer)).map_err(failed)?;
                return Err(is_host_only(&path.to_string_lossy(), kind));
            }
        }
        layers.mount(target, options.flags, id_mappings.as_ref(), context.host).map_err(failed)?;
        return Ok(Vec::new());
    }
    if id_mappings.is_some() {
        let message = format!("{} cannot be id-mapped; only overlay and bind mounts are supported", root.kind);
        return Err(RootfsError::Unsupported(message));
    }
    mount_file_system(root, target, &options, context.host).map_err(failed)?;
    Ok(Vec::new())
}

fn is_host_only(what: &str, kind: &str) -> RootfsError {
    RootfsError::Unsupported(format!("{what} is on a host-only file system ({kind}), which cannot be shared with a VM"))
}

/// Shortens an option string for an error message.
fn shorten(options: &str) -> String {
    const MAX: usize = 200;
    if options.len() <= MAX {
        return options.into();
    }
    let mut text: String = options.chars().take(MAX).collect();
    text.push('…');
    text
}

fn bind(
    source: &Path,
    target: &Path,
    (stage, context): (&StagingDir, CopyContext<'_>),
    options: &Options<'_>,
    id_mappings: Option<&IdMappings>,
) -> io::Result<Vec<String>> {
    let CopyContext { host_only, host } = context;
    let recursive = options.flags.contains(MsFlags::MS_REC);
    let (file, mut left_out) = (host.open(source, true)?, Vec::new());
    if let Some(kind) = host_only.type_of(&file, host)? {
        return Err(io::Error::other(format!("the source is on a host-only file system ({kind})")));
    }
    // With another propagation, the copy would receive the host's later mounts.
    let mut tree = host.clone_tree(&file, recursive, libc::MS_PRIVATE)?;
    if recursive {
        CopiedTree { tree, left_out, .. } = stage.copy(&tree, &file, context)?;
    }
    if let Some(id_mappings) = id_mappings {
        mount_api::set_id_mapping(tree.as_fd(), id_mappings.namespace()?.as_fd(), recursive)?;
    }
    let attr = if options.flags.contains(MsFlags::MS_RDONLY) { mount_api::MOUNT_ATTR_RDONLY } else { 0 };
    mount_api::set_attributes(tree.as_fd(), attr, 0, false)?;
    mount_api::attach_to_share(tree.as_fd(), mount_api::open_path(target, false)?.as_fd())?;
    let notes = (!left_out.is_empty())
        .then(|| format!("host-only or inaccessible mounts are left out of the rootfs: {}", left_out.join(", ")));
    Ok(notes.into_iter().collect())
}

fn mount_file_system(root: &RootMount, target: &Path, options: &Options<'_>, host: &HostView) -> io::Result<()> {
    let of_host = HostFile::open(&root.source, host)?;
    let mut source = of_host.path;
    let _device; // keeps the loop device attached until mount(2) has returned
    if options.loop_device {
        let (path, file) = crate::volumes::loop_device::attach(&source, options.flags.contains(MsFlags::MS_RDONLY))?;
        _device = file;
        source = path;
    }
    // erofs takes the files of further layers as options.
    let (mut data, mut devices) = (Vec::new(), Vec::new());
    for option in &options.data {
        match option.strip_prefix("device=") {
            Some(path) => {
                let device = HostFile::open(path, host)?;
                data.push(format!("device={}", device.path.display()));
                devices.push(device);
            }
            None => data.push((*option).to_owned()),
        }
    }
    mount_api::mount_in_share(&source, target, &root.kind, options.flags, &data.join(","))
}

/// The source of a mount.
struct HostFile {
    /// Path of the file in the shim's mount namespace, or the source itself if it is not a file of the host.
    path: PathBuf,
    /// A private copy of the file's mount. A file on the host's own mount would keep this mount busy.
    _mount: Option<OwnedFd>,
}

impl HostFile {
    fn open(source: &str, host: &HostView) -> io::Result<Self> {
        let path = PathBuf::from(source);
        // The shim's namespace has the host's `/dev`.
        if !path.is_absolute() || path.starts_with("/dev") {
            return Ok(Self { path, _mount: None });
        }
        let file = match host.open(&path, true) {
            // Not every source of a file system is a path.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self { path, _mount: None }),
            file => file?,
        };
        let copy = host.clone_tree(&file, false, libc::MS_PRIVATE)?;
        Ok(Self { path: path_of(&copy), _mount: Some(copy) })
    }
}

/// Mount options, separated into flags and the file system's options.
struct Options<'a> {
    /// Flags of mount(2).
    flags: MsFlags,
    /// Options of the file system.
    data: Vec<&'a str>,
    /// Whether the source is a file that must be attached to a loop device.
    loop_device: bool,
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Self {
        let mut parsed = Self { flags: MsFlags::empty(), data: Vec::new(), loop_device: false };
        for option in options {
            let (set, clear) = match option.as_str() {
                "bind" => (MsFlags::MS_BIND, MsFlags::empty()),
                "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, MsFlags::empty()),
                "ro" => (MsFlags::MS_RDONLY, MsFlags::empty()),
                "rw" => (MsFlags::empty(), MsFlags::MS_RDONLY),
                "nosuid" => (MsFlags::MS_NOSUID, MsFlags::empty()),
                "suid" => (MsFlags::empty(), MsFlags::MS_NOSUID),
                "nodev" => (MsFlags::MS_NODEV, MsFlags::empty()),
                "dev" => (MsFlags::empty(), MsFlags::MS_NODEV),
                "noexec" => (MsFlags::MS_NOEXEC, MsFlags::empty()),
                "exec" => (MsFlags::empty(), MsFlags::MS_NOEXEC),
                "sync" => (MsFlags::MS_SYNCHRONOUS, MsFlags::empty()),
                "async" => (MsFlags::empty(), MsFlags::MS_SYNCHRONOUS),
                "dirsync" => (MsFlags::MS_DIRSYNC, MsFlags::empty()),
                "noatime" => (MsFlags::MS_NOATIME, MsFlags::empty()),
                "atime" => (MsFlags::empty(), MsFlags::MS_NOATIME),
                "nodiratime" => (MsFlags::MS_NODIRATIME, MsFlags::empty()),
                "diratime" => (MsFlags::empty(), MsFlags::MS_NODIRATIME),
                "relatime" => (MsFlags::MS_RELATIME, MsFlags::empty()),
                "norelatime" => (MsFlags::empty(), MsFlags::MS_RELATIME),
                "strictatime" => (MsFlags::MS_STRICTATIME, MsFlags::empty()),
                "loop" => {
                    parsed.loop_device = true;
                    continue;
                }
                "defaults" | "remount" | "" => continue,
                data => {
                    parsed.data.push(data);
                    continue;
                }
            };
            parsed.flags.insert(set);
            parsed.flags.remove(clear);
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::host_only::HostOnly;

    #[test]
    fn parse_separates_flags_from_data() {
        let options = ["rw", "ro", "nosuid", "suid", "rbind", "loop", "index=off", "defaults"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(parsed.data, ["index=off"]);
        assert!(parsed.loop_device);
    }

    #[test]
    fn mount_all_rejects_targets_inside_the_rootfs_and_incomplete_id_mappings() {
        let inside = RootMount { kind: "bind".into(), target: "/etc".into(), ..RootMount::default() };
        let (stage, host_only) = (StagingDir::for_share(Path::new("/x/share")), HostOnly::new([]).unwrap());
        let context = CopyContext { host_only: &host_only, host: &HostView::own() };
        let mounted = |mount| mount_all(&[mount], Path::new("/nowhere"), &stage, context);
        assert!(matches!(mounted(inside), Err(RootfsError::Unsupported(_))));
        let options = vec!["uidmap=0:1000:1".to_string()];
        let mapped = RootMount { kind: "overlay".into(), options, ..RootMount::default() };
        assert!(matches!(mounted(mapped), Err(RootfsError::Unsupported(_))));
    }
}
