//! File locks (flock(2), fcntl(2)) that apply to all guests and to the host.
//!
//! A lock of the guest is a lock of the host's kernel. Therefore, the lock excludes other VMMs and processes of the
//! host, and ends with the VMM. A lock of flock(2) belongs to an open file, and the VMM takes the lock on the guest's
//! handle. A range lock belongs to a process, or to an open file with F_OFD_SETLK. For each owner of range locks, the
//! VMM opens the file once more, and takes the locks on this open file description (F_OFD_SETLK). A process of the host
//! that asks for the holder sees PID -1.
//!
//! A process that waits has a thread of its own ([`waiters`]), and its request stays in the queue. FUSE_INTERRUPT ends
//! the wait. The VMM detects deadlocks of processes of its guest ([`table`]). As with NFS, deadlocks that involve
//! several guests or the host are not detected.

mod change;
mod private;
mod ranges;
mod table;
#[cfg(test)]
mod tests;
mod waiters;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use husk_base::sync::lock;
use husk_base::sys::file_lock::{Flock, flock};
use nix::fcntl::{FcntlArg, fcntl};
use virtiofsd::filesystem::{Context, FileSystem as _};
use virtiofsd::fuse::{FileLock, InHeader, LkIn};

use self::change::{Change, LAST_BYTE, error};
use self::private::PrivateFiles;
use self::ranges::RangeLock;
use self::table::{Owner, OwnerLocks, Table};
use self::waiters::{Job, Waiters};
use super::closing;
use super::ids::{Handle, Inode};
use super::joined_fs::JoinedFs;

/// The lock is a lock of flock(2): FUSE_LK_FLOCK in include/uapi/linux/fuse.h.
const FLOCK: u32 = 1 << 0;
/// The share's root directory: FUSE_ROOT_ID in include/uapi/linux/fuse.h.
const ROOT: Inode = 1;

/// Sends the answer of a request that has waited.
pub type Answer = Box<dyn FnOnce(io::Result<()>) + Send>;

/// The locks of one device.
pub struct Locks {
    fs: Arc<JoinedFs>,
    private: PrivateFiles,
    table: Mutex<Table>,
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
    /// Creates the table, and starts the thread that starts the waiting threads. `fd_directory` is /proc/self/fd.
    ///
    /// # Errors
    /// If the thread cannot be started or confined.
    pub fn new(fs: Arc<JoinedFs>, fd_directory: File) -> io::Result<Self> {
        let private = PrivateFiles::new(fd_directory);
        Ok(Self { fs, private, table: Mutex::default(), waiters: Waiters::start()? })
    }

    /// Returns whether only the guest uses a file, so that the guest need not ask for its locks.
    pub fn are_private(&self, inode: Inode, handle: Handle) -> bool {
        self.with_file(inode, handle, |file| Ok(self.private.contains(file))).unwrap_or(false)
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
        // The kernel does not report the locks of the description with which it is asked.
        let own = lock(&self.table).owner(inode, change.owner).map(|locks| locks.description);
        let mut answer = change.to_kernel();
        self.with_file(inode, own.unwrap_or(change.handle), |file| {
            Ok(fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut answer))?)
        })?;
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
    }

    /// Prepares for a new connection of a guest.
    ///
    /// # Errors
    /// If the path of the share cannot be read.
    pub fn init(&self) -> io::Result<()> {
        self.clear();
        let (handle, _) = self.fs.opendir(context(), ROOT, (libc::O_RDONLY | libc::O_DIRECTORY).cast_unsigned())?;
        let handle = handle.ok_or_else(|| error(libc::EBADF))?;
        let result = self.with_file(ROOT, handle, |root| self.private.set_root(root));
        self.fs.releasedir(context(), ROOT, 0, handle)?;
        result
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
        self.wait(unique, move || flock(&file, operation, true), |_| {}, later)
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
        let result = self.prepare(change).and_then(|()| self.take(change));
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
        let mut file = None;
        let attempt = move || locks.wait_for_range(&change, &mut file);
        let locks = Arc::clone(self);
        let end = move |may_block| {
            if may_block {
                let entered = locks.enter(change.inode);
                let _order = lock(&entered.order);
                locks.end_wait(&change, unique);
            } else {
                // If the owner has no locks, its description stays open until the guest closes its file.
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
        attempt: impl FnMut() -> io::Result<()> + Send + 'static,
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
    fn wait_for_range(&self, change: &Change, file: &mut Option<(Handle, File)>) -> io::Result<()> {
        if file.is_none() {
            let entered = self.enter(change.inode);
            let _order = lock(&entered.order);
            let description = self.description(change).ok_or_else(|| error(libc::EINTR))?;
            *file = Some((description, self.with_file(change.inode, description, File::try_clone)?));
        }
        let Some((description, duplicate)) = file else { return Err(error(libc::EINTR)) };
        fcntl(duplicate.as_fd(), FcntlArg::F_OFD_SETLKW(&change.to_kernel()))?;
        let entered = self.enter(change.inode);
        let _order = lock(&entered.order);
        if self.description(change) != Some(*description) {
            // The owner got another description during the wait. Closing the last fd of the earlier one also ends the
            // lock that it has just got.
            *file = None;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // Another thread of the owner may have unlocked the range since the wait ended. If the lock is still there,
        // this call changes nothing.
        self.take(change)
    }

    fn description(&self, change: &Change) -> Option<Handle> {
        Some(lock(&self.table).owner(change.inode, change.owner)?.description)
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

    /// Opens a description for the owner, unless the owner has one that allows the lock.
    fn prepare(&self, change: &Change) -> io::Result<()> {
        let &Change { inode, owner, handle, .. } = change;
        let access =
            self.with_file(inode, handle, |file| Ok(fcntl(file.as_fd(), FcntlArg::F_GETFL)?))? & libc::O_ACCMODE;
        let refused = if change.range.exclusive { libc::O_RDONLY } else { libc::O_WRONLY };
        if access == refused {
            return Err(error(libc::EBADF));
        }
        let writable = access != libc::O_RDONLY;
        let table = lock(&self.table);
        let existing = table.owner(inode, owner).map(|locks| (locks.description, locks.writable));
        if !table.has_room(existing.is_none()) {
            return Err(error(libc::ENOLCK));
        }
        drop(table);
        let Some((old, old_writable)) = existing else {
            let description = self.open(inode, writable, access)?;
            let locks = OwnerLocks {
                description,
                writable,
                guest_handle: handle,
                open_file: change.open_file,
                pid: change.pid,
                ranges: ranges::Ranges::default(),
                waits: 0,
            };
            lock(&self.table).add(inode, owner, locks);
            return Ok(());
        };
        if old_writable || !writable {
            return Ok(());
        }
        // The old description has only shared locks. The new one can take the same locks before the old one is closed.
        let description = self.open(inode, true, access)?;
        let held: Vec<RangeLock> = match lock(&self.table).owner(inode, owner) {
            Some(locks) => locks.ranges.iter().copied().collect(),
            None => Vec::new(),
        };
        let copied = self.with_file(inode, description, |file| {
            held.iter().try_for_each(|range| {
                let change = Change { range: *range, ..*change };
                fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&change.to_kernel())).map(drop).map_err(io::Error::from)
            })
        });
        if let Err(error) = copied {
            self.close(inode, description);
            return Err(error);
        }
        if let Some(locks) = lock(&self.table).owner_mut(inode, owner) {
            (locks.description, locks.writable) = (description, true);
        }
        self.close(inode, old);
        Ok(())
    }

    /// Takes a lock on the owner's description without waiting, and records the lock.
    fn take(&self, change: &Change) -> io::Result<()> {
        let &Change { inode, owner, range, .. } = change;
        let description = self.description(change).ok_or_else(|| error(libc::EINTR))?;
        self.with_file(inode, description, |file| {
            Ok(fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&change.to_kernel())).map(drop)?)
        })?;
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
        let Some(description) = self.description(change) else { return Ok(()) };
        // Unlocking the middle of a range creates two ranges.
        if !lock(&self.table).has_room(false) && (range.start, range.end) != (0, LAST_BYTE) {
            return Err(error(libc::ENOLCK));
        }
        self.with_file(inode, description, |file| {
            Ok(fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&change.to_kernel())).map(drop)?)
        })?;
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

    /// Closes the owner's description if the owner has no locks and does not wait.
    fn sweep(&self, change: &Change) {
        let unused = lock(&self.table).remove_unused(change.inode, change.owner);
        if let Some(description) = unused {
            self.close(change.inode, description);
        }
    }

    /// Opens a file of the guest.
    fn open(&self, inode: Inode, writable: bool, access: i32) -> io::Result<Handle> {
        let open = |flags: i32| self.fs.open(context(), inode, false, flags.cast_unsigned());
        let opened = match open(if writable { libc::O_RDWR } else { libc::O_RDONLY }) {
            // The guest's user may write the file, but not read it, on a file system that does not trust root.
            Err(error) if writable && error.raw_os_error() == Some(libc::EACCES) => open(access),
            opened => opened,
        };
        opened?.0.ok_or_else(|| error(libc::EBADF))
    }

    fn close(&self, inode: Inode, description: Handle) {
        let release = || self.fs.release(context(), inode, 0, description, false, false, None);
        if let Err(error) = closing::while_open(&*self.fs, context(), inode, description, release) {
            log::error!("failed to close a file that had locks: {error}");
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
