//! Mounts an overlay whose layers are directories of the host.
//!
//! overlayfs accepts only layers that are mounted in the caller's mount namespace, and the shim's namespace does not
//! contain the layers. For example, some snapshotters mount each layer with FUSE. Therefore, a thread attaches copies
//! of the layers' mounts in a new mount namespace, and mounts the overlay there. The namespace disappears with the
//! thread. The overlay keeps the copies.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::iter::Peekable;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::Chars;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::host_view::{HostView, path_of};
use crate::oci::id_mappings::IdMappings;
use crate::volumes::mount_api;

/// Directory in the new namespace that contains the upper directory and the working directory.
const UPPER: &str = "upper";

/// The open directories of an overlay, and its other options.
pub struct Layers {
    lower: Vec<Lower>,
    /// The upper directory and the working directory.
    writable: Option<[OwnedFd; 2]>,
    options: Vec<String>,
}

struct Lower {
    directory: OwnedFd,
    /// Text before the layer in the option `lowerdir`: nothing for the first layer, `:`, or `::` for a layer that
    /// contains only data.
    separator: &'static str,
}

impl Layers {
    /// Opens the directories that the options name.
    ///
    /// # Errors
    /// If a directory cannot be opened, or the options name only one of the writable directories.
    pub fn open(options: &[&str], host: &HostView) -> io::Result<Self> {
        let value = |name: &str| options.iter().rev().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
        let lower = split(value("lowerdir").ok_or_else(|| io::Error::other("the overlay has no option lowerdir"))?);
        let writable = match (value("upperdir"), value("workdir")) {
            (Some(upper), Some(work)) => vec![upper, work],
            (None, _) => Vec::new(),
            (Some(_), None) => return Err(io::Error::other("the overlay has an upper directory, but no workdir")),
        };
        let paths = writable.iter().map(|path| unescape(path)).chain(lower.iter().map(|(path, _)| path.clone()));
        let paths: Vec<_> = paths.map(|path| Path::new("/").join(path)).collect();
        let mut opened = host.open_all(paths)?.into_iter();
        let writable = opened.by_ref().take(writable.len()).collect::<io::Result<Vec<_>>>()?;
        let lower =
            opened.zip(&lower).map(|(directory, (_, separator))| Ok(Lower { directory: directory?, separator }));
        let is_path =
            |option: &&&str| ["lowerdir=", "upperdir=", "workdir="].iter().any(|name| option.starts_with(name));
        Ok(Self {
            lower: lower.collect::<io::Result<_>>()?,
            writable: <[OwnedFd; 2]>::try_from(writable).ok(),
            options: options.iter().filter(|option| !is_path(option)).map(ToString::to_string).collect(),
        })
    }

    /// Returns all directories.
    pub fn directories(&self) -> impl Iterator<Item = &OwnedFd> {
        self.lower.iter().map(|lower| &lower.directory).chain(self.writable.iter().flatten())
    }

    /// Mounts the overlay at `target` in the share. With `id_mappings`, the lower directories are id-mapped. The upper
    /// directory is not id-mapped, because containerd created this directory with the mapped ids.
    ///
    /// # Errors
    /// The errors of the mounts.
    pub fn mount(
        self,
        target: &Path,
        flags: MsFlags,
        id_mappings: Option<&IdMappings>,
        host: &HostView,
    ) -> io::Result<()> {
        let Self { lower, writable, mut options } = self;
        let namespace = id_mappings.map(IdMappings::namespace).transpose()?;
        let mut attached = Vec::new();
        let mut lowerdir = String::from("lowerdir=");
        // One request for all layers: an image can have more than a hundred.
        let directories: Vec<_> = lower.iter().map(|lower| &lower.directory).collect();
        let trees = host.clone_trees(&directories, false, libc::MS_PRIVATE)?;
        for (number, (tree, Lower { separator, .. })) in trees.into_iter().zip(&lower).enumerate() {
            if let Some(namespace) = &namespace {
                mount_api::set_id_mapping(tree.as_fd(), namespace.as_fd(), false)?;
            }
            lowerdir.push_str(&format!("{separator}{number}"));
            attached.push((number.to_string(), tree));
        }
        options.push(lowerdir);
        if let Some(writable) = writable {
            let (tree, [upper, work]) = common_mount(&writable, host)?;
            options.push(format!("upperdir={UPPER}/{}", escape(&upper)?));
            options.push(format!("workdir={UPPER}/{}", escape(&work)?));
            attached.push((UPPER.to_owned(), tree));
        }
        let stage = target.to_path_buf();
        let mounter = std::thread::Builder::new().name("mount".into()).spawn(move || {
            let none = None::<&Path>;
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("layers"), &stage, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
            // With relative paths, the options of an overlay with many layers fit into a page.
            nix::unistd::chdir(&stage)?;
            for (name, tree) in &attached {
                fs::create_dir(name)?;
                mount_api::attach(tree.as_fd(), mount_api::open_path(Path::new(name), false)?.as_fd())?;
            }
            let merged = Path::new("merged");
            fs::create_dir(merged)?;
            mount_api::mount_in_share(Path::new("overlay"), merged, "overlay", flags, &options.join(","))?;
            mount_api::clone_tree(mount_api::open_path(merged, false)?.as_fd(), false)
        })?;
        let overlay =
            mounter.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts the overlay panicked")))?;
        mount_api::attach_to_share(overlay.as_fd(), mount_api::open_path(target, false)?.as_fd())
    }
}

/// Returns a copy of the mount of the two directories, and their paths in the copy. overlayfs needs both directories in
/// one mount. The copy's root is the deepest directory that contains both directories.
fn common_mount(directories: &[OwnedFd; 2], host: &HostView) -> io::Result<(OwnedFd, [PathBuf; 2])> {
    let [upper, work] = directories;
    let (upper_path, work_path) = (fs::read_link(path_of(upper))?, fs::read_link(path_of(work))?);
    let common = upper_path.ancestors().find(|above| work_path.starts_with(above)).unwrap_or_else(|| Path::new("/"));
    let root = host.open(common, true)?;
    let id = mount_api::mount_id(root.as_fd())?;
    if mount_api::mount_id(upper.as_fd())? != id || mount_api::mount_id(work.as_fd())? != id {
        return Err(io::Error::other("the upper directory and the workdir of the overlay are not in one mount"));
    }
    let below = |path: &Path| path.strip_prefix(common).unwrap_or(path).to_owned();
    Ok((host.clone_tree(&root, false, libc::MS_PRIVATE)?, [below(&upper_path), below(&work_path)]))
}

/// Splits the value of the option `lowerdir` as the kernel does (`ovl_parse_param_lowerdir` in fs/overlayfs). Returns
/// the path of each layer, and the separator before the layer.
fn split(value: &str) -> Vec<(PathBuf, &'static str)> {
    let (mut layers, mut separator, mut characters) = (Vec::new(), "", value.chars().peekable());
    loop {
        layers.push((unescape_until(&mut characters, Some(':')), separator));
        if characters.next().is_none() {
            return layers;
        }
        separator = if characters.next_if_eq(&':').is_some() { "::" } else { ":" };
    }
}

/// Removes the backslashes that protect special characters.
fn unescape(value: &str) -> PathBuf {
    unescape_until(&mut value.chars().peekable(), None)
}

/// Reads a path before the character `end`, if it is not protected. Removes the backslashes that protect characters.
fn unescape_until(characters: &mut Peekable<Chars<'_>>, end: Option<char>) -> PathBuf {
    let mut path = String::new();
    while let Some(character) = characters.next_if(|character| Some(*character) != end) {
        match character {
            '\\' => path.extend(characters.next()),
            _ => path.push(character),
        }
    }
    path.into()
}

/// Protects special characters with backslashes.
fn escape(path: &Path) -> io::Result<String> {
    let text = std::str::from_utf8(OsStr::as_bytes(path.as_os_str())).map_err(io::Error::other)?;
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if ['\\', ',', ':'].contains(&character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    Ok(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_keeps_separators_and_removes_backslashes() {
        let layers = split("/a:/b\\:c\\\\::/data::/more");
        let expected = [("/a", ""), ("/b:c\\", ":"), ("/data", "::"), ("/more", "::")];
        assert_eq!(layers, expected.map(|(path, separator)| (PathBuf::from(path), separator)));
    }

    #[test]
    fn escape_and_unescape_are_inverse() {
        let path = Path::new("a:b,c\\d/e");
        assert_eq!(escape(path).unwrap(), "a\\:b\\,c\\\\d/e");
        assert_eq!(unescape(&escape(path).unwrap()), path);
    }

    #[test]
    fn open_needs_lowerdir_and_both_writable_directories() {
        let host = HostView::own();
        assert!(Layers::open(&["upperdir=/tmp", "workdir=/tmp"], &host).is_err());
        assert!(Layers::open(&["lowerdir=/tmp", "upperdir=/tmp"], &host).is_err());
        let layers = Layers::open(&["lowerdir=/tmp:/usr", "index=off"], &host).unwrap();
        assert_eq!((layers.directories().count(), layers.options), (2, vec!["index=off".to_owned()]));
    }
}
