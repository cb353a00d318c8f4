//! File systems that hang until a test ends the hang.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use husk_base::sync::{lock, wait_timeout};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::test_guest::*;

/// FOPEN_DIRECT_IO: the kernel sends each read to the file system.
const DIRECT_IO: u32 = 1;

/// Gives this thread its own mount namespace. Threads that are started later share this namespace.
pub fn enter_mount_namespace() {
    unshare(CloneFlags::CLONE_NEWNS).expect("failed to create a mount namespace: this test needs root");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>).unwrap();
}

/// A FUSE file system with the directories and files that a client looks up: names that start with `d` are directories.
/// Until [`Self::release`] is called, requests with one opcode get no answer.
pub struct Hanging {
    point: PathBuf,
    server: Option<JoinHandle<()>>,
    state: Arc<(Mutex<State>, Condvar)>,
    connection: File,
}

struct State {
    held_opcode: u32,
    held: Vec<Vec<u8>>,
}

impl Hanging {
    /// Mounts the file system at `point`.
    pub fn mount(point: &Path, held_opcode: u32) -> Self {
        fs::create_dir_all(point).unwrap();
        let connection = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", connection.as_raw_fd());
        mount(Some("hanging"), point, Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
        let state = Arc::new((Mutex::new(State { held_opcode, held: Vec::new() }), Condvar::new()));
        let (shared, reader) = (Arc::clone(&state), connection.try_clone().unwrap());
        let server = Some(thread::spawn(move || serve(reader, &shared)));
        Self { point: point.into(), server, state, connection }
    }

    /// Waits until `count` requests hang. Returns the number of requests that hang.
    pub fn wait_for(&self, count: usize) -> usize {
        let (state, changed) = &*self.state;
        let mut state = lock(state);
        for _ in 0..20 {
            if state.held.len() >= count {
                break;
            }
            (state, _) = wait_timeout(changed, state, Duration::from_secs(1));
        }
        state.held.len()
    }

    /// Begins to hold requests with another opcode.
    pub fn hold(&self, opcode: u32) {
        lock(&self.state.0).held_opcode = opcode;
    }

    /// Answers all requests.
    pub fn release(&mut self) {
        let mut state = lock(&self.state.0);
        state.held_opcode = 0;
        for request in state.held.drain(..) {
            answer(&mut self.connection, &request);
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.release();
        umount2(&self.point, MntFlags::MNT_DETACH).unwrap();
        // The server ends when the last file of the file system is closed.
        drop(self.server.take());
    }
}

fn serve(mut connection: File, state: &(Mutex<State>, Condvar)) {
    let mut request = vec![0; 1 << 17];
    // The read fails when the file system is unmounted.
    while let Ok(length) = connection.read(&mut request) {
        let request = &request[..length];
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let mut held = lock(&state.0);
        if opcode == held.held_opcode {
            held.held.push(request.to_vec());
            state.1.notify_all();
        } else {
            drop(held);
            answer(&mut connection, request);
        }
    }
}

fn answer(connection: &mut File, request: &[u8]) {
    let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
    let name = request.get(40..).unwrap_or_default();
    let directory = opcode == GETATTR && request[16] == ROOT as u8 || opcode == LOOKUP && name.starts_with(b"d");
    // `struct fuse_attr`: ino, size, blocks, three times, three nanoseconds, mode, nlink, and others.
    let mode = if directory { 0o40755 } else { 0o100_644 };
    let node = u64::from(name.iter().map(|&byte| u32::from(byte)).sum::<u32>()) + 2;
    let node = if opcode == LOOKUP { node } else { u64_at(request, 16) };
    let attributes = [longs([node, 4096, 8, 0, 0, 0]), words([0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat();
    let (error, body) = match opcode {
        INIT => (0, [words([7, 31, 0, 0]), vec![0; 48]].concat()),
        // The names stay valid, and the attributes do not.
        LOOKUP => (0, [longs([node, 0, 3600, 0]), words([0, 0]), attributes].concat()),
        GETATTR => (0, [longs([0, 0]), attributes].concat()),
        OPEN | OPENDIR => (0, [longs([1]), words([DIRECT_IO, 0])].concat()),
        READ if u64_at(request, 48) == 0 => (0, b"content".to_vec()),
        READ => (0, Vec::new()),
        FLUSH | RELEASE | RELEASEDIR => (0, Vec::new()),
        FORGET | BATCH_FORGET | INTERRUPT => return,
        _ => (-libc::ENOSYS, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap();
    let reply = [&words([length, error.cast_unsigned()])[..], &request[8..16], &body].concat();
    // The write fails if the client was interrupted.
    let _ = connection.write_all(&reply);
}

/// An ext4 file system in an image file.
pub struct Ext4 {
    point: PathBuf,
    frozen: bool,
}

impl Ext4 {
    pub fn mount(image: &Path, point: &Path) -> Self {
        fs::create_dir_all(point).unwrap();
        File::create(image).unwrap().set_len(16 << 20).unwrap();
        let run = |program: &str, arguments: &[&str], last: &[&Path]| {
            assert!(Command::new(program).args(arguments).args(last).status().unwrap().success(), "{program} failed");
        };
        run("mkfs.ext4", &["-q", "-F"], &[image]);
        run("mount", &["-o", "loop"], &[image, point]);
        Self { point: point.into(), frozen: false }
    }

    /// Suspends all writes to the file system, or continues them.
    pub fn freeze(&mut self, frozen: bool) {
        let flag = if frozen { "-f" } else { "-u" };
        assert!(Command::new("fsfreeze").arg(flag).arg(&self.point).status().unwrap().success());
        self.frozen = frozen;
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        if self.frozen {
            self.freeze(false);
        }
        umount2(&self.point, MntFlags::MNT_DETACH).unwrap();
    }
}
