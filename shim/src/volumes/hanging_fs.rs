//! A test file system that hangs, like a network file system whose server is gone.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::Path,
};

use nix::mount::{MsFlags, mount};

/// FUSE opcodes (linux/fuse.h, `enum fuse_opcode`).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;
/// File name. A lookup of this name is the last request that the file system answers.
const LAST: &str = "last";

/// A FUSE file system that answers no requests after [`Self::mount`] has returned. A tmpfs is mounted on the directory
/// `dir` of the FUSE file system. After this value is dropped, the kernel fails all requests.
pub struct HangingFileSystem {
    connection: File,
}

impl HangingFileSystem {
    /// Mounts the file system at `point`.
    pub fn mount(point: &Path) -> Self {
        fs::create_dir_all(point).unwrap();
        let mut connection = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", connection.as_raw_fd());
        mount(Some("hanging"), point, Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
        // The mount(2) call for the tmpfs needs answers from this file system. Therefore, a thread answers requests.
        let server = std::thread::spawn(move || {
            while answer(&mut connection) {}
            connection
        });
        mount(Some("t"), &point.join("dir"), Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
        fs::metadata(point.join(LAST)).unwrap_err();
        Self { connection: server.join().unwrap() }
    }

    /// Waits for a request from the kernel, and does not answer the request.
    pub fn wait_for_request(&mut self) {
        // Each read returns one request.
        let length = self.connection.read(&mut [0; 1 << 16]).unwrap();
        assert_ne!(length, 0);
    }
}

/// Reads and answers one request. Returns false after the lookup of `LAST`.
fn answer(connection: &mut File) -> bool {
    let mut request = [0; 1 << 16];
    let length = connection.read(&mut request).unwrap();
    let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
    let (operation, unique) = (number(4), &request[8..16]);
    let last = request[40..length].starts_with(LAST.as_bytes());
    // `mode` is at offset 60 of `struct fuse_attr`. All timeouts in the answers are 0, so that the kernel caches
    // nothing.
    let mut attributes = [0; 88];
    attributes[60..64].copy_from_slice(&0o40755_u32.to_ne_bytes());
    let (error, body) = match operation {
        // `struct fuse_init_out`: major and minor version, then limits.
        INIT => (0, [&7_u32.to_ne_bytes()[..], &31_u32.to_ne_bytes(), &[0; 56]].concat()),
        LOOKUP if last => (-libc::ENOENT, Vec::new()),
        // `struct fuse_entry_out` for node 2.
        LOOKUP => (0, [&2_u64.to_ne_bytes()[..], &[0; 32], &attributes].concat()),
        // `struct fuse_attr_out`.
        GETATTR => (0, [&[0; 16][..], &attributes].concat()),
        FORGET | BATCH_FORGET => return true,
        _ => (-libc::ENOSYS, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap();
    let reply = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &body].concat();
    connection.write_all(&reply).unwrap();
    !(operation == LOOKUP && last)
}
