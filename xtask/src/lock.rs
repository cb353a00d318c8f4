//! One at a time: two kernel builds in one tree spoil each other, two nodes on a small machine are both too slow for
//! what they test.

use crate::{cache, paths, ui};
use anyhow::{Context, Result};
use std::fs::{File, TryLockError};

/// Waits until nobody else holds the lock of `what`; it stays taken while the file is open.
pub fn take(what: &str) -> Result<File> {
    let dir = paths::state().join(what);
    cache::make_dir(&dir)?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => ui::say(what, format!("waiting for another xtask to be done with the {what}")),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
