//! A node as hosts were before: the kernel of Debian's former release, the last one with all controllers of version 1 of
//! control groups, which the node's init mounts then.

use super::rootfs::{self, Node};
use super::{Add, Line};
use crate::cache::{self, Key};
use crate::{cmd, paths, pins, setup, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's release that has the kernel.
const SUITE: &str = "bookworm";
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Changes when the unpacking does.
const RECIPE: u32 = 1;

fn dir() -> PathBuf {
    paths::node().join("legacy")
}

/// The modules, to be put over the node.
pub fn files(line: Line) -> Vec<Add> {
    match line {
        Line::Legacy => vec![Add::new(dir().join("usr"), "/usr")],
        Line::One | Line::Two | Line::Systemd => Vec::new(),
    }
}

/// The node with that kernel. The caller holds the node's lock.
pub fn node(node: Node) -> Result<Node> {
    let made = Node { disk: node.disk, kernel: dir().join("vmlinuz"), initrd: dir().join("initrd.cpio") };
    let (tree, init) = (paths::node().join("tree"), paths::root().join("tests/node/initramfs-init"));
    let key = Key::new("legacy", RECIPE).text(SUITE).text(pins::RELEASE).file(&init)?.finish();
    if cache::fresh("legacy", &key, &[&made.kernel, &made.initrd]) {
        return Ok(made);
    }
    if !cmd::is_root() {
        bail!("unpacking a kernel for the test node needs root: run this as root");
    }
    cache::forget("legacy")?;
    // Within the node's tree, whose depmod reads it.
    let (part, inside) = (tree.join("husk-legacy"), Path::new("/husk-legacy"));
    for old in [&dir(), &part] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
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
    fs::rename(&modules, to.join(&release)).context("cannot keep the kernel's modules")?;
    fs::remove_dir_all(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    cache::done("legacy", &key)?;
    Ok(made)
}
