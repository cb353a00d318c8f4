//! File tables in which POSIX locks are taken. The kernel takes a file table for a process that owns the locks, because
//! usually all threads of a process share one (`current->files` in fs/locks.c).
//!
//! A table has threads of its own, which make all calls for its files. The closing of any fd of a file ends all POSIX
//! locks that the table has on the file. Therefore, a table has one entry for each file of the host, and does not open
//! a file while the file is being closed.
//!
//! A call can hang, for example on a network file system. Therefore, a thread starts another thread before it makes a
//! call, unless another thread is ready. A thread of a table uses no fd of other threads, and writes no log lines.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Builder;

use husk_base::sync::{lock, wait};
use husk_base::sys::pidfd;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::close;

use super::waiters::Calls;
use crate::jail::Kind;

/// Stack size of a thread. The threads only make system calls and return results.
pub const STACK: usize = 128 * 1024;
/// Number of ready threads that a table keeps: one makes the next call, and another one follows it.
const READY: usize = 2;

/// A file of the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the id of an open file.
    ///
    /// # Errors
    /// The errors of statx(2).
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }
}

/// A call that a thread of the table makes. The argument says whether another thread is ready.
type Task = Box<dyn FnOnce(bool) + Send>;

/// A file table. If the value is dropped, the table's threads end, and with them the locks.
pub struct FileTable(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Notified when there is a task, or when the table ends.
    changed: Condvar,
    /// Notified when a file has been closed.
    closed: Condvar,
    /// A pidfd of this process. Every table has a copy of it, with the same number.
    process: RawFd,
    /// Dropped when the last thread has ended.
    _guard: Box<dyn Send + Sync>,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    /// Number of threads that do not make a call.
    ready: usize,
    files: HashMap<FileId, OpenFile>,
    /// Whether the table gets no more calls.
    ended: bool,
}

/// The fds of a file. The numbers have a meaning only in the table's threads.
#[derive(Default)]
struct OpenFile {
    /// The fds with their access modes. None is closed before the file has no more users.
    fds: Vec<(RawFd, i32)>,
    /// Number of nodes of the guest that use the file. A file has several nodes if it is in several mounts.
    users: usize,
    /// Whether the file is being closed.
    closing: bool,
}

impl OpenFile {
    /// Returns whether an fd allows all locks that a description with this access mode allows.
    fn has(&self, access: i32) -> bool {
        self.fds.iter().any(|&(_, mode)| mode == access || mode == libc::O_RDWR)
    }

    /// Returns the fd for a lock.
    fn fd(&self, lock: &libc::flock) -> Option<RawFd> {
        let refused = match i32::from(lock.l_type) {
            libc::F_RDLCK => Some(libc::O_WRONLY),
            libc::F_WRLCK => Some(libc::O_RDONLY),
            _ => None,
        };
        let allowed = self.fds.iter().find(|&&(_, mode)| Some(mode) != refused);
        allowed.or_else(|| self.fds.first()).map(|&(fd, _)| fd)
    }
}

impl FileTable {
    /// Creates a table with its first thread, which has to call [`Thread::run`]. `process` is a pidfd of this process,
    /// and is open in the table.
    pub fn new(process: RawFd, guard: impl Send + Sync + 'static) -> (Self, Thread) {
        let state = Mutex::new(State { ready: 1, ..State::default() });
        let shared = Arc::new(Shared {
            state,
            changed: Condvar::new(),
            closed: Condvar::new(),
            process,
            _guard: Box::new(guard),
        });
        (Self(Arc::clone(&shared)), Thread(shared))
    }

    /// Opens a file in the table, for another node of the guest or for an access mode that the table lacks. `file` is
    /// open with the access mode `access`. For another node, also takes a lock without waiting, and returns the result.
    ///
    /// # Errors
    /// If there are too many open files, or if the table has ended. The node then does not use the file.
    pub fn attach(
        &self,
        id: FileId,
        file: &File,
        access: i32,
        new_node: Option<libc::flock>,
    ) -> io::Result<io::Result<()>> {
        let (shared, number) = (Arc::clone(&self.0), file.as_raw_fd());
        self.call(move |_| {
            let mut state = lock(&shared.state);
            while state.files.get(&id).is_some_and(|file| file.closing) {
                state = wait(&shared.closed, state);
            }
            // The call does not block.
            let has = state.files.get(&id).is_some_and(|file| file.has(access));
            let fd = if has { None } else { Some(shared.get_fd(number)?) };
            if state.ended {
                // The fd is closed when the threads end.
                return Err(error(libc::EBADF));
            }
            let file = state.files.entry(id).or_default();
            file.fds.extend(fd.map(|fd| (fd, access)));
            let Some(lock) = new_node else { return Ok(Ok(())) };
            file.users += 1;
            let fd = file.fd(&lock);
            drop(state);
            Ok(fd.map_or_else(|| Err(error(libc::EBADF)), |fd| set(fd, &lock)))
        })
    }

    /// Closes a file in the table, and so ends its locks, if no other node of the guest uses it. Otherwise, only
    /// unlocks the range of `unlock`. The node must have no waits.
    pub fn detach(&self, id: FileId, unlock: Option<libc::flock>) {
        let mut state = lock(&self.0.state);
        let Some(file) = state.files.get_mut(&id) else { return };
        file.users = file.users.saturating_sub(1);
        file.closing = file.users == 0;
        let fds = if file.closing { std::mem::take(&mut file.fds) } else { Vec::new() };
        let unlock = unlock.and_then(|range| Some((file.fd(&range)?, range)));
        drop(state);
        let shared = Arc::clone(&self.0);
        // The call fails only if the table has ended. Then the fds are closed when the threads end.
        let _ = self.call(move |_| {
            if let Some((fd, range)) = unlock {
                return set(fd, &range);
            }
            close_all(fds);
            let mut state = lock(&shared.state);
            if state.files.get(&id).is_some_and(|file| file.closing) {
                state.files.remove(&id);
            }
            drop(state);
            shared.closed.notify_all();
            Ok(())
        });
    }

    /// Changes locks without waiting (F_SETLK).
    ///
    /// # Errors
    /// The errors of fcntl(2).
    pub fn set(&self, id: FileId, lock: libc::flock) -> io::Result<()> {
        let fd = self.fd(id, &lock)?;
        self.call(move |_| set(fd, &lock))
    }

    /// Waits for a lock (F_SETLKW).
    ///
    /// # Errors
    /// ENOLCK if no other thread could be started, and the errors of fcntl(2). EDEADLK is among them.
    pub fn wait(&self, id: FileId, lock: libc::flock, calls: &Calls) -> io::Result<()> {
        let (fd, calls) = (self.fd(id, &lock)?, calls.clone());
        self.call(move |others| {
            if !others {
                return Err(error(libc::ENOLCK));
            }
            calls.call(|| control(fd, FcntlArg::F_SETLKW(&lock)))
        })
    }

    /// Returns a lock of another owner that conflicts with `lock` (F_GETLK).
    ///
    /// # Errors
    /// The errors of fcntl(2).
    pub fn get(&self, id: FileId, mut lock: libc::flock) -> io::Result<libc::flock> {
        let fd = self.fd(id, &lock)?;
        self.call(move |_| {
            without_interruption(|| control(fd, FcntlArg::F_GETLK(&mut lock)))?;
            Ok(lock)
        })
    }

    /// Closes all files, and ends the table. All locks have ended when the receiver gets a value or fails.
    pub fn end(&self) -> Receiver<()> {
        let (closed, result) = sync_channel(1);
        let mut state = lock(&self.0.state);
        if !state.ended {
            state.ended = true;
            let fds: Vec<_> = state.files.drain().flat_map(|(_, file)| file.fds).collect();
            state.tasks.push_back(Box::new(move |_| {
                close_all(fds);
                // The caller may not wait.
                let _ = closed.send(());
            }));
            self.0.changed.notify_all();
        }
        result
    }

    fn fd(&self, id: FileId, flock: &libc::flock) -> io::Result<RawFd> {
        lock(&self.0.state).files.get(&id).and_then(|file| file.fd(flock)).ok_or_else(|| error(libc::EBADF))
    }

    /// Makes a call in a thread of the table.
    fn call<T: Send + 'static>(&self, call: impl FnOnce(bool) -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let (sender, result) = sync_channel(1);
        let mut state = lock(&self.0.state);
        if state.ended {
            return Err(error(libc::EBADF));
        }
        state.tasks.push_back(Box::new(move |others| {
            // The receiver waits for the result.
            let _ = sender.send(call(others));
        }));
        drop(state);
        self.0.changed.notify_one();
        result.recv().unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

impl Drop for FileTable {
    fn drop(&mut self) {
        lock(&self.0.state).ended = true;
        self.0.changed.notify_all();
    }
}

/// The first thread of a table.
pub struct Thread(Arc<Shared>);

impl Thread {
    /// Makes the table's calls until the table ends. This thread must have its own file table.
    pub fn run(self) {
        self.0.run();
    }
}

impl Shared {
    fn run(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                state.ready -= 1;
                let last = state.ready == 0;
                state.ready += usize::from(last);
                drop(state);
                let others = !last || self.start_thread().is_ok();
                if !others {
                    lock(&self.state).ready -= 1;
                }
                task(others);
                state = lock(&self.state);
                state.ready += 1;
            } else if state.ended || state.ready > READY {
                state.ready -= 1;
                return;
            } else {
                state = wait(&self.changed, state);
            }
        }
    }

    /// Starts another thread, which shares the file table of this one.
    fn start_thread(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        let thread = Builder::new().name(Kind::LockOwner.thread_name().to_owned()).stack_size(STACK);
        thread.spawn(move || shared.run()).map(drop)
    }

    /// Copies an fd of the VMM's other threads into the table.
    fn get_fd(&self, number: RawFd) -> io::Result<RawFd> {
        // SAFETY: each table has this pidfd, and does not close it.
        let process = unsafe { BorrowedFd::borrow_raw(self.process) };
        // The fd has no owner in Rust, because another thread could drop the owner, and so close another file.
        Ok(pidfd::get_fd(process, number)?.into_raw_fd())
    }
}

/// Calls fcntl(2) in a thread of a table.
fn control(fd: RawFd, argument: FcntlArg<'_>) -> io::Result<()> {
    // SAFETY: the table does not close the fd of a file that is in use. When the table ends, the number is not reused.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fcntl(fd, argument).map(drop)?)
}

/// Changes locks without waiting.
fn set(fd: RawFd, lock: &libc::flock) -> io::Result<()> {
    without_interruption(|| control(fd, FcntlArg::F_SETLK(lock)))
}

/// Repeats a call that a late signal for an earlier wait of this thread has interrupted.
fn without_interruption(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn close_all(fds: Vec<(RawFd, i32)>) {
    for (fd, _) in fds {
        // The fd is closed in any case.
        let _ = close(fd);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::super::owners::Owners;
    use super::super::table::Owner;
    use super::*;
    use crate::virtio::fs::hanging_fs::{Hanging, enter_mount_namespace};
    use crate::virtio::fs::test_guest::FLUSH;

    fn flock(kind: i32) -> libc::flock {
        libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 }
    }

    /// Returns whether the host can lock a file.
    fn is_free(file: &File) -> bool {
        let free = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK))).is_ok();
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock(libc::F_UNLCK))).unwrap();
        free
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no file tables")]
    fn file_stays_open_until_its_last_node_is_detached() {
        let file = tempfile::tempfile().unwrap();
        let table = Owners::new().unwrap().enter(Owner(1)).unwrap();
        let id = FileId::of(&file).unwrap();
        assert_eq!(table.set(id, flock(libc::F_WRLCK)).unwrap_err().raw_os_error(), Some(libc::EBADF));
        for _ in 0..3 {
            table.attach(id, &file, libc::O_RDWR, Some(flock(libc::F_WRLCK))).unwrap().unwrap();
        }
        table.detach(id, None);
        assert!(!is_free(&file));
        table.detach(id, Some(flock(libc::F_UNLCK)));
        assert!(is_free(&file));
        table.set(id, flock(libc::F_WRLCK)).unwrap();
        assert!(!is_free(&file));
        table.detach(id, None);
        assert!(is_free(&file));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no file tables")]
    fn lock_is_taken_with_an_fd_that_allows_it() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (reader, writer) = (File::open(path.path()).unwrap(), path.reopen().unwrap());
        let table = Owners::new().unwrap().enter(Owner(1)).unwrap();
        let id = FileId::of(&reader).unwrap();
        table.attach(id, &reader, libc::O_RDONLY, Some(flock(libc::F_RDLCK))).unwrap().unwrap();
        assert_eq!(table.set(id, flock(libc::F_WRLCK)).unwrap_err().raw_os_error(), Some(libc::EBADF));
        table.attach(id, &writer, libc::O_RDWR, None).unwrap().unwrap();
        table.set(id, flock(libc::F_WRLCK)).unwrap();
        assert!(!is_free(&writer));
        assert_eq!(i32::from(table.get(id, flock(libc::F_WRLCK)).unwrap().l_type), libc::F_UNLCK);
        table.end().recv().unwrap();
        assert!(is_free(&writer));
        assert_eq!(table.set(id, flock(libc::F_RDLCK)).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no file tables")]
    fn call_that_hangs_does_not_hold_up_other_calls() {
        let file = tempfile::tempfile().unwrap();
        let owners = Owners::new().unwrap();
        let table = owners.enter(Owner(1)).unwrap();
        let id = FileId::of(&file).unwrap();
        table.attach(id, &file, libc::O_RDWR, Some(flock(libc::F_RDLCK))).unwrap().unwrap();
        let (release, hang) = channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        let (hangs, began) = channel();
        let calls: Vec<_> = (0..5)
            .map(|_| {
                let (table, hang, hangs) = (Arc::clone(&table), Arc::clone(&hang), hangs.clone());
                std::thread::spawn(move || {
                    table.call(move |others| {
                        hangs.send(others).unwrap();
                        // The channel is closed when the hang ends.
                        let _ = lock(&hang).recv();
                        Ok(())
                    })
                })
            })
            .collect();
        for _ in &calls {
            assert!(began.recv().unwrap());
        }
        table.set(id, flock(libc::F_WRLCK)).unwrap();
        assert!(!is_free(&file));
        // A table whose calls hang can end its locks.
        owners.clear();
        assert!(is_free(&file));
        drop(release);
        for call in calls {
            call.join().unwrap().unwrap();
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no file tables")]
    fn file_is_not_opened_while_it_is_being_closed() {
        let test = || {
            enter_mount_namespace();
            let base = tempfile::tempdir().unwrap();
            let mut volume = Hanging::mount(&base.path().join("volume"), 0);
            let file = File::options().read(true).write(true).open(base.path().join("volume/file")).unwrap();
            let table = Owners::new().unwrap().enter(Owner(1)).unwrap();
            let id = FileId::of(&file).unwrap();
            let attach = |file| table.attach(id, file, libc::O_RDWR, Some(flock(libc::F_WRLCK))).unwrap().unwrap();
            attach(&file);
            volume.hold(FLUSH);
            std::thread::scope(|scope| {
                scope.spawn(|| table.detach(id, Some(flock(libc::F_UNLCK))));
                assert_eq!(volume.wait_for(1), 1);
                // Another node of the guest.
                let attached = scope.spawn(|| attach(&file));
                std::thread::sleep(Duration::from_millis(50));
                assert!(!attached.is_finished());
                volume.release();
            });
            assert!(!is_free(&file));
            table.detach(id, None);
            assert!(is_free(&file));
        };
        std::thread::spawn(test).join().unwrap();
    }
}
