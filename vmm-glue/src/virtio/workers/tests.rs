//! Tests of a reset while a worker is serving a request. Also the device for the tests of a session.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::virtio::activation::{self, OpenedActivation};
use crate::virtio::device::{ActivateError, Activation, VirtioDevice};
use crate::virtio::testing::Bench;

/// What a worker has started.
#[derive(Debug, PartialEq, Eq)]
pub enum Started {
    Request,
    Job,
}

/// A handler that reports the start of each request and job, and then waits until the test ends it.
pub struct Held {
    started: Mutex<Sender<Started>>,
    end: Mutex<Receiver<()>>,
    limiter: SharedLimiter,
}

impl Handler for Held {
    const NAME: &'static str = "held";
    const KIND: Kind = Kind::Disk;
    const GROWTH: Option<Growth> = Some(Growth { workers: 2, per_group: 2, supervisor: Kind::FileSupervisor });

    fn limiter(&self) -> &SharedLimiter {
        &self.limiter
    }

    fn bytes(&self, _request: &Chain<'_>) -> usize {
        0
    }

    fn serve(&self, _memory: &GuestMemory, _request: Chain<'_>, _later: Later<'_>) -> Option<u32> {
        lock(&self.started).send(Started::Request).unwrap();
        // The channel is closed at the end of the test.
        let _ = lock(&self.end).recv();
        Some(0)
    }

    fn run_job(&self, _job: u64) {
        lock(&self.started).send(Started::Job).unwrap();
        let _ = lock(&self.end).recv();
    }
}

pub struct Device(pub Workers<Held>);

impl MutEventSubscriber for Device {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let OpenedActivation { memory, interrupt, queues: [queue], .. } = activation::open_queues(activation)?;
        self.0.activate(memory, queue, interrupt).map_err(|error| ActivateError::Host("the thread", error))
    }
    fn reset(&mut self) {
        self.0.deactivate();
    }
}

/// Returns an active device. Also returns the sender that ends a request, and the receiver that reports the start of a
/// request.
pub fn active(workers: u8) -> (Bench<Device>, Sender<()>, Receiver<Started>) {
    let ((started, starts), (end, ends)) = (channel(), channel());
    let handler =
        Arc::new(Held { started: Mutex::new(started), end: Mutex::new(ends), limiter: SharedLimiter::default() });
    let mut bench = Bench::new(Device(Workers::start(workers, handler).unwrap()));
    bench.activate(0);
    (bench, end, starts)
}

/// Returns a device whose worker is serving a request, as [`active`] does.
fn serving() -> (Bench<Device>, Sender<()>, Receiver<Started>) {
    let (mut bench, end, starts) = active(2);
    bench.queues[0].add(&[b"request"], &[1]);
    starts.recv().unwrap();
    (bench, end, starts)
}

#[test]
fn workers_become_idle_after_reset_when_request_ends() {
    let (mut bench, end, starts) = serving();
    bench.lock().reset();
    let idle = Arc::new(AtomicBool::new(false));
    let (now_idle, wait) = channel();
    let reported = Arc::clone(&idle);
    bench.lock().0.when_idle(Box::new(move || {
        reported.store(true, Ordering::SeqCst);
        now_idle.send(()).unwrap();
    }));
    assert!(!idle.load(Ordering::SeqCst));
    end.send(()).unwrap();
    wait.recv().unwrap();
    // The request of the earlier activation was completed. The device serves the next activation.
    assert!(bench.queues[0].poll().is_some());
    bench.activate(0);
    bench.queues[0].add(&[b"request"], &[1]);
    starts.recv().unwrap();
    end.send(()).unwrap();
    bench.run_until(|queues| queues[0].poll().is_some());
    // If the workers are idle, `when_idle` calls the closure at once.
    bench.lock().reset();
    let (now_idle, wait) = channel();
    bench.lock().0.when_idle(Box::new(move || now_idle.send(()).unwrap()));
    wait.recv().unwrap();
}

#[test]
fn pause_after_reset_waits_for_request() {
    let (bench, end, _starts) = serving();
    bench.lock().reset();
    let (pool, device) = (Arc::clone(&bench.lock().0.pool), Arc::clone(&bench.device));
    thread::scope(|scope| {
        let pause = scope.spawn(|| lock(&device).0.pause());
        while !lock(&pool.state).paused {
            thread::yield_now();
        }
        assert!(!pause.is_finished());
        end.send(()).unwrap();
        pause.join().unwrap();
    });
}
