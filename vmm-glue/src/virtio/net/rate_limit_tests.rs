//! Tests of an interface with rate limits. The tests check only minimum times, because a busy host can delay every
//! step.

use std::time::{Duration, Instant};

use super::tests::{MAC, frame, limited_interface};
use super::*;
use crate::config::Rate;

const NO_LIMIT: RateLimit = RateLimit { bytes: None, operations: None };

fn bytes(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { bytes: Some(Rate { per_second, burst }), operations: None }
}

fn frames(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { bytes: None, operations: Some(Rate { per_second, burst }) }
}

/// The ten frames have between 1005 and 1014 bytes.
#[test]
fn transmitted_frames_beyond_the_rate_wait() {
    for (limit, at_once) in [(frames(100, 2), 2), (bytes(101_400, 2028), 2)] {
        let (socket, mut bench) = limited_interface(NO_LIMIT, limit);
        let begin = Instant::now();
        for number in 0..10 {
            bench.queues[1].add(&[&frame(MAC, 1000 - number)], &[]);
        }
        // `run` returns only when no event is pending. The return of `run` therefore shows that the device does not
        // busy-poll while frames wait.
        bench.run();
        let mut buffer = vec![0; 2000];
        let mut lengths = Vec::new();
        let mut receive = || {
            while let Ok(length) = socket.recv(&mut buffer) {
                lengths.push(length - VNET_HEADER_LEN - 14);
            }
            lengths.len()
        };
        assert!(receive() >= at_once);
        bench.run_until(|_| receive() == 10);
        assert!(
            begin.elapsed() >= Duration::from_millis(79),
            "10 frames took only {:?}, must take at least 79 ms",
            begin.elapsed()
        );
        assert_eq!(lengths, (991..=1000).rev().collect::<Vec<_>>());
    }
}

#[test]
fn received_frames_beyond_the_rate_wait_and_do_not_delay_transmitted_frames() {
    for limit in [frames(100, 2), bytes(101_400, 2028)] {
        let (socket, mut bench) = limited_interface(limit, NO_LIMIT);
        let begin = Instant::now();
        for _ in 0..10 {
            bench.queues[0].add(&[], &[2000]);
            socket.send(&frame([9; 6], 1000)).unwrap();
        }
        bench.run();
        for _ in 0..50 {
            bench.queues[1].add(&[&frame(MAC, 1000)], &[]);
            bench.run();
            assert!(socket.recv(&mut [0; 2000]).is_ok(), "a transmitted frame must not wait for received frames");
        }
        let mut received = 0;
        bench.run_until(|queues| {
            received += std::iter::from_fn(|| queues[0].poll()).count();
            received == 10
        });
        // The tenth frame is admitted as soon as the bucket has half of the burst.
        assert!(
            begin.elapsed() >= Duration::from_millis(70),
            "10 frames took only {:?}, must take at least 70 ms",
            begin.elapsed()
        );
    }
}

/// In each direction, the first frame takes far more tokens than the burst. Therefore, the next frame has to wait a
/// quarter of an hour for its tokens.
#[test]
fn reset_does_not_add_tokens() {
    let (socket, mut bench) = limited_interface(bytes(1, 1), bytes(1, 1));
    let round = |bench: &mut crate::virtio::testing::Bench<Net>| {
        bench.queues[0].add(&[], &[2000]);
        bench.queues[1].add(&[&frame(MAC, 1000)], &[]);
        socket.send(&frame([9; 6], 1000)).unwrap();
        bench.run();
        (bench.queues[0].poll().is_some(), socket.recv(&mut [0; 2000]).is_ok())
    };
    assert_eq!(round(&mut bench), (true, true));
    for _ in 0..3 {
        assert_eq!(round(&mut bench), (false, false));
        bench.lock().reset();
        bench.run();
        bench.activate_with_socket(0);
    }
}
