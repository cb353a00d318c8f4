//! Mounts a container's rootfs. The mounts come from containerd's snapshotter.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::oci::id_mappings::IdMappings;
use crate::volumes::host_only::HostOnly;
use crate::volumes::mount_api;
use crate::volumes::staging_dir::StagingDir;

/// Size of a page. mount(2) copies at most one page of options, including the terminating NUL.
const PAGE_SIZE: usize = 4096;

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

/// Values that [`mount_all`] needs to copy the mount trees of bind mounts.
#[derive(Clone, Copy)]
pub struct CopyContext<'a> {
    /// The staging directory.
    pub stage: &'a StagingDir,
    /// Recognizes host-only file systems, which are not copied.
    pub host_only: &'a HostOnly,
}

/// Stacks `mounts` at `target`, in order. Returns notes for the log about omitted mounts.
pub fn mount_all(mounts: &[RootMount], target: &Path, context: CopyContext<'_>) -> Result<Vec<String>, RootfsError> {
    let left_out = mounts.iter().map(|mount| mount_one(mount, target, context));
    Ok(left_out.collect::<Result<Vec<_>, _>>()?.concat())
}

fn mount_one(root: &RootMount, target: &Path, context: CopyContext<'_>) -> Result<Vec<String>, RootfsError> {
    if !root.target.is_empty() && root.target != "/" {
        // A symlink in the image could redirect this mount to any directory of the host.
        let message = format!("a mount at {:?} inside the rootfs is not supported", root.target);
        return Err(RootfsError::Unsupported(message));
    }
    let mut options = Options::parse(&root.options);
    reject_host_only(&root.kind, &options, context.host_only)?;
    let id_mappings = IdMappings::from_options(options.data.iter().copied()).map_err(RootfsError::Unsupported)?;
    options.data.retain(|option| !option.starts_with("uidmap=") && !option.starts_with("gidmap="));
    let result = if root.kind == "bind" || options.flags.contains(MsFlags::MS_BIND) {
        bind(Path::new(&root.source), target, context, &options, id_mappings.as_ref())
    } else {
        match id_mappings {
            None => mount_file_system(root, target, &options).map(|()| Vec::new()),
            Some(id_mappings) if root.kind == "overlay" => {
                id_mapped_overlay(target, &options, &id_mappings).map(|()| Vec::new())
            }
            Some(_) => {
                let message = format!("{} cannot be id-mapped; only overlay and bind mounts are supported", root.kind);
                return Err(RootfsError::Unsupported(message));
            }
        }
    };
    result.map_err(|source| RootfsError::Mount {
        kind: root.kind.clone(),
        mount_source: root.source.clone(),
        options: shorten(&root.options.join(",")),
        source,
    })
}

/// Fails if the file system of the rootfs or of a layer is host-only.
fn reject_host_only(kind: &str, options: &Options<'_>, host_only: &HostOnly) -> Result<(), RootfsError> {
    let reject = |what: &str, kind: &str| {
        Err(RootfsError::Unsupported(format!(
            "{what} is on a host-only file system ({kind}), which cannot be shared with a VM"
        )))
    };
    if HostOnly::is_type(kind) {
        return reject("the rootfs", kind);
    }
    let layers = options.data.iter().filter_map(|option| {
        let (name, paths) = option.split_once('=')?;
        matches!(name, "lowerdir" | "upperdir").then_some(paths)
    });
    for layer in layers.flat_map(|paths| paths.split(':')).filter(|path| path.starts_with('/')) {
        // Skip a layer that cannot be opened, because the mount fails later with a better error.
        let Ok(file) = mount_api::open_path(Path::new(layer), true) else { continue };
        match host_only.type_of_layer(&file) {
            Ok(Some(kind)) => return reject(layer, kind),
            Ok(None) => {}
            Err(error) => {
                let message = format!("failed to determine the file system of the layer {layer}: {error}");
                return Err(RootfsError::Unsupported(message));
            }
        }
    }
    Ok(())
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
    context: CopyContext<'_>,
    options: &Options<'_>,
    id_mappings: Option<&IdMappings>,
) -> io::Result<Vec<String>> {
    let CopyContext { stage, host_only } = context;
    let recursive = options.flags.contains(MsFlags::MS_REC);
    let (file, mut left_out) = (mount_api::open_path(source, true)?, Vec::new());
    if let Some(kind) = host_only.type_of(&file)? {
        return Err(io::Error::other(format!("the source is on a host-only file system ({kind})")));
    }
    let mut tree = mount_api::clone_tree(file.as_fd(), recursive)?;
    // Set private propagation. Otherwise, the copy would receive the host's later mounts.
    mount_api::set_attributes(tree.as_fd(), 0, libc::MS_PRIVATE, true)?;
    if recursive {
        (tree, left_out) = stage.copy(&tree, host_only)?;
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

fn mount_file_system(root: &RootMount, target: &Path, options: &Options<'_>) -> io::Result<()> {
    let mut source = PathBuf::from(&root.source);
    let _device; // keeps the loop device attached until mount(2) has returned
    if options.loop_device {
        let (path, file) = crate::volumes::loop_device::attach(&source, options.flags.contains(MsFlags::MS_RDONLY))?;
        _device = file;
        source = path;
    }
    let data = options.data.join(",");
    if data.len() < PAGE_SIZE {
        return mount_with_data(&source, target, &root.kind, options.flags, &data);
    }
    let Some((dir, data)) = (root.kind == "overlay").then(|| relative_layers(&options.data)).flatten() else {
        let message = format!("the options have {} bytes, but the kernel accepts only {}", data.len(), PAGE_SIZE - 1);
        return Err(io::Error::other(message));
    };
    // The shortened options contain paths relative to the working directory. A thread has its own working directory
    // only after unshare(CLONE_FS). Therefore, a new thread makes this mount.
    let (target, kind, flags) = (target.to_path_buf(), root.kind.clone(), options.flags);
    let mounter = std::thread::Builder::new().name("mount".into()).spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&dir)?;
        mount_with_data(&source, &target, &kind, flags, &data)
    })?;
    mounter.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts the rootfs panicked")))
}

/// Mounts an overlay at `target`. Each lower directory of the overlay is an id-mapped mount of a layer.
///
/// The upper directory is not id-mapped, because containerd created this directory with the mapped ids. The id-mapped
/// mounts exist as long as the overlay.
fn id_mapped_overlay(target: &Path, options: &Options<'_>, id_mappings: &IdMappings) -> io::Result<()> {
    let lower = options.data.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let lower = lower.ok_or_else(|| io::Error::other("the overlay has no option lowerdir"))?;
    if lower.contains('\\') || lower.contains("::") {
        return Err(io::Error::other("layers cannot be id-mapped if lowerdir contains a backslash or \"::\""));
    }
    let namespace = id_mappings.namespace()?;
    let layers = lower.split(':').map(|layer| {
        let tree = mount_api::clone_tree(mount_api::open_path(Path::new(layer), true)?.as_fd(), false)?;
        mount_api::set_id_mapping(tree.as_fd(), namespace.as_fd(), false)?;
        Ok(tree)
    });
    let layers: Vec<OwnedFd> = layers.collect::<io::Result<_>>()?;
    let mut data: Vec<String> =
        options.data.iter().filter(|option| !option.starts_with("lowerdir=")).map(ToString::to_string).collect();
    let names: Vec<String> = (0..layers.len()).map(|layer| layer.to_string()).collect();
    data.push(format!("lowerdir={}", names.join(":")));
    let (stage, flags) = (target.to_path_buf(), options.flags);
    // overlayfs accepts only layers that are attached in the caller's mount namespace. A thread attaches the layers in
    // a new mount namespace, because no other process may see them. The new namespace disappears with the thread.
    let mounter = std::thread::Builder::new().name("mount".into()).spawn(move || {
        let none = None::<&Path>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS | nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("layers"), &stage, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
        nix::unistd::chdir(&stage)?;
        for (name, layer) in names.iter().zip(&layers) {
            std::fs::create_dir(name)?;
            mount_api::attach(layer.as_fd(), mount_api::open_path(Path::new(name), false)?.as_fd())?;
        }
        std::fs::create_dir("overlay")?;
        mount_with_data(Path::new("overlay"), Path::new("overlay"), "overlay", flags, &data.join(","))?;
        mount_api::clone_tree(mount_api::open_path(Path::new("overlay"), false)?.as_fd(), false)
    })?;
    let overlay = mounter.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts layers panicked")))?;
    mount_api::attach_to_share(overlay.as_fd(), mount_api::open_path(target, false)?.as_fd())
}

/// Mounts a file system with [`mount_api::SHARED_FLAGS`]. mount(2) itself must set these flags, because the VMM sees a
/// new mount in the share at once. A later remount would set them too late.
fn mount_with_data(source: &Path, target: &Path, kind: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    let flags = flags | mount_api::SHARED_FLAGS;
    Ok(mount(Some(source), target, Some(kind), flags, Some(data).filter(|data| !data.is_empty()))?)
}

/// Rewrites the lower directories in an overlay's options as paths relative to their longest common parent. Returns
/// this parent and the new options. Returns `None` if the options cannot be rewritten, or still exceed a page.
fn relative_layers(data: &[&str]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    // Do not split a list with an escaped colon (`\:`) or a data-only layer (`::`). containerd creates neither.
    if lower.contains('\\') || lower.contains("::") {
        return None;
    }
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    if !dirs.iter().all(|dir| dir.is_absolute()) {
        return None;
    }
    let mut common = dirs.first()?.parent()?;
    while !dirs.iter().all(|dir| dir.starts_with(common)) {
        common = common.parent()?;
    }
    let short: Option<Vec<&str>> =
        dirs.iter().map(|dir| dir.strip_prefix(common).ok()?.to_str().filter(|name| !name.is_empty())).collect();
    let lower = format!("lowerdir={}", short?.join(":"));
    let data: Vec<&str> =
        data.iter().map(|option| if option.starts_with("lowerdir=") { lower.as_str() } else { option }).collect();
    let data = data.join(",");
    (data.len() < PAGE_SIZE).then(|| (common.to_path_buf(), data))
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

    #[test]
    fn parse_separates_flags_from_data() {
        let options = ["rw", "ro", "nosuid", "suid", "rbind", "loop", "index=off", "defaults"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(parsed.data, ["index=off"]);
        assert!(parsed.loop_device);
    }

    #[test]
    fn relative_layers_shortens_long_lists() {
        let dirs: Vec<String> = (0..120).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let lower = format!("lowerdir={}", dirs.join(":"));
        assert!(lower.len() > PAGE_SIZE);
        let (dir, data) = relative_layers(&["index=off", &lower, "upperdir=/a/b"]).unwrap();
        assert_eq!(dir, Path::new("/var/lib/containerd/snapshots"));
        assert!(data.starts_with("index=off,lowerdir=0/fs:1/fs:2/fs:"), "{data}");
        assert!(data.ends_with(":119/fs,upperdir=/a/b"), "{data}");
    }

    #[test]
    fn relative_layers_shortens_only_lists_that_it_can_rewrite() {
        assert_eq!(relative_layers(&["upperdir=/a"]), None);
        assert_eq!(relative_layers(&["lowerdir=/a\\:b:/c"]), None);
        assert_eq!(relative_layers(&["lowerdir=/a:/a/b"]), Some(("/".into(), "lowerdir=a:a/b".into())));
        assert_eq!(relative_layers(&["lowerdir=a:/b"]), None);
        assert_eq!(relative_layers(&[&format!("lowerdir=/{}", "x".repeat(5000))]), None);
    }

    #[test]
    fn mount_all_rejects_targets_inside_the_rootfs_and_incomplete_id_mappings() {
        let inside = RootMount { kind: "bind".into(), target: "/etc".into(), ..RootMount::default() };
        let (stage, host_only) = (StagingDir::for_share(Path::new("/x/share")), HostOnly::new([]).unwrap());
        let context = CopyContext { stage: &stage, host_only: &host_only };
        let mounted = |mount| mount_all(&[mount], Path::new("/nowhere"), context);
        assert!(matches!(mounted(inside), Err(RootfsError::Unsupported(_))));
        let options = vec!["uidmap=0:1000:1".to_string()];
        let mapped = RootMount { kind: "overlay".into(), options, ..RootMount::default() };
        assert!(matches!(mounted(mapped), Err(RootfsError::Unsupported(_))));
    }
}
