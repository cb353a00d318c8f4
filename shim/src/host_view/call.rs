//! Calls on the threads of the host view. If a file system of the host hangs, the callers stop waiting.
//!
//! A call that hangs in the kernel cannot be cancelled. Its caller abandons the call, and the thread stays until the
//! file system answers. Abandoned calls must not use up the threads: the pool replaces some abandoned threads
//! ([`Pool::abandon`]), and only a few calls for one path can hang.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::sync::lock;
use nix::unistd::close;

use super::ended;
use crate::blocking::{Job, Pool};

/// How long a caller waits for a call.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of abandoned calls for one path. If this many calls hang, further calls for the path fail at once.
const MAX_ABANDONED: usize = 2;

/// An fd that threads of the view can close. In a debug build, dropping an `OwnedFd` calls fcntl(2), which the seccomp
/// filter of these threads refuses.
#[derive(Debug)]
pub struct Fd(Option<OwnedFd>);

impl Fd {
    /// Takes the ownership of the fd.
    pub fn new(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }

    /// Returns the fd to a thread without the filter.
    pub fn into_owned(mut self) -> io::Result<OwnedFd> {
        // Only this function and `drop` take the fd.
        self.0.take().ok_or_else(|| io::Error::from(nix::Error::EBADF))
    }

    /// Returns the fd for a system call.
    pub fn borrow(&self) -> io::Result<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd).ok_or_else(|| nix::Error::EBADF.into())
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if let Some(fd) = self.0.take() {
            let _ = close(fd);
        }
    }
}

/// The progress of a call.
pub struct Call {
    /// The paths of the call, in the order of their lookup.
    paths: Vec<PathBuf>,
    /// Number of paths whose lookup has ended.
    looked_up: AtomicUsize,
    stage: Mutex<Stage>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// No thread has begun the call.
    Queued,
    Running,
    Ended,
    /// The caller no longer waits.
    Abandoned,
}

impl Call {
    /// Returns a call that looks up `paths`.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, looked_up: AtomicUsize::new(0), stage: Mutex::new(Stage::Queued) }
    }

    /// Records that the lookup of the current path has ended.
    pub fn next(&self) {
        self.looked_up.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the path whose lookup has not ended.
    fn path(&self) -> &Path {
        let current = self.paths.get(self.looked_up.load(Ordering::Relaxed));
        current.or_else(|| self.paths.last()).map_or_else(|| Path::new(""), PathBuf::as_path)
    }

    /// Returns false if the call has been abandoned.
    fn advance(&self, stage: Stage) -> bool {
        let mut current = lock(&self.stage);
        let waits = *current != Stage::Abandoned;
        if waits {
            *current = stage;
        }
        waits
    }
}

/// Abandoned calls that still hang.
#[derive(Default)]
pub struct Abandoned(Mutex<Vec<Arc<Call>>>);

impl Abandoned {
    /// Fails if too many calls for one of `paths` hang.
    fn check(&self, paths: &[PathBuf]) -> io::Result<()> {
        let calls = lock(&self.0);
        let hangs =
            |path: &&PathBuf| calls.iter().filter(|call| call.path() == path.as_path()).count() >= MAX_ABANDONED;
        match paths.iter().find(hangs) {
            Some(path) => Err(hang(format!("earlier lookups of {} still hang", path.display()))),
            None => Ok(()),
        }
    }

    fn remove(&self, call: &Arc<Call>) {
        lock(&self.0).retain(|other| !Arc::ptr_eq(other, call));
    }
}

/// The thread that runs a call.
pub enum Runner<'a> {
    /// The view's first thread, to which `send` sends the call.
    First(&'a dyn Fn(Job) -> io::Result<()>),
    /// A thread of the pool. `start` starts another thread.
    Pool(&'a Arc<Pool>, &'a dyn Fn() -> io::Result<()>),
}

/// Runs `work` on another thread, and waits for its result, at most for `timeout`. A result that comes later is
/// dropped.
///
/// # Errors
/// If the call takes too long, or if earlier calls for one of the paths still hang. The error names the path.
pub fn run<T: Send + 'static>(
    runner: &Runner<'_>,
    (abandoned, timeout): (&Arc<Abandoned>, Duration),
    paths: Vec<PathBuf>,
    work: impl FnOnce(&Call) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    abandoned.check(&paths)?;
    let call = Arc::new(Call::new(paths));
    let (sender, done) = mpsc::sync_channel(1);
    let job = {
        let (call, abandoned) = (Arc::clone(&call), Arc::clone(abandoned));
        let pool = match runner {
            Runner::First(_) => None,
            Runner::Pool(pool, _) => Some(Arc::clone(pool)),
        };
        Box::new(move || {
            if !call.advance(Stage::Running) {
                return;
            }
            let result = work(&call);
            if !call.advance(Stage::Ended) {
                abandoned.remove(&call);
                pool.iter().for_each(|pool| pool.resume());
            }
            drop(sender.send(result));
        })
    };
    match runner {
        Runner::First(send) => send(job)?,
        Runner::Pool(pool, start) => pool.run(job, start)?,
    }
    match done.recv_timeout(timeout) {
        Ok(result) => return result,
        Err(RecvTimeoutError::Disconnected) => return Err(ended()),
        Err(RecvTimeoutError::Timeout) => {}
    }
    let mut stage = lock(&call.stage);
    let (path, limit) = (call.path().display(), timeout.as_secs());
    match std::mem::replace(&mut *stage, Stage::Abandoned) {
        // The thread is about to send the result.
        Stage::Ended => {
            drop(stage);
            done.recv().unwrap_or_else(|_| Err(ended()))
        }
        Stage::Running => {
            // The thread ends the call after this, because the stage is locked.
            lock(&abandoned.0).push(Arc::clone(&call));
            if let Runner::Pool(pool, start) = runner
                && let Err(error) = pool.abandon(start)
            {
                tracing::warn!(%error, "failed to replace a thread that hangs");
            }
            Err(hang(format!("the lookup of {path} takes more than {limit} s: its file system may hang")))
        }
        Stage::Queued | Stage::Abandoned => {
            Err(hang(format!("the lookup of {path} did not begin within {limit} s: all threads may hang")))
        }
    }
}

fn hang(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}
