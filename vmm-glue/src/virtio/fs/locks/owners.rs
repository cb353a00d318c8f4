//! Gives a file table to each process of the guest that has POSIX locks.
//!
//! The kernel copies at least the first 64 fds into a new file table, and closes the copies that are not wanted. A copy
//! could keep a file of the guest open, and its close could hang. Therefore, one thread gets its own, nearly empty
//! table before the guest runs. This thread starts the first thread of each other table.

use std::collections::HashMap;
use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::Builder;

use husk_base::sync::lock;
use husk_base::sys::{fd, pidfd};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::getpid;

use super::file_table::{FileTable, STACK, Thread};
use super::table::Owner;
use crate::client::CONTROL_FD;
use crate::jail::{Kind, confine};

/// Maximum number of file tables of a pod. A table has two threads, and another one for each wait.
pub const MAX_TABLES: usize = 64;
/// Maximum number of file tables that wait for their next owner.
const MAX_FREE: usize = 2;
/// The first fd that the tables do not inherit. They need standard error and the control socket, on which the handler
/// for violations of seccomp filters reports. Unit tests have no control socket.
const FIRST_CLOSED: u32 = if cfg!(test) { 3 } else { CONTROL_FD.cast_unsigned() + 1 };

/// The file tables of the guest's processes.
pub struct Owners {
    starter: Arc<Starter>,
    state: Mutex<State>,
    /// Number of tables whose threads have not ended.
    count: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    used: HashMap<Owner, Used>,
    free: Vec<Arc<FileTable>>,
}

/// The table of an owner.
struct Used {
    table: Arc<FileTable>,
    /// Number of files on which the owner has locks.
    files: usize,
}

/// Counts a table until its last thread has ended.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Owners {
    /// Starts the thread that starts the other threads. Returns when the thread is confined.
    ///
    /// # Errors
    /// If the thread cannot be started or confined.
    pub fn new() -> io::Result<Self> {
        Ok(Self { starter: Starter::get()?, state: Mutex::default(), count: Arc::default() })
    }

    /// Returns the owner's table, in which the owner uses another file. Returns `None` if there are too many tables.
    /// [`Self::leave`] must follow.
    pub fn enter(&self, owner: Owner) -> Option<Arc<FileTable>> {
        let entered = lock(&self.state).enter(owner, None);
        if entered.is_some() {
            return entered;
        }
        let new = self.start()?;
        lock(&self.state).enter(owner, Some(Arc::new(new)))
    }

    /// Records that the owner no longer uses a file in its table.
    pub fn leave(&self, owner: Owner, table: &Arc<FileTable>) {
        let mut state = lock(&self.state);
        let Some(used) = state.used.get_mut(&owner).filter(|used| Arc::ptr_eq(&used.table, table)) else { return };
        used.files = used.files.saturating_sub(1);
        if used.files == 0 {
            let unused = state.used.remove(&owner);
            if state.free.len() < MAX_FREE {
                state.free.extend(unused.map(|used| used.table));
            }
        }
    }

    /// Ends all tables. Returns when all their locks have ended.
    pub fn clear(&self) {
        let State { used, free } = std::mem::take(&mut *lock(&self.state));
        let tables = used.into_values().map(|used| used.table).chain(free);
        let ends: Vec<_> = tables.map(|table| table.end()).collect();
        for end in ends {
            // The receiver fails if the table has already ended.
            let _ = end.recv();
        }
    }

    /// Returns the number of tables that an owner uses, and of the free ones.
    #[cfg(test)]
    pub fn tables(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.used.len(), state.free.len())
    }

    fn start(&self) -> Option<FileTable> {
        let add = |count: usize| (count < MAX_TABLES).then_some(count + 1);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        let (table, thread) = FileTable::new(self.starter.process, Counted(Arc::clone(&self.count)));
        match self.starter.start(thread) {
            Ok(()) => Some(table),
            Err(error) => {
                log::error!("failed to start a thread for the locks of a process: {error}");
                None
            }
        }
    }
}

impl State {
    /// Returns the owner's table. If the owner has none, gives it `new` or a free table.
    fn enter(&mut self, owner: Owner, new: Option<Arc<FileTable>>) -> Option<Arc<FileTable>> {
        if let Some(used) = self.used.get_mut(&owner) {
            // Another request of the owner may have got a table while `new` was started.
            self.free.extend(new);
            used.files += 1;
            return Some(Arc::clone(&used.table));
        }
        let table = new.or_else(|| self.free.pop())?;
        self.used.insert(owner, Used { table: Arc::clone(&table), files: 1 });
        Some(table)
    }
}

/// The thread that starts the first thread of each table.
struct Starter {
    requests: Sender<Request>,
    /// A pidfd of this process in each table.
    process: RawFd,
}

struct Request {
    thread: Thread,
    started: SyncSender<io::Result<()>>,
}

/// The process's starter. A second one would be started when files of guests may be open.
static STARTER: Mutex<Option<Arc<Starter>>> = Mutex::new(None);

impl Starter {
    /// Returns the starter, which the first call starts.
    fn get() -> io::Result<Arc<Self>> {
        let mut starter = lock(&STARTER);
        if let Some(starter) = &*starter {
            return Ok(Arc::clone(starter));
        }
        let (requests, received) = channel();
        let (confined, result) = channel();
        Builder::new().name(Kind::LockOwner.thread_name().to_owned()).stack_size(STACK).spawn(move || {
            let result = separate().and_then(|process| {
                confine(Kind::LockOwner).map_err(io::Error::other)?;
                Ok(process)
            });
            let failed = result.is_err();
            // The receiver waits for the result.
            let _ = confined.send(result);
            drop(confined);
            if !failed {
                serve(&received);
            }
        })?;
        let process = result.recv().map_err(io::Error::other)??;
        let new = Arc::new(Self { requests, process });
        *starter = Some(Arc::clone(&new));
        Ok(new)
    }

    /// Starts a thread with a new file table.
    fn start(&self, thread: Thread) -> io::Result<()> {
        let (started, result) = sync_channel(1);
        self.requests.send(Request { thread, started }).map_err(|_| io::ErrorKind::BrokenPipe)?;
        result.recv().map_err(io::Error::other)?
    }
}

/// Gives this thread its own file table. Returns a pidfd of this process in this table.
fn separate() -> io::Result<RawFd> {
    // SAFETY: the thread and the threads that it starts use only fds that they have opened themselves.
    unsafe { fd::unshare_fds_below(FIRST_CLOSED) }?;
    Ok(pidfd::open(getpid().as_raw())?.into_raw_fd())
}

/// Main function of the starter.
fn serve(requests: &Receiver<Request>) {
    for Request { thread, started } in requests {
        let new = Builder::new().name(Kind::LockOwner.thread_name().to_owned()).stack_size(STACK);
        let spawned = started.clone();
        let result = new.spawn(move || {
            let result = unshare(CloneFlags::CLONE_FILES).map_err(io::Error::from);
            let separate = result.is_ok();
            // The receiver waits for the result.
            let _ = spawned.send(result);
            if separate {
                thread.run();
            }
        });
        if let Err(error) = result {
            let _ = started.send(Err(error));
        }
    }
}
