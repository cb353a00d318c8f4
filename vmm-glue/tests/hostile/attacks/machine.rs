//! Attacks on other parts of the VM: I/O ports, the console, addresses without a device, and the vCPU itself.

use husk_vmm::arch::layout;

use super::{Attack, Build, RNG};
use crate::assembler::Size;
use crate::machine::MEMORY_MIB;

/// The console's data port.
const CONSOLE: u16 = 0x3f8;
/// Command port of the keyboard controller. Command 0xfe resets the VM.
const I8042: u16 = 0x64;
/// The I/O port for boot marks.
const BOOT_MARK: u16 = 0x5f0;

pub fn attacks() -> Vec<Attack> {
    let on = |name, build: Build| Attack::on(RNG, name, build);
    vec![
        on("write to every I/O port", |guest, _| {
            for port in (0..0x1000).chain((0x1000..=0xffff).step_by(0x101)) {
                if port != I8042 && !(CONSOLE..CONSOLE + 8).contains(&port) {
                    guest.out(Size::Long, port, 0x0101_0101);
                }
            }
        }),
        on("read from every I/O port", |guest, _| {
            for port in (0..0x1000).chain((0x1000..=0xffff).step_by(0x101)) {
                guest.input(Size::Long, port);
                guest.input(Size::Byte, port);
            }
        }),
        on("report boot steps 20000 times", |guest, _| {
            let marks = guest.buffer(&[1, 2, 3, 0].repeat(5000));
            guest.out_string(BOOT_MARK, marks, 20_000);
            guest.repeat(2000, |code| [1, 2].iter().for_each(|&mark| code.out(Size::Byte, BOOT_MARK, mark)));
        }),
        on("128 KiB of console output without a newline", |guest, _| {
            let text = guest.buffer(&vec![b'x'; 128 << 10]);
            guest.out_string(CONSOLE, text, 128 << 10);
            guest.print("\n");
        }),
        on("nonsense in the console's registers", |guest, _| {
            for register in 1..8 {
                for value in 0..=255 {
                    guest.out(Size::Byte, CONSOLE + register, value);
                    guest.input(Size::Byte, CONSOLE + register);
                }
            }
            // Leave loopback mode and select the data register.
            [1, 3, 4].iter().for_each(|register| guest.out(Size::Byte, CONSOLE + register, 0));
            guest.print("\n");
        }),
        on("access addresses without a device", |guest, _| {
            let end = layout::slot_address(layout::MAX_SLOTS as u32);
            let addresses = [
                MEMORY_MIB << 20,
                layout::HOLE_START,
                layout::MMIO - 8,
                layout::MMIO - 3,
                layout::slot_address(6),
                layout::slot_address(1) - 4,
                layout::slot_address(1) - 3,
                end - 2,
                end,
                u64::from(layout::IOAPIC) + 0x800,
                layout::KVM_TSS as u64,
                layout::HOLE_END - 8,
                6 << 30,
            ];
            for address in addresses {
                for size in Size::ALL {
                    guest.load(size, address);
                    guest.store(size, address, u64::MAX);
                }
            }
        }),
        on("string, vector and atomic instructions on a device's MMIO registers", |guest, _| {
            let buffer = guest.allocate(8192);
            guest.copy(layout::slot_address(0), buffer, 4096);
            guest.copy(buffer, layout::slot_address(6), 4096);
            guest.copy(layout::slot_address(1) + 0x100, layout::slot_address(2) + 0x100, 64);
            guest.copy(layout::MMIO - 64, buffer, 128);
            guest.store(Size::Quad, layout::slot_address(0), 0);
            // RDI points to a device's register. These instructions access the register atomically, with a push, and
            // with SSE.
            for code in [
                &[0xf0, 0x0f, 0xb1, 0x07][..],                           // lock cmpxchg [rdi], eax
                &[0xf0, 0x0f, 0xc1, 0x07],                               // lock xadd [rdi], eax
                &[0x87, 0x07],                                           // xchg [rdi], eax
                &[0xff, 0x37, 0x58],                                     // push [rdi]; pop rax
                &[0x0f, 0x20, 0xe0, 0x80, 0xcc, 0x02, 0x0f, 0x22, 0xe0], // cr4 |= OSFXSR
                &[0x0f, 0x10, 0x07],                                     // movups xmm0, [rdi]
                &[0x0f, 0x11, 0x07],                                     // movups [rdi], xmm0
                &[0x48, 0x0f, 0xc7, 0x0f],                               // cmpxchg16b [rdi]
            ] {
                guest.attempt(code);
            }
        })
        .may_end("KVM reported an internal error"),
        on("nonsense in model-specific and control registers", |guest, _| {
            let specific =
                (0..0x20).chain([0x1b, 0x3a, 0x3b, 0x48, 0x8b, 0x174, 0x1a0, 0x277, 0x2ff, 0x6e0, 0xc000_0080]);
            // Paravirtual registers of KVM and Hyper-V.
            let paravirtual = [
                0x11,
                0x12,
                0x4b56_4d00,
                0x4b56_4d01,
                0x4b56_4d02,
                0x4b56_4d03,
                0x4b56_4d04,
                0x4000_0000,
                0x4000_0001,
                0x4000_0105,
            ];
            for register in specific.chain(paravirtual) {
                // Skip EFER and the APIC base address, because the attacker needs their values.
                if register == 0xc000_0080 || register == 0x1b {
                    continue;
                }
                for value in [0, 1, 0x7fff_ffff, u32::MAX] {
                    let mut code = vec![0xb9]; // mov ecx, register
                    code.extend(u32::to_le_bytes(register));
                    code.push(0xb8); // mov eax, value
                    code.extend(u32::to_le_bytes(value));
                    code.extend([0x89, 0xc2, 0x0f, 0x30]); // mov edx, eax; wrmsr
                    guest.attempt(&code);
                }
            }
            for code in [
                &[0x48, 0x31, 0xc0, 0x48, 0xff, 0xc8, 0x0f, 0x22, 0xe0][..], // cr4 = all ones
                &[0x48, 0x31, 0xc0, 0x48, 0xff, 0xc8, 0x44, 0x0f, 0x22, 0xc0], // cr8 = all ones
                &[0x0f, 0x0b],                                               // ud2
                &[0x48, 0x31, 0xc0, 0x48, 0xf7, 0xf0],                       // divide by zero
                &[0xcc],                                                     // int3
                &[0x0f, 0x01, 0xc1],                                         // vmcall
                &[0x0f, 0x01, 0xd9],                                         // vmmcall
                &[0x0f, 0x01, 0xc2],                                         // vmlaunch
            ] {
                guest.attempt(code);
            }
        })
        .may_end("KVM reported an internal error"),
        on("storm of interprocessor interrupts", |guest, _| {
            let command = u64::from(layout::LAPIC) + 0x300;
            guest.repeat(500, |code| {
                // Send interrupts to this vCPU, to all vCPUs, to all other vCPUs and to APIC id 0.
                [0x0004_0040, 0x0008_00ff, 0x000c_0020, 0x0000_0030]
                    .iter()
                    .for_each(|&value| code.store32(command, value));
            });
        }),
        on("triple fault", |guest, _| {
            let none = guest.allocate(16);
            guest.rax(none);
            guest.raw(&[0x0f, 0x01, 0x18, 0x0f, 0x0b]); // lidt [rax]; ud2
        })
        .ends("the guest reset the VM"),
        on("reset by the keyboard controller", |guest, _| {
            guest.out(Size::Byte, I8042, 0xfe);
            guest.halt();
        })
        .ends("the guest reset the VM"),
        on("jump to a device's MMIO registers, to execute them as code", |guest, _| {
            guest.rax(layout::slot_address(0));
            guest.raw(&[0xff, 0xe0]); // jmp rax
        })
        .ends("KVM reported an internal error"),
        on("vCPU that resets itself by an interprocessor interrupt", |guest, _| {
            guest.store32(u64::from(layout::LAPIC) + 0x300, 0x0004_4500);
            guest.halt();
        })
        .ends("KVM"),
    ]
}
