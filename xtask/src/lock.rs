//! Locks that exclude other xtask processes. Two kernel builds in one directory would break each other. Two nodes on a
//! small machine would both be too slow for their tests.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};

use crate::{files, paths, ui};

/// Acquires the lock `what`. Waits if another process holds the lock. The lock is released when the returned file is
/// closed.
pub fn take(what: &str) -> Result<File> {
    take_in(&paths::state().join(what), what)
}

/// Creates the directory `dir` and acquires the lock in it. Waits if another process holds the lock.
pub fn take_in(dir: &Path, what: &str) -> Result<File> {
    files::make_dir(dir)?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    match flock(&file, libc::LOCK_EX | libc::LOCK_NB) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            ui::say(what, format!("waiting for another xtask that uses the {what}"));
            flock(&file, libc::LOCK_EX).with_context(|| format!("failed to lock {}", path.display()))?;
        }
        result => result.with_context(|| format!("failed to lock {}", path.display()))?,
    }
    Ok(file)
}

fn flock(file: &File, operation: i32) -> Result<(), Error> {
    loop {
        // SAFETY: flock takes an fd, which `file` keeps open, and an integer.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
