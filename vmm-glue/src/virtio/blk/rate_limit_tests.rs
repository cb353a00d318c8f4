//! Tests of a disk with a rate limit. The tests check only minimum times, because a busy host can delay every step.

use std::time::{Duration, Instant};

use super::tests::*;
use super::*;
use crate::config::Rate;
use crate::virtio::testing::Bench;

fn operations(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { bytes: None, operations: Some(Rate { per_second, burst }) }
}

fn bytes(per_second: u64, burst: u64) -> RateLimit {
    RateLimit { bytes: Some(Rate { per_second, burst }), operations: None }
}

fn served(bench: &mut Bench<Blk>) -> bool {
    std::thread::sleep(Duration::from_millis(20));
    bench.queues[0].poll().is_some()
}

#[test]
fn requests_beyond_the_rate_wait_and_succeed_in_order() {
    for (limit, seconds) in [(operations(200, 2), 18.0 / 200.0), (bytes(100_000, 1024), 18.0 * 512.0 / 100_000.0)] {
        let (_, mut bench) = limited_disk(false, limit);
        let begin = Instant::now();
        let heads: Vec<u16> = (0..20).map(|sector| bench.queues[0].add(&[&header(IN, sector)], &[512, 1])).collect();
        let mut answers = Vec::new();
        bench.run_until(|queues| {
            answers.extend(std::iter::from_fn(|| queues[0].poll()));
            answers.len() == heads.len()
        });
        assert!(
            begin.elapsed() >= Duration::from_secs_f64(seconds),
            "20 requests took only {:?}, must take at least {seconds} s",
            begin.elapsed()
        );
        assert_eq!(answers.iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
        for (sector, (_, bytes)) in answers.iter().enumerate() {
            assert_eq!((bytes.len(), bytes[0], bytes[512]), (513, sector as u8 + 1, 0));
        }
    }
}

/// The first request takes far more tokens than the burst. Therefore, the second request has to wait more than eight
/// minutes for its tokens.
#[test]
fn pause_and_reset_do_not_wait_for_tokens_or_add_tokens() {
    let (_, mut bench) = limited_disk(false, bytes(1, 1));
    assert_eq!(call(&mut bench, &[&header(IN, 0)], &[512, 1]).len(), 513);
    bench.queues[0].add(&[&header(IN, 1)], &[512, 1]);
    assert!(!served(&mut bench));
    bench.lock().pause();
    bench.lock().resume();
    assert!(!served(&mut bench), "a pause must not add tokens to the bucket");
    bench.lock().pause();
    bench.lock().reset();
    bench.lock().resume();
    bench.activate(0);
    bench.queues[0].add(&[&header(IN, 1)], &[512, 1]);
    assert!(!served(&mut bench), "a reset must not add tokens to the bucket");
    // The drop of the device at the end of the test must end the thread that is waiting for tokens.
}

#[test]
fn write_zeroes_takes_tokens_from_the_byte_rate_limit() {
    let (_, mut bench) = limited_disk(false, bytes(512 << 10, 1));
    let mut config = [0; 64];
    bench.lock().read_config(0, &mut config);
    assert_eq!((config[48..52].to_vec(), config[52]), (2048_u32.to_le_bytes().to_vec(), 1));
    let begin = Instant::now();
    assert_eq!(call(&mut bench, &[&header(WRITE_ZEROES, 0), &range(0, 64, 0)], &[1]), [0]);
    assert_eq!(call(&mut bench, &[&header(IN, 0)], &[512, 1])[0], 0);
    assert!(
        begin.elapsed() >= Duration::from_millis(62),
        "both requests took only {:?}, must take at least 62 ms",
        begin.elapsed()
    );
    let two = [range(0, 1, 0), range(2, 1, 0)].concat();
    assert_eq!(call(&mut bench, &[&header(WRITE_ZEROES, 0), &two], &[1]), [1]);
    assert_eq!(call(&mut bench, &[&header(DISCARD, 0), &two], &[1]), [0]);
}
