//! Tests that only a guest's root user can use the blocks that a file system reserves for root.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;

use super::test_guest::*;

const CHUNK: usize = 16384;
/// Flag that marks a WRITE request as writeback: the guest kernel writes dirty pages of a mapped file
/// (`FUSE_WRITE_CACHE`).
const WRITE_CACHE: u32 = 1;
/// A function that returns a request's body for a file handle, an offset and flags.
type Request = fn(u64, u64, u32) -> Vec<u8>;

/// Runs `test` with a new, small ext4 file system, in a separate mount namespace.
fn with_ext4(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("failed to create a mount namespace: this test needs root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (image, point) = (dir.path().join("image"), dir.path().join("point"));
        fs::create_dir(&point).unwrap();
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let run = |program: &str, arguments: &[&str], last: &[&Path]| {
            assert!(Command::new(program).args(arguments).args(last).status().unwrap().success(), "{program} failed");
        };
        run("mkfs.ext4", &["-q", "-F", "-m", "20", "-O", "^has_journal"], &[&image]);
        run("mount", &["-o", "loop"], &[&image, &point]);
        test(&point);
        umount2(&point, MntFlags::MNT_DETACH).unwrap();
    });
    thread.join().unwrap();
}

/// Returns the number of free blocks, and the number of blocks that are reserved for root.
fn free_and_reserved(point: &Path) -> (u64, u64) {
    let stat = statvfs(point).unwrap();
    (stat.blocks_free(), stat.blocks_free() - stat.blocks_available())
}

/// Sends a request of user `uid`. Returns the negative errno of the answer, or 0 if the request succeeded.
fn call_as(guest: &mut Guest, uid: u32, opcode: u32, node: u64, body: &[u8]) -> i32 {
    let mut header = guest.header(opcode, node, body.len());
    header[24..28].copy_from_slice(&uid.to_le_bytes());
    guest.bench.queues[1].add(&[&header, body], &[16, ANSWER_SIZE]);
    let mut answer = None;
    guest.bench.run_until(|queues| {
        answer = queues[1].poll();
        answer.is_some()
    });
    i32::from_le_bytes(answer.unwrap().1[4..8].try_into().unwrap())
}

/// Calls `request` with increasing offsets until a call fails. Returns the error of this call.
fn fill(mut request: impl FnMut(u64) -> i32) -> i32 {
    let mut offset = 0;
    loop {
        match request(offset) {
            0 => offset += CHUNK as u64,
            error => return error,
        }
    }
}

/// Returns the body of a WRITE request: `struct fuse_write_in` and the data.
fn write_request(handle: u64, offset: u64, flags: u32) -> Vec<u8> {
    [longs([handle, offset]), words([CHUNK as u32, flags, 0, 0, 0, 0]), vec![7; CHUNK]].concat()
}

/// Returns the body of a FALLOCATE request: `struct fuse_fallocate_in`.
fn fallocate_request(handle: u64, offset: u64, _flags: u32) -> Vec<u8> {
    [longs([handle, offset, CHUNK as u64]), words([0, 0])].concat()
}

/// For each kind of request, fills the disk with a file of the user `uid`, and then empties the file. Returns, for each
/// kind of request, the number of blocks that were still free when the requests failed with ENOSPC.
fn fill_disk_as(uid: u32, guest: &mut Guest, point: &Path) -> Vec<u64> {
    // The guest kernel sends the writeback of a mapped file (`WRITE_CACHE`) as user 0.
    let kinds: [(u32, Request, u32, u32); 3] = [
        (WRITE, write_request, 0, uid),
        (WRITE, write_request, WRITE_CACHE, 0),
        (FALLOCATE, fallocate_request, 0, uid),
    ];
    let fill_once = |(opcode, request, flags, requester): (u32, Request, u32, u32)| {
        let file = point.join(format!("{uid}-{opcode}-{flags}"));
        fs::write(&file, "").unwrap();
        chown(&file, Some(uid), Some(uid)).unwrap();
        let node = guest.lookup(ROOT, file.file_name().unwrap().to_str().unwrap());
        let handle = guest.open(OPEN, node, libc::O_RDWR);
        let error = fill(|offset| call_as(guest, requester, opcode, node, &request(handle, offset, flags)));
        assert_eq!(error, -libc::ENOSPC);
        let (free, _) = free_and_reserved(point);
        fs::File::options().write(true).open(&file).unwrap().set_len(0).unwrap();
        free
    };
    kinds.into_iter().map(fill_once).collect()
}

#[test]
fn only_root_of_the_guest_can_use_reserved_blocks() {
    with_ext4(|point| {
        let (_, reserved) = free_and_reserved(point);
        assert!(reserved > 100, "the file system must reserve more than 100 blocks, but reserves {reserved}");
        let mut guest = Guest::with_share(point, 1);
        guest.init();
        let free = fill_disk_as(1000, &mut guest, point);
        assert!(
            free.iter().all(|free| *free >= reserved),
            "user 1000 used some of the {reserved} reserved blocks: only {free:?} blocks are free"
        );
        let free = fill_disk_as(0, &mut guest, point);
        assert!(
            free.iter().all(|free| *free < reserved),
            "root failed to use the {reserved} reserved blocks: {free:?} blocks are still free"
        );
    });
}
