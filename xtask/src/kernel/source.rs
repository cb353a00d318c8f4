//! Finds the kernel's source: in a package of this machine, or, if its distribution has none, in Debian's package.

use crate::pins::{KERNEL_SOURCE, RELEASE};
use crate::{cache, cmd, paths, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the source archive and its version.
pub fn find() -> Result<(PathBuf, String)> {
    let archive = format!("usr/src/{KERNEL_SOURCE}.tar.xz");
    let installed = Path::new("/").join(&archive);
    if installed.exists() {
        let version = cmd::output(Command::new("dpkg-query").args(["-W", "-f=${Version}", KERNEL_SOURCE]))?;
        return Ok((installed, version));
    }
    let dir = paths::state().join("kernel/debian");
    let (fetched, stamp) = (dir.join(&archive), dir.join("version"));
    if let (true, Ok(version)) = (fetched.exists(), fs::read_to_string(&stamp)) {
        return Ok((fetched, version));
    }
    fetch(&dir)?;
    let version = version(&dir)?;
    fs::write(&stamp, &version).with_context(|| format!("failed to write {}", stamp.display()))?;
    Ok((fetched, version))
}

/// Fetches and unpacks Debian's package without installing it.
fn fetch(dir: &Path) -> Result<()> {
    if !cmd::is_root() {
        bail!("failed to find package {KERNEL_SOURCE}; fetching Debian's needs root: run this as root");
    }
    ui::say("kernel", format!("fetching {KERNEL_SOURCE} from Debian {RELEASE}"));
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    }
    cache::make_dir(dir)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--skip=cleanup/apt/cache"]).arg(format!("--include={KERNEL_SOURCE}"));
    command.arg(RELEASE).arg(dir).args(crate::setup::debian_mirror()?);
    cmd::logged("kernel", "kernel-fetch", &mut command)
}

/// Returns the version from the file name of the downloaded package.
fn version(dir: &Path) -> Result<String> {
    let cache = dir.join("var/cache/apt/archives");
    for entry in fs::read_dir(&cache).with_context(|| format!("failed to read {}", cache.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(rest) = name.strip_prefix(KERNEL_SOURCE).and_then(|rest| rest.strip_prefix('_')) {
            return Ok(rest.split('_').next().unwrap_or(rest).replace("%3a", ":"));
        }
    }
    bail!("mmdebstrap did not download {KERNEL_SOURCE}");
}
