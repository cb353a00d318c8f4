//! Tests of locks: two guests share a directory with each other and with the host.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use husk_base::sys::file_lock::{Flock, flock};
use nix::fcntl::{FcntlArg, fcntl};
use virtiofsd::fuse::{FileLock, LkIn};

use super::Answer;
use crate::virtio::device::VirtioDevice as _;
use crate::virtio::fs::test_guest::*;

pub const READ_LOCK: i32 = libc::F_RDLCK;
pub const WRITE_LOCK: i32 = libc::F_WRLCK;
pub const UNLOCK: i32 = libc::F_UNLCK;
pub const ALL: (u64, u64) = (0, i64::MAX as u64);
const FLOCK: u32 = 1;
pub const OPEN_FILE: u32 = 1 << 31;

/// A guest that has the file `hello` open.
pub struct Pod {
    pub guest: Guest,
    pub node: u64,
    pub handle: u64,
}

impl Pod {
    pub fn new(share: &Path) -> Self {
        let mut guest = Guest::with_share(share, 2);
        guest.init();
        let node = guest.lookup(ROOT, "hello");
        let handle = guest.open(OPEN, node, libc::O_RDWR);
        Self { guest, node, handle }
    }

    /// Opens another file of the share instead of `hello`.
    pub fn reopen(&mut self, name: &str) {
        self.node = self.guest.lookup(ROOT, name);
        self.handle = self.guest.open(OPEN, self.node, libc::O_RDWR);
    }

    pub fn open(&mut self, flags: i32) -> u64 {
        self.guest.open(OPEN, self.node, flags)
    }

    /// Changes a lock with SETLK. Returns the errno.
    pub fn set(&mut self, handle: u64, owner: u64, kind: i32, range: (u64, u64), flags: u32) -> i32 {
        self.guest.error(SETLK, self.node, &body(handle, owner, kind, range, flags))
    }

    pub fn range(&mut self, owner: u64, kind: i32, range: (u64, u64)) -> i32 {
        self.set(self.handle, owner, kind, range, 0)
    }

    fn flock(&mut self, handle: u64, kind: i32) -> i32 {
        self.set(handle, handle, kind, ALL, FLOCK)
    }

    /// Sends SETLKW, which is expected to wait. Returns its unique id.
    pub fn wait(&mut self, owner: u64, kind: i32, range: (u64, u64), flags: u32) -> u64 {
        self.guest.send(SETLKW, self.node, &body(self.handle, owner, kind, range, flags))
    }

    /// Returns the lock that conflicts with a lock: type, first byte, last byte, PID.
    pub fn get(&mut self, owner: u64, kind: i32, range: (u64, u64)) -> (i32, u64, u64, u32) {
        let (error, lock) = self.guest.call(GETLK, self.node, &body(self.handle, owner, kind, range, 0), 64);
        assert_eq!(error, 0);
        let word = |at: usize| u32::from_le_bytes(lock[at..at + 4].try_into().unwrap());
        (word(16) as i32, u64_at(&lock, 0), u64_at(&lock, 8), word(20))
    }

    pub fn flush(&mut self, handle: u64, owner: u64) {
        assert_eq!(self.guest.error(FLUSH, self.node, &longs([handle, 0, owner])), 0);
    }

    pub fn release(&mut self, handle: u64) {
        assert_eq!(self.guest.error(RELEASE, self.node, &longs([handle, 0, 0])), 0);
    }

    /// Waits until `count` requests of this guest wait.
    pub fn until_waiting(&mut self, count: usize) {
        let device = self.guest.bench.device.clone();
        let waits = move || device.lock().unwrap().server.lock_waits();
        self.guest.bench.run_until(|_| waits() == count);
    }
}

/// Encodes `struct fuse_lk_in`. The PID is the owner's number plus 1000.
pub fn body(handle: u64, owner: u64, kind: i32, range: (u64, u64), flags: u32) -> Vec<u8> {
    [longs([handle, owner, range.0, range.1]), words([kind as u32, owner as u32 + 1000, flags, 0])].concat()
}

pub fn share() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("hello"), b"content").unwrap();
    root
}

pub fn on_host(root: &Path) -> File {
    File::options().read(true).write(true).open(root.join("hello")).unwrap()
}

/// Takes a POSIX lock of this process on a byte range of the host's file.
fn host_lock(file: &File, kind: i32, start: i64, len: i64) -> nix::Result<i32> {
    let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock))
}

#[test]
fn flock_holds_between_pods_and_with_the_host() {
    let root = share();
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    let (first, second) = (one.handle, two.handle);
    assert_eq!(one.flock(first, READ_LOCK), 0);
    assert_eq!(two.flock(second, READ_LOCK), 0);
    assert_eq!(two.flock(second, WRITE_LOCK), libc::EAGAIN);
    one.release(first);
    assert_eq!(two.flock(second, WRITE_LOCK), 0);
    // Within a guest, flock(2) locks of two open files exclude each other.
    let again = two.open(libc::O_RDONLY);
    assert_eq!(two.flock(again, READ_LOCK), libc::EAGAIN);
    let host = on_host(root.path());
    assert!(flock(&host, Flock::Shared, false).is_err());
    assert_eq!(two.flock(second, UNLOCK), 0);
    flock(&host, Flock::Exclusive, false).unwrap();
    assert_eq!(two.flock(second, READ_LOCK), libc::EAGAIN);
}

#[test]
fn range_locks_hold_between_processes_pods_and_the_host() {
    let root = share();
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    assert_eq!(one.range(1, WRITE_LOCK, (0, 9)), 0);
    // Another process of the same guest, another guest, and the host.
    assert_eq!(one.range(2, READ_LOCK, (5, 20)), libc::EAGAIN);
    assert_eq!(two.range(1, READ_LOCK, (9, 9)), libc::EAGAIN);
    assert_eq!(two.range(1, WRITE_LOCK, (10, ALL.1)), 0);
    let host = on_host(root.path());
    assert_eq!(host_lock(&host, READ_LOCK, 0, 1), Err(nix::errno::Errno::EAGAIN));
    // The owner may change its locks.
    assert_eq!(one.range(1, READ_LOCK, (0, 4)), 0);
    assert_eq!(one.range(2, READ_LOCK, (0, 4)), 0);
    assert_eq!(host_lock(&host, READ_LOCK, 0, 5), Ok(0));
    assert_eq!(one.range(1, WRITE_LOCK, (0, 4)), libc::EAGAIN);
    assert_eq!(one.range(1, UNLOCK, (0, 9)), 0);
    assert_eq!(host_lock(&host, WRITE_LOCK, 5, 5), Ok(0));
    drop(host);
    assert_eq!(one.range(2, WRITE_LOCK, (0, 9)), 0);
}

#[test]
fn getlk_reports_the_holder_with_its_pid_in_the_guest() {
    let root = share();
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    assert_eq!(one.get(1, WRITE_LOCK, ALL).0, UNLOCK);
    assert_eq!(one.range(1, WRITE_LOCK, (3, 8)), 0);
    assert_eq!(one.get(1, WRITE_LOCK, ALL).0, UNLOCK);
    assert_eq!(one.get(2, READ_LOCK, ALL), (WRITE_LOCK, 3, 8, 1001));
    assert_eq!(one.get(2, READ_LOCK, (0, 2)).0, UNLOCK);
    // The kernel of another guest does not know the PID.
    assert_eq!(two.get(1, READ_LOCK, ALL), (WRITE_LOCK, 3, 8, 0));
    assert_eq!(two.range(1, READ_LOCK, (20, ALL.1)), 0);
    assert_eq!(one.get(1, WRITE_LOCK, (10, 30)), (READ_LOCK, 20, ALL.1, 0));
}

#[test]
fn close_ends_the_locks_of_the_process_or_open_file() {
    let root = share();
    let mut pod = Pod::new(root.path());
    let host = on_host(root.path());
    let (handle, other) = (pod.handle, pod.open(libc::O_RDONLY));
    let free = |host: &File| {
        let free = host_lock(host, WRITE_LOCK, 0, 0).is_ok();
        host_lock(host, UNLOCK, 0, 0).unwrap();
        free
    };
    // The close of any file of the process ends its locks.
    assert_eq!(pod.set(handle, 1, WRITE_LOCK, ALL, 0), 0);
    pod.flush(other, 2);
    assert!(!free(&host));
    pod.flush(other, 1);
    assert!(free(&host));
    // Locks of an open file end when the file is released.
    assert_eq!(pod.set(handle, 5, WRITE_LOCK, ALL, OPEN_FILE), 0);
    pod.flush(handle, 1);
    pod.release(other);
    assert!(!free(&host));
    pod.release(handle);
    assert!(free(&host));
}

#[test]
fn locks_end_with_the_guest() {
    let root = share();
    let mut pod = Pod::new(root.path());
    assert_eq!(pod.range(1, WRITE_LOCK, ALL), 0);
    assert_eq!(pod.flock(pod.handle, WRITE_LOCK), 0);
    let host = on_host(root.path());
    assert!(host_lock(&host, WRITE_LOCK, 0, 0).is_err() && flock(&host, Flock::Exclusive, false).is_err());
    // INIT of the next driver forgets everything that the last one had.
    pod.guest.init();
    host_lock(&host, WRITE_LOCK, 0, 0).unwrap();
    flock(&host, Flock::Exclusive, false).unwrap();
}

#[test]
fn lock_through_a_read_only_handle_does_not_open_the_file_for_writing() {
    let root = share();
    let mut pod = Pod::new(root.path());
    let (reader, writer) = (pod.open(libc::O_RDONLY), pod.open(libc::O_WRONLY));
    assert_eq!(pod.set(reader, 1, READ_LOCK, (0, 9), 0), 0);
    assert_eq!(pod.set(reader, 1, READ_LOCK, (20, 29), 0), 0);
    assert_eq!(pod.set(reader, 1, WRITE_LOCK, (0, 9), 0), libc::EBADF);
    assert_eq!(pod.set(writer, 1, READ_LOCK, (0, 9), 0), libc::EBADF);
    // The locks stay when the same process needs a description that is open for writing.
    assert_eq!(pod.set(writer, 1, WRITE_LOCK, (5, 24), 0), 0);
    let host = on_host(root.path());
    for byte in 0..32 {
        let held = match byte {
            0..5 | 25..30 => READ_LOCK,
            5..25 => WRITE_LOCK,
            _ => UNLOCK,
        };
        let result = host_lock(&host, READ_LOCK, byte, 1);
        assert_eq!(result.is_ok(), held != WRITE_LOCK, "byte {byte}");
        host_lock(&host, UNLOCK, byte, 1).unwrap();
        assert_eq!(host_lock(&host, WRITE_LOCK, byte, 1).is_ok(), held == UNLOCK, "byte {byte}");
        host_lock(&host, UNLOCK, byte, 1).unwrap();
    }
}

#[test]
fn wait_ends_when_the_lock_is_free() {
    let root = share();
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    let host = on_host(root.path());
    for flags in [0, FLOCK, OPEN_FILE] {
        let (first, second) = (one.handle, two.handle);
        let set = |pod: &mut Pod, handle, kind| assert_eq!(pod.set(handle, 1, kind, ALL, flags), 0);
        // Another guest has the lock.
        set(&mut one, first, WRITE_LOCK);
        let unique = two.wait(1, WRITE_LOCK, ALL, flags);
        two.until_waiting(1);
        // The worker threads serve other requests.
        for _ in 0..3 {
            two.guest.read_hello();
        }
        set(&mut one, first, UNLOCK);
        assert_eq!(two.guest.answer(), (unique, 0));
        assert_eq!(one.set(first, 1, READ_LOCK, ALL, flags), libc::EAGAIN);
        // The holder releases the lock.
        let unique = one.wait(1, READ_LOCK, ALL, flags);
        one.until_waiting(1);
        set(&mut two, second, UNLOCK);
        assert_eq!(one.guest.answer(), (unique, 0));
        set(&mut one, first, UNLOCK);
        // The host has the lock.
        if flags == FLOCK {
            flock(&host, Flock::Exclusive, false).unwrap();
        } else {
            host_lock(&host, WRITE_LOCK, 0, 0).unwrap();
        }
        let unique = two.wait(1, READ_LOCK, ALL, flags);
        two.until_waiting(1);
        flock(&host, Flock::Unlock, false).unwrap();
        host_lock(&host, UNLOCK, 0, 0).unwrap();
        assert_eq!(two.guest.answer(), (unique, 0));
        set(&mut two, second, UNLOCK);
        set(&mut one, first, WRITE_LOCK);
        set(&mut one, first, UNLOCK);
    }
}

#[test]
fn processes_of_one_guest_wait_for_each_other() {
    let root = share();
    let mut pod = Pod::new(root.path());
    assert_eq!(pod.range(1, WRITE_LOCK, ALL), 0);
    let waits: Vec<u64> = (2..12).map(|owner| pod.wait(owner, READ_LOCK, ALL, 0)).collect();
    pod.until_waiting(10);
    pod.flush(pod.handle, 1);
    let mut answers: Vec<_> = waits.iter().map(|_| pod.guest.answer()).collect();
    answers.sort_unstable();
    assert_eq!(answers, waits.iter().map(|&unique| (unique, 0)).collect::<Vec<_>>());
    assert_eq!(pod.range(1, READ_LOCK, ALL), 0);
    assert_eq!(pod.range(1, WRITE_LOCK, ALL), libc::EAGAIN);
}

#[test]
fn interrupt_ends_a_wait() {
    let root = share();
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    let began = Instant::now();
    for flags in [0, FLOCK] {
        assert_eq!(one.set(one.handle, 1, WRITE_LOCK, ALL, flags), 0);
        for round in 0..200 {
            let unique = two.wait(1, WRITE_LOCK, ALL, flags);
            // In every other round, the interrupt can arrive before the request waits, or while its thread is about to
            // enter the system call.
            if round % 2 == 0 {
                two.until_waiting(1);
            }
            two.guest.interrupt(unique);
            assert_eq!(two.guest.answer(), (unique, libc::EINTR));
        }
    }
    assert!(began.elapsed() < Duration::from_secs(60));
    two.until_waiting(0);
    for flags in [0, FLOCK] {
        assert_eq!(one.set(one.handle, 1, UNLOCK, ALL, flags), 0);
        assert_eq!(two.set(two.handle, 1, WRITE_LOCK, ALL, flags), 0);
    }
}

#[test]
fn deadlock_of_processes_is_refused() {
    let root = share();
    let mut pod = Pod::new(root.path());
    assert_eq!(pod.range(1, WRITE_LOCK, (0, 0)), 0);
    assert_eq!(pod.range(2, WRITE_LOCK, (1, 1)), 0);
    let unique = pod.wait(1, WRITE_LOCK, (1, 1), 0);
    pod.until_waiting(1);
    let refused = pod.wait(2, READ_LOCK, (0, 0), 0);
    assert_eq!(pod.guest.answer(), (refused, libc::EDEADLK));
    assert_eq!(pod.range(2, UNLOCK, ALL), 0);
    assert_eq!(pod.guest.answer(), (unique, 0));
}

#[test]
fn reset_and_pause_do_not_wait_for_locks() {
    let root = share();
    let mut pod = Pod::new(root.path());
    let host = on_host(root.path());
    flock(&host, Flock::Exclusive, false).unwrap();
    let unique = pod.wait(1, WRITE_LOCK, ALL, FLOCK);
    pod.until_waiting(1);
    pod.guest.bench.lock().pause();
    flock(&host, Flock::Unlock, false).unwrap();
    // The lock is granted during the pause. The answer comes after the pause.
    std::thread::sleep(Duration::from_millis(50));
    assert!(pod.guest.bench.queues[1].poll().is_none());
    pod.guest.bench.lock().resume();
    assert_eq!(pod.guest.answer(), (unique, 0));
    let other = pod.open(libc::O_RDONLY);
    let wait = body(other, 2, READ_LOCK, ALL, FLOCK);
    pod.guest.send(SETLKW, pod.node, &wait);
    pod.until_waiting(1);
    let (idle, is_idle) = channel();
    pod.guest.bench.lock().reset();
    pod.guest.bench.lock().when_idle(Box::new(move || idle.send(()).unwrap()));
    is_idle.recv_timeout(Duration::from_secs(10)).unwrap();
    pod.until_waiting(0);
    assert!(pod.guest.bench.queues[1].poll().is_none());
}

#[test]
fn worker_begins_no_wait_after_a_reset() {
    let root = share();
    let mut pod = Pod::new(root.path());
    let host = on_host(root.path());
    flock(&host, Flock::Exclusive, false).unwrap();
    host_lock(&host, WRITE_LOCK, 0, 0).unwrap();
    let locks = Arc::clone(pod.guest.bench.lock().server.locks());
    let wait = |pod: &Pod, flags: u32| {
        let lk = FileLock { start: 0, end: ALL.1, type_: WRITE_LOCK.cast_unsigned(), pid: 1 };
        let request = LkIn { fh: pod.handle, owner: 1, lk, lk_flags: flags, ..LkIn::default() };
        locks.set(pod.node, 1000, &request, Some(|| -> Answer { Box::new(|_| {}) }))
    };
    // A worker has taken the request before the reset, and begins the wait afterwards.
    pod.guest.bench.lock().reset();
    for flags in [0, FLOCK] {
        assert_eq!(wait(&pod, flags).map(|result| result.unwrap_err().raw_os_error()), Some(Some(libc::EINTR)));
    }
    // The requests of the next activation wait.
    pod.guest.bench.activate(0);
    assert!(wait(&pod, FLOCK).is_none());
    pod.until_waiting(1);
}

#[test]
fn guest_keeps_the_locks_of_private_mounts_to_itself() {
    let root = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for (directory, private) in [
        ("pod/rootfs", true),
        ("pod/rootfs/etc", true),
        ("pod/other/rootfs", false),
        (".volumes/0.fd-1-2-private", true),
        (".volumes/0.fd-1-2-private/a/b", true),
        (".volumes/1.fd-1-3-f", false),
        (".volumes/1.fd-1-3-f/x-private", false),
        ("x-private", false),
    ] {
        std::fs::create_dir_all(root.path().join(directory)).unwrap();
        std::fs::write(root.path().join(directory).join("file"), b"x").unwrap();
        expected.push((directory, private));
    }
    let mut guest = Guest::with_share(root.path(), 1);
    guest.init();
    for (directory, private) in expected {
        let directory = directory.split('/').fold(ROOT, |node, name| guest.lookup(node, name));
        let node = guest.lookup(directory, "file");
        let (error, opened) = guest.call(OPEN, node, &words([libc::O_RDWR as u32, 0]), 16);
        assert_eq!((error, opened[11] & 0x80 != 0), (0, private), "{directory}");
        let create = [words([libc::O_RDWR as u32, 0o644, 0, 0]), b"new\0".to_vec()].concat();
        let (error, created) = guest.call(CREATE, directory, &create, 144);
        assert_eq!((error, created[128 + 11] & 0x80 != 0), (0, private), "{directory}");
    }
}

#[test]
fn invalid_requests_are_rejected() {
    let root = share();
    let mut pod = Pod::new(root.path());
    let handle = pod.handle;
    for flags in [0, FLOCK] {
        assert_eq!(pod.set(handle, 1, 7, ALL, flags), libc::EINVAL);
        assert_eq!(pod.set(handle + 1, 1, WRITE_LOCK, ALL, flags), libc::EBADF);
    }
    for range in [(1, 0), (0, 1 << 63), (1 << 63, u64::MAX)] {
        assert_eq!(pod.range(1, WRITE_LOCK, range), libc::EINVAL);
    }
    for opcode in [GETLK, SETLK, SETLKW] {
        assert_eq!(pod.guest.error(opcode, pod.node, &[0; 47]), libc::EINVAL);
        assert_eq!(pod.guest.error(opcode, pod.node + 1, &body(handle, 1, WRITE_LOCK, ALL, 0)), libc::EBADF);
    }
    assert_eq!(pod.guest.error(GETLK, pod.node, &body(handle, 1, UNLOCK, ALL, 0)), libc::EINVAL);
    pod.guest.read_hello();
}
