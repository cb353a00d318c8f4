//! Locks that exclude other xtask processes. Two kernel builds in one directory would break each other. Two nodes on a
//! small machine would both be too slow for their tests.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::{files, paths, ui};

/// Acquires the lock `what`. Waits if another process holds the lock. The lock is released when the returned value is
/// dropped.
pub fn take(what: &str) -> Result<Flock<File>> {
    take_in(&paths::state().join(what), what)
}

/// Creates the directory `dir` and acquires the lock in it. Waits if another process holds the lock.
pub fn take_in(dir: &Path, what: &str) -> Result<Flock<File>> {
    files::make_dir(dir)?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    let locked = match flock(file, FlockArg::LockExclusiveNonblock) {
        Err((file, Errno::EWOULDBLOCK)) => {
            ui::say(what, format!("waiting for another xtask that uses the {what}"));
            flock(file, FlockArg::LockExclusive)
        }
        result => result,
    };
    locked.map_err(|(_, error)| error).with_context(|| format!("failed to lock {}", path.display()))
}

/// Calls flock(2). Retries after EINTR.
fn flock(mut file: File, operation: FlockArg) -> Result<Flock<File>, (File, Errno)> {
    loop {
        match Flock::lock(file, operation) {
            Err((unlocked, Errno::EINTR)) => file = unlocked,
            result => return result,
        }
    }
}
