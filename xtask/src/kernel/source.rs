//! Finds the kernel's source in an installed package. If the package is not installed, fetches Debian's package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::pins::{KERNEL_SOURCE, RELEASE};
use crate::stamp::{Key, Stamp};
use crate::user_cache::Step;
use crate::{cmd, files, paths, ui};

/// Increase this number whenever [`fetch`] changes.
const RECIPE: u32 = 1;

/// Returns the path of the source archive, and the version of its package.
pub fn find() -> Result<(PathBuf, String)> {
    let archive = format!("usr/src/{KERNEL_SOURCE}.tar.xz");
    let installed = Path::new("/").join(&archive);
    if installed.exists() {
        let version = cmd::output(Command::new("dpkg-query").args(["-W", "-f=${Version}", KERNEL_SOURCE]))?;
        return Ok((installed, version));
    }
    // The caller holds the kernel's lock, so no other xtask process uses this directory.
    let dir = paths::state().join("kernel/debian");
    let (fetched, file) = (dir.join(format!("{KERNEL_SOURCE}.tar.xz")), dir.join("version"));
    let key = Key::new("kernel-source", RECIPE).text(KERNEL_SOURCE).text(RELEASE).finish();
    let step =
        Step { kind: "kernel-source", key: &key, outputs: &[&fetched, &file], stamp: Stamp::new("kernel-source") };
    step.run(|| fetch(&dir.join("part"), &archive, &fetched, &file))?;
    let version = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    Ok((fetched, version))
}

/// Fetches Debian's package and unpacks it in `part`, without installing it. Moves the source archive to `fetched`, and
/// writes the package's version to `file`.
fn fetch(part: &Path, archive: &str, fetched: &Path, file: &Path) -> Result<()> {
    if !cmd::is_root() {
        bail!(
            "package {KERNEL_SOURCE} is not installed, and only root can fetch it from Debian; run cargo xtask as root"
        );
    }
    ui::say("kernel", format!("fetching {KERNEL_SOURCE} from Debian {RELEASE}"));
    files::remove(part)?;
    files::make_dir(part)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--skip=cleanup/apt/cache"]).arg(format!("--include={KERNEL_SOURCE}"));
    command.arg(RELEASE).arg(part).args(crate::setup::debian_mirror()?);
    cmd::logged("kernel", "kernel-fetch", &mut command)?;
    fs::write(file, version(part)?).with_context(|| format!("failed to write {}", file.display()))?;
    let from = part.join(archive);
    fs::rename(&from, fetched).with_context(|| format!("failed to find {} in Debian's package", from.display()))?;
    files::remove(part)
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
    bail!("failed to find package {KERNEL_SOURCE} among the packages that mmdebstrap downloaded");
}
