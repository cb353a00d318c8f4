//! Tests of the transport with a well-behaved driver, and with the writes that a hostile driver might make.

use std::sync::LazyLock;
use std::sync::mpsc::channel;
use std::thread;

use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vm_memory::GuestAddress;

use super::*;
use crate::control::wire;
use crate::event_loop::{EventLoop, PreparedLoop};
use crate::reporter::Reporter;
use crate::virtio::device::{OnIdle, VirtioDevice};
use crate::virtio::saved::ActiveState;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << 5;
const ACK_DRIVER: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = ACK_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// A device that records its calls.
#[derive(Default)]
struct Probe {
    activations: Vec<(u64, Vec<(u16, u64)>)>,
    active: bool,
    resets: usize,
    refuse: bool,
    config: [u8; 8],
    /// The queues of the last activation.
    queues: Vec<Queue>,
    values: DeviceValues,
    /// Whether the device has a thread that is serving a request. If so, `on_idle` is called at the end of the request.
    busy: bool,
    on_idle: Option<OnIdle>,
}

impl MutEventSubscriber for Probe {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (byte, value) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *byte = *value;
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.active, "the device was activated twice without a reset");
        if self.refuse {
            return Err(ActivateError::Queue(0));
        }
        assert_eq!(activation.features & !FEATURES, 0);
        assert_eq!(activation.features >> VIRTIO_F_VERSION_1 & 1, 1);
        for queue in activation.queues.iter().filter(|queue| queue.queue.ready()) {
            assert!(queue.queue.is_valid(&activation.memory));
        }
        let queues = activation.queues.iter().map(|queue| (queue.queue.size(), queue.queue.desc_table())).collect();
        self.activations.push((activation.features, queues));
        self.queues = activation.queues.into_iter().map(|queue| queue.queue).collect();
        self.active = true;
        Ok(())
    }
    fn save(&self) -> Result<ActiveState, SaveError> {
        Ok(ActiveState { queues: self.queues.iter().map(Queue::state).collect(), values: self.values })
    }
    fn restore(&mut self, values: DeviceValues) {
        self.values = values;
    }
    fn reset(&mut self) {
        self.active = false;
        self.resets += 1;
    }
    fn when_idle(&mut self, idle: OnIdle) {
        assert!(self.on_idle.is_none(), "a second reset has begun before the first reset was complete");
        if self.busy { self.on_idle = Some(idle) } else { idle() }
    }
}

/// Starts a device loop. Its thread runs until the tests end.
fn start_loop() -> (EventLoop, LoopHandle) {
    let device_loop = PreparedLoop::new().unwrap();
    let handle = device_loop.handle();
    let reporter = Reporter::new(wire::pair().unwrap().0);
    (device_loop.start(Vec::new(), Arc::new(reporter)).unwrap(), handle)
}

fn transport_on(device_loop: &LoopHandle) -> (Arc<Transport>, Arc<Mutex<Probe>>) {
    let probe = Arc::new(Mutex::new(Probe::default()));
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    (Arc::new(Transport::new(probe.clone(), memory, irq, device_loop.clone()).unwrap()), probe)
}

/// Returns a transport on a device loop that all tests share and that is never paused.
fn transport() -> (Arc<Transport>, Arc<Mutex<Probe>>) {
    static SHARED: LazyLock<LoopHandle> = LazyLock::new(|| start_loop().1);
    transport_on(&SHARED)
}

fn lock_probe(probe: &Mutex<Probe>) -> MutexGuard<'_, Probe> {
    probe.lock().unwrap()
}

/// Waits until the device loop has run all earlier closures.
fn settle(transport: &Transport) {
    let (done, wait) = channel();
    transport.device_loop.run(move || done.send(()).unwrap()).unwrap();
    wait.recv().unwrap();
}

fn get(transport: &Transport, register: u32) -> u32 {
    let mut data = [0; 4];
    transport.read(register.into(), &mut data);
    u32::from_le_bytes(data)
}

fn set(transport: &Arc<Transport>, register: u32, value: u32) {
    transport.write(register.into(), &value.to_le_bytes());
}

/// Does everything that a driver does up to FEATURES_OK, and accepts all offered features.
fn negotiate(transport: &Arc<Transport>) {
    set(transport, VIRTIO_MMIO_STATUS, 0);
    set(transport, VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    set(transport, VIRTIO_MMIO_STATUS, ACK_DRIVER);
    for select in 0..2 {
        set(transport, VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        let features = get(transport, VIRTIO_MMIO_DEVICE_FEATURES);
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        set(transport, VIRTIO_MMIO_DRIVER_FEATURES, features);
    }
    set(transport, VIRTIO_MMIO_STATUS, FEATURES_OK);
    assert_eq!(get(transport, VIRTIO_MMIO_STATUS), FEATURES_OK);
}

fn set_up_queue(transport: &Arc<Transport>, index: u32, size: u32, base: u32) {
    set(transport, VIRTIO_MMIO_QUEUE_SEL, index);
    set(transport, VIRTIO_MMIO_QUEUE_NUM, size);
    set(transport, VIRTIO_MMIO_QUEUE_DESC_LOW, base);
    set(transport, VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
    set(transport, VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
    set(transport, VIRTIO_MMIO_QUEUE_READY, 1);
}

/// Sets DRIVER_OK, and waits for the activation.
fn activate(transport: &Arc<Transport>) {
    set(transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
    settle(transport);
}

#[test]
fn driver_can_activate_and_reset_device() {
    let (transport, probe) = transport();
    assert_eq!(get(&transport, VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
    assert_eq!(get(&transport, VIRTIO_MMIO_DEVICE_ID), 42);
    for round in 1..3 {
        negotiate(&transport);
        set_up_queue(&transport, 0, 128, 0x1_0000);
        set_up_queue(&transport, 1, 16, 0x2_0000);
        activate(&transport);
        assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK);
        let expected = (FEATURES, vec![(128, 0x1_0000), (16, 0x2_0000)]);
        assert_eq!(probe.lock().unwrap().activations.last(), Some(&expected));
        set(&transport, VIRTIO_MMIO_STATUS, 0);
        assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), 0);
        assert_eq!(get(&transport, VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(probe.lock().unwrap().resets, round);
    }
}

#[test]
fn restored_device_goes_on_where_the_saved_one_was() {
    let (first, probe) = transport();
    negotiate(&first);
    set_up_queue(&first, 0, 128, 0x1_0000);
    activate(&first);
    let values = DeviceValues::Vsock { next_port: 7 };
    {
        let mut probe = lock_probe(&probe);
        probe.queues[0].set_next_avail(300);
        probe.queues[0].set_next_used(299);
        probe.values = values;
    }
    set(&first, VIRTIO_MMIO_QUEUE_SEL, 1);
    first.state.interrupt.config().unwrap();
    let saved = first.save().unwrap();
    let saved: SavedDevice = postcard::from_bytes(&postcard::to_allocvec(&saved).unwrap()).unwrap();
    let (second, probe) = transport();
    second.restore(&saved).unwrap();
    settle(&second);
    assert_eq!(get(&second, VIRTIO_MMIO_STATUS), DRIVER_OK);
    assert_eq!(get(&second, VIRTIO_MMIO_CONFIG_GENERATION), 1);
    let causes = VIRTIO_MMIO_INT_CONFIG | VIRTIO_MMIO_INT_VRING;
    assert_eq!((get(&second, VIRTIO_MMIO_INTERRUPT_STATUS), second.irq_fd().read().unwrap()), (causes, 1));
    // The second queue is selected, and is not ready.
    assert_eq!(get(&second, VIRTIO_MMIO_QUEUE_READY), 0);
    let probe = lock_probe(&probe);
    assert_eq!(probe.activations, [(FEATURES, vec![(128, 0x1_0000), (16, 0)])]);
    assert_eq!((probe.queues[0].next_avail(), probe.queues[0].next_used(), probe.values), (300, 299, values));
    drop(probe);
    assert_eq!(second.save().unwrap().queues, saved.queues);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let (first, _) = transport();
    negotiate(&first);
    set_up_queue(&first, 0, 128, 0x1_0000);
    let saved = first.save().unwrap();
    let refused = |change: &dyn Fn(&mut SavedDevice)| {
        let mut saved = saved.clone();
        change(&mut saved);
        transport().0.restore(&saved).unwrap_err()
    };
    assert_eq!(refused(&|saved| saved.device_type = 1), RestoreError::Type { saved: 1, device: 42 });
    assert_eq!(refused(&|saved| saved.driver_features |= 2), RestoreError::Features(42));
    for status in [VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, DRIVER_OK | NEEDS_RESET] {
        assert_eq!(refused(&|saved| saved.status = status), RestoreError::Features(42));
    }
    assert_eq!(refused(&|saved| saved.queues.truncate(1)), RestoreError::Queues(42));
    assert_eq!(refused(&|saved| saved.queues.reverse()), RestoreError::Queues(42));
    let failed = transport().0;
    failed.state.interrupt.needs_reset().unwrap();
    assert_eq!(failed.save(), Err(SaveError::Reset(42)));
}

#[test]
fn queues_are_frozen_at_driver_ok() {
    let (transport, probe) = transport();
    negotiate(&transport);
    set_up_queue(&transport, 0, 128, 0x1_0000);
    activate(&transport);
    for register in [VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_READY] {
        set(&transport, register, 0);
    }
    assert_eq!(get(&transport, VIRTIO_MMIO_QUEUE_READY), 1);
    activate(&transport);
    assert_eq!(probe.lock().unwrap().activations.len(), 1);
}

#[test]
fn features_not_offered_are_rejected() {
    let (transport, _) = transport();
    for features in [1u64 << VIRTIO_F_VERSION_1 | 1, 1 << 5] {
        set(&transport, VIRTIO_MMIO_STATUS, 0);
        set(&transport, VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        set(&transport, VIRTIO_MMIO_STATUS, ACK_DRIVER);
        for select in 0..2 {
            set(&transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            set(&transport, VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
        }
        set(&transport, VIRTIO_MMIO_STATUS, FEATURES_OK);
        assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), ACK_DRIVER);
    }
}

#[test]
fn queue_outside_guest_memory_sets_needs_reset() {
    let (transport, probe) = transport();
    negotiate(&transport);
    set_up_queue(&transport, 0, 256, 0xffff_0000);
    activate(&transport);
    assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK | NEEDS_RESET);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert!(probe.lock().unwrap().activations.is_empty());
    negotiate(&transport);
}

#[test]
fn failed_activation_sets_needs_reset() {
    let (transport, probe) = transport();
    probe.lock().unwrap().refuse = true;
    negotiate(&transport);
    activate(&transport);
    assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK | NEEDS_RESET);
    assert_eq!(transport.irq_fd().read().unwrap(), 1);
}

#[test]
fn failed_device_sets_needs_reset() {
    let (transport, probe) = transport();
    negotiate(&transport);
    set(&transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
    transport.state.interrupt.needs_reset().unwrap();
    assert_eq!(get(&transport, VIRTIO_MMIO_STATUS), DRIVER_OK | NEEDS_RESET);
    negotiate(&transport);
    assert_eq!(probe.lock().unwrap().resets, 1);
}

#[test]
fn interrupt_causes_stay_until_acknowledged() {
    let (transport, _) = transport();
    let generation = get(&transport, VIRTIO_MMIO_CONFIG_GENERATION);
    transport.state.interrupt.queue(0).unwrap();
    transport.state.interrupt.config().unwrap();
    assert_ne!(get(&transport, VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    set(&transport, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(transport.irq_fd().read().unwrap(), 2);
}

#[test]
fn configuration_space_is_writable_only_after_driver_bit_is_set() {
    let (transport, _) = transport();
    transport.write(u64::from(VIRTIO_MMIO_CONFIG), &[1, 2]);
    let mut data = [9; 8];
    transport.read(u64::from(VIRTIO_MMIO_CONFIG) + 1, &mut data);
    assert_eq!(data, [0; 8], "the configuration space must not be writable before DRIVER is set");
    negotiate(&transport);
    transport.write(u64::from(VIRTIO_MMIO_CONFIG), &[1, 2]);
    transport.read(u64::from(VIRTIO_MMIO_CONFIG) + 1, &mut data);
    assert_eq!(data, [2, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn empty_slot_reads_as_transport_without_device() {
    let mut data = [0; 4];
    read_empty(VIRTIO_MMIO_MAGIC_VALUE.into(), &mut data);
    assert_eq!(u32::from_le_bytes(data), MAGIC);
    read_empty(VIRTIO_MMIO_DEVICE_ID.into(), &mut data);
    assert_eq!(data, [0; 4]);
}

/// Generates one access of a hostile driver. Most accesses use registers and values that well-behaved drivers use. Some
/// accesses have an arbitrary offset and arbitrary bytes.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let status = prop::sample::select(vec![0u32, 1, ACK_DRIVER, FEATURES_OK, DRIVER_OK, DRIVER_OK, 0x80, 0xff]);
    let value = prop_oneof![3 => status, 2 => 0u32..0x400, 1 => any::<u32>()];
    let plain = (0u64..0x48, value.clone()).prop_map(|(word, value)| (word * 4, value.to_le_bytes().to_vec()));
    let status = value.prop_map(|value| (u64::from(VIRTIO_MMIO_STATUS), value.to_le_bytes().to_vec()));
    let odd = (0u64..0x1000, prop::collection::vec(any::<u8>(), 0..9));
    (any::<bool>(), prop_oneof![4 => plain, 4 => status, 1 => odd])
        .prop_map(|(write, (offset, data))| (write, offset, data))
}

proptest! {
    #[test]
    fn any_writes_keep_state_consistent(
        start in 0..3u8,
        accesses in prop::collection::vec((access(), any::<bool>()), 0..200),
    ) {
        let (transport, probe) = transport();
        if start > 0 {
            negotiate(&transport);
            set_up_queue(&transport, 0, 128, 0x1_0000);
        }
        if start > 1 {
            set(&transport, VIRTIO_MMIO_STATUS, DRIVER_OK);
        }
        let mut status = get(&transport, VIRTIO_MMIO_STATUS);
        let snapshot = |transport: &Transport| {
            let registers = transport.registers();
            registers.queues.iter().map(Queue::state).collect::<Vec<_>>()
        };
        let mut queues = snapshot(&transport);
        for ((write, offset, mut data), settled) in accesses {
            if write {
                transport.write(offset, &data);
            } else {
                transport.read(offset, &mut data);
            }
            if settled {
                settle(&transport);
            }
            let now = get(&transport, VIRTIO_MMIO_STATUS);
            // Status bits are only added, except at a reset. When no activation is pending, the device is active if and
            // only if DRIVER_OK is set and NEEDS_RESET is not set. Without DRIVER_OK, the device is never active.
            prop_assert!(now == 0 || now & status == status);
            let ok = now & VIRTIO_CONFIG_S_DRIVER_OK != 0 && now & NEEDS_RESET == 0;
            let active = probe.lock().unwrap().active;
            let valid = if settled { active == ok } else { !active || now & VIRTIO_CONFIG_S_DRIVER_OK != 0 };
            prop_assert!(valid, "device active: {}, which contradicts status {:#x}", active, now);
            let state = snapshot(&transport);
            if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && now != 0 {
                prop_assert_eq!(&state, &queues);
            }
            (status, queues) = (now, state);
        }
    }
}

#[test]
fn shared_interrupt_always_reports_used_buffers() {
    let (transport, _probe) = transport();
    negotiate(&transport);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let irq = transport.state.interrupt.share_irq().unwrap();
    // Like vhost, the test signals the interrupt and sets no cause.
    irq.write(1).unwrap();
    assert_eq!(transport.irq_fd().read().unwrap(), 1);
    for _ in 0..2 {
        assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        set(&transport, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    }
    transport.state.interrupt.config().unwrap();
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    set(&transport, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    set(&transport, VIRTIO_MMIO_STATUS, 0);
    assert_eq!(get(&transport, VIRTIO_MMIO_INTERRUPT_STATUS), 0, "a reset must clear the cause");
}

#[path = "mmio_pending_tests.rs"]
mod pending;
