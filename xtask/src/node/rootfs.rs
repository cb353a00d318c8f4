//! Builds the test node's root file system: a Debian tree, a disk image of it, and the initramfs that mounts the disk.

use crate::cache::{self, Key};
use crate::cpio::Cpio;
use crate::pins::RELEASE;
use crate::{cmd, paths, setup, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Raised whenever the steps that make the tree change.
const TREE_RECIPE: u32 = 1;
/// Raised whenever the steps after the tree change.
const RECIPE: u32 = 3;
/// Documentation and other files that only enlarge the image.
const EXCLUDED: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];
/// Size of the disk. The image is sparse.
const DISK: &str = "12G";

/// The drivers for the disk and its file system. ext4 requests the checksum by name.
const DRIVERS: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// The parts of the node that QEMU boots.
pub struct Node {
    /// The disk with the root file system. It is never written: QEMU keeps changes in a snapshot.
    pub disk: PathBuf,
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Builds the node's parts if their inputs changed.
pub fn node() -> Result<Node> {
    let dir = paths::node();
    let node = Node { disk: dir.join("base.img"), kernel: dir.join("vmlinuz"), initrd: dir.join("initrd.cpio") };
    let inputs = paths::root().join("tests/node");
    let packages = packages(&inputs.join("packages"))?;
    let tree_key = Key::new("node-tree", TREE_RECIPE).text(RELEASE).text(&packages).finish();
    let tree = dir.join("tree");
    // The tree is needed only to make the other parts.
    if !cache::fresh("node-tree", &tree_key, &[&tree.join("usr/bin/containerd")]) {
        make_tree(&tree, &packages)?;
        cache::done("node-tree", &tree_key)?;
    }
    let key = Key::new("node", RECIPE).text(&tree_key).file(&inputs.join("initramfs-init"))?.finish();
    if cache::fresh("node", &key, &[&node.disk, &node.kernel, &node.initrd]) {
        return Ok(node);
    }
    cache::forget("node")?;
    unpack_modules(&tree)?;
    make_initrd(&tree, &tree, &inputs.join("initramfs-init"), &node)?;
    make_disk(&tree, &node.disk)?;
    cache::done("node", &key)?;
    Ok(node)
}

/// Reads the package list: one package per line, `#` starts a comment.
fn packages(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    let names: Vec<&str> =
        text.lines().map(|l| l.split('#').next().unwrap_or_default().trim()).filter(|l| !l.is_empty()).collect();
    Ok(names.join(","))
}

fn make_tree(tree: &Path, packages: &str) -> Result<()> {
    if !cmd::is_root() {
        bail!("failed to unpack the test node's root file system: its owners need root; run this as root");
    }
    cache::forget("node-tree")?;
    cache::make_dir(&paths::node())?;
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("failed to remove {}", tree.display()))?;
    }
    ui::say("node", format!("unpacking Debian {RELEASE} with {packages}"));
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=apt"]).arg(format!("--include={packages}"));
    for path in EXCLUDED {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    // Debian's initramfs is not used.
    command.env("INITRD", "No");
    command.arg(RELEASE).arg(tree);
    // If this machine does not run Debian, mmdebstrap uses its default mirror.
    command.args(setup::debian_mirror()?);
    cmd::logged("node", "node-mmdebstrap", &mut command)
}

/// Returns the kernel's release in a tree, and the directory of its modules.
pub fn modules(tree: &Path) -> Result<(String, PathBuf)> {
    // In a tree whose packages were only extracted, `lib` is not a link to `usr/lib` yet.
    let modules = tree.join("lib/modules");
    let entry = fs::read_dir(&modules).with_context(|| format!("failed to read {}", modules.display()))?.next();
    let entry = entry.context("failed to find a kernel in the node's tree")??;
    Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
}

/// Decompresses the kernel's modules: an emulated node needs a second for KVM's modules alone.
fn unpack_modules(tree: &Path) -> Result<()> {
    let (release, modules) = modules(tree)?;
    let mut unpack = Command::new("sh");
    unpack.args(["-c", "find \"$1\" -name '*.ko.xz' -print0 | xargs -0 -r -n 50 -P 4 xz -d -f", "sh"]).arg(modules);
    cmd::logged("node", "node-modules", &mut unpack)?;
    cmd::logged("node", "node-depmod", Command::new("chroot").arg(tree).args(["depmod", &release]))
}

/// Returns the wanted modules and their dependencies, in load order, from the text of modules.dep. Modules that it does
/// not list are built in.
fn with_dependencies<'a>(list: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut all: Vec<&str> = Vec::new();
    for name in wanted {
        let of = |line: &&str| {
            let path = line.split(':').next().unwrap_or_default();
            path.rsplit('/').next().and_then(|file| file.strip_suffix(".ko")) == Some(name)
        };
        let Some((path, needs)) = list.lines().find(of).and_then(|line| line.split_once(':')) else { continue };
        // The last one listed is the one that all others need.
        for module in needs.split_whitespace().rev().chain([path]) {
            if !all.contains(&module) {
                all.push(module);
            }
        }
    }
    all
}

/// Writes the initramfs, with busybox of `tree`, the disk's drivers and the script `init`, and copies the kernel of the
/// tree
/// `kernel`.
pub fn make_initrd(kernel: &Path, tree: &Path, init: &Path, node: &Node) -> Result<()> {
    let (release, modules) = modules(kernel)?;
    fs::copy(kernel.join(format!("boot/vmlinuz-{release}")), &node.kernel)
        .context("failed to copy the node's kernel")?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("failed to read {}", path.display()));
    let list =
        String::from_utf8(read(&modules.join("modules.dep"))?).context("failed to decode modules.dep as UTF-8")?;
    let drivers = with_dependencies(&list, &DRIVERS);
    let mut cpio = Cpio::new(Vec::new());
    for name in ["bin", "dev", "proc", "root"] {
        cpio.directory(name, 0o755)?;
    }
    cpio.character("dev/console", 0o600, 5, 1)?;
    cpio.file("bin/busybox", 0o755, &read(&tree.join("usr/bin/busybox"))?)?;
    let mut names = String::new();
    for driver in drivers {
        let name = driver.rsplit('/').next().unwrap_or(driver);
        cpio.file(name, 0o644, &read(&modules.join(driver))?)?;
        names.push_str(&format!("{name}\n"));
    }
    cpio.file("modules", 0o644, names.as_bytes())?;
    cpio.file("init", 0o755, &read(init)?)?;
    fs::write(&node.initrd, cpio.finish()?).context("failed to write the node's initramfs")
}

/// Makes an ext4 image of the tree.
fn make_disk(tree: &Path, disk: &Path) -> Result<()> {
    ui::say("node", "making the disk");
    let _ = fs::remove_file(disk);
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0", "-d"]);
    cmd::logged("node", "node-mkfs", mkfs.arg(tree).arg(disk).arg(DISK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_their_dependencies() {
        let list = "k/virtio_blk.ko: k/virtio_ring.ko k/virtio.ko\nk/virtio.ko:\nk/ext4.ko: k/jbd2.ko k/virtio.ko\n";
        let all = with_dependencies(list, &["virtio_pci", "virtio_blk", "ext4"]);
        assert_eq!(all, ["k/virtio.ko", "k/virtio_ring.ko", "k/virtio_blk.ko", "k/jbd2.ko", "k/ext4.ko"]);
    }
}
