//! `cargo xtask image`: the guest's initramfs, which is the agent and the directories it mounts things on.

use crate::build::{self, Profile, Program};
use crate::cache::{self, Key};
use crate::cpio::Cpio;
use crate::kernel::mebibytes;
use crate::{lock, paths, ui};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

/// Changes when what is packed does.
const RECIPE: u32 = 1;
/// The crate whose program is the guest's PID 1.
pub const AGENT: &str = "husk-agent";

/// Builds the agent and packs it.
pub fn image(profile: Profile) -> Result<PathBuf> {
    let programs = build::programs(&[AGENT], profile)?;
    let _lock = lock::take("image")?;
    pack(build::find(&programs, &[AGENT])?)
}

/// Packs an agent that is built.
pub fn pack(agent: &Program) -> Result<PathBuf> {
    let made = paths::initrd();
    let key = Key::new("image", RECIPE).file(&agent.path)?.finish();
    if cache::fresh("image", &key, &[&made]) {
        ui::say("image", "up to date");
        return Ok(made);
    }
    cache::forget("image")?;
    cache::make_dir(made.parent().unwrap_or(&made))?;
    let init = fs::read(&agent.path).with_context(|| format!("cannot read {}", agent.path.display()))?;
    let file = File::create(&made).with_context(|| format!("cannot write {}", made.display()))?;
    archive(Cpio::new(BufWriter::new(file)), &init).with_context(|| format!("cannot write {}", made.display()))?;
    cache::done("image", &key)?;
    ui::say("image", format!("{} ({:.1} MiB)", made.display(), mebibytes(&made)?));
    Ok(made)
}

/// What is in the initramfs. It is not compressed: the kernel would spend longer on that than on the copy.
fn archive<W: std::io::Write>(mut cpio: Cpio<W>, init: &[u8]) -> std::io::Result<()> {
    for (name, mode) in [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)] {
        cpio.directory(name, mode)?;
    }
    // The kernel opens it for init's standard streams before anything is mounted on /dev.
    cpio.character("dev/console", 0o600, 5, 1)?;
    cpio.file("init", 0o755, init)?;
    cpio.finish()?;
    Ok(())
}
