//! Tests for finding the directory underneath a mount, and for copying trees.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use husk_base::sys::xattr;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::{EarlierMounts, copy_up, is_fs_option, normalize};

/// Temporary directory that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("husk-tmpfs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("from")).unwrap();
        fs::create_dir_all(path.join("to")).unwrap();
        Self(path)
    }

    fn from(&self) -> PathBuf {
        self.0.join("from")
    }

    fn to(&self) -> PathBuf {
        self.0.join("to")
    }

    fn copy_up(&self) -> Result<(), copy_up::CopyUpError> {
        let (from, to) = (File::open(self.from()).unwrap(), File::open(self.to()).unwrap());
        copy_up::copy_up(from.as_fd(), to.as_fd())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn copy_up_keeps_content_modes_and_links() {
    let scratch = Scratch::new("copy");
    let (from, to) = (scratch.from(), scratch.to());
    fs::create_dir_all(from.join("a/b")).unwrap();
    fs::write(from.join("a/b/file"), vec![7; 300_000]).unwrap();
    fs::write(from.join("a/tool"), "tool").unwrap();
    fs::set_permissions(from.join("a/tool"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(from.join("a"), fs::Permissions::from_mode(0o1733)).unwrap();
    symlink("/etc/passwd", from.join("out")).unwrap();
    symlink("..", from.join("a/up")).unwrap();
    mkfifo(&from.join("fifo"), Mode::S_IRUSR).unwrap();
    scratch.copy_up().unwrap();
    assert_eq!(fs::read(to.join("a/b/file")).unwrap(), vec![7; 300_000]);
    let mode = |path: &str| fs::symlink_metadata(to.join(path)).unwrap().mode() & 0o7777;
    assert_eq!(mode("a/tool"), 0o4751);
    assert_eq!(mode("a"), 0o1733);
    assert_eq!(fs::read_link(to.join("out")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(to.join("a/up")).unwrap(), Path::new(".."));
    // The fifo is created but never opened, because opening it would wait for a writer.
    assert!(fs::symlink_metadata(to.join("fifo")).unwrap().file_type().is_fifo());
}

#[test]
fn copy_up_rejects_a_very_deep_tree() {
    let scratch = Scratch::new("deep");
    let mut at = nix::fcntl::open(&scratch.from(), nix::fcntl::OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..3000 {
        nix::sys::stat::mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
        at = nix::fcntl::openat(&at, "d", nix::fcntl::OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    }
    let error = scratch.copy_up().unwrap_err();
    assert!(matches!(error, copy_up::CopyUpError::Read(..) | copy_up::CopyUpError::Create(..)), "{error}");
}

#[test]
fn symlinks_of_the_image_do_not_lead_outside_the_image() {
    let scratch = Scratch::new("links");
    let from = scratch.from();
    let outside = scratch.0.join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::create_dir_all(from.join("etc")).unwrap();
    symlink("../../../../../../../../../../etc", from.join("relative")).unwrap();
    symlink(&outside, from.join("absolute")).unwrap();
    symlink("/proc/self/root", from.join("magic")).unwrap();
    symlink("loop", from.join("loop")).unwrap();
    fs::write(from.join("file"), "").unwrap();
    let earlier = EarlierMounts { root: from.clone(), mounts: Vec::new(), id_mappings: None };
    let inode = |path: &str| {
        let found = earlier.directory(Path::new(path)).unwrap();
        found.map(|directory| File::from(directory).metadata().unwrap().ino())
    };
    let etc = fs::metadata(from.join("etc")).unwrap().ino();
    assert_eq!(inode("/etc"), Some(etc));
    assert_eq!(inode("/relative"), Some(etc));
    assert_eq!(inode("/absolute"), None);
    assert_eq!(inode("/magic"), None);
    assert_eq!(inode("/file"), None);
    assert_eq!(inode("/none"), None);
    assert!(earlier.directory(Path::new("/loop")).is_err());
}

#[test]
fn directory_returns_the_content_of_the_last_mount_on_a_path() {
    let scratch = Scratch::new("earlier");
    let (root, volume) = (scratch.from(), scratch.to());
    fs::create_dir_all(root.join("data/sub")).unwrap();
    fs::create_dir_all(volume.join("sub")).unwrap();
    fs::write(volume.join("sub/volume"), "yes").unwrap();
    let mut earlier = EarlierMounts { root, mounts: vec![("/data".into(), Some(volume))], id_mappings: None };
    let found = earlier.directory(Path::new("/data/sub")).unwrap().unwrap();
    assert_eq!(fs::read_to_string(copy_up::proc_path(found.as_fd()).join("volume")).unwrap(), "yes");
    earlier.mounts.push(("/data".into(), None));
    assert!(earlier.directory(Path::new("/data/sub")).unwrap().is_none());
}

#[test]
fn destinations_are_normalized_and_options_classified() {
    assert_eq!(normalize(Path::new("/a/./b/../c/")), Path::new("/a/c"));
    assert_eq!(normalize(Path::new("../../x")), Path::new("/x"));
    assert!(is_fs_option("size=8m") && is_fs_option("inode64"));
    assert!(!is_fs_option("nosuid") && !is_fs_option("ro"));
}

#[test]
fn copy_up_keeps_extended_attributes() {
    let scratch = Scratch::new("attributes");
    let file = scratch.from().join("file");
    fs::write(&file, "").unwrap();
    let (name, value) = (c"user.husk", b"some\0bytes");
    xattr::set(&file, name, value).unwrap();
    scratch.copy_up().unwrap();
    let mut found = [0_u8; 32];
    let length = xattr::get(&scratch.to().join("file"), name, &mut found).unwrap();
    assert_eq!(found.get(..length), Some(value.as_slice()));
}
