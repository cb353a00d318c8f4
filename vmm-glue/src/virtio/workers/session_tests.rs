//! Tests of a session: chains in flight, wake-ups, limits of workers, and pauses.

use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::testing::{Bench, Irq, queue_without_device};
use crate::virtio::workers::tests::{Device, Started, active};

fn session(bench: &Bench<Device>) -> Arc<Session> {
    lock(&bench.lock().0.pool.state).session.clone().unwrap()
}

/// Waits until the state of the session fulfils a condition.
fn wait_until(session: &Session, mut condition: impl FnMut(&State) -> bool) {
    while !condition(&session.lock()) {
        std::thread::yield_now();
    }
}

#[test]
fn driver_that_offers_a_chain_again_and_again_stops_the_device() {
    let (mut bench, end, _starts) = active(2);
    let (session, irq) = (session(&bench), Arc::clone(&bench.irq));
    let head = bench.queues[0].add(&[b"request"], &[1]);
    // The first requests hang. The others are held, because their group may not have more workers.
    for taken in 1..100 {
        wait_until(&session, |state| state.taken == taken || state.failed);
        if session.lock().failed {
            break;
        }
        bench.queues[0].offer(head);
    }
    assert_eq!(irq.needs_reset.load(Ordering::SeqCst), 1);
    drop(end);
}

#[test]
fn request_is_served_although_a_job_that_hangs_has_taken_its_wakeup() {
    let (mut bench, end, starts) = active(2);
    let session = session(&bench);
    wait_until(&session, |state| state.idle == 2);
    // The lock lets a worker see the request and the job at the same time, after one notification for both.
    let mut state = session.lock();
    state.groups.queue(1, 0);
    bench.queues[0].add(&[b"request"], &[1]);
    drop(state);
    let mut started = Vec::new();
    bench.run_until(|_| {
        started.extend(starts.try_iter());
        started.len() == 2
    });
    // The two workers report their starts in any order.
    assert!(started.contains(&Started::Job) && started.contains(&Started::Request), "{started:?}");
    drop(end);
    bench.run_until(|queues| queues[0].poll().is_some());
}

#[test]
fn group_has_few_workers_only_if_workers_were_added() {
    let (bench, _end, _starts) = active(8);
    let session = session(&bench);
    wait_until(&session, |state| state.workers == 8);
    let mut state = session.lock();
    let (workers, busy) = (state.workers, state.busy);
    state.busy = 7;
    assert_eq!(session.max_busy(&state), usize::MAX);
    state.workers = 9;
    assert_eq!(session.max_busy(&state), FEW_WORKERS);
    state.busy = 5;
    assert_eq!(session.max_busy(&state), usize::MAX);
    (state.workers, state.busy) = (workers, busy);
}

#[test]
fn supervisor_can_be_woken_while_a_group_has_too_many_requests() {
    let (mut bench, end, starts) = active(2);
    let session = session(&bench);
    for _ in 0..2 {
        bench.queues[0].add(&[b"request"], &[1]);
        starts.recv().unwrap();
    }
    // The supervisor adds a worker, which holds these requests. The group may have no third worker.
    for _ in 0..6 {
        bench.queues[0].add(&[b"request"], &[1]);
    }
    wait_until(&session, |state| state.groups.has_excess());
    // Later, requests are refused, because the group is stuck. Until then, a worker can wake the supervisor.
    let mut can_be_woken = false;
    wait_until(&session, |state| {
        can_be_woken |= state.supervisor_waits;
        can_be_woken || !state.groups.has_excess()
    });
    assert!(can_be_woken);
    drop(end);
}

#[test]
fn request_that_hangs_is_answered_after_the_pause() {
    let (mut bench, end, starts) = active(2);
    let session = session(&bench);
    bench.queues[0].add(&[b"request"], &[1]);
    starts.recv().unwrap();
    // The pause does not wait any longer.
    bench.lock().0.pause();
    end.send(()).unwrap();
    wait_until(&session, |state| state.busy == 0);
    assert!(bench.queues[0].poll().is_none());
    bench.lock().0.resume();
    bench.run_until(|queues| queues[0].poll().is_some());
}

#[test]
fn poll_ends_with_a_request_a_job_the_session_or_its_time() {
    let (memory, mut driver, queue) = queue_without_device(4);
    let interrupt = Arc::new(Irq::default());
    let mut session = Session::new(Arc::new(memory), queue, interrupt, false, (1, 0), 1).unwrap();
    session.poll_time = Duration::from_millis(1);
    let state = session.poll(session.lock()).unwrap();
    assert!(!state.polled);
    drop(state);
    session.poll_time = Duration::from_secs(3600);
    driver.add(&[b"request"], &[]);
    let mut state = session.poll(session.lock()).unwrap();
    assert!(state.queue.pop(&session.memory).unwrap().is_some());
    state.groups.queue(1, 7);
    let mut state = session.poll(state).unwrap();
    assert!(matches!(state.groups.next(1), Some((1, Work::Job(7)))));
    state.stopped = true;
    drop(session.poll(state).unwrap());
}
