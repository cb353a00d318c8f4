//! Tests that no user of a guest can use the blocks that a file system reserves for the host's root.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;

use super::test_guest::*;

const CHUNK: usize = 16384;

/// Runs `test` with a new, small ext4, in a separate mount namespace.
fn with_ext4(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root: it mounts");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (image, point) = (dir.path().join("image"), dir.path().join("point"));
        fs::create_dir(&point).unwrap();
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let run = |program: &str, arguments: &[&str], last: &[&Path]| {
            assert!(Command::new(program).args(arguments).args(last).status().unwrap().success(), "{program}");
        };
        run("mkfs.ext4", &["-q", "-F", "-m", "20", "-O", "^has_journal"], &[&image]);
        run("mount", &["-o", "loop"], &[&image, &point]);
        test(&point);
        umount2(&point, MntFlags::MNT_DETACH).unwrap();
    });
    thread.join().unwrap();
}

/// Returns the numbers of free blocks and of blocks that are reserved for root.
fn free_and_reserved(point: &Path) -> (u64, u64) {
    let stat = statvfs(point).unwrap();
    (stat.blocks_free(), stat.blocks_free() - stat.blocks_available())
}

/// Sends a request of user `uid`. Returns the error of the answer.
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

/// Calls `request` with increasing offsets until it fails. Returns the error.
fn fill(mut request: impl FnMut(u64) -> i32) -> i32 {
    let mut offset = 0;
    loop {
        match request(offset) {
            0 => offset += CHUNK as u64,
            error => return error,
        }
    }
}

#[test]
fn no_user_of_the_guest_can_use_reserved_blocks() {
    with_ext4(|point| {
        let (_, reserved) = free_and_reserved(point);
        assert!(reserved > 100, "only {reserved} blocks are reserved");
        let mut guest = Guest::with_share(point, 1);
        guest.init();
        for uid in [0, 1000] {
            for opcode in [WRITE, FALLOCATE] {
                let file = point.join(format!("{uid}-{opcode}"));
                fs::write(&file, "").unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
                let node = guest.lookup(ROOT, file.file_name().unwrap().to_str().unwrap());
                let handle = guest.open(OPEN, node, libc::O_RDWR);
                let error = fill(|offset| {
                    let body = match opcode {
                        // struct fuse_write_in and the data
                        WRITE => {
                            [longs([handle, offset]), words([CHUNK as u32, 0, 0, 0, 0, 0]), vec![7; CHUNK]].concat()
                        }
                        // struct fuse_fallocate_in
                        _ => [longs([handle, offset, CHUNK as u64]), words([0, 0])].concat(),
                    };
                    call_as(&mut guest, uid, opcode, node, &body)
                });
                assert_eq!(error, -libc::ENOSPC);
                let (free, _) = free_and_reserved(point);
                assert!(free >= reserved, "user {uid}, opcode {opcode}: {free} of {reserved} reserved blocks are free");
                fs::File::options().write(true).open(&file).unwrap().set_len(0).unwrap();
            }
        }
        // Root of the host can use the reserved blocks.
        fs::write(point.join("root"), vec![7; 6 << 20]).unwrap();
        assert!(free_and_reserved(point).0 < reserved);
    });
}
