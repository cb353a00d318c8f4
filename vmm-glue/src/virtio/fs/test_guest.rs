//! The guest's side of FUSE, for tests: sends requests through the queues of a device.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;

use super::Fs;
use crate::config::{RateLimit, ShareConfig};
use crate::jail::Belongings;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::Bench;

pub use crate::virtio::testing::fuse::*;

/// Buffer size for answers without file data, in bytes.
pub const ANSWER_SIZE: usize = 256;

/// A guest with a virtio-fs device.
pub struct Guest {
    pub bench: Bench<Fs>,
    pub unique: u64,
    root: Option<tempfile::TempDir>,
    /// Answers to requests of [`Guest::send`] that arrived while [`Guest::call`] waited for another answer.
    early: VecDeque<Vec<u8>>,
}

pub fn share(root: &Path, workers: u8) -> ShareConfig {
    ShareConfig {
        tag: "husk".into(),
        root: root.to_str().unwrap().into(),
        workers,
        volume_cache_ms: 1000,
        rate_limit: RateLimit::default(),
    }
}

pub fn belongings() -> Belongings {
    Belongings::without_jail().unwrap()
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Drop for Guest {
    fn drop(&mut self) {
        // End the activation, so that the worker threads release guest memory and the queue's fds.
        if let Ok(mut device) = self.bench.device.lock() {
            device.reset();
        }
    }
}

impl Guest {
    /// Creates a guest whose share is a new directory with the file `hello`.
    pub fn new(workers: u8) -> Self {
        Self::with_limit(workers, RateLimit::default())
    }

    /// Creates a guest as [`Guest::new`] does, but with a rate limit for the share.
    pub fn with_limit(workers: u8, rate_limit: RateLimit) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("hello"), b"content").unwrap();
        let mut guest = Self::with_config(&ShareConfig { rate_limit, ..share(root.path(), workers) }, belongings());
        guest.root = Some(root);
        guest
    }

    /// Creates a guest whose share is the directory `root`.
    pub fn with_share(root: &Path, workers: u8) -> Self {
        Self::with_config(&share(root, workers), belongings())
    }

    /// Creates a guest whose share is the directory `root`. Opens no file outside `root`, because landlock rules may
    /// deny the access to such files.
    pub fn with_belongings(root: &Path, workers: u8, belongings: Belongings) -> Self {
        Self::with_config(&share(root, workers), belongings)
    }

    fn with_config(share: &ShareConfig, belongings: Belongings) -> Self {
        let mut bench = Bench::new(Fs::new(share, belongings, || {}).unwrap());
        bench.activate(0);
        Self { bench, unique: 0, root: None, early: VecDeque::new() }
    }

    /// Returns the share's directory.
    pub fn root(&self) -> &Path {
        self.root.as_ref().unwrap().path()
    }

    pub fn header(&mut self, opcode: u32, node: u64, body: usize) -> Vec<u8> {
        self.unique += 1;
        let mut bytes = words([(40 + body) as u32, opcode]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend(words([0, 0, 1, 0]));
        bytes
    }

    /// Sends a request. Returns the answer's error, and the bytes after the answer's header. The error is a
    /// negative errno, or 0 if the request succeeded.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8], answer_size: usize) -> (i32, Vec<u8>) {
        let header = self.header(opcode, node, body.len());
        self.bench.queues[1].add(&[&header, body], &[16, answer_size]);
        let mut bytes = self.next_answer();
        while u64_at(&bytes, 8) != self.unique {
            self.early.push_back(bytes);
            bytes = self.next_answer();
        }
        assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len());
        (i32::from_le_bytes(bytes[4..8].try_into().unwrap()), bytes[16..].to_vec())
    }

    /// Sends a request without waiting for the answer. Returns the request's unique id.
    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        let header = self.header(opcode, node, body.len());
        self.bench.queues[1].add(&[&header, body], &[16, ANSWER_SIZE]);
        self.unique
    }

    /// Waits until the device answers a request, and returns the answer. Requests are answered in any order.
    fn next_answer(&mut self) -> Vec<u8> {
        let mut answer = None;
        self.bench.run_until(|queues| {
            answer = queues[1].poll();
            answer.is_some()
        });
        answer.unwrap().1
    }

    /// Waits for the next answer to a request of [`Guest::send`]. Returns the request's unique id and the errno.
    pub fn answer(&mut self) -> (u64, i32) {
        let early = self.early.pop_front();
        let bytes = early.unwrap_or_else(|| self.next_answer());
        (u64_at(&bytes, 8), -i32::from_le_bytes(bytes[4..8].try_into().unwrap()))
    }

    /// Sends INTERRUPT for a request on the high-priority queue.
    pub fn interrupt(&mut self, unique: u64) {
        let mut header = self.header(INTERRUPT, 0, 8);
        header.extend(unique.to_le_bytes());
        self.bench.queues[0].add(&[&header], &[]);
        self.bench.run_until(|queues| queues[0].poll().is_some());
    }

    /// Sends a request. Returns the errno of the answer, or 0 if the request succeeded.
    pub fn error(&mut self, opcode: u32, node: u64, body: &[u8]) -> i32 {
        -self.call(opcode, node, body, ANSWER_SIZE).0
    }

    pub fn init(&mut self) {
        self.init_with(0);
    }

    /// Sends INIT. The guest offers the flags `flags2` in the field `flags2` of `struct fuse_init_in`
    /// (include/uapi/linux/fuse.h).
    pub fn init_with(&mut self, flags2: u32) {
        let mut body = words([7, 36, 65536, u32::MAX, flags2]);
        body.resize(64, 0);
        let (error, answer) = self.call(INIT, 0, &body, 64);
        assert_eq!((error, answer.len()), (0, 64));
    }

    /// Looks up a name in a directory. Returns the node of the entry.
    pub fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        let (error, entry) = self.call(LOOKUP, parent, format!("{name}\0").as_bytes(), 128);
        assert_eq!(error, 0, "LOOKUP of {name} failed");
        u64_at(&entry, 0)
    }

    /// Opens a node with OPEN or OPENDIR. Returns the handle.
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
