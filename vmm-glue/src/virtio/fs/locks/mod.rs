//! File locks (flock(2), fcntl(2)) that apply to all guests and to the host.
//!
//! A lock of the guest is a lock of the host's kernel. Therefore, the lock excludes other VMMs and processes of the
//! host, and ends with the VMM. A lock of flock(2) belongs to an open file, and the VMM takes the lock on the guest's
//! handle. A range lock belongs to a process, or to an open file with F_OFD_SETLK ([`place`]):
//!
//! * For a process of the guest, the VMM takes the lock with F_SETLK in a file table of its own ([`file_table`]). For
//!   the kernel, each such table is another process. Therefore, the kernel finds deadlocks between processes of several
//!   guests and of the host. A process of the host that asks for the holder sees the VMM's PID.
//! * For an open file, the VMM opens the file once more, and takes the lock with F_OFD_SETLK on this open file
//!   description. A process of the host that asks for the holder sees PID -1.
//!
//! The number of tables is limited ([`owners`]). A process without a table has its locks on an open file description,
//! too. The VMM itself finds deadlocks of processes of its guest ([`table`]). The kernel finds others only if they end
//! with the request of a process that has a table, and if each of the other waits is for a lock in a table
//! (`posix_locks_deadlock` and `__locks_insert_block` in fs/locks.c).
//!
//! Each wait has a thread ([`waiters`]), and its request stays in the queue. FUSE_INTERRUPT ends the wait.

mod change;
#[cfg(test)]
mod deadlock_tests;
mod file_table;
mod owners;
mod place;
mod ranges;
mod table;
#[cfg(test)]
mod tests;
mod waiters;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use husk_base::sync::lock;
use husk_base::sys::file_lock::{Flock, flock};
use virtiofsd::filesystem::Context;
use virtiofsd::fuse::{FileLock, InHeader, LkIn};

use self::change::{Change, LAST_BYTE, error};
use self::owners::Owners;
use self::place::Waiting;
use self::ranges::RangeLock;
use self::table::{Owner, Place, Table};
use self::waiters::{Calls, Job, Waiters};
use super::ids::{Handle, Inode};
use super::joined_fs::JoinedFs;

/// The lock is a lock of flock(2): FUSE_LK_FLOCK in include/uapi/linux/fuse.h.
const FLOCK: u32 = 1 << 0;

/// Sends the answer of a request that has waited.
pub type Answer = Box<dyn FnOnce(io::Result<()>) + Send>;

/// The locks of one device.
pub struct Locks {
    fs: Arc<JoinedFs>,
    table: Mutex<Table>,
    owners: Owners,
    waiters: Waiters,
}

/// The right to change the locks of one file. Other requests for this file wait.
struct Entered<'a> {
    locks: &'a Locks,
    inode: Inode,
    order: Arc<Mutex<()>>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        lock(&self.locks.table).leave(self.inode);
    }
}

fn would_block(error: &io::Error) -> bool {
    // fcntl(2) may return either of the two.
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

impl Locks {
    /// Creates the table, and starts the threads that start the other threads. The guest must not have open files yet
    /// ([`owners`]).
    ///
    /// # Errors
    /// If a thread cannot be started or confined.
    pub fn new(fs: Arc<JoinedFs>) -> io::Result<Self> {
        let (owners, waiters) = (Owners::new()?, Waiters::start()?);
        Ok(Self { fs, table: Mutex::default(), owners, waiters })
    }

    /// Serves GETLK.
    ///
    /// # Errors
    /// The errors of fcntl(2).
    pub fn get(&self, inode: Inode, request: &LkIn) -> io::Result<FileLock> {
        let change = Change::decode(inode, request)?;
        if change.unlock {
            return Err(error(libc::EINVAL));
        }
        let entered = self.enter(inode);
        let _order = lock(&entered.order);
        // The kernel does not report the locks of the place at which it is asked.
        let own = lock(&self.table).owner(inode, change.owner).map(|locks| locks.place.clone());
        let answer = self.get_at(&own.unwrap_or(Place::Description(change.handle)), &change)?;
        if i32::from(answer.l_type) == libc::F_UNLCK {
            return Ok(FileLock { type_: libc::F_UNLCK.cast_unsigned(), ..FileLock::default() });
        }
        let start = u64::try_from(answer.l_start).unwrap_or(0);
        let end = match u64::try_from(answer.l_len) {
            Ok(len) if len > 0 => start.saturating_add(len - 1).min(LAST_BYTE),
            _ => LAST_BYTE,
        };
        let exclusive = i32::from(answer.l_type) == libc::F_WRLCK;
        let pid = lock(&self.table).pid(inode, change.owner, &RangeLock { start, end, exclusive });
        Ok(FileLock { start, end, type_: i32::from(answer.l_type).cast_unsigned(), pid })
    }

    /// Serves SETLK, and SETLKW if there is a function `later`. If the lock is not free, SETLKW calls `later` and
    /// returns `None`. The returned function is called when the wait has ended.
    pub fn set(
        self: &Arc<Self>,
        inode: Inode,
        unique: u64,
        request: &LkIn,
        later: Option<impl FnOnce() -> Answer>,
    ) -> Option<io::Result<()>> {
        let waits = later.is_some();
        let result = if request.lk_flags & FLOCK != 0 {
            self.set_flock(inode, unique, request, later)
        } else {
            Change::decode(inode, request)
                .map_or_else(|error| Some(Err(error)), |change| self.set_range(&change, unique, later))
        };
        if waits && result.is_some() {
            self.waiters.forget(unique);
        }
        result
    }

    /// Ends the range locks of a process. The guest sends FLUSH whenever a process closes the file.
    pub fn flush(&self, inode: Inode, owner: u64) {
        self.release_owners(inode, |_| vec![Owner(owner)]);
    }

    /// Ends the range locks of an open file. If a FLUSH was lost, also ends the locks of the process whose last request
    /// had this handle.
    pub fn release(&self, inode: Inode, handle: Handle) {
        self.release_owners(inode, |table| table.owners_by_handle(inode, handle));
    }

    /// Interrupts the wait of a request.
    pub fn interrupt(&self, unique: u64) {
        self.waiters.interrupt(unique);
    }

    /// Returns the number of threads that wait.
    #[cfg(test)]
    pub fn waits(&self) -> usize {
        self.waiters.in_calls()
    }

    /// Lets requests wait, or interrupts all waits and lets no request begin one.
    pub fn allow_waits(&self, allowed: bool) {
        self.waiters.allow(allowed);
    }

    /// Forgets all locks. The file system has closed all descriptions.
    pub fn clear(&self) {
        self.waiters.interrupt_all();
        lock(&self.table).clear();
        self.owners.clear();
    }

    fn enter(&self, inode: Inode) -> Entered<'_> {
        let order = lock(&self.table).enter(inode);
        Entered { locks: self, inode, order }
    }

    fn set_flock(
        &self,
        inode: Inode,
        unique: u64,
        request: &LkIn,
        later: Option<impl FnOnce() -> Answer>,
    ) -> Option<io::Result<()>> {
        let operation = match i32::try_from(request.lk.type_) {
            Ok(libc::F_RDLCK) => Flock::Shared,
            Ok(libc::F_WRLCK) => Flock::Exclusive,
            Ok(libc::F_UNLCK) => Flock::Unlock,
            _ => return Some(Err(error(libc::EINVAL))),
        };
        let result = self.with_file(inode, request.fh, |file| flock(file, operation, false));
        let Some(later) = later else { return Some(result) };
        if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            return Some(result);
        }
        let file = match self.with_file(inode, request.fh, File::try_clone) {
            Ok(file) => file,
            Err(error) => return Some(Err(error)),
        };
        self.wait(unique, move |calls| calls.call(|| flock(&file, operation, true)), |_| {}, later)
    }

    fn set_range(
        self: &Arc<Self>,
        change: &Change,
        unique: u64,
        later: Option<impl FnOnce() -> Answer>,
    ) -> Option<io::Result<()>> {
        let entered = self.enter(change.inode);
        let _order = lock(&entered.order);
        if change.unlock {
            return Some(self.unlock(change));
        }
        let result = self.prepare(change).and_then(|tried| self.take(change, tried));
        let wait = match (&result, later) {
            (Err(error), Some(later)) if would_block(error) => later,
            _ => {
                self.sweep(change);
                return Some(result);
            }
        };
        {
            let mut table = lock(&self.table);
            if !change.open_file && table.deadlock(change.inode, change.owner, &change.range) {
                drop(table);
                self.sweep(change);
                return Some(Err(error(libc::EDEADLK)));
            }
            if !change.open_file {
                table.add_wait(unique, change.inode, change.owner, change.range);
            }
            if let Some(locks) = table.owner_mut(change.inode, change.owner) {
                locks.waits += 1;
            }
        }
        let (locks, change) = (Arc::clone(self), *change);
        let mut waiting = None;
        let attempt = move |calls: &Calls| locks.wait_for_range(&change, &mut waiting, calls);
        let locks = Arc::clone(self);
        let end = move |may_block| {
            if may_block {
                let entered = locks.enter(change.inode);
                let _order = lock(&entered.order);
                locks.end_wait(&change, unique);
            } else {
                // If the owner has no locks, its place stays open until the guest closes its file.
                locks.remove_wait(&change, unique);
            }
        };
        let refused = self.wait(unique, attempt, end, wait);
        if refused.is_some() {
            self.end_wait(&change, unique);
        }
        refused
    }

    /// Starts a wait. `end` is called after the wait ([`Job::end`]), and then the function that `later` returns. If the
    /// wait cannot start, returns the error and calls neither function.
    fn wait(
        &self,
        unique: u64,
        attempt: impl FnMut(&Calls) -> io::Result<()> + Send + 'static,
        end: impl FnOnce(bool) + Send + 'static,
        later: impl FnOnce() -> Answer,
    ) -> Option<io::Result<()>> {
        // The answer must exist before the thread starts, and must be dropped unused if the thread does not start.
        let answer = Arc::new(Mutex::new(None::<Answer>));
        let slot = Arc::clone(&answer);
        let mut slot_guard = lock(&answer);
        let send = move |result| {
            let answer = lock(&slot).take();
            if let Some(answer) = answer {
                answer(result);
            }
        };
        let job = Job { wait: Box::new(attempt), end: Box::new(end), answer: Box::new(send) };
        match self.waiters.add(unique, job) {
            Ok(()) => {
                *slot_guard = Some(later());
                None
            }
            Err(error) => Some(Err(error)),
        }
    }

    /// Waits for a lock in the kernel, and records the lock. Fails with EWOULDBLOCK if the wait must be repeated.
    fn wait_for_range(&self, change: &Change, waiting: &mut Option<Waiting>, calls: &Calls) -> io::Result<()> {
        if waiting.is_none() {
            let entered = self.enter(change.inode);
            let _order = lock(&entered.order);
            let place = self.place(change).ok_or_else(|| error(libc::EINTR))?;
            *waiting = Some(self.waiting_at(place, change)?);
        }
        let Some(place) = waiting else { return Err(error(libc::EINTR)) };
        place.wait(change, calls)?;
        let entered = self.enter(change.inode);
        let _order = lock(&entered.order);
        if !self.place(change).is_some_and(|current| place.is_at(&current)) {
            // The owner got another description during the wait. Closing the last fd of the earlier one also ends the
            // lock that it has just got.
            *waiting = None;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // Another thread of the owner may have unlocked the range since the wait ended. If the lock is still there,
        // this call changes nothing.
        self.take(change, None)
    }

    fn place(&self, change: &Change) -> Option<Place> {
        Some(lock(&self.table).owner(change.inode, change.owner)?.place.clone())
    }

    fn end_wait(&self, change: &Change, unique: u64) {
        self.remove_wait(change, unique);
        self.sweep(change);
    }

    fn remove_wait(&self, change: &Change, unique: u64) {
        let mut table = lock(&self.table);
        table.remove_wait(unique);
        if let Some(locks) = table.owner_mut(change.inode, change.owner) {
            locks.waits = locks.waits.saturating_sub(1);
        }
    }

    /// Takes a lock at the owner's place without waiting, unless this was already tried, and records the lock.
    fn take(&self, change: &Change, tried: Option<io::Result<()>>) -> io::Result<()> {
        let &Change { inode, owner, range, .. } = change;
        let place = self.place(change).ok_or_else(|| error(libc::EINTR))?;
        tried.unwrap_or_else(|| self.set_at(&place, change))?;
        let mut table = lock(&self.table);
        table.change(inode, owner, |ranges| ranges.lock(range));
        if let Some(locks) = table.owner_mut(inode, owner) {
            (locks.guest_handle, locks.pid, locks.open_file) = (change.handle, change.pid, change.open_file);
        }
        Ok(())
    }

    /// Unlocks a range.
    fn unlock(&self, change: &Change) -> io::Result<()> {
        let &Change { inode, owner, range, .. } = change;
        let Some(place) = self.place(change) else { return Ok(()) };
        // Unlocking the middle of a range creates two ranges.
        if !lock(&self.table).has_room(false) && (range.start, range.end) != (0, LAST_BYTE) {
            return Err(error(libc::ENOLCK));
        }
        // `sweep` unlocks the last range in a file table. A second call there would need another switch of threads.
        let last = lock(&self.table).has_only(inode, owner, &range);
        if !(last && matches!(place, Place::FileTable(..))) {
            self.set_at(&place, change)?;
        }
        lock(&self.table).change(inode, owner, |ranges| ranges.unlock(range.start, range.end));
        self.sweep(change);
        Ok(())
    }

    fn release_owners(&self, inode: Inode, owners: impl FnOnce(&Table) -> Vec<Owner>) {
        if !lock(&self.table).has_file(inode) {
            return;
        }
        let entered = self.enter(inode);
        let _order = lock(&entered.order);
        let owners = owners(&lock(&self.table));
        for owner in owners {
            let range = RangeLock { start: 0, end: LAST_BYTE, exclusive: false };
            let change = Change { inode, handle: 0, owner, open_file: false, pid: 0, range, unlock: true };
            if let Err(error) = self.unlock(&change) {
                log::error!("failed to release the locks of a file: {error}");
            }
        }
    }

    /// Closes the owner's place if the owner has no locks and does not wait.
    fn sweep(&self, change: &Change) {
        let unused = lock(&self.table).remove_unused(change.inode, change.owner);
        if let Some(place) = unused {
            self.close_place(change, &place);
        }
    }

    fn with_file<T>(&self, inode: Inode, handle: Handle, call: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        self.fs.with_file(context(), inode, handle, call)
    }
}

/// Returns the context of a request that the VMM itself makes.
fn context() -> Context {
    Context::from(InHeader::default())
}
