//! FUSE requests through crafted chains, against a directory.

use std::fs;
use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::testing::Bench;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const ROOT: u64 = 1;

struct Guest {
    bench: Bench<Fs>,
    _root: tempfile::TempDir,
    unique: u64,
}

fn share(root: &std::path::Path, workers: u8) -> ShareConfig {
    ShareConfig { tag: "husk".into(), root: root.to_str().unwrap().into(), workers }
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Guest {
    fn new(workers: u8) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("hello"), b"content").unwrap();
        let mut bench = Bench::new(Fs::new(&share(root.path(), workers), || {}).unwrap());
        bench.activate(0);
        Self { bench, _root: root, unique: 0 }
    }

    fn header(&mut self, opcode: u32, node: u64, body: usize) -> Vec<u8> {
        self.unique += 1;
        let mut bytes = words([(40 + body) as u32, opcode]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend(words([0, 0, 1, 0]));
        bytes
    }

    /// A request and its answer: the error, and what follows the header.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> (i32, Vec<u8>) {
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

    fn init(&mut self) {
        let mut body = words([7, 36, 65536, u32::MAX, 0]);
        body.resize(64, 0);
        let (error, answer) = self.call(INIT, 0, &body, 64);
        assert_eq!((error, answer.len()), (0, 64));
    }

    fn read_hello(&mut self) {
        let (error, entry) = self.call(LOOKUP, ROOT, b"hello\0", 128);
        assert_eq!(error, 0);
        let node = u64_at(&entry, 0);
        let (error, opened) = self.call(OPEN, node, &words([0, 0]), 16);
        assert_eq!(error, 0);
        let mut body = opened[..8].to_vec();
        body.extend(words([0, 0, 4096, 0, 0, 0, 0, 0]));
        assert_eq!(self.call(READ, node, &body, 4096), (0, b"content".to_vec()));
    }
}

#[test]
fn a_file_is_found_and_read() {
    let mut guest = Guest::new(2);
    guest.init();
    guest.read_hello();
    assert_eq!(guest.call(LOOKUP, ROOT, b"missing\0", 128).0, -libc::ENOENT);
    assert!(guest.bench.irq.queues[1].load(Ordering::SeqCst) > 0);
}

#[test]
fn many_requests_at_once() {
    let mut guest = Guest::new(4);
    guest.init();
    let mut left = 200;
    for _ in 0..10 {
        for _ in 0..20 {
            let header = guest.header(LOOKUP, ROOT, 6);
            guest.bench.queues[1].add(&[&header, b"hello\0"], &[16, 128]);
        }
        let mut got = 0;
        guest.bench.run_until(|queues| {
            while let Some((_, bytes)) = queues[1].poll() {
                assert_eq!(bytes[4..8], [0; 4]);
                got += 1;
            }
            got == 20
        });
        left -= got;
    }
    assert_eq!(left, 0);
}

#[test]
fn forget_goes_by_the_high_priority_queue_and_nothing_else_does() {
    let mut guest = Guest::new(1);
    guest.init();
    let (_, entry) = guest.call(LOOKUP, ROOT, b"hello\0", 128);
    let node = u64_at(&entry, 0);
    let header = guest.header(FORGET, node, 8);
    guest.bench.queues[0].add(&[&header, &1_u64.to_le_bytes()], &[]);
    guest.bench.run();
    assert_eq!(guest.bench.queues[0].poll().unwrap().1, b"");
    // The guest has forgotten it, and so has the host.
    assert_eq!(guest.call(OPEN, node, &words([0, 0]), 16).0, -libc::EBADF);
    let header = guest.header(READ, node, 40);
    guest.bench.queues[0].add(&[&header, &[0; 40]], &[16]);
    guest.bench.run();
    let (_, bytes) = guest.bench.queues[0].poll().unwrap();
    assert_eq!(bytes[4..8], (-libc::EOPNOTSUPP).to_le_bytes());
}

#[test]
fn malformed_requests_are_answered_or_dropped() {
    let mut guest = Guest::new(1);
    guest.init();
    let read = guest.header(READ, ROOT, 40);
    let cut = guest.header(READ, ROOT, 40);
    // No room for an answer, no header, a body too short, and one that is no request at all.
    guest.bench.queues[1].add(&[&read, &[0; 40]], &[8]);
    guest.bench.queues[1].add(&[&[0; 10]], &[64]);
    guest.bench.queues[1].add(&[&cut, &[0; 3]], &[64]);
    guest.bench.queues[1].add(&[], &[64]);
    let mut answers = Vec::new();
    guest.bench.run_until(|queues| {
        answers.extend(queues[1].poll().map(|(_, bytes)| bytes));
        answers.len() == 4
    });
    assert_eq!(answers.iter().map(Vec::len).collect::<Vec<_>>(), [0, 0, 16, 0]);
    assert_eq!(answers[2][4..8], (-libc::EINVAL).to_le_bytes());
    guest.read_hello();
}

#[test]
fn paused_it_serves_nothing() {
    let mut guest = Guest::new(2);
    guest.init();
    guest.bench.lock().quiesce();
    let header = guest.header(LOOKUP, ROOT, 6);
    guest.bench.queues[1].add(&[&header, b"hello\0"], &[16, 128]);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(guest.bench.queues[1].poll().is_none());
    guest.bench.lock().resume();
    guest.bench.run_until(|queues| queues[1].poll().is_some());
}

#[test]
fn reset_and_again() {
    let mut guest = Guest::new(3);
    for _ in 0..5 {
        guest.init();
        guest.read_hello();
        guest.bench.lock().reset();
        guest.bench.activate(0);
    }
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let mut guest = Guest::new(2);
    guest.bench.queues[1].set_avail_index(30_000);
    let irq = Arc::clone(&guest.bench.irq);
    guest.bench.run_until(|_| irq.needs_reset.load(Ordering::SeqCst) == 1);
    guest.bench.lock().reset();
    guest.bench.activate(0);
    guest.init();
}

#[test]
fn configuration() {
    let root = tempfile::tempdir().unwrap();
    let fs = Fs::new(&share(root.path(), 1), || {}).unwrap();
    let mut config = [9; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..5], b"husk\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    fs.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 44]);
    let missing = root.path().join("missing");
    assert!(matches!(Fs::new(&share(&missing, 1), || {}), Err(FsError::Root { .. })));
    let long = ShareConfig { tag: "t".repeat(37), ..share(root.path(), 1) };
    assert!(matches!(Fs::new(&long, || {}), Err(FsError::Tag(_))));
}
