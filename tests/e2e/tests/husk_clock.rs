//! The guest's wall clock follows the node's wall clock.
use std::thread;
use std::time::{Duration, SystemTime};

use husk_e2e::cri::{Pod, PodContainer, Pods, pods};
use husk_e2e::{node, vm};
use nix::sys::signal::Signal;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// How long a VMM is stopped.
const PAUSE: Duration = Duration::from_secs(5);

/// Adds `seconds` to the node's wall clock.
fn step(seconds: i64) {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap();
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec())).unwrap();
}

/// Keeps the node's clock one hour ahead until this value is dropped.
struct Ahead;

impl Ahead {
    fn new() -> Self {
        step(3600);
        Self
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        step(-3600);
    }
}

/// Starts a pod whose container has Python.
fn start(pods: &Pods) -> (Pod, PodContainer) {
    let pod = pods.pod();
    let container = pod.start(&pod.python("import time; time.sleep(1000000)"));
    (pod, container)
}

/// Returns the guest's wall clock and its monotonic clock, in seconds.
fn clocks(container: &PodContainer) -> (f64, f64) {
    let program = "import time; print(time.time(), time.monotonic())";
    let text = container.exec(&["python3", "-c", program]).out;
    let (wall, monotonic) = text.trim().split_once(' ').unwrap_or_else(|| panic!("{text:?}"));
    (wall.parse().unwrap(), monotonic.parse().unwrap())
}

/// Waits until the guest's clock agrees with the node's clock: until it shows a time between two readings of the node's
/// clock. Returns the guest's monotonic clock.
#[track_caller]
fn wait_for_node_clock(container: &PodContainer) -> f64 {
    let node_clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let mut seen = Vec::new();
    let followed = node::eventually(Duration::from_secs(30), || {
        let before = node_clock();
        let (guest, monotonic) = clocks(container);
        let after = node_clock();
        seen.push((before - guest, after - guest));
        // The clocks may differ by 100 ms.
        (before - 0.1 <= guest && guest <= after + 0.1).then_some(monotonic)
    });
    followed.unwrap_or_else(|| {
        panic!(
            "the guest's clock did not follow within 30 s; node minus guest, before and after each reading: {seen:?}"
        )
    })
}

#[test]
fn guest_clock_follows_steps_of_the_node_clock() {
    pods("cri-clock", |pods| {
        let (_pod, container) = start(pods);
        let first = wait_for_node_clock(&container);
        let ahead = Ahead::new();
        let second = wait_for_node_clock(&container);
        drop(ahead);
        let third = wait_for_node_clock(&container);
        assert!(
            first < second && second < third && third < first + 600.0,
            "the guest's monotonic clock went back or was stepped: {first}, {second}, {third}"
        );
    });
}

#[test]
fn guest_clock_is_right_after_the_vmm_was_stopped() {
    pods("cri-clock-pause", |pods| {
        let (pod, container) = start(pods);
        let first = wait_for_node_clock(&container);
        let vmms = vm::vmm_pids_of(&pod.id);
        assert!(!vmms.is_empty());
        vmms.iter().for_each(|pid| node::send_signal(*pid, Signal::SIGSTOP));
        thread::sleep(PAUSE);
        vmms.iter().for_each(|pid| node::send_signal(*pid, Signal::SIGCONT));
        // As for a process that is stopped, the monotonic clock goes on.
        let second = wait_for_node_clock(&container);
        let passed = second - first;
        assert!((PAUSE.as_secs_f64()..600.0).contains(&passed), "the monotonic clock advanced by {passed} s");
    });
}

/// Slews the node's clock by 10 % until this value is dropped, as chrony does after a large error.
struct Fast;

impl Fast {
    /// Microseconds that the clock advances in each tick at its normal rate (adjtimex(2), `tick`).
    const NORMAL: i64 = 10_000;

    fn new() -> Self {
        set_tick(Self::NORMAL + Self::NORMAL / 10);
        Self
    }
}

impl Drop for Fast {
    fn drop(&mut self) {
        set_tick(Self::NORMAL);
    }
}

fn set_tick(micros: i64) {
    // SAFETY: zero is a valid value of each field of the structure.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    (timex.modes, timex.tick) = (libc::ADJ_TICK, micros);
    // SAFETY: adjtimex reads and writes only the structure.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    assert!(state >= 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn guest_clock_follows_slews_of_the_node_clock() {
    pods("cri-clock-slew", |pods| {
        let (_pod, container) = start(pods);
        let first = wait_for_node_clock(&container);
        let fast = Fast::new();
        let begin = SystemTime::now();
        // A second of difference.
        let slewed = node::eventually(Duration::from_secs(60), || {
            (begin.elapsed().unwrap_or_default() >= Duration::from_secs(11)).then_some(())
        });
        drop(fast);
        assert!(slewed.is_some());
        let second = wait_for_node_clock(&container);
        step(-1);
        let third = wait_for_node_clock(&container);
        assert!(first < second && second < third, "the guest's monotonic clock went back: {first}, {second}, {third}");
    });
}
