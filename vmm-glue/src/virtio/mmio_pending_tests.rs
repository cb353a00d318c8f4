//! Tests of activations and resets that wait for the device loop, and of several vCPUs that write at the same time.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Generates a status that a hostile vCPU writes.
fn status() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![0, VIRTIO_CONFIG_S_ACKNOWLEDGE, ACK_DRIVER, FEATURES_OK, DRIVER_OK, DRIVER_OK, 0x8f])
}

/// Generates a write that changes queues, features or selectors if the status permits the change.
fn configuration() -> impl Strategy<Value = (u32, u32)> {
    let registers = vec![
        VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_USED_LOW,
    ];
    let value = prop_oneof![0u32..3, Just(256), (0u32..16).prop_map(|page| page << 12), any::<u32>()];
    (prop::sample::select(registers), value)
}

/// Negotiates features and sets up a queue, as a driver does. Omits the reset of the device and the checks of the
/// status, because other vCPUs may write at the same time.
fn negotiate_among_others(transport: &Arc<Transport>) {
    for value in [VIRTIO_CONFIG_S_ACKNOWLEDGE, ACK_DRIVER] {
        set(transport, VIRTIO_MMIO_STATUS, value);
    }
    for select in 0..2 {
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES, half(FEATURES, select));
    }
    set(transport, VIRTIO_MMIO_STATUS, FEATURES_OK);
    set_up_queue(transport, 0, 128, 0x1_0000);
}

#[test]
fn reset_waits_for_paused_device_loop() {
    let (mut device_loop, handle) = start_loop();
    let (transport, probe) = transport_on(&handle);
    negotiate(&transport);
    activate(&transport);
    device_loop.pause(Vec::new()).unwrap();
    let returned = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    set(&transport, VIRTIO_MMIO_STATUS, 0);
                    returned.store(true, Ordering::SeqCst);
                })
            })
            .collect();
        while !transport.registers().resetting {
            thread::yield_now();
        }
        // The driver cannot change the status before the reset is complete.
        for value in [VIRTIO_CONFIG_S_ACKNOWLEDGE, DRIVER_OK, DRIVER_OK | VIRTIO_CONFIG_S_FAILED] {
            set(&transport, VIRTIO_MMIO_STATUS, value);
            assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK);
        }
        assert!(!returned.load(Ordering::SeqCst) && probe.lock().unwrap().active);
        device_loop.resume();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), 0);
    assert!(!probe.lock().unwrap().active);
}

#[test]
fn reset_waits_for_last_request_but_device_loop_does_not() {
    let (transport, probe) = transport();
    negotiate(&transport);
    activate(&transport);
    probe.lock().unwrap().busy = true;
    thread::scope(|scope| {
        let writer = scope.spawn(|| set(&transport, VIRTIO_MMIO_STATUS, 0));
        while probe.lock().unwrap().on_idle.is_none() {
            thread::yield_now();
        }
        settle(&transport);
        assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK);
        assert!(!writer.is_finished());
        let idle = probe.lock().unwrap().on_idle.take().unwrap();
        idle();
        writer.join().unwrap();
    });
    assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), 0);
    probe.lock().unwrap().busy = false;
    negotiate(&transport);
    activate(&transport);
    assert_eq!(probe.lock().unwrap().activations.len(), 2);
}

#[test]
fn at_most_two_jobs_of_a_transport_wait_for_paused_device_loop() {
    let (mut device_loop, handle) = start_loop();
    let (transport, probe) = transport_on(&handle);
    negotiate(&transport);
    device_loop.pause(Vec::new()).unwrap();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..100 {
                        negotiate_among_others(&transport);
                        set(&transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
                    }
                    // Each vCPU now waits for the same reset.
                    set(&transport, VIRTIO_MMIO_STATUS, 0);
                })
            })
            .collect();
        while !transport.registers().resetting {
            thread::yield_now();
        }
        for _ in 0..1000 {
            // Each job that waits for the device loop holds a reference to the transport.
            assert!(Arc::strong_count(&transport) <= 1 + 2);
            thread::yield_now();
        }
        device_loop.resume();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    settle(&transport);
    assert!(!probe.lock().unwrap().active || get(&transport, VIRTIO_MMIO_STATUS) & DRIVER_OK == DRIVER_OK);
    assert_eq!(Arc::strong_count(&transport), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn pending_activation_uses_registers_as_they_were_at_driver_ok(
        writes in prop::collection::vec(configuration(), 0..30),
    ) {
        static LOOP: LazyLock<Mutex<(EventLoop, LoopHandle)>> = LazyLock::new(|| Mutex::new(start_loop()));
        let mut device_loop = sync::lock(&LOOP);
        let (transport, probe) = transport_on(&device_loop.1);
        negotiate(&transport);
        set_up_queue(&transport, 0, 128, 0x1_0000);
        device_loop.0.pause(Vec::new()).unwrap();
        set(&transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
        for (register, value) in writes {
            set(&transport, register, value);
        }
        prop_assert!(probe.lock().unwrap().activations.is_empty());
        prop_assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK);
        device_loop.0.resume();
        settle(&transport);
        prop_assert_eq!(&probe.lock().unwrap().activations, &vec![(FEATURES, vec![(128, 0x1_0000), (16, 0)])]);
    }

    /// The probe fails the test if the transport activates the probe twice without a reset, or starts a reset before
    /// the previous reset is complete.
    #[test]
    fn writes_of_several_vcpus_keep_activations_and_resets_in_order(
        vcpus in prop::collection::vec(prop::collection::vec((status(), any::<bool>()), 1..40), 2..4),
        pauses in 0usize..4,
    ) {
        static LOOP: LazyLock<Mutex<(EventLoop, LoopHandle)>> = LazyLock::new(|| Mutex::new(start_loop()));
        let mut device_loop = sync::lock(&LOOP);
        let (transport, probe) = transport_on(&device_loop.1);
        thread::scope(|scope| {
            for writes in &vcpus {
                let transport = &transport;
                scope.spawn(move || {
                    for &(value, negotiates) in writes {
                        if negotiates {
                            negotiate_among_others(transport);
                        }
                        set(transport, VIRTIO_MMIO_STATUS, value);
                    }
                });
            }
            for _ in 0..pauses {
                device_loop.0.pause(Vec::new()).unwrap();
                thread::yield_now();
                device_loop.0.resume();
            }
        });
        settle(&transport);
        let status = get(&transport, VIRTIO_MMIO_STATUS);
        let ok = status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && status & NEEDS_RESET == 0;
        prop_assert_eq!(probe.lock().unwrap().active, ok);
        set(&transport, VIRTIO_MMIO_STATUS, 0);
        prop_assert!(!probe.lock().unwrap().active);
        settle(&transport);
        prop_assert_eq!(Arc::strong_count(&transport), 1);
    }
}

#[test]
fn thread_that_completes_a_reset_does_not_own_the_device() {
    let (transport, probe) = transport();
    probe.lock().unwrap().busy = true;
    transport.start_reset();
    let complete = probe.lock().unwrap().on_idle.take().unwrap();
    let device = Arc::downgrade(&probe);
    drop((transport, probe));
    // While the closure runs, a hot-unplug can drop all other references to the device. If the closure held the last
    // reference, the thread that runs the closure would drop the device and join itself.
    assert!(device.upgrade().is_none());
    complete();
}
