//! Tests of the file tables in which POSIX locks are taken: deadlocks that involve several guests and the host.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use super::owners::MAX_TABLES;
use super::tests::*;
use crate::config::SeccompMode;
use crate::jail::seccomp;
use crate::virtio::device::VirtioDevice as _;
use crate::virtio::fs::hanging_fs::{Hanging, enter_mount_namespace};
use crate::virtio::fs::test_guest::{FLUSH, OPEN, ROOT, SETLK};

/// The environment variable with the path of the file that the test program for the host locks.
const FILE: &str = "HUSK_TEST_LOCKED_FILE";

/// Waits until the kernel has `count` waits for POSIX or OFD locks of a file.
fn until_blocked(file: &Path, count: usize) {
    let inode = format!(":{} ", std::fs::metadata(file).unwrap().ino());
    let blocked = || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        locks.lines().filter(|line| line.contains("->") && line.contains(&inode)).count()
    };
    let began = Instant::now();
    while blocked() != count {
        assert!(began.elapsed() < Duration::from_secs(60), "{} waits instead of {count}", blocked());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns the tables that the guest's owners use, and the free ones.
fn tables(pod: &Pod) -> (usize, usize) {
    let locks = Arc::clone(pod.guest.bench.lock().server.locks());
    locks.owners.tables()
}

#[test]
fn deadlock_of_two_pods_is_refused() {
    let root = share();
    let file = root.path().join("hello");
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    for round in 0..20 {
        assert_eq!(one.range(1, WRITE_LOCK, (0, 0)), 0);
        assert_eq!(two.range(1, WRITE_LOCK, (1, 1)), 0);
        let unique = one.wait(1, WRITE_LOCK, (1, 1), 0);
        until_blocked(&file, 1);
        let refused = two.wait(1, READ_LOCK, (0, 0), 0);
        assert_eq!(two.guest.answer(), (refused, libc::EDEADLK));
        if round % 2 == 0 {
            assert_eq!(two.range(1, UNLOCK, ALL), 0);
        } else {
            two.flush(two.handle, 1);
        }
        assert_eq!(one.guest.answer(), (unique, 0));
        assert_eq!(two.range(1, READ_LOCK, (0, 0)), libc::EAGAIN);
        one.flush(one.handle, 1);
        assert_eq!((tables(&one), tables(&two)), ((0, 1), (0, 1)));
    }
}

#[test]
fn deadlock_of_three_pods_and_several_files_is_refused() {
    let root = share();
    let (first, second) = (root.path().join("hello"), root.path().join("other"));
    std::fs::write(&second, b"x").unwrap();
    let mut pods = [Pod::new(root.path()), Pod::new(root.path()), Pod::new(root.path())];
    let [one, two, three] = &mut pods;
    assert_eq!(one.range(1, WRITE_LOCK, (0, 0)), 0);
    assert_eq!(two.range(1, WRITE_LOCK, (1, 1)), 0);
    // The process of the third pod has a lock of another file, for which the first pod waits.
    let other = (three.node, three.handle);
    three.reopen("other");
    assert_eq!(three.range(1, WRITE_LOCK, ALL), 0);
    (three.node, three.handle) = other;
    let two_waits = two.wait(1, WRITE_LOCK, (0, 0), 0);
    until_blocked(&first, 1);
    one.reopen("other");
    let one_waits = one.wait(1, READ_LOCK, (5, 9), 0);
    until_blocked(&second, 1);
    let refused = three.wait(1, WRITE_LOCK, (1, 1), 0);
    assert_eq!(three.guest.answer(), (refused, libc::EDEADLK));
    // Another process of the same pod is not part of the deadlock.
    let three_waits = three.wait(2, WRITE_LOCK, (1, 1), 0);
    until_blocked(&first, 2);
    three.reopen("other");
    three.flush(three.handle, 1);
    assert_eq!(one.guest.answer(), (one_waits, 0));
    one.guest.bench.lock().reset();
    one.guest.bench.activate(0);
    one.guest.init();
    assert_eq!(two.guest.answer(), (two_waits, 0));
    two.flush(two.handle, 1);
    assert_eq!(three.guest.answer(), (three_waits, 0));
}

#[test]
fn locks_of_processes_and_open_files_exclude_each_other() {
    let root = share();
    let file = root.path().join("hello");
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    assert_eq!(one.set(one.handle, 1, WRITE_LOCK, (0, 0), OPEN_FILE), 0);
    assert_eq!(one.range(2, WRITE_LOCK, (0, 0)), libc::EAGAIN);
    assert_eq!(two.range(1, WRITE_LOCK, (0, 0)), libc::EAGAIN);
    assert_eq!(two.range(1, WRITE_LOCK, (1, 1)), 0);
    assert_eq!(one.set(one.handle, 1, WRITE_LOCK, (1, 1), OPEN_FILE), libc::EAGAIN);
    // As on one kernel, a request for a lock of an open file is not checked for a deadlock.
    let waits = two.wait(1, WRITE_LOCK, (0, 0), 0);
    until_blocked(&file, 1);
    let unique = one.wait(1, WRITE_LOCK, (1, 1), OPEN_FILE);
    until_blocked(&file, 2);
    two.guest.interrupt(waits);
    assert_eq!(two.guest.answer(), (waits, libc::EINTR));
    // As on one kernel, the request of a process is checked, and an open file can wait for a process.
    let refused = two.wait(1, WRITE_LOCK, (0, 0), 0);
    assert_eq!(two.guest.answer(), (refused, libc::EDEADLK));
    assert_eq!(two.range(1, UNLOCK, ALL), 0);
    assert_eq!(one.guest.answer(), (unique, 0));
    // Only processes have tables.
    assert_eq!((tables(&one), tables(&two)), ((0, 1), (0, 1)));
}

#[test]
fn process_changes_its_locks_while_one_of_its_threads_waits() {
    let root = share();
    let file = root.path().join("hello");
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    assert_eq!(one.range(1, WRITE_LOCK, (0, 0)), 0);
    assert_eq!(two.range(1, WRITE_LOCK, (1, 1)), 0);
    let unique = one.wait(1, WRITE_LOCK, (1, 1), 0);
    until_blocked(&file, 1);
    let again = one.wait(1, READ_LOCK, (1, 2), 0);
    until_blocked(&file, 2);
    assert_eq!(one.range(1, WRITE_LOCK, (5, 5)), 0);
    assert_eq!(two.range(2, WRITE_LOCK, (5, 5)), libc::EAGAIN);
    assert_eq!(one.range(1, UNLOCK, (0, 0)), 0);
    assert_eq!(two.range(1, WRITE_LOCK, (0, 0)), 0);
    // The close ends the locks, but not the waits.
    one.flush(one.handle, 1);
    assert_eq!(two.range(2, WRITE_LOCK, (5, 5)), 0);
    one.guest.interrupt(unique);
    assert_eq!(one.guest.answer(), (unique, libc::EINTR));
    until_blocked(&file, 1);
    two.flush(two.handle, 1);
    assert_eq!(one.guest.answer(), (again, 0));
    assert_eq!(two.get(1, WRITE_LOCK, (0, 2)), (READ_LOCK, 1, 2, 0));
    one.release(one.handle);
    assert_eq!(two.range(1, WRITE_LOCK, (0, 2)), 0);
    assert_eq!(tables(&one), (0, 1));
}

#[test]
fn processes_beyond_the_limit_of_tables_have_locks_without_tables() {
    let root = share();
    let file = root.path().join("hello");
    let (mut one, mut two) = (Pod::new(root.path()), Pod::new(root.path()));
    let limit = MAX_TABLES as u64;
    for owner in 1..=limit + 2 {
        assert_eq!(one.range(owner, WRITE_LOCK, (owner, owner)), 0);
    }
    assert_eq!(tables(&one).0, MAX_TABLES);
    let (first, second) = (limit + 1, limit + 2);
    assert_eq!(two.range(1, READ_LOCK, (first, first)), libc::EAGAIN);
    assert_eq!(one.get(1, READ_LOCK, (first, first)), (WRITE_LOCK, first, first, first as u32 + 1000));
    assert_eq!(one.get(first, READ_LOCK, (1, 1)), (WRITE_LOCK, 1, 1, 1001));
    // A deadlock within the guest is found, whether its processes have tables or not.
    for holder in [second, 1] {
        let waits = one.wait(first, WRITE_LOCK, (holder, holder), 0);
        until_blocked(&file, 1);
        let refused = one.wait(holder, WRITE_LOCK, (first, first), 0);
        assert_eq!(one.guest.answer(), (refused, libc::EDEADLK));
        one.guest.interrupt(waits);
        assert_eq!(one.guest.answer(), (waits, libc::EINTR));
    }
    // A deadlock with another guest is not found if the process without a table makes the last request.
    assert_eq!(two.range(1, WRITE_LOCK, (0, 0)), 0);
    let unique = two.wait(1, WRITE_LOCK, (first, first), 0);
    until_blocked(&file, 1);
    let waits = one.wait(first, WRITE_LOCK, (0, 0), 0);
    until_blocked(&file, 2);
    two.guest.interrupt(unique);
    assert_eq!(two.guest.answer(), (unique, libc::EINTR));
    let refused = two.wait(1, WRITE_LOCK, (first, first), 0);
    assert_eq!(two.guest.answer(), (refused, libc::EDEADLK));
    two.flush(two.handle, 1);
    assert_eq!(one.guest.answer(), (waits, 0));
    // The tables can be used again.
    for owner in 1..=second {
        one.flush(one.handle, owner);
    }
    assert_eq!(tables(&one).0, 0);
    assert_eq!(two.range(1, WRITE_LOCK, ALL), 0);
    assert_eq!(two.range(1, UNLOCK, ALL), 0);
    assert_eq!(one.range(first, WRITE_LOCK, ALL), 0);
    assert_eq!(tables(&one).0, 1);
    // INIT of the next driver ends all locks.
    one.guest.init();
    assert_eq!(two.range(1, WRITE_LOCK, ALL), 0);
    assert_eq!(tables(&one), (0, 0));
}

#[test]
fn process_whose_file_system_hangs_locks_files_of_others() {
    let test = || {
        enter_mount_namespace();
        let root = share();
        let mut volume = Hanging::mount(&root.path().join("volume"), 0);
        let mut pod = Pod::new(root.path());
        let (node, handle) = (pod.node, pod.handle);
        let directory = pod.guest.lookup(ROOT, "volume");
        let file = pod.guest.lookup(directory, "file");
        let opened = pod.guest.open(OPEN, file, libc::O_RDONLY);
        (pod.node, pod.handle) = (file, opened);
        assert_eq!(pod.range(1, READ_LOCK, ALL), 0);
        // The close of the file in the table hangs.
        volume.hold(FLUSH);
        let body = body(opened, 1, UNLOCK, ALL, 0);
        let unique = pod.guest.send(SETLK, file, &body);
        assert_eq!(volume.wait_for(1), 1);
        (pod.node, pod.handle) = (node, handle);
        for owner in [1, 2] {
            assert_eq!(pod.range(owner, WRITE_LOCK, (owner, owner)), 0);
            assert_eq!(pod.range(3, WRITE_LOCK, (owner, owner)), libc::EAGAIN);
            pod.flush(handle, owner);
        }
        volume.release();
        assert_eq!(pod.guest.answer(), (unique, 0));
        assert_eq!(tables(&pod).0, 0);
    };
    std::thread::spawn(test).join().unwrap();
}

/// A process of the host that has the POSIX lock of byte 1.
struct HostProcess {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl HostProcess {
    fn start(file: &Path) -> Self {
        let test = "virtio::fs::locks::deadlock_tests::process_of_the_host";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(FILE, file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut this = Self { child, lines };
        assert_eq!(this.result(), 0);
        this
    }

    /// Returns the errno of the next call. The test harness writes other lines.
    fn result(&mut self) -> i32 {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the process has ended");
            if let Some((_, errno)) = line.split_once("errno ") {
                return errno.trim().parse().unwrap();
            }
        }
    }

    /// Makes the process wait for byte 0.
    fn wait_for_lock(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the program of the test `deadlock_of_a_pod_and_the_host_is_refused`"]
fn process_of_the_host() {
    let Some(path) = std::env::var_os(FILE) else { return };
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let take = |byte, argument: fn(&libc::flock) -> FcntlArg<'_>| {
        let lock = libc::flock { l_type: WRITE_LOCK as i16, l_whence: 0, l_start: byte, l_len: 1, l_pid: 0 };
        println!("errno {}", fcntl(file.as_fd(), argument(&lock)).err().map_or(0, |errno| errno as i32));
    };
    take(1, |lock| FcntlArg::F_SETLK(lock));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    take(0, |lock| FcntlArg::F_SETLKW(lock));
    std::io::stdin().read_line(&mut line).unwrap();
}

#[test]
fn deadlock_of_a_pod_and_the_host_is_refused() {
    let root = share();
    let file = root.path().join("hello");
    let mut pod = Pod::new(root.path());
    assert_eq!(pod.range(1, WRITE_LOCK, (0, 0)), 0);
    // The host waits first.
    let mut host = HostProcess::start(&file);
    assert_eq!(pod.get(1, READ_LOCK, (0, 5)), (WRITE_LOCK, 1, 1, 0));
    host.wait_for_lock();
    until_blocked(&file, 1);
    let refused = pod.wait(1, WRITE_LOCK, (1, 1), 0);
    assert_eq!(pod.guest.answer(), (refused, libc::EDEADLK));
    assert_eq!(pod.range(1, UNLOCK, (0, 0)), 0);
    assert_eq!(host.result(), 0);
    drop(host);
    // The pod waits first.
    assert_eq!(pod.range(1, WRITE_LOCK, (0, 0)), 0);
    let mut host = HostProcess::start(&file);
    let unique = pod.wait(1, WRITE_LOCK, (1, 1), 0);
    until_blocked(&file, 1);
    host.wait_for_lock();
    assert_eq!(host.result(), libc::EDEADLK);
    drop(host);
    assert_eq!(pod.guest.answer(), (unique, 0));
    // The host sees the VMM's process as the holder.
    let mut found = libc::flock { l_type: WRITE_LOCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(on_host(root.path()).as_fd(), FcntlArg::F_GETLK(&mut found)).unwrap();
    assert_eq!(found.l_pid.unsigned_abs(), std::process::id());
}

#[test]
#[ignore = "the program of the test `locks_need_no_call_that_the_filters_refuse`"]
fn pods_with_filters() {
    seccomp::prepare(SeccompMode::Enforce).unwrap();
    deadlock_of_two_pods_is_refused();
    process_changes_its_locks_while_one_of_its_threads_waits();
    processes_beyond_the_limit_of_tables_have_locks_without_tables();
}

#[test]
fn locks_need_no_call_that_the_filters_refuse() {
    // The filters expect a VMM with the PID 1. A thread that makes another call ends the process.
    let ended = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "virtio::fs::locks::deadlock_tests::pods_with_filters", "--ignored"])
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
    assert!(ended.status.success() && output.contains("1 passed"), "{output}");
}
