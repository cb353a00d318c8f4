//! FUSE requests through crafted chains, against a directory.

use std::sync::atomic::Ordering;

use super::test_guest::*;
use super::*;

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
