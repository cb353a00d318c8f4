//! Provides a node with cgroup v1: the kernel of Debian's previous release is the last one with all cgroup v1
//! controllers. The node's init mounts them.

use super::rootfs::{self, Node};
use super::{Add, Line};
use crate::cache::{self, Key};
use crate::{cmd, paths, pins, setup, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Debian release that has the kernel.
const SUITE: &str = "bookworm";
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Raised whenever the unpacking changes.
const RECIPE: u32 = 1;

fn dir() -> PathBuf {
    paths::node().join("legacy")
}

/// Returns the kernel modules to add to the node.
pub fn files(line: Line) -> Vec<Add> {
    match line {
        Line::Legacy => vec![Add::new(dir().join("usr"), "/usr")],
        Line::One | Line::Two | Line::Systemd => Vec::new(),
    }
}

/// Returns the node with that kernel. The caller holds the lock of the node's parts.
pub fn node(node: Node) -> Result<Node> {
    let made = Node { disk: node.disk, kernel: dir().join("vmlinuz"), initrd: dir().join("initrd.cpio") };
    let (tree, init) = (paths::node().join("tree"), paths::root().join("tests/node/initramfs-init"));
    let key = Key::new("legacy", RECIPE).text(SUITE).text(pins::RELEASE).file(&init)?.finish();
    if cache::fresh("legacy", &key, &[&made.kernel, &made.initrd]) {
        return Ok(made);
    }
    if !cmd::is_root() {
        bail!("failed to unpack a kernel for the test node: it needs root; run this as root");
    }
    cache::forget("legacy")?;
    // Inside the node's tree, where its depmod can read it.
    let (part, inside) = (tree.join("husk-legacy"), Path::new("/husk-legacy"));
    for old in [&dir(), &part] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("failed to remove {}", old.display()))?;
        }
    }
    ui::say("node", format!("unpacking the kernel of Debian {SUITE}"));
    let mut command = Command::new("mmdebstrap");
    command.arg("--variant=extract").arg(format!("--include={PACKAGE}")).arg(SUITE).arg(&part);
    cmd::logged("node", "node-legacy", command.args(setup::debian_mirror()?))?;
    let (release, modules) = rootfs::modules(&part)?;
    let mut depmod = Command::new("chroot");
    depmod.arg(&tree).arg("depmod").arg("-b").arg(inside).arg(&release);
    cmd::logged("node", "node-legacy-depmod", &mut depmod)?;
    let to = dir().join("usr/lib/modules");
    cache::make_dir(&to)?;
    rootfs::make_initrd(&part, &tree, &init, &made)?;
    fs::rename(&modules, to.join(&release)).context("failed to keep the kernel's modules")?;
    fs::remove_dir_all(&part).with_context(|| format!("failed to remove {}", part.display()))?;
    cache::done("legacy", &key)?;
    Ok(made)
}
