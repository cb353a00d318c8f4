//! Fuzzes the virtio-mmio transport with register accesses of any size, in any order. During these accesses, the device
//! uses its queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, RemoteEndpoint, SubscriberOps};
use husk_vmm::config::RateLimit;
use husk_vmm::guest_memory::GuestMemory;
use husk_vmm::virtio::balloon::Balloon;
use husk_vmm::virtio::blk::Blk;
use husk_vmm::virtio::device::SharedDevice;
use husk_vmm::virtio::loop_handle::LoopHandle;
use husk_vmm::virtio::mmio::{NOTIFY_OFFSET, Transport};
use husk_vmm::virtio::rng::Rng;
use husk_vmm::virtio::vsock::Vsock;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::memory_file;
use crate::input::input;

/// Size of guest memory in bytes.
const MEMORY: usize = 1 << 20;
const MAX_STEPS: usize = 96;
/// Register offsets of virtio 1.2, section 4.2.2. At the last offset, 0x1c, no register exists.
const REGISTERS: [u64; 31] = [
    0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90,
    0x94, 0xa0, 0xa4, 0xac, 0xb0, 0xb4, 0xb8, 0xbc, 0xc0, 0xfc, 0x100, 0x1c,
];
const STATUS: u64 = 0x70;

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    /// A 32-bit write to a register.
    Register { which: u8, value: u32 },
    /// A 32-bit write of a small number, such as a status or a queue index.
    Small { which: u8, value: u8 },
    /// A read of any size at any offset.
    Read { offset: u16, len: u8 },
    /// A write of any size at any offset.
    Write { offset: u16, bytes: Vec<u8> },
    /// The writes with which a driver starts a device, including DRIVER_OK. The address of each part of a queue is a
    /// multiple of 16.
    Start { features: u64, queues: Vec<[u16; 4]> },
    /// A write to guest memory, for example to a ring.
    Memory { address: u32, bytes: Vec<u8> },
    /// A write to the notification register. The target also signals the queue's ioeventfd, as KVM would do.
    Notify(u8),
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    device: u8,
    steps: Vec<Step>,
}

/// A device loop in its own thread.
struct DeviceLoop {
    endpoint: RemoteEndpoint<SharedDevice>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceLoop {
    fn start(device: SharedDevice) -> Self {
        let mut manager = EventManager::<SharedDevice>::new().expect("create the device loop");
        manager.add_subscriber(device);
        let (endpoint, ended) = (manager.remote_endpoint(), Arc::new(AtomicBool::new(false)));
        let end = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                manager.run().expect("run the device loop");
            }
        });
        Self { endpoint, ended, thread: Some(thread) }
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        let ended = Arc::clone(&self.ended);
        self.endpoint.fire(move |_| ended.store(true, Ordering::SeqCst)).expect("tell the device loop to end");
        self.thread.take().map(JoinHandle::join).transpose().expect("join the thread of the device loop");
    }
}

fn device(which: u8) -> SharedDevice {
    match which % 4 {
        0 => Arc::new(Mutex::new(Rng::new().expect("create the device"))),
        1 => Arc::new(Mutex::new(Balloon::new().expect("create the device"))),
        2 => Arc::new(Mutex::new(Vsock::new(3, RateLimit::default()).expect("create the device"))),
        _ => Arc::new(Mutex::new(
            Blk::new(memory_file(8 * 512), false, "serial", RateLimit::default()).expect("create the device"),
        )),
    }
}

fn set(transport: &Arc<Transport>, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

fn get(transport: &Transport, register: u64) -> u32 {
    let mut bytes = [0xff; 4];
    transport.read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn start(transport: &Arc<Transport>, features: u64, queues: &[[u16; 4]]) {
    for status in [1, 3] {
        set(transport, STATUS, status);
    }
    for half in [0, 1] {
        set(transport, 0x24, half);
        // VIRTIO_F_VERSION_1 is bit 32.
        set(transport, 0x20, ((features | 1 << 32) >> (32 * half)) as u32);
    }
    set(transport, STATUS, 11);
    for (queue, [size, addresses @ ..]) in (0..).zip(queues.iter().take(8)) {
        set(transport, 0x30, queue);
        set(transport, 0x38, 1 << (size % 16));
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(addresses) {
            set(transport, register, u32::from(*address) * 16);
        }
        set(transport, 0x44, 1);
    }
    set(transport, STATUS, 15);
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("create guest memory");
    let device = device(input.device);
    let device_loop = DeviceLoop::start(Arc::clone(&device));
    let irq = EventFd::new(EFD_NONBLOCK).expect("create an eventfd");
    let handle = LoopHandle::new(device_loop.endpoint.clone());
    let transport = Arc::new(Transport::new(device, memory.clone(), irq, handle).expect("create the transport"));
    let register = |which: u8| REGISTERS[usize::from(which) % REGISTERS.len()];
    for step in input.steps.iter().take(MAX_STEPS) {
        match step {
            Step::Register { which, value } => set(&transport, register(*which), *value),
            Step::Small { which, value } => set(&transport, register(*which), u32::from(*value)),
            Step::Read { offset, len } => transport.read((*offset).into(), &mut vec![0xff; usize::from(*len)]),
            Step::Write { offset, bytes } => transport.write((*offset).into(), bytes),
            Step::Start { features, queues } => start(&transport, *features, queues),
            Step::Memory { address, bytes } => {
                let _ = memory.write(bytes, GuestAddress(u64::from(*address) % MEMORY as u64));
            }
            Step::Notify(queue) => {
                set(&transport, NOTIFY_OFFSET, (*queue).into());
                if let Some(notify) = transport.notify_fds().get(usize::from(*queue)) {
                    notify.write(1).expect("notify the queue");
                }
            }
        }
    }
    set(&transport, STATUS, 0);
    assert_eq!(get(&transport, STATUS), 0, "the device status is not 0 after the reset");
    assert_eq!(get(&transport, 0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(get(&transport, 0x60), 0, "the reset left an interrupt pending");
    for queue in 0..8 {
        set(&transport, 0x30, queue);
        assert_eq!(get(&transport, 0x44), 0, "the reset left queue {queue} ready");
    }
}
