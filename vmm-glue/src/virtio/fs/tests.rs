//! Tests of the device: FUSE requests for a directory, pause and resume, reset, broken queues and the configuration
//! space.

use std::sync::atomic::Ordering;

use super::test_guest::*;
use super::*;

#[test]
fn file_is_looked_up_and_read() {
    let mut guest = Guest::new(2);
    guest.init();
    guest.read_hello();
    assert_eq!(guest.call(LOOKUP, ROOT, b"missing\0", 128).0, -libc::ENOENT);
    assert!(guest.bench.irq.queues[1].load(Ordering::SeqCst) > 0);
}

#[test]
fn fsync_reaches_the_host() {
    // Files of proc(5) have no fsync. An answer without a call of fsync(2) or fdatasync(2) would be a success.
    let mut guest = Guest::with_share(std::path::Path::new("/proc/sys/kernel"), 1);
    guest.init();
    let node = guest.lookup(ROOT, "ostype");
    let handle = guest.open(OPEN, node, libc::O_RDONLY);
    for datasync in [0, 1] {
        assert_eq!(guest.error(FSYNC, node, &longs([handle, datasync])), libc::EINVAL);
    }
}

#[test]
fn many_requests_are_served_in_parallel() {
    let mut guest = Guest::new(4);
    guest.init();
    let mut left = 200;
    for _ in 0..10 {
        for _ in 0..20 {
            let header = guest.header(LOOKUP, ROOT, 6);
            guest.bench.queues[1].add(&[&header, b"hello\0"], &[16, 128]);
        }
        let mut answered = 0;
        guest.bench.run_until(|queues| {
            while let Some((_, bytes)) = queues[1].poll() {
                assert_eq!(bytes[4..8], [0; 4]);
                answered += 1;
            }
            answered == 20
        });
        left -= answered;
    }
    assert_eq!(left, 0);
}

#[test]
fn high_priority_queue_serves_forget_and_rejects_other_opcodes() {
    let mut guest = Guest::new(1);
    guest.init();
    let (_, entry) = guest.call(LOOKUP, ROOT, b"hello\0", 128);
    let node = u64_at(&entry, 0);
    let header = guest.header(FORGET, node, 8);
    guest.bench.queues[0].add(&[&header, &1_u64.to_le_bytes()], &[]);
    guest.bench.run();
    assert_eq!(guest.bench.queues[0].poll().unwrap().1, b"");
    // The device no longer knows the node.
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
    // The first request has a too small answer buffer, and the second has an incomplete header. The third request has a
    // too short body, and the fourth has no readable buffer.
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
fn paused_device_does_not_serve_requests() {
    let mut guest = Guest::new(2);
    guest.init();
    guest.bench.lock().pause();
    let header = guest.header(LOOKUP, ROOT, 6);
    guest.bench.queues[1].add(&[&header, b"hello\0"], &[16, 128]);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(guest.bench.queues[1].poll().is_none());
    guest.bench.lock().resume();
    guest.bench.run_until(|queues| queues[1].poll().is_some());
}

#[test]
fn device_serves_requests_after_each_reset() {
    let mut guest = Guest::new(3);
    for _ in 0..5 {
        guest.init();
        guest.read_hello();
        guest.bench.lock().reset();
        guest.bench.activate(0);
    }
}

#[test]
fn device_with_a_broken_ring_works_again_after_a_reset() {
    let mut guest = Guest::new(2);
    guest.bench.queues[1].set_avail_index(30_000);
    let irq = Arc::clone(&guest.bench.irq);
    guest.bench.run_until(|_| irq.needs_reset.load(Ordering::SeqCst) == 1);
    guest.bench.lock().reset();
    guest.bench.activate(0);
    guest.init();
}

#[test]
fn configuration_space_contains_the_tag_and_invalid_shares_are_rejected() {
    let root = tempfile::tempdir().unwrap();
    let fs = Fs::new(&share(root.path(), 1), belongings(), || {}).unwrap();
    let mut config = [9; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..5], b"husk\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    fs.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 44]);
    let missing = root.path().join("missing");
    assert!(matches!(Fs::new(&share(&missing, 1), belongings(), || {}), Err(FsError::Root { .. })));
    let long = ShareConfig { tag: "t".repeat(37), ..share(root.path(), 1) };
    assert!(matches!(Fs::new(&long, belongings(), || {}), Err(FsError::Tag(_))));
}
