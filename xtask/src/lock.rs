//! One at a time: two kernel builds in one tree spoil each other, two nodes on a small machine are both too slow for
//! what they test.

use crate::{cache, paths, ui};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::fd::AsRawFd;

/// Waits until nobody else holds the lock of `what`; it stays taken while the file is open.
pub fn take(what: &str) -> Result<File> {
    let dir = paths::state().join(what);
    cache::make_dir(&dir)?;
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match flock(&file, libc::LOCK_EX | libc::LOCK_NB) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            ui::say(what, format!("waiting for another xtask to be done with the {what}"));
            flock(&file, libc::LOCK_EX).with_context(|| format!("cannot lock {}", path.display()))?;
        }
        result => result.with_context(|| format!("cannot lock {}", path.display()))?,
    }
    Ok(file)
}

fn flock(file: &File, operation: i32) -> Result<(), Error> {
    loop {
        // SAFETY: flock takes a descriptor, which the file keeps open, and an integer.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
