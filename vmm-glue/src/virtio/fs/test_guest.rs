//! The guest's side of FUSE for the tests: whole requests through the queues of a device.

use std::fs;
use std::path::Path;

use super::Fs;
use crate::config::ShareConfig;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::Bench;

// include/uapi/linux/fuse.h: enum fuse_opcode.
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const ACCESS: u32 = 34;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
/// FUSE_ROOT_ID.
pub const ROOT: u64 = 1;
/// Room for any answer but data.
pub const ROOM: usize = 256;

/// A guest with a device over a directory.
pub struct Guest {
    pub bench: Bench<Fs>,
    pub unique: u64,
    root: Option<tempfile::TempDir>,
}

pub fn share(root: &Path, workers: u8) -> ShareConfig {
    ShareConfig { tag: "husk".into(), root: root.to_str().unwrap().into(), workers }
}

pub fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

pub fn longs<const N: usize>(longs: [u64; N]) -> Vec<u8> {
    longs.into_iter().flat_map(u64::to_le_bytes).collect()
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Ends its workers, which hold what it has of memory and descriptors.
        if let Ok(mut device) = self.bench.device.lock() {
            device.reset();
        }
    }
}

impl Guest {
    /// Over a directory of its own with the file `hello`.
    pub fn new(workers: u8) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("hello"), b"content").unwrap();
        let mut guest = Self::over(root.path(), workers);
        guest.root = Some(root);
        guest
    }

    pub fn over(root: &Path, workers: u8) -> Self {
        let mut bench = Bench::new(Fs::new(&share(root, workers), || {}).unwrap());
        bench.activate(0);
        Self { bench, unique: 0, root: None }
    }

    pub fn header(&mut self, opcode: u32, node: u64, body: usize) -> Vec<u8> {
        self.unique += 1;
        let mut bytes = words([(40 + body) as u32, opcode]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend(words([0, 0, 1, 0]));
        bytes
    }

    /// A request and its answer: the error, and what follows the header.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> (i32, Vec<u8>) {
        let header = self.header(opcode, node, body.len());
        self.bench.queues[1].add(&[&header, body], &[16, room]);
        let mut answer = None;
        self.bench.run_until(|queues| {
            answer = queues[1].poll();
            answer.is_some()
        });
        let (_, bytes) = answer.unwrap();
        assert_eq!(u64_at(&bytes, 8), self.unique);
        assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len());
        (i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..].to_vec())
    }

    /// A request's error; 0 without.
    pub fn error(&mut self, opcode: u32, node: u64, body: &[u8]) -> i32 {
        -self.call(opcode, node, body, ROOM).0
    }

    pub fn init(&mut self) {
        self.init_with(0);
    }

    /// With these flags of the second word offered: include/uapi/linux/fuse.h, `flags2` of `struct fuse_init_in`.
    pub fn init_with(&mut self, flags2: u32) {
        let mut body = words([7, 36, 65536, u32::MAX, flags2]);
        body.resize(64, 0);
        let (error, answer) = self.call(INIT, 0, &body, 64);
        assert_eq!((error, answer.len()), (0, 64));
    }

    /// The node that a name in a directory has.
    pub fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        let (error, entry) = self.call(LOOKUP, parent, format!("{name}\0").as_bytes(), 128);
        assert_eq!(error, 0, "{name}");
        u64_at(&entry, 0)
    }

    /// The handle of a node that is opened by OPEN or OPENDIR.
    pub fn open(&mut self, opcode: u32, node: u64, flags: i32) -> u64 {
        let (error, opened) = self.call(opcode, node, &words([flags.cast_unsigned(), 0]), 16);
        assert_eq!(error, 0);
        u64_at(&opened, 0)
    }

    pub fn read_hello(&mut self) {
        let node = self.lookup(ROOT, "hello");
        let handle = self.open(OPEN, node, libc::O_RDONLY);
        let mut body = longs([handle, 0]);
        body.extend(words([4096, 0, 0, 0, 0, 0]));
        assert_eq!(self.call(READ, node, &body, 4096), (0, b"content".to_vec()));
    }
}
