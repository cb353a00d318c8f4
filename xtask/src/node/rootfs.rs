//! Builds the test node's root file system: a Debian tree, a disk image of the tree, and the initramfs that mounts the
//! disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;
use crate::pins::RELEASE;
use crate::stamp::{Key, Stamp};
use crate::user_cache::Step;
use crate::{cmd, files, paths, setup, ui};

/// Increase this number whenever the steps that make the tree change.
const TREE_RECIPE: u32 = 1;
/// Increase this number whenever the steps that make the disk, the kernel or the directory `boot` change.
const RECIPE: u32 = 4;
/// Increase this number whenever the content of the initramfs changes.
const INITRD_RECIPE: u32 = 1;
/// Documentation and other files that only enlarge the image.
const EXCLUDED: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];
/// Size of the disk. The image is sparse.
const DISK: &str = "12G";

/// The drivers for the disk and its file system. crc32c_generic is listed because ext4 requests it by name, and
/// modules.dep does not list such dependencies.
const DRIVERS: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// The files from which QEMU boots the node.
pub struct Node {
    /// The disk with the root file system. If `Boot::keep` is set, QEMU writes to this file. Otherwise QEMU writes to a
    /// temporary snapshot, and this file does not change.
    pub disk: PathBuf,
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The hash of the inputs of the disk and the kernel.
    pub key: String,
}

/// Builds the node's disk, kernel and initramfs if their inputs changed. The caller holds the lock of the files that
/// all nodes share.
pub fn node() -> Result<Node> {
    let dir = paths::node();
    let (disk, kernel, boot) = (dir.join("base.img"), dir.join("vmlinuz"), boot());
    let key = Key::new("node", RECIPE).text(&tree_key(&packages()?)).finish();
    let step = Step { kind: "node", key: &key, outputs: &[&disk, &kernel, &boot], stamp: Stamp::new("node") };
    step.run(|| {
        let tree = tree()?;
        unpack_modules(&tree)?;
        let (release, modules) = modules(&tree)?;
        copy_kernel(&tree, &release, &kernel)?;
        copy_boot(&tree, &modules, &boot)?;
        make_disk(&tree, &disk)
    })?;
    let initrd = initrd("node-initrd", &key, &boot, dir.join("initrd.cpio"))?;
    Ok(Node { disk, kernel, initrd, key })
}

/// Returns the directory of the files that the initramfs needs from the tree: busybox, the drivers, and their
/// dependencies.
fn boot() -> PathBuf {
    paths::node().join("boot")
}

fn tree_key(packages: &str) -> String {
    Key::new("node-tree", TREE_RECIPE).text(RELEASE).text(packages).finish()
}

/// Returns the directory tree from which the node's disk, kernel and initramfs are made. Makes the tree first if its
/// inputs changed.
pub fn tree() -> Result<PathBuf> {
    let (tree, packages) = (paths::node().join("tree"), packages()?);
    let (stamp, key) = (Stamp::new("node-tree"), tree_key(&packages));
    if !stamp.fresh(&key, &[&tree.join("usr/bin/containerd")]) {
        stamp.remove()?;
        make_tree(&tree, &packages)?;
        stamp.write(&key)?;
    }
    Ok(tree)
}

/// Reads the list of the node's packages. The list has one package per line, and `#` starts a comment. Returns the
/// packages, separated by commas.
fn packages() -> Result<String> {
    let path = paths::root().join("tests/node/packages");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let names: Vec<&str> =
        text.lines().map(|l| l.split('#').next().unwrap_or_default().trim()).filter(|l| !l.is_empty()).collect();
    Ok(names.join(","))
}

fn make_tree(tree: &Path, packages: &str) -> Result<()> {
    if !cmd::is_root() {
        bail!(
            "failed to unpack the test node's root file system: only root can set file owners; run cargo xtask as root"
        );
    }
    files::make_dir(&paths::node())?;
    files::remove(tree)?;
    ui::say("node", format!("unpacking Debian {RELEASE} with {packages}"));
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=apt"]).arg(format!("--include={packages}"));
    for path in EXCLUDED {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    // The node boots with its own initramfs. `INITRD=No` keeps the kernel's package from building Debian's initramfs.
    command.env("INITRD", "No");
    command.arg(RELEASE).arg(tree);
    // If this machine does not run Debian, mmdebstrap uses its default mirror.
    command.args(setup::debian_mirror()?);
    cmd::logged("node", "node-mmdebstrap", &mut command)
}

/// Returns the release of the kernel in a tree, and the directory of its modules.
pub fn modules(tree: &Path) -> Result<(String, PathBuf)> {
    // The path begins with `lib`, which exists in every tree. In a tree of installed packages, `lib` is a link to
    // `usr/lib`. In a tree of extracted packages, `lib` is a directory.
    let modules = tree.join("lib/modules");
    let entry = fs::read_dir(&modules).with_context(|| format!("failed to read {}", modules.display()))?.next();
    let entry = entry.context("failed to find a kernel in the node's tree")??;
    Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
}

/// Decompresses the kernel's modules, because an emulated node needs a second to decompress KVM's modules alone.
fn unpack_modules(tree: &Path) -> Result<()> {
    let (release, modules) = modules(tree)?;
    let mut unpack = Command::new("sh");
    unpack.args(["-c", "find \"$1\" -name '*.ko.xz' -print0 | xargs -0 -r -n 50 -P 4 xz -d -f", "sh"]).arg(modules);
    cmd::logged("node", "node-modules", &mut unpack)?;
    cmd::logged("node", "node-depmod", Command::new("chroot").arg(tree).args(["depmod", &release]))
}

/// Returns the wanted modules and their dependencies, in load order, from the text of modules.dep. Skips a module that
/// modules.dep does not list, because such a module is built into the kernel.
fn with_dependencies<'a>(list: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut all: Vec<&str> = Vec::new();
    for name in wanted {
        let of = |line: &&str| {
            let path = line.split(':').next().unwrap_or_default();
            path.rsplit('/').next().and_then(|file| file.strip_suffix(".ko")) == Some(name)
        };
        let Some((path, needs)) = list.lines().find(of).and_then(|line| line.split_once(':')) else { continue };
        // modules.dep lists the dependencies in reverse load order.
        for module in needs.split_whitespace().rev().chain([path]) {
            if !all.contains(&module) {
                all.push(module);
            }
        }
    }
    all
}

/// Copies the kernel of a tree.
pub fn copy_kernel(tree: &Path, release: &str, to: &Path) -> Result<()> {
    files::make_dir(to.parent().unwrap_or(to))?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), to).context("failed to copy the node's kernel").map(drop)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

/// Reads the file modules.dep in a directory of modules.
fn dependencies(modules: &Path) -> Result<String> {
    String::from_utf8(read(&modules.join("modules.dep"))?).context("failed to decode modules.dep as UTF-8")
}

/// Copies to `boot` those files of the tree and of its modules that the initramfs needs.
fn copy_boot(tree: &Path, modules: &Path, boot: &Path) -> Result<()> {
    let list = dependencies(modules)?;
    let drivers = with_dependencies(&list, &DRIVERS).into_iter().chain(["modules.dep"]);
    for (from, name) in
        drivers.map(|name| (modules.join(name), name)).chain([(tree.join("usr/bin/busybox"), "busybox")])
    {
        let to = boot.join(name);
        files::make_dir(to.parent().unwrap_or(boot))?;
        fs::copy(&from, &to).with_context(|| format!("failed to copy {}", from.display()))?;
    }
    Ok(())
}

/// Writes the initramfs: busybox, the disk's drivers from the directory `modules`, and a script as init. `key` is the
/// hash of the inputs of `modules`.
pub fn initrd(step: &str, key: &str, modules: &Path, made: PathBuf) -> Result<PathBuf> {
    let init = paths::root().join("tests/node/initramfs-init");
    let key = Key::new(step, INITRD_RECIPE).text(key).file(&init)?.file(&boot().join("busybox"))?.finish();
    let stamp = Stamp::new(step);
    if stamp.fresh(&key, &[&made]) {
        return Ok(made);
    }
    stamp.remove()?;
    let list = dependencies(modules)?;
    let mut cpio = Cpio::new(Vec::new());
    for name in ["bin", "dev", "proc", "root"] {
        cpio.directory(name, 0o755)?;
    }
    cpio.character("dev/console", 0o600, 5, 1)?;
    cpio.file("bin/busybox", 0o755, &read(&boot().join("busybox"))?)?;
    let mut names = String::new();
    for driver in with_dependencies(&list, &DRIVERS) {
        let name = driver.rsplit('/').next().unwrap_or(driver);
        cpio.file(name, 0o644, &read(&modules.join(driver))?)?;
        names.push_str(&format!("{name}\n"));
    }
    cpio.file("modules", 0o644, names.as_bytes())?;
    cpio.file("init", 0o755, &read(&init)?)?;
    fs::write(&made, cpio.finish()?).context("failed to write the node's initramfs")?;
    stamp.write(&key)?;
    Ok(made)
}

/// Makes an ext4 image of the tree.
fn make_disk(tree: &Path, disk: &Path) -> Result<()> {
    ui::say("node", "making the disk");
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
