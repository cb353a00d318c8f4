//! `cargo xtask image`: builds the guest's initramfs. The initramfs has the agent, and the mount points that the agent
//! uses.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::build::{self, Profile, Program};
use crate::cpio::Cpio;
use crate::kernel::mebibytes;
use crate::stamp::{Key, Stamp};
use crate::{files, lock, paths, ui};

/// Increase this number whenever the content of the archive changes.
const RECIPE: u32 = 1;
/// The crate of the guest's PID 1.
pub const AGENT: &str = "husk-agent";

/// Builds the agent and the initramfs.
pub fn image(profile: Profile) -> Result<PathBuf> {
    let programs = build::programs(&[AGENT], profile)?;
    let _lock = lock::take("image")?;
    pack(build::find(&programs, &[AGENT])?)
}

/// Builds the initramfs from an agent that is already built.
pub fn pack(agent: &Program) -> Result<PathBuf> {
    let made = paths::initrd();
    let key = Key::new("image", RECIPE).file(&agent.path)?.finish();
    let stamp = Stamp::new("image");
    if stamp.fresh(&key, &[&made]) {
        ui::say("image", "up to date");
        return Ok(made);
    }
    stamp.remove()?;
    files::make_dir(made.parent().unwrap_or(&made))?;
    let init = fs::read(&agent.path).with_context(|| format!("failed to read {}", agent.path.display()))?;
    let file = File::create(&made).with_context(|| format!("failed to write {}", made.display()))?;
    archive(Cpio::new(BufWriter::new(file)), &init).with_context(|| format!("failed to write {}", made.display()))?;
    stamp.write(&key)?;
    ui::say("image", format!("{} ({:.1} MiB)", made.display(), mebibytes(&made)?));
    Ok(made)
}

/// Writes to `made` an initramfs that contains another program in place of the agent.
pub fn pack_other(init: &Program, made: &Path) -> Result<()> {
    let context = || format!("failed to write {}", made.display());
    let init = fs::read(&init.path).with_context(|| format!("failed to read {}", init.path.display()))?;
    archive(Cpio::new(BufWriter::new(File::create(made).with_context(context)?)), &init).with_context(context)
}

/// Writes the initramfs. The archive is not compressed, because the kernel copies data faster than it decompresses
/// data.
fn archive<W: std::io::Write>(mut cpio: Cpio<W>, init: &[u8]) -> std::io::Result<()> {
    for (name, mode) in [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)] {
        cpio.directory(name, mode)?;
    }
    // The kernel opens this device for the standard streams of init, before devtmpfs is mounted on /dev.
    cpio.character("dev/console", 0o600, 5, 1)?;
    cpio.file("init", 0o755, init)?;
    cpio.finish()?;
    Ok(())
}
