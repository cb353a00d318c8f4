//! Tests of a share with a rate limit. The tests check only minimum times, because a busy host can delay every step.

use std::fs::File;
use std::time::{Duration, Instant};

use super::test_guest::*;
use crate::config::{Rate, RateLimit};

#[test]
fn requests_beyond_the_rate_limit_wait_and_then_succeed() {
    for workers in [1, 4] {
        let limit = RateLimit { bytes: None, operations: Some(Rate { per_second: 300, burst: 3 }) };
        let mut guest = Guest::with_limit(workers, limit);
        let begin = Instant::now();
        guest.init();
        for _ in 0..29 {
            let header = guest.header(LOOKUP, ROOT, 6);
            guest.bench.queues[1].add(&[&header, b"hello\0"], &[16, 128]);
        }
        let mut answers = 0;
        guest.bench.run_until(|queues| {
            while let Some((_, bytes)) = queues[1].poll() {
                assert_eq!(bytes[4..8], [0; 4], "LOOKUP failed");
                answers += 1;
            }
            answers == 29
        });
        let elapsed = begin.elapsed();
        assert!(elapsed >= Duration::from_millis(90), "30 requests must take at least 90 ms, but took {elapsed:?}");
    }
}

#[test]
fn read_and_write_take_tokens_from_the_byte_rate_limit() {
    let limit = RateLimit { bytes: Some(Rate { per_second: 100_000, burst: 1 }), operations: None };
    let mut guest = Guest::with_limit(1, limit);
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(OPEN, node, libc::O_RDWR);
    for (opcode, data, answer) in [(WRITE, 5000, 8), (READ, 0, 5000)] {
        let mut body = [longs([handle, 0]), words([5000, 0, 0, 0, 0, 0])].concat();
        body.resize(40 + data, 7);
        let begin = Instant::now();
        assert_eq!(guest.call(opcode, node, &body, answer).0, 0);
        assert_eq!(guest.call(GETATTR, node, &longs([0, 0]), 104).0, 0);
        let elapsed = begin.elapsed();
        assert!(
            elapsed >= Duration::from_millis(40),
            "opcode {opcode} and the next GETATTR must take at least 40 ms, but took {elapsed:?}"
        );
    }
}

#[test]
fn copy_file_range_takes_tokens_from_the_byte_rate_limit() {
    let limit = RateLimit { bytes: Some(Rate { per_second: 20 << 20, burst: 1 }), operations: None };
    let mut guest = Guest::with_limit(1, limit);
    let hello = guest.root().join("hello");
    File::options().write(true).open(hello).unwrap().set_len(3 << 20).unwrap();
    File::create(guest.root().join("copy")).unwrap();
    guest.init();
    let [from, to] = ["hello", "copy"].map(|name| guest.lookup(ROOT, name));
    let [from_handle, to_handle] = [from, to].map(|node| guest.open(OPEN, node, libc::O_RDWR));
    let body = longs([from_handle, 0, to, to_handle, 0, 3 << 20, 0]);
    let begin = Instant::now();
    let (error, answer) = guest.call(COPY_FILE_RANGE, from, &body, 8);
    let copied = u32::from_le_bytes(answer[..4].try_into().unwrap());
    assert_eq!(
        (error, copied),
        (0, 1 << 20),
        "COPY_FILE_RANGE must succeed and copy 1 MiB, the maximum for a share with a byte rate limit"
    );
    assert_eq!(guest.call(GETATTR, to, &longs([0, 0]), 104).0, 0);
    let elapsed = begin.elapsed();
    assert!(
        elapsed >= Duration::from_millis(45),
        "COPY_FILE_RANGE and the next GETATTR must take at least 45 ms, but took {elapsed:?}"
    );
}

#[test]
fn syncfs_and_fallocate_take_one_token_from_the_operation_rate_limit() {
    let limit = RateLimit { bytes: None, operations: Some(Rate { per_second: 20, burst: 1 }) };
    let mut guest = Guest::with_limit(1, limit);
    let begin = Instant::now();
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(OPEN, node, libc::O_RDWR);
    for _ in 0..2 {
        assert_eq!(guest.call(SYNCFS, ROOT, &longs([0]), 0).0, 0);
        assert_eq!(guest.call(FALLOCATE, node, &[longs([handle, 0, 1 << 20]), words([0, 0])].concat(), 0).0, 0);
    }
    let elapsed = begin.elapsed();
    assert!(elapsed >= Duration::from_millis(300), "7 requests must take at least 300 ms, but took {elapsed:?}");
}

#[test]
fn fallocate_mode_that_copies_data_is_not_supported() {
    let mut guest = Guest::new(1);
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(OPEN, node, libc::O_RDWR);
    let mut fallocate = |mode: i32| {
        let body = [longs([handle, 0, 4096]), words([mode.cast_unsigned(), 0])].concat();
        guest.error(FALLOCATE, node, &body)
    };
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE] {
        assert_eq!(fallocate(mode), 0, "{mode}");
    }
    assert_eq!(fallocate(libc::FALLOC_FL_UNSHARE_RANGE), libc::EOPNOTSUPP);
}

#[test]
fn fallocate_removes_and_inserts_ranges_if_the_file_system_can() {
    let mut guest = Guest::new(1);
    let path = guest.root().join("hello");
    let blocks = [[b'a'; 4096], [b'b'; 4096], [b'c'; 4096]].concat();
    std::fs::write(&path, &blocks).unwrap();
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    let handle = guest.open(OPEN, node, libc::O_RDWR);
    let mut fallocate = |mode: i32| {
        let body = [longs([handle, 4096, 4096]), words([mode.cast_unsigned(), 0])].concat();
        guest.error(FALLOCATE, node, &body)
    };
    // The host's kernel decides. tmpfs, for example, has neither of the two modes.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let supported = nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 4096, 4096);
    std::fs::write(&path, &blocks).unwrap();
    let expected = supported.err().map_or(0, |errno| errno as i32);
    assert_eq!(fallocate(libc::FALLOC_FL_COLLAPSE_RANGE), expected);
    if expected == 0 {
        assert_eq!(std::fs::read(&path).unwrap(), [[b'a'; 4096], [b'c'; 4096]].concat());
        assert_eq!(fallocate(libc::FALLOC_FL_INSERT_RANGE), 0);
        assert_eq!(std::fs::read(&path).unwrap(), [[b'a'; 4096], [0; 4096], [b'c'; 4096]].concat());
    }
}
