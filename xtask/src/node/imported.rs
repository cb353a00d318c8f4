//! Makes the disk of a node whose containerd already has the OCI images. An emulated node takes half a minute to unpack
//! the images. Without this disk, each boot would take that time again. The node itself imports the images, in a boot
//! whose writes are kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::rootfs::Node;
use super::{Add, Limits, Line, Machine, Seat, boot, out_disk, tar};
use crate::stamp::{Key, Stamp};
use crate::user_cache::Step;
use crate::{cmd, files, paths};

/// Increase this number whenever the steps below change.
const RECIPE: u32 = 1;
const LIMITS: Limits = Limits::secs(600, 600);
/// The script that the node runs. It imports the images once for `ctr` and once for the CRI, because each namespace of
/// containerd unpacks its own images. Then it removes the tars.
const SCRIPT: &str = "set -e
for namespace in e2e k8s.io; do
    for tar in /husk/images/*.tar; do ctr -n $namespace images import $tar; done
done
rm -r /husk/images
";

/// Returns the path of the disk. Makes the disk first if its inputs changed. The caller holds the lock of the node
/// `seat` and the lock of the files that all nodes share.
pub fn disk(seat: Seat, node: &Node, images: &[Add]) -> Result<PathBuf> {
    let disk = paths::node().join("images.img");
    let mut key = Key::new("node-images", RECIPE);
    key.text(&node.key).text(SCRIPT);
    for image in images {
        // This file has the hash of the tar's inputs.
        key.file(&image.from.with_extension("tar.inputs"))?;
    }
    // The boot leaves these files on the disk, so they are inputs too.
    files(&root(), &mut key)?;
    let key = key.finish();
    let stamp = Stamp::new("node-images");
    Step { kind: "node-images", key: &key, outputs: &[&disk], stamp }.run(|| make(seat, node, images, &disk))?;
    Ok(disk)
}

fn root() -> PathBuf {
    paths::root().join("tests/node/root")
}

/// Adds the paths and contents of all files in a directory to a key.
fn files(dir: &Path, key: &mut Key) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files(&path, key)?;
        } else {
            key.text(&path.strip_prefix(root()).unwrap_or(&path).to_string_lossy()).file(&path)?;
        }
    }
    Ok(())
}

fn make(seat: Seat, node: &Node, images: &[Add], disk: &Path) -> Result<()> {
    seat.say("importing the images into the node's disk");
    let part = disk.with_extension("part");
    files::remove(&part)?;
    let mut copy = Command::new("cp");
    copy.args(["--reflink=auto", "--sparse=always"]).arg(&node.disk).arg(&part);
    cmd::output(&mut copy)?;
    let extras = seat.dir().join("extras.tar");
    let file = File::create(&extras).with_context(|| format!("failed to write {}", extras.display()))?;
    let mut tar = tar::Tar::new(file);
    tar.add(&root(), Path::new("/"))?;
    for Add { from, to } in images {
        tar.add(from, to)?;
    }
    tar.content("husk/run", b"exec bash /husk/script\n")?;
    tar.content("husk/script", SCRIPT.as_bytes())?;
    tar.finish()?;
    let node =
        Node { disk: part.clone(), kernel: node.kernel.clone(), initrd: node.initrd.clone(), key: String::new() };
    let (out, parameters) = (out_disk(seat)?, Line::One.parameters());
    let machine = Machine::default();
    let boot = boot::Boot { seat, node: &node, keep: true, extras: &extras, out: &out, machine, parameters };
    match boot::run(&boot, LIMITS, &mut |_| {})? {
        0 => {}
        code => bail!("failed to import the images: the script in the node ended with exit code {code}"),
    }
    // The node powers off without unmounting its root file system, so this file system has to be checked. `discard`
    // turns freed blocks into holes.
    let mut check = Command::new("e2fsck");
    let check = check.args(["-f", "-y", "-E", "discard"]).arg(&part).output().context("failed to start e2fsck")?;
    // Exit code 1 says that errors were corrected.
    if !matches!(check.status.code(), Some(0 | 1)) {
        bail!(
            "failed to check the node's disk: e2fsck ended with {}: {}",
            check.status,
            String::from_utf8_lossy(&check.stdout).trim()
        );
    }
    fs::rename(&part, disk).with_context(|| format!("failed to rename {}", part.display()))
}
