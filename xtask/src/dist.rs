//! `cargo xtask dist`: the tree that is copied over `/` of a node.

use crate::build::{self, Profile};
use crate::{cache, image, kernel, lock, paths, ui};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Builds everything and lays it out under `dist/root`; returns that directory.
pub fn dist(profile: Profile) -> Result<PathBuf> {
    let kernel = kernel::kernel()?;
    let programs = build::programs(&[image::AGENT, "husk-shim", "husk-cli"], profile)?;
    let _lock = lock::take("image")?;
    let initrd = image::pack(build::find(&programs, &[image::AGENT])?)?;
    let shim = build::find(&programs, &["containerd-shim-husk-v2", "husk-shim"])?;
    let husk = build::find(&programs, &["husk", "husk-cli"])?;
    let root = paths::dist();
    let repository = paths::root();
    let files: [(&Path, &str, u32); 7] = [
        (&shim.path, "usr/local/bin/containerd-shim-husk-v2", 0o755),
        (&husk.path, "usr/local/bin/husk", 0o755),
        (&kernel, "usr/local/share/husk/vmlinux", 0o644),
        (&initrd, "usr/local/share/husk/initrd.cpio", 0o644),
        (&repository.join("config/config.toml"), "etc/husk/config.toml", 0o644),
        (&repository.join("deploy/containerd/husk.toml"), "etc/containerd/conf.d/husk.toml", 0o644),
        (&repository.join("deploy/containerd/husk-2.toml"), "usr/local/share/husk/containerd-2.toml", 0o644),
    ];
    for (from, to, mode) in files {
        place(from, &root.join(to), mode)?;
        if !to.starts_with("etc/") {
            ui::say("dist", format!("{to} ({:.1} MiB)", kernel::mebibytes(from)?));
        }
    }
    ui::say("dist", format!("{} is ready", root.display()));
    Ok(root)
}

/// Copies a file unless it is there already; the new one takes the old one's place at once.
fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    let content = fs::read(from).with_context(context)?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    cache::make_dir(to.parent().unwrap_or(to))?;
    let part = to.with_extension("part");
    fs::write(&part, &content).with_context(context)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(mode)).with_context(context)?;
    fs::rename(&part, to).with_context(context)
}
