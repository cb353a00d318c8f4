//! Provides a node with cgroup v1. The node runs the kernel of Debian's previous release, because that kernel is the
//! last one with all cgroup v1 controllers. The node's init mounts the controllers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::rootfs::{self, Node};
use super::{Add, Line};
use crate::stamp::{Key, Stamp};
use crate::user_cache::Step;
use crate::{cmd, files, paths, pins, setup, ui};

/// The Debian release that has the kernel.
const SUITE: &str = "bookworm";
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Increase this number whenever the unpacking changes.
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

/// Returns the node with the kernel of the previous release. The caller holds the lock of the files that all nodes
/// share.
pub fn node(node: Node) -> Result<Node> {
    let (kernel, files) = (dir().join("vmlinuz"), dir().join("usr"));
    let key = Key::new("legacy", RECIPE).text(SUITE).text(pins::RELEASE).finish();
    let step = Step { kind: "node-legacy", key: &key, outputs: &[&kernel, &files], stamp: Stamp::new("legacy") };
    step.run(|| unpack(&kernel, &files))?;
    let (_, modules) = rootfs::modules(&files)?;
    let initrd = rootfs::initrd("legacy-initrd", &key, &modules, dir().join("initrd.cpio"))?;
    Ok(Node { kernel, initrd, ..node })
}

/// Unpacks the kernel to the file `kernel`, and its modules to the directory `files`.
fn unpack(kernel: &Path, files: &Path) -> Result<()> {
    if !cmd::is_root() {
        bail!("failed to unpack a kernel for the test node: only root can do that; run cargo xtask as root");
    }
    // The package is unpacked inside the node's tree, so that the tree's depmod, which runs in a chroot, can read the
    // modules.
    let tree = rootfs::tree()?;
    let (part, inside) = (tree.join("husk-legacy"), Path::new("/husk-legacy"));
    files::remove(&part)?;
    ui::say("node", format!("unpacking the kernel of Debian {SUITE}"));
    let mut command = Command::new("mmdebstrap");
    command.arg("--variant=extract").arg(format!("--include={PACKAGE}")).arg(SUITE).arg(&part);
    cmd::logged("node", "node-legacy", command.args(setup::debian_mirror()?))?;
    let (release, modules) = rootfs::modules(&part)?;
    let mut depmod = Command::new("chroot");
    depmod.arg(&tree).arg("depmod").arg("-b").arg(inside).arg(&release);
    cmd::logged("node", "node-legacy-depmod", &mut depmod)?;
    let to = files.join("lib/modules");
    files::make_dir(&to)?;
    rootfs::copy_kernel(&part, &release, kernel)?;
    fs::rename(&modules, to.join(&release)).context("failed to move the modules of the kernel for cgroup v1")?;
    files::remove(&part)
}
