//! Tests with a file system of the host that hangs: only the requests for this file system wait.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::hanging_fs::{Ext4, Hanging, enter_mount_namespace};
use super::test_guest::*;
use crate::virtio::device::VirtioDevice as _;

/// Runs `test` with a share that has the file `hello`, in a separate mount namespace. The directory of the share is
/// `share` in the directory that `test` gets.
fn with_share(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = thread::spawn(move || {
        enter_mount_namespace();
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(share_of(base.path())).unwrap();
        fs::write(share_of(base.path()).join("hello"), b"content").unwrap();
        test(base.path());
    });
    thread.join().unwrap();
}

fn share_of(base: &Path) -> PathBuf {
    base.join("share")
}

/// Returns a guest with two workers that has opened a file in the directory `volume` of its share. Also returns the
/// file's node and handle.
fn guest_with_open_file(base: &Path) -> (Guest, u64, u64) {
    let mut guest = Guest::with_share(&share_of(base), 2);
    guest.init();
    let volume = guest.lookup(ROOT, "volume");
    let node = guest.lookup(volume, "file");
    let handle = guest.open(OPEN, node, libc::O_RDONLY);
    (guest, node, handle)
}

/// Sends a READ, and does not wait for the answer.
fn send_read(guest: &mut Guest, node: u64, handle: u64) {
    let mut request = guest.header(READ, node, 40);
    request.extend(longs([handle, 0]));
    request.extend(words([4096, 0, 0, 0, 0, 0]));
    guest.bench.queues[1].add(&[&request], &[4096 + 16]);
}

/// Waits for `count` answers. Returns their errors and data.
fn answers(guest: &mut Guest, count: usize) -> Vec<(i32, Vec<u8>)> {
    let mut answers = Vec::new();
    guest.bench.run_until(|queues| {
        let answer = queues[1].poll().map(|(_, bytes)| bytes);
        answers
            .extend(answer.map(|bytes| (-i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..].to_vec())));
        answers.len() == count
    });
    answers
}

#[test]
fn requests_for_other_file_systems_are_served_while_one_hangs() {
    with_share(|base| {
        let mut volume = Hanging::mount(&share_of(base).join("volume"), READ);
        let (mut guest, node, handle) = guest_with_open_file(base);
        // More requests than a mount may have workers. The device starts with two workers.
        for _ in 0..20 {
            send_read(&mut guest, node, handle);
        }
        assert_eq!(volume.wait_for(8), 8);
        for _ in 0..3 {
            guest.read_hello();
        }
        thread::sleep(Duration::from_millis(300));
        assert_eq!(volume.wait_for(8), 8);
        volume.release();
        assert_eq!(answers(&mut guest, 20), vec![(0, b"content".to_vec()); 20]);
        guest.read_hello();
        // The additional workers end.
        for _ in 0..200 {
            if guest.bench.lock().workers.added() == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("{} additional workers are left", guest.bench.lock().workers.added());
    });
}

#[test]
fn stuck_file_system_leaves_descriptors_for_others() {
    with_share(|base| {
        let mut volume = Hanging::mount(&share_of(base).join("volume"), READ);
        let (mut guest, node, handle) = guest_with_open_file(base);
        // The queue has 128 descriptors, and a request has two. 8 requests are served, and 37 are held.
        for _ in 0..45 {
            send_read(&mut guest, node, handle);
        }
        assert_eq!(answers(&mut guest, 5), vec![(libc::EIO, Vec::new()); 5]);
        guest.read_hello();
        send_read(&mut guest, node, handle);
        assert_eq!(answers(&mut guest, 1), [(libc::EIO, Vec::new())]);
        volume.release();
        assert_eq!(answers(&mut guest, 40), vec![(0, b"content".to_vec()); 40]);
    });
}

#[test]
fn close_that_hangs_does_not_stop_requests_for_other_file_systems() {
    with_share(|base| {
        let mut volume = Hanging::mount(&share_of(base).join("volume"), FLUSH);
        let (mut guest, node, handle) = guest_with_open_file(base);
        let mut request = guest.header(RELEASE, node, 24);
        request.extend(longs([handle, 0, 0]));
        guest.bench.queues[1].add(&[&request], &[16]);
        assert_eq!(volume.wait_for(1), 1);
        guest.read_hello();
        volume.release();
        assert_eq!(answers(&mut guest, 1), [(0, Vec::new())]);
    });
}

#[test]
fn close_of_a_file_with_locks_that_hangs_does_not_stop_requests_for_other_file_systems() {
    with_share(|base| {
        let mut volume = Hanging::mount(&share_of(base).join("volume"), FLUSH);
        let (mut guest, node, handle) = guest_with_open_file(base);
        // `struct fuse_lk_in`. The device opens the file once more for the lock, and closes it after the unlock.
        let lock = |kind: i32| [longs([handle, 1, 0, 9]), words([kind.cast_unsigned(), 1, 0, 0])].concat();
        assert_eq!(guest.error(SETLK, node, &lock(libc::F_RDLCK)), 0);
        guest.send(SETLK, node, &lock(libc::F_UNLCK));
        assert_eq!(volume.wait_for(1), 1);
        guest.read_hello();
        volume.release();
        assert_eq!(answers(&mut guest, 1), [(0, Vec::new())]);
    });
}

#[test]
fn guest_can_drop_its_cache_while_a_server_does_not_answer() {
    with_share(|base| {
        let volume = Hanging::mount(&share_of(base).join("volume"), 0);
        let mut guest = Guest::with_share(&share_of(base), 2);
        guest.init();
        let directory = guest.lookup(ROOT, "volume");
        let nodes: Vec<u64> = (0..20).map(|number| guest.lookup(directory, &format!("file{number}"))).collect();
        // The attributes of the files are not cached. statx(2) would wait for the server.
        volume.hold(GETATTR);
        for &node in &nodes {
            let request = [guest.header(FORGET, node, 8), longs([1])].concat();
            guest.bench.queues[0].add(&[&request], &[]);
        }
        let inside = format!("{}/file", share_of(base).join("volume").display());
        let open_files = || {
            let fds = fs::read_dir("/proc/self/fd").unwrap().map(|fd| fs::read_link(fd.unwrap().path()));
            fds.filter(|target| target.as_ref().is_ok_and(|target| target.to_string_lossy().starts_with(&inside)))
                .count()
        };
        guest.bench.run_until(|_| open_files() == 0);
        guest.read_hello();
    });
}

#[test]
fn unlinked_file_on_a_frozen_file_system_is_forgotten_and_closed() {
    with_share(|base| {
        let mut volume = Ext4::mount(&base.join("image"), &share_of(base).join("volume"));
        fs::write(share_of(base).join("volume/file"), b"content").unwrap();
        let (mut guest, node, handle) = guest_with_open_file(base);
        let directory = guest.lookup(ROOT, "volume");
        assert_eq!(guest.error(UNLINK, directory, b"file\0"), 0);
        assert_eq!(guest.error(RELEASE, node, &longs([handle, 0, 0])), 0);
        let deleted = format!("{} (deleted)", share_of(base).join("volume/file").display());
        let is_open = || {
            let mut fds = fs::read_dir("/proc/self/fd").unwrap().map(|fd| fs::read_link(fd.unwrap().path()));
            fds.any(|target| target.is_ok_and(|target| target.to_string_lossy() == deleted))
        };
        assert!(is_open());
        volume.freeze(true);
        let request = [guest.header(FORGET, node, 8), longs([1])].concat();
        guest.bench.queues[0].add(&[&request], &[]);
        guest.bench.run();
        assert!(guest.bench.queues[0].poll().is_some());
        guest.read_hello();
        volume.freeze(false);
        guest.bench.run_until(|_| !is_open());
        assert_eq!(-guest.call(OPEN, node, &words([0, 0]), 16).0, libc::EBADF);
    });
}

#[test]
fn pause_and_end_do_not_wait_for_a_file_system_that_hangs() {
    with_share(|base| {
        let mut volume = Hanging::mount(&share_of(base).join("volume"), READ);
        let (mut guest, node, handle) = guest_with_open_file(base);
        send_read(&mut guest, node, handle);
        assert_eq!(volume.wait_for(1), 1);
        guest.bench.lock().pause();
        guest.bench.lock().resume();
        guest.read_hello();
        drop(guest);
        volume.release();
    });
}
