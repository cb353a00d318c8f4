//! One node at a time: booting two on a small machine makes both too slow for what they test.

use crate::{cache, paths, ui};
use anyhow::{Context, Result};
use std::fs::{File, TryLockError};

/// Waits for the node to be free; it stays taken while the file is open.
pub fn take() -> Result<File> {
    let path = paths::node().join("lock");
    cache::make_dir(&paths::node())?;
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => ui::say("node", "waiting for another node to end"),
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the node"),
    }
    file.lock().context("cannot lock the node")?;
    Ok(file)
}
