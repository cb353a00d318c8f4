//! Tests of vsock with a rate limit. The tests check only minimum times, because a busy host can delay every step.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::*;
use crate::config::Rate;

fn limited_guest(limit: RateLimit) -> Guest {
    let mut bench = Bench::new(Vsock::new(CID, limit).unwrap());
    bench.activate(0);
    let mut guest = Guest { bench };
    guest.refill(64);
    guest
}

#[test]
fn packets_from_the_guest_wait_for_the_rate_limit() {
    let mut guest =
        limited_guest(RateLimit { bytes: Some(Rate { per_second: 100_000, burst: 2000 }), operations: None });
    let (side, mut stream) = guest.open(1);
    let begin = Instant::now();
    let data = pattern(1000, 3);
    let header = Header { len: 1000, ..Guest::header(side, Op::ReadWrite) }.to_bytes();
    for _ in 0..12 {
        guest.bench.queues[1].add(&[&header, &data], &[]);
    }
    // `run` returns only when no event is pending. If the device busy-polled while packets wait, `run` would panic.
    guest.bench.run();
    let mut received = Vec::new();
    guest.bench.run_until(|_| {
        let mut part = [0; 4096];
        while let Ok(count) = stream.read(&mut part) {
            received.extend_from_slice(&part[..count]);
        }
        received.len() == 12_000
    });
    let elapsed = begin.elapsed();
    assert!(elapsed >= Duration::from_millis(99), "12 packets must take at least 99 ms, but took {elapsed:?}");
    assert_eq!(received, data.repeat(12));
}

#[test]
fn packets_to_the_guest_wait_for_the_rate_limit() {
    let mut guest = limited_guest(RateLimit { bytes: None, operations: Some(Rate { per_second: 100, burst: 2 }) });
    let (_, mut stream) = guest.open(1);
    let begin = Instant::now();
    stream.write_all(&pattern(40_000, 5)).unwrap();
    guest.bench.run();
    // A receive buffer of the guest has space for 4052 bytes of data. Therefore, the data needs 10 packets.
    let mut received = Vec::new();
    while received.len() < 40_000 {
        let count = received.len();
        assert!(begin.elapsed() < Duration::from_secs(60), "the guest received only {count} of 40000 bytes in 60 s");
        received.extend(guest.packets().into_iter().flat_map(|(_, data)| data));
    }
    let elapsed = begin.elapsed();
    assert!(elapsed >= Duration::from_millis(79), "10 packets must take at least 79 ms, but took {elapsed:?}");
    assert_eq!(received, pattern(40_000, 5));
}

#[test]
fn connection_requests_wait_for_the_rate_limit() {
    let mut guest = limited_guest(RateLimit { bytes: None, operations: Some(Rate { per_second: 100, burst: 1 }) });
    let begin = Instant::now();
    let _replies: Vec<_> = (0..10).map(|port| guest.connect(port)).collect();
    let mut requests = 0;
    while requests < 10 {
        assert!(begin.elapsed() < Duration::from_secs(60), "the guest received only {requests} of 10 requests in 60 s");
        requests += guest.packets().len();
    }
    let elapsed = begin.elapsed();
    assert!(elapsed >= Duration::from_millis(89), "10 requests must take at least 89 ms, but took {elapsed:?}");
}
