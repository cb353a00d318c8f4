//! Assembles the attacker's machine code: x86-64 instructions with constant operands, and loops.
//!
//! The attacker runs without a kernel. Therefore, no kernel can filter the accesses to the VMM's devices. The attacker
//! boots in milliseconds, even if KVM emulates each instruction.

/// Machine code at a fixed address.
pub struct Assembler {
    origin: u64,
    code: Vec<u8>,
}

/// Size of a memory or port access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    Byte,
    Word,
    Long,
    Quad,
}

impl Size {
    pub const ALL: [Self; 4] = [Self::Byte, Self::Word, Self::Long, Self::Quad];
}

impl Assembler {
    /// Starts code whose first instruction is at `origin`.
    pub fn new(origin: u64) -> Self {
        Self { origin, code: Vec::new() }
    }

    pub fn code(&self) -> &[u8] {
        &self.code
    }

    /// Adds encoded instructions.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn here(&self) -> u64 {
        self.origin + self.code.len() as u64
    }

    /// `mov rdi, address`
    fn rdi(&mut self, address: u64) {
        self.raw(&[0x48, 0xbf]);
        self.raw(&address.to_le_bytes());
    }

    /// `mov rax, value`
    pub fn rax(&mut self, value: u64) {
        self.raw(&[0x48, 0xb8]);
        self.raw(&value.to_le_bytes());
    }

    /// Writes the lower bytes of `value` to memory.
    pub fn store(&mut self, size: Size, address: u64, value: u64) {
        self.rdi(address);
        self.rax(value);
        self.raw(match size {
            Size::Byte => &[0x88, 0x07],
            Size::Word => &[0x66, 0x89, 0x07],
            Size::Long => &[0x89, 0x07],
            Size::Quad => &[0x48, 0x89, 0x07],
        });
    }

    /// Writes 32 bits to memory.
    pub fn store32(&mut self, address: u64, value: u32) {
        self.store(Size::Long, address, value.into());
    }

    /// Writes 16 bits to memory.
    pub fn store16(&mut self, address: u64, value: u16) {
        self.store(Size::Word, address, value.into());
    }

    /// Reads from memory into RAX.
    pub fn load(&mut self, size: Size, address: u64) {
        self.rdi(address);
        self.raw(match size {
            Size::Byte => &[0x8a, 0x07],
            Size::Word => &[0x66, 0x8b, 0x07],
            Size::Long => &[0x8b, 0x07],
            Size::Quad => &[0x48, 0x8b, 0x07],
        });
    }

    /// Adds `value` to the 16-bit number at `address`.
    pub fn add16(&mut self, address: u64, value: u16) {
        self.rdi(address);
        self.raw(&[0x66, 0x81, 0x07]);
        self.raw(&value.to_le_bytes());
    }

    /// Repeats `count` times the instructions that `body` adds.
    pub fn repeat(&mut self, count: u32, body: impl FnOnce(&mut Self)) {
        self.raw(&[0x41, 0x54, 0x49, 0xc7, 0xc4]); // push r12; mov r12, count
        self.raw(&count.to_le_bytes());
        let start = self.code.len();
        body(self);
        self.raw(&[0x49, 0xff, 0xcc, 0x0f, 0x85]); // dec r12; jnz start
        self.jump_target(start);
        self.raw(&[0x41, 0x5c]); // pop r12
    }

    /// Adds the 32-bit displacement of a backward jump. `target` is the offset of an earlier instruction in the code.
    fn jump_target(&mut self, target: usize) {
        let displacement = target as i64 - (self.code.len() as i64 + 4);
        self.raw(&(displacement as i32).to_le_bytes());
    }

    /// Adds a conditional jump over the instructions that `body` adds. `condition` is the second byte of the jump's
    /// opcode.
    fn jump_over(&mut self, condition: u8, body: impl FnOnce(&mut Self)) {
        self.raw(&[0x0f, condition, 0, 0, 0, 0]);
        let start = self.code.len();
        body(self);
        let length = (self.code.len() - start) as u32;
        self.code[start - 4..start].copy_from_slice(&length.to_le_bytes());
    }

    /// If the 16-bit number at `address` is not `value`, executes the instructions that `body` adds.
    pub fn if16_differs(&mut self, address: u64, value: u16, body: impl FnOnce(&mut Self)) {
        self.compare16(address, value);
        self.jump_over(0x84, body);
    }

    /// If the 32-bit number at `address` has one of the bits of `mask`, executes the instructions that `body` adds.
    pub fn if32_has(&mut self, address: u64, mask: u32, body: impl FnOnce(&mut Self)) {
        self.load(Size::Long, address);
        self.raw(&[0xa9]); // test eax, mask
        self.raw(&mask.to_le_bytes());
        self.jump_over(0x84, body);
    }

    fn compare16(&mut self, address: u64, value: u16) {
        self.rdi(address);
        self.raw(&[0x66, 0x81, 0x3f]);
        self.raw(&value.to_le_bytes());
    }

    /// Waits until the 16-bit number at `address` is not `value`.
    pub fn wait16(&mut self, address: u64, value: u16) {
        let start = self.code.len();
        self.raw(&[0xf3, 0x90]); // pause
        self.compare16(address, value);
        self.raw(&[0x0f, 0x84]);
        self.jump_target(start);
    }

    /// Waits until the 32-bit register has a bit of `mask`.
    pub fn wait32_has(&mut self, register: u64, mask: u32) {
        let start = self.code.len();
        self.load(Size::Long, register);
        self.raw(&[0xa9]); // test eax, mask
        self.raw(&mask.to_le_bytes());
        self.raw(&[0x0f, 0x84]); // jz start
        self.jump_target(start);
    }

    /// Waits until the 16-bit numbers at two addresses are equal.
    pub fn wait_equal16(&mut self, first: u64, second: u64) {
        let start = self.code.len();
        self.raw(&[0xf3, 0x90]); // pause
        self.load(Size::Word, first);
        self.rdi(second);
        self.raw(&[0x66, 0x3b, 0x07, 0x0f, 0x85]); // cmp ax, [rdi]; jne start
        self.jump_target(start);
    }

    /// Waits until the first bit of the 32-bit register `status` is set, although the register `ack` clears the bit.
    pub fn wait_for_lasting_bit(&mut self, status: u64, ack: u64) {
        let start = self.code.len();
        self.store32(ack, 3);
        self.load(Size::Long, status);
        self.raw(&[0xa9, 1, 0, 0, 0, 0x0f, 0x84]); // test eax, 1; jz start
        self.jump_target(start);
    }

    /// Waits until the 16-bit number at `memory` is not `value`, or the 32-bit register has a bit of `mask`. The wait
    /// ends at the latest after `limit` reads of the register.
    pub fn poll(&mut self, (memory, value): (u64, u16), (register, mask): (u64, u32), limit: u32) {
        self.raw(&[0x41, 0x54, 0x49, 0xc7, 0xc4]); // push r12; mov r12, limit
        self.raw(&limit.to_le_bytes());
        let start = self.code.len();
        self.compare16(memory, value);
        self.jump_over(0x85, |code| {
            code.load(Size::Long, register);
            code.raw(&[0xa9]);
            code.raw(&mask.to_le_bytes());
            code.jump_over(0x85, |code| {
                code.raw(&[0x49, 0xff, 0xcc, 0x0f, 0x85]); // dec r12; jnz start
                code.jump_target(start);
            });
        });
        self.raw(&[0x41, 0x5c]);
    }

    /// Writes to an I/O port. [`Size::Quad`] writes 32 bits, because ports have no 64-bit access.
    pub fn out(&mut self, size: Size, port: u16, value: u32) {
        self.raw(&[0x66, 0xba]);
        self.raw(&port.to_le_bytes());
        self.rax(value.into());
        self.raw(match size {
            Size::Byte => &[0xee],
            Size::Word => &[0x66, 0xef],
            Size::Long | Size::Quad => &[0xef],
        });
    }

    /// Reads from an I/O port. [`Size::Quad`] reads 32 bits, because ports have no 64-bit access.
    pub fn input(&mut self, size: Size, port: u16) {
        self.raw(&[0x66, 0xba]);
        self.raw(&port.to_le_bytes());
        self.raw(match size {
            Size::Byte => &[0xec],
            Size::Word => &[0x66, 0xed],
            Size::Long | Size::Quad => &[0xed],
        });
    }

    /// Writes `count` bytes from memory to an I/O port with one string instruction.
    pub fn out_string(&mut self, port: u16, address: u64, count: u32) {
        self.raw(&[0x66, 0xba]);
        self.raw(&port.to_le_bytes());
        self.raw(&[0x48, 0xbe]); // mov rsi, address
        self.raw(&address.to_le_bytes());
        self.raw(&[0xb9]); // mov ecx, count
        self.raw(&count.to_le_bytes());
        self.raw(&[0xfc, 0xf3, 0x6e]); // cld; rep outsb
    }

    /// Copies bytes from memory to memory with one string instruction.
    pub fn copy(&mut self, from: u64, to: u64, count: u32) {
        self.rdi(to);
        self.raw(&[0x48, 0xbe]); // mov rsi, from
        self.raw(&from.to_le_bytes());
        self.raw(&[0xb9]); // mov ecx, count
        self.raw(&count.to_le_bytes());
        self.raw(&[0xfc, 0xf3, 0xa4]); // cld; rep movsb
    }

    /// Adds instructions that may fault. After a fault, the vCPU continues after these instructions (see [`HANDLER`]).
    pub fn attempt(&mut self, bytes: &[u8]) {
        // mov r14, rsp; mov r15, next
        self.raw(&[0x49, 0x89, 0xe6, 0x49, 0xbf]);
        let next = self.here() + 8 + bytes.len() as u64;
        self.raw(&next.to_le_bytes());
        self.raw(bytes);
    }

    /// Stops the vCPU.
    pub fn halt(&mut self) {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfc]); // cli; hlt; jmp to cli
    }
}

/// Handler of all exceptions. The handler restores the stack pointer that [`Assembler::attempt`] has saved in R14, and
/// continues at the address in R15.
pub const HANDLER: &[u8] = &[0x4c, 0x89, 0xf4, 0x41, 0xff, 0xe7]; // mov rsp, r14; jmp r15
