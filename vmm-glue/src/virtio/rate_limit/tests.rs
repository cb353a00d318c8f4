//! Tests of the limiter at times that each test chooses.

use proptest::prelude::*;

use super::*;
use crate::config::Rate;

fn limiter(bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>, now: Instant) -> RateLimiter {
    let rate = |(per_second, burst)| Rate { per_second, burst };
    RateLimiter::new(RateLimit { bytes: bytes.map(rate), operations: operations.map(rate) }, now).unwrap()
}

#[test]
fn burst_is_admitted_at_once_and_the_rest_at_the_rate() {
    let begin = Instant::now();
    let mut limiter = limiter(Some((1000, 300)), None, begin);
    for _ in 0..3 {
        assert_eq!(limiter.admit(100, begin), Ok(()));
    }
    let wait = Duration::from_millis(100);
    assert_eq!(limiter.admit(100, begin), Err(wait));
    assert!(limiter.admit(100, begin + Duration::from_nanos(99_999_999)).is_err());
    assert_eq!(limiter.admit(100, begin + wait), Ok(()));
    // The bucket does not fill beyond the burst.
    let later = begin + Duration::from_secs(3600);
    assert_eq!(limiter.admit(300, later), Ok(()));
    assert!(limiter.admit(1, later).is_err());
}

#[test]
fn operation_larger_than_the_burst_delays_the_next_operation() {
    let begin = Instant::now();
    let mut limiter = limiter(Some((1000, 10)), None, begin);
    assert_eq!(limiter.admit(1000, begin), Ok(()));
    // Even an operation without bytes waits until the missing tokens have been added.
    assert_eq!(limiter.admit(0, begin), Err(Duration::from_millis(990)));
    assert_eq!(limiter.admit(5000, begin), Err(Duration::from_secs(1)));
    assert_eq!(limiter.admit(5000, begin + Duration::from_secs(1)), Ok(()));
}

#[test]
fn fast_device_does_not_wake_a_thread_for_each_operation() {
    let begin = Instant::now();
    // The rate is ten operations per microsecond. The second burst is the number of operations in a microsecond.
    for (burst, wait) in [(1_000_000, Duration::from_millis(1)), (10, Duration::from_nanos(500))] {
        let mut limiter = limiter(None, Some((10_000_000, burst)), begin);
        limiter.charge(0, burst, begin);
        assert_eq!(limiter.admit(0, begin), Err(wait));
    }
}

#[test]
fn both_buckets_have_to_admit_an_operation() {
    let begin = Instant::now();
    let mut limiter = limiter(Some((100, 100)), Some((10, 2)), begin);
    assert_eq!((limiter.admit(50, begin), limiter.admit(1, begin)), (Ok(()), Ok(())));
    assert_eq!(limiter.admit(1, begin), Err(Duration::from_millis(100)), "must wait for tokens for operations");
    assert_eq!(limiter.admit(60, begin), Err(Duration::from_millis(110)), "must wait for tokens for bytes");
    assert_eq!(limiter.admit(60, begin + Duration::from_millis(110)), Ok(()));
    limiter.charge(1000, 0, begin);
    assert!(limiter.admit(1, begin + Duration::from_secs(5)).is_err());
}

#[test]
fn operation_of_unknown_size_waits_for_half_of_the_burst_at_most() {
    let begin = Instant::now();
    let mut limiter = limiter(Some((1000, 100)), None, begin);
    limiter.charge(100, 0, begin);
    assert_eq!(limiter.admit_up_to(65536, begin), Err(Duration::from_millis(50)));
    assert_eq!(limiter.admit_up_to(10, begin), Err(Duration::from_millis(10)));
    assert_eq!(limiter.admit_up_to(65536, begin + Duration::from_millis(50)), Ok(()));
}

#[test]
fn unlimited_device_has_no_limiter() {
    assert!(RateLimiter::new(RateLimit::default(), Instant::now()).is_none());
    let shared = SharedLimiter::default();
    shared.charge_bytes(u64::MAX);
    assert_eq!(shared.admit(|| u64::MAX), Ok(()));
}

/// The device loop may serve the timer's event after the timer was set again. In this case, a blocking read of the
/// timer would block the device loop until the timer expires.
#[test]
fn clear_timer_does_not_wait_until_the_timer_expires() {
    let limit = RateLimit { bytes: Some(Rate { per_second: 1, burst: 1 }), operations: None };
    let mut throttle = Throttle::new(limit, RateLimit::default()).unwrap();
    throttle.begin_turn();
    assert!(throttle.admit(Direction::Receive, 1_000_000));
    assert!(!throttle.admit(Direction::Receive, 1));
    assert!(throttle.admit(Direction::Transmit, 1_000_000), "the limit of received bytes applied to transmitted bytes");
    throttle.end_turn();
    throttle.clear_timer();
}

#[test]
fn extreme_values_do_not_overflow() {
    let begin = Instant::now();
    let most = (u64::MAX, u64::MAX);
    let mut fast = limiter(Some(most), Some(most), begin);
    for _ in 0..1000 {
        fast.charge(u64::MAX, u64::MAX, begin);
    }
    assert!(fast.admit(u64::MAX, begin + Duration::from_secs(100 * 365 * 86400)).is_ok());
    let mut slow = limiter(Some((1, 1)), None, begin);
    slow.charge(u64::MAX, 1, begin);
    assert!(slow.admit(1, begin).is_err());
    assert!(slow.admit(1, begin.checked_sub(Duration::from_secs(1)).unwrap()).is_err());
}

/// Generates a rate, and a burst between a thousandth of the rate and the rate.
fn rates() -> impl Strategy<Value = (u64, u64)> {
    (1_000..1_000_000_000_u64).prop_flat_map(|rate| (Just(rate), rate / 1000..=rate))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Operations arrive at any time, and each retry can be late. In no interval are more bytes admitted than the rate
    /// and the burst allow.
    #[test]
    fn bytes_in_any_interval_are_at_most_rate_times_interval_plus_burst(
        (rate, burst) in rates(),
        operations in proptest::collection::vec((0..3_000_u64, 0..50_000_000_u64, 0..50_000_000_u64), 1..120),
    ) {
        let mut now = Instant::now();
        let mut limiter = limiter(Some((rate, burst)), None, now);
        let mut admitted = Vec::new();
        for (permille, gap, late) in operations {
            let bytes = u64::try_from(u128::from(burst) * u128::from(permille) / 1000).unwrap();
            now += Duration::from_nanos(gap);
            while let Err(wait) = limiter.admit(bytes, now) {
                now += wait + Duration::from_nanos(late);
            }
            admitted.push((now, bytes));
        }
        for (first, (begin, _)) in admitted.iter().enumerate() {
            let mut sum = 0_u128;
            for (end, bytes) in &admitted[first..] {
                sum += u128::from(*bytes);
                let refilled = (*end - *begin).as_nanos() * u128::from(rate);
                let allowed = refilled + u128::from(burst.max(*bytes)) * 1_000_000_000;
                prop_assert!(sum * 1_000_000_000 <= allowed, "admitted too many bytes: {sum} in {:?}", *end - *begin);
            }
        }
    }

    /// A queue that always has a next operation gets at least 95 % of its rate although each retry is late. Each delay
    /// is at most the time until the bucket is full, or 2 % of the time that the operation takes at the rate, whichever
    /// is longer.
    #[test]
    fn backlogged_queue_gets_at_least_95_percent_of_its_rate(
        (rate, burst) in rates(),
        permille in 1..3_000_u64,
        lateness in 0.0..1.0,
    ) {
        let begin = Instant::now();
        let mut limiter = limiter(Some((rate, burst)), Some((1_000_000_000, 1_000_000)), begin);
        let bytes = u64::try_from(u128::from(burst) * u128::from(permille) / 1000).unwrap().max(1);
        let headroom = burst.saturating_sub(bytes.max(burst / 2)).max(bytes / 50) as f64 / rate as f64;
        let late = Duration::from_secs_f64(headroom * lateness);
        let (mut now, mut served) = (begin, 0_u128);
        while served < 100 * u128::from(burst.max(bytes)) {
            match limiter.admit(bytes, now) {
                Ok(()) => served += u128::from(bytes),
                Err(wait) => now += wait + late,
            }
        }
        let due = (now - begin).as_secs_f64() * rate as f64;
        prop_assert!(served as f64 >= 0.95 * due, "only {served} of {due} bytes were served, must be at least 95 %");
    }

    /// The size of an operation is known only after the operation, as with frames. The queue gets at least 95 % of its
    /// rate, and at most the rate and the burst.
    #[test]
    fn operations_of_unknown_size_get_their_rate_and_no_more(
        (rate, burst) in rates(),
        permille in 1..500_u64,
    ) {
        let begin = Instant::now();
        let mut limiter = limiter(Some((rate, burst)), None, begin);
        let bytes = u64::try_from(u128::from(burst) * u128::from(permille) / 1000).unwrap().max(1);
        let late = Duration::from_secs_f64(burst as f64 / rate as f64 / 10.0);
        let (mut now, mut served) = (begin, 0_u64);
        while served < 100 * burst {
            match limiter.admit_up_to(u64::MAX, now) {
                Ok(()) => {
                    limiter.charge(bytes, 1, now);
                    served += bytes;
                }
                Err(wait) => now += wait + late,
            }
        }
        let due = (now - begin).as_secs_f64() * rate as f64;
        prop_assert!(
            served as f64 >= 0.95 * due && served as f64 <= due * 1.000_001 + burst as f64,
            "{served} bytes were served, but the rate allows {due} and a burst of {burst}"
        );
    }
}
