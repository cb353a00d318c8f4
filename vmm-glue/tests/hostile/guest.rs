//! Builds the attacker: an image for the VM's memory that contains page tables, code and data. The attacker's code
//! includes a virtio-mmio driver.

use std::fs::File;
use std::io::Write;
use std::ops::{Deref, DerefMut};

use husk_vmm::arch::layout;

use crate::assembler::{Assembler, HANDLER, Size};

/// Start of the image. The VMM writes boot data below this address.
const IMAGE: u64 = 0x20_0000;
/// Address of the exception handler, after ten pages of page tables.
const HANDLER_AT: u64 = IMAGE + 0xa000;
/// Address of code that resets the VM. An exception before the first [`Assembler::attempt`] continues here.
const RESET_AT: u64 = HANDLER_AT + 0x100;
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64]; // mov al, 0xfe; out 0x64, al
/// Address of the interrupt descriptor table.
const IDT: u64 = IMAGE + 0xb000;
/// Address at which the second vCPU starts in real mode. The VMM's boot data does not use this page.
const STARTUP: u64 = 0x1_0000;
/// Address of the operand of `lidt`.
const IDT_POINTER: u64 = IMAGE + 0xc000;
pub const CODE: u64 = IMAGE + 0x1_0000;
/// Start of queues and buffers.
const DATA: u64 = 0x40_0000;
/// Size of the address space that the attacker maps. This space contains RAM, devices, and hot-plugged memory.
const MAPPED_GIB: u64 = 8;

/// Offsets of virtio-mmio registers.
pub mod register {
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_AVAIL: u64 = 0x90;
    pub const QUEUE_USED: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// The status bits ACKNOWLEDGE, DRIVER and FEATURES_OK.
pub const FEATURES_OK: u32 = 1 | 2 | 8;
/// The bits of [`FEATURES_OK`] and the bit DRIVER_OK.
pub const DRIVER_OK: u32 = FEATURES_OK | 4;
/// The status bit DEVICE_NEEDS_RESET.
pub const NEEDS_RESET: u32 = 64;

/// Index of the transmit queue of a network device.
const TRANSMIT: usize = 1;
/// Number of times that the attacker sends a full transmit queue of frames, so that the VMM requests vhost-net.
const WARM_UP_TURNS: u16 = 3;
/// Maximum number of reads of the status register in [`Guest::settle`].
const SETTLE_READS: u32 = 300;
/// The same for vhost-net. The limit is higher, because frames for the guest arrive every few milliseconds.
const SETTLE_READS_VHOST: u32 = 1000;

/// VIRTIO_F_VERSION_1 and VIRTIO_RING_F_INDIRECT_DESC.
pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Prefix of the line that says what a device did with the attack's chains.
pub const REACTION: char = '>';
/// The line after which the attacker does nothing.
pub const END: &str = "end";

/// A device under attack, as its driver sees it.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub name: &'static str,
    pub slot: u32,
    pub features: u64,
    /// Sizes of the queues that a driver has to set up.
    pub queues: &'static [u16],
    /// Index of the queue that serves a valid request.
    pub queue: u16,
    /// Returns the bytes of a valid request that the device reads, and the length of the answer.
    pub request: fn() -> (Vec<u8>, u32),
    /// Whether vhost-net serves the queues when an attack begins.
    pub vhost: bool,
}

impl Device {
    pub fn register(&self, offset: u64) -> u64 {
        layout::slot_address(self.slot) + offset
    }
}

/// A queue in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// The indices of both rings when the attack begins.
    pub base: u16,
    /// Value of the available ring's index that makes all offered heads visible to the device.
    pub offered: u16,
}

/// A descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Builds the attacker. This type dereferences to the assembler of the attacker's code.
pub struct Guest {
    assembler: Assembler,
    /// Content of memory from [`DATA`] on.
    data: Vec<u8>,
}

impl Deref for Guest {
    type Target = Assembler;

    fn deref(&self) -> &Assembler {
        &self.assembler
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Assembler {
        &mut self.assembler
    }
}

impl Guest {
    pub fn new() -> Self {
        let mut guest = Self { assembler: Assembler::new(CODE), data: Vec::new() };
        guest.rax(IMAGE);
        guest.raw(&[0x0f, 0x22, 0xd8]); // mov cr3, rax
        guest.rax(IDT_POINTER);
        guest.raw(&[0x0f, 0x01, 0x18]); // lidt [rax]
        guest.raw(&[0x49, 0xbf]); // mov r15, RESET_AT
        guest.raw(&RESET_AT.to_le_bytes());
        guest
    }

    /// Returns the code that `build` adds to a guest. `build` must not use [`Assembler::attempt`], which adds code that
    /// depends on its address.
    pub fn fragment(build: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut guest = Self { assembler: Assembler::new(0), data: Vec::new() };
        build(&mut guest);
        assert!(guest.data.is_empty(), "a fragment cannot reserve memory");
        guest.assembler.code().to_vec()
    }

    /// Reserves zeroed memory.
    pub fn allocate(&mut self, len: u64) -> u64 {
        let start = self.data.len().next_multiple_of(4096);
        self.data.resize(start + len as usize, 0);
        DATA + start as u64
    }

    /// Sets the initial content of reserved memory.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        let start = (address - DATA) as usize;
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Reserves memory with this content.
    pub fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len() as u64);
        self.put(address, bytes);
        address
    }

    /// Reserves memory for a queue.
    pub fn queue(&mut self, index: u16, size: u16) -> Queue {
        let entries = u64::from(size);
        let desc = self.allocate(16 * entries);
        let avail = self.allocate(6 + 2 * entries);
        let used = self.allocate(6 + 8 * entries);
        Queue { index, size, desc, avail, used, base: 0, offered: 0 }
    }

    /// Sets the initial content of a descriptor.
    pub fn describe(&mut self, queue: &Queue, at: u16, desc: Desc) {
        self.put(queue.desc + 16 * u64::from(at), &desc.bytes());
    }

    /// Puts a head into the queue's available ring. [`Self::publish`] shows the head to the device.
    pub fn offer(&mut self, queue: &mut Queue, head: u16) {
        let entry = u64::from(queue.offered % queue.size);
        self.put(queue.avail + 4 + 2 * entry, &head.to_le_bytes());
        queue.offered += 1;
    }

    /// Runs code on the second vCPU. Returns the address of a 16-bit value, which is 0 until the code
    /// ends, and then 1.
    pub fn on_second_vcpu(&mut self, code: &[u8]) -> u64 {
        let (done, stack) = (self.allocate(2), self.allocate(4096));
        let mut second = Assembler::new(0);
        second.rax(stack + 4096);
        second.raw(&[0x48, 0x89, 0xc4]); // mov rsp, rax
        second.raw(code);
        second.store16(done, 1);
        second.halt();
        let entry = self.buffer(second.code());
        let startup = self.buffer(&to_long_mode(entry as u32));
        self.copy(startup, STARTUP, 4096);
        for (offset, value) in
            [(0x310, 1 << 24), (0x300, 0x4500), (0x310, 1 << 24), (0x300, 0x4600 | (STARTUP >> 12) as u32)]
        {
            // INIT, and then the startup interprocessor interrupt, to APIC 1.
            self.store32(u64::from(layout::LAPIC) + offset, value);
        }
        done
    }

    /// Writes a device's register.
    pub fn write(&mut self, device: &Device, offset: u64, value: u32) {
        self.store32(device.register(offset), value);
    }

    /// Resets the device and negotiates its features.
    pub fn negotiate(&mut self, device: &Device) {
        for status in [0, 1, 3] {
            self.write(device, register::STATUS, status);
        }
        for half in [0u32, 1] {
            self.write(device, register::DRIVER_FEATURES_SEL, half);
            self.write(device, register::DRIVER_FEATURES, (device.features >> (32 * half)) as u32);
        }
        self.write(device, register::STATUS, FEATURES_OK);
    }

    /// Tells the device where a queue is.
    pub fn set_queue(&mut self, device: &Device, queue: &Queue) {
        self.write(device, register::QUEUE_SEL, queue.index.into());
        self.write(device, register::QUEUE_NUM, queue.size.into());
        let parts = [
            (register::QUEUE_DESC, queue.desc),
            (register::QUEUE_AVAIL, queue.avail),
            (register::QUEUE_USED, queue.used),
        ];
        for (offset, address) in parts {
            self.write(device, offset, address as u32);
            self.write(device, offset + 4, (address >> 32) as u32);
        }
        self.write(device, register::QUEUE_READY, 1);
    }

    /// Resets the device and makes it active with these queues.
    pub fn activate(&mut self, device: &Device, queues: &[Queue]) {
        self.negotiate(device);
        for queue in queues {
            self.set_queue(device, queue);
        }
        self.write(device, register::STATUS, DRIVER_OK);
    }

    /// Reserves the device's queues and makes the device active.
    pub fn start(&mut self, device: &Device) -> Vec<Queue> {
        let mut queues: Vec<Queue> = (0..).zip(device.queues).map(|(index, &size)| self.queue(index, size)).collect();
        if device.vhost {
            self.start_vhost(device, &mut queues);
        } else {
            self.activate(device, &queues);
        }
        queues
    }

    /// Makes a network device active with these queues, and sends frames until vhost-net serves the queues.
    pub fn start_vhost(&mut self, device: &Device, queues: &mut [Queue]) {
        let transmit = queues[TRANSMIT];
        let size = u64::from(transmit.size);
        let frame = self.buffer(&(crate::attacks::NET.request)().0);
        let frame_len = (crate::attacks::NET.request)().0.len() as u32;
        // All heads in the available ring are 0. The first descriptor is a frame.
        let descs = self.buffer(&Desc { addr: frame, len: frame_len, ..Desc::default() }.bytes());
        let heads = self.allocate(2 * size);
        // The memory of the queue already contains the attack's descriptors and heads. They are copied back when
        // vhost-net serves the queue.
        let (attack_desc, attack_heads) = (self.allocate(16), self.allocate(2 * size));
        self.copy(transmit.desc, attack_desc, 16);
        self.copy(transmit.avail + 4, attack_heads, 2 * u32::from(transmit.size));
        self.copy(descs, transmit.desc, 16);
        self.copy(heads, transmit.avail + 4, 2 * u32::from(transmit.size));
        self.activate(device, queues);
        self.serve_again(device, &transmit, WARM_UP_TURNS.into());
        // While vhost-net serves the queues, the first bit stays set even if the driver acknowledges the interrupt.
        self.wait_for_lasting_bit(
            device.register(register::INTERRUPT_STATUS),
            device.register(register::INTERRUPT_ACK),
        );
        self.serve_again(device, &transmit, 1);
        self.copy(attack_desc, transmit.desc, 16);
        self.copy(attack_heads, transmit.avail + 4, 2 * u32::from(transmit.size));
        let base = (WARM_UP_TURNS + 1) * transmit.size;
        queues[TRANSMIT] = Queue { base, offered: base, ..transmit };
    }

    /// Shows all offered heads to the device.
    pub fn publish(&mut self, device: &Device, queue: &Queue) {
        self.store16(queue.avail + 2, queue.offered);
        self.write(device, register::QUEUE_NOTIFY, queue.index.into());
    }

    /// Waits until the device returns a chain or asks for a reset, and prints what the device did. The wait is short,
    /// because a device may ignore an attack.
    pub fn settle(&mut self, device: &Device, queue: &Queue) {
        let status = device.register(register::STATUS);
        let reads = if device.vhost { SETTLE_READS_VHOST } else { SETTLE_READS };
        self.poll((queue.used + 2, queue.base), (status, NEEDS_RESET), reads);
        self.print(&format!("{REACTION}"));
        self.if16_differs(queue.used + 2, queue.base, |code| print(code, "returns a chain;"));
        self.if32_has(status, NEEDS_RESET, |code| print(code, "asks for a reset"));
        self.print("\n");
    }

    /// Waits until the VMM ends. A thread of the VMM may serve the attack much later than [`Guest::settle`] returns.
    pub fn wait_for_end(&mut self) {
        let never = self.allocate(2);
        self.wait16(never, 0);
    }

    /// Offers a chain with a request and a buffer for the answer. The chain has one or two descriptors. Returns the
    /// address of the buffer.
    pub fn request(&mut self, queue: &mut Queue, at: u16, request: &[u8], answer: u32) -> u64 {
        let readable = self.buffer(request);
        let writable = self.allocate(u64::from(answer).min(1 << 20));
        let answer = Desc { addr: writable, len: answer, flags: WRITE, next: 0 };
        let head = match (request.is_empty(), answer.len) {
            (true, _) => answer,
            (false, 0) => Desc { addr: readable, len: request.len() as u32, ..Desc::default() },
            (false, _) => Desc { addr: readable, len: request.len() as u32, flags: NEXT, next: at + 1 },
        };
        self.describe(queue, at, head);
        if head.flags & NEXT != 0 {
            self.describe(queue, at + 1, answer);
        }
        self.offer(queue, at);
        writable
    }

    /// Makes all requests, in batches that fit in the queue. Waits for the answers of each batch. The device must be
    /// active.
    pub fn serve(&mut self, device: &Device, queue: &mut Queue, requests: &[(Vec<u8>, u32)]) {
        for batch in requests.chunks(usize::from(queue.size / 2)) {
            let first = queue.offered;
            for (at, (request, answer)) in (0..).zip(batch) {
                self.request(queue, 2 * at, request, *answer);
            }
            // All batches use the same descriptors and heads. Therefore, the attacker's code writes the descriptors
            // and heads of a batch only when the previous batch is complete.
            let (descs, heads) = (
                self.take(queue.desc, 16 * u64::from(queue.size)),
                self.take(queue.avail + 4, 2 * u64::from(queue.size)),
            );
            let (descs_at, heads_at) = (self.buffer(&descs), self.buffer(&heads));
            self.copy(descs_at, queue.desc, descs.len() as u32);
            self.copy(heads_at, queue.avail + 4, heads.len() as u32);
            assert_eq!(usize::from(queue.offered - first), batch.len());
            self.publish(device, queue);
            self.wait_equal16(queue.avail + 2, queue.used + 2);
        }
    }

    /// Makes the offered requests of a full queue `turns` times. Waits until each turn is complete.
    pub fn serve_again(&mut self, device: &Device, queue: &Queue, turns: u32) {
        let notify = device.register(register::QUEUE_NOTIFY);
        self.repeat(turns, |code| {
            code.add16(queue.avail + 2, queue.size);
            code.store32(notify, queue.index.into());
            code.wait_equal16(queue.avail + 2, queue.used + 2);
        });
    }

    fn take(&mut self, address: u64, len: u64) -> Vec<u8> {
        let start = (address - DATA) as usize;
        self.data[start..start + len as usize].to_vec()
    }

    /// Resets the device, makes a valid request, and waits for the answer. The answer shows that the device works after
    /// an attack.
    pub fn check(&mut self, device: &Device) {
        let mut queues = self.start(device);
        let (request, answer) = (device.request)();
        let queue = &mut queues[usize::from(device.queue)];
        self.request(queue, 0, &request, answer);
        let queue = *queue;
        self.publish(device, &queue);
        self.wait16(queue.used + 2, queue.base);
    }

    pub fn print(&mut self, text: &str) {
        print(&mut self.assembler, text);
    }

    /// Adds the end of the attacker's code. Returns a kernel image that the VMM boots.
    pub fn finish(mut self) -> File {
        self.print(END);
        self.print("\n");
        self.halt();
        let code = self.assembler.code();
        assert!(CODE + code.len() as u64 <= DATA, "the attacker's code is too long: {} bytes", code.len());
        let mut image = page_tables();
        image.extend_from_slice(HANDLER);
        image.resize((RESET_AT - IMAGE) as usize, 0);
        image.extend_from_slice(RESET);
        image.resize((IDT - IMAGE) as usize, 0);
        image.extend((0..256).flat_map(|_| gate(HANDLER_AT)));
        image.extend(4095u16.to_le_bytes());
        image.extend(IDT.to_le_bytes());
        image.resize((CODE - IMAGE) as usize, 0);
        image.extend_from_slice(code);
        image.resize((DATA - IMAGE) as usize, 0);
        image.extend_from_slice(&self.data);
        elf(&image)
    }
}

fn print(code: &mut Assembler, text: &str) {
    for byte in text.bytes() {
        code.out(Size::Byte, 0x3f8, byte.into());
    }
}

/// Returns page tables that map each virtual address to the same physical address, with 2 MiB pages.
fn page_tables() -> Vec<u8> {
    let table = |index: u64| (IMAGE + 0x1000 * index) | 3;
    let mut entries = vec![0u64; 1024];
    entries[0] = table(1);
    for gib in 0..MAPPED_GIB {
        entries[512 + gib as usize] = table(2 + gib);
    }
    entries.extend((0..MAPPED_GIB * 512).map(|page| page << 21 | 0x83));
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Returns real-mode code for [`STARTUP`]. The code enters long mode with the attacker's page tables and with the VMM's
/// segment descriptors (GDT), and continues at `entry`.
fn to_long_mode(entry: u32) -> Vec<u8> {
    let mut code = vec![0xfa, 0x8c, 0xc8, 0x8e, 0xd8]; // cli; mov ax, cs; mov ds, ax
    code.extend([0x0f, 0x01, 0x16, 0x80, 0x00]); // lgdt [0x80]
    code.extend([0x66, 0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0]); // cr4 = PAE
    code.extend([0x66, 0xb8]);
    code.extend((IMAGE as u32).to_le_bytes());
    code.extend([0x0f, 0x22, 0xd8]); // cr3 = page tables
    code.extend([0x66, 0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, 0x66, 0x0d, 0, 1, 0, 0, 0x0f, 0x30]); // EFER |= LME
    code.extend([0x66, 0xb8, 1, 0, 0, 0x80, 0x0f, 0x22, 0xc0]); // cr0 = PG | PE
    code.extend([0x66, 0xea]); // jump to the 64-bit code segment
    code.extend(entry.to_le_bytes());
    code.extend([8, 0]);
    code.resize(0x80, 0);
    code.extend([31, 0]);
    code.extend((layout::GDT as u32).to_le_bytes());
    code.resize(4096, 0);
    code
}

/// Returns a 64-bit interrupt gate.
fn gate(handler: u64) -> [u8; 16] {
    let mut gate = [0; 16];
    gate[..2].copy_from_slice(&(handler as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&8u16.to_le_bytes()); // the code segment
    gate[5] = 0x8e; // present, interrupt gate
    gate[6..8].copy_from_slice(&((handler >> 16) as u16).to_le_bytes());
    gate
}

/// Returns an ELF file with one segment, which is loaded at [`IMAGE`] and entered at [`CODE`].
fn elf(image: &[u8]) -> File {
    const HEADERS: u64 = 4096;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // executable, x86-64
    }
    file.extend(1u32.to_le_bytes());
    for quad in [CODE, 64, 0] {
        file.extend(quad.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes()); // sizes and numbers of headers
    }
    for long in [1u32, 7] {
        file.extend(long.to_le_bytes()); // PT_LOAD, all permissions
    }
    let len = image.len() as u64;
    for quad in [HEADERS, IMAGE, IMAGE, len, len, 4096] {
        file.extend(quad.to_le_bytes());
    }
    file.resize(HEADERS as usize, 0);
    file.extend_from_slice(image);
    let mut kernel = tempfile::tempfile().expect("create the kernel file");
    kernel.write_all(&file).expect("write the kernel file");
    kernel
}
