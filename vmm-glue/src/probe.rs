//! Whether this machine's KVM is usable, found out by measuring it.
//!
//! A `/dev/kvm` that opens and runs vCPUs is not yet one a guest can boot on: some hypervisors interpret guest code at
//! privilege level 0, a thousand times too slow for a kernel. So a loop of known length runs there, and is timed.

use crate::arch::{layout, regs};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use std::{
    io,
    time::{Duration, Instant},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap};

/// Instructions a second at privilege level 0 below which a kernel does not come up in useful time: real hardware does
/// thousands of millions, emulated hardware hundreds, an interpreter about one.
pub const USABLE: f64 = 50e6;

/// Guest memory: page tables, then the code.
const MEMORY: usize = 0x10_0000;
/// Where the code lies, clear of the page tables.
const CODE: u64 = 0x2_0000;
/// Rounds to begin with, and the most there are.
const FEW: u32 = 2_000;
const MANY: u32 = 200_000_000;
/// A run that takes so long can be timed: entering and leaving the guest no longer counts.
const TIMED: Duration = Duration::from_millis(5);

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Probe {
    /// Guest instructions a second at privilege level 0.
    pub instructions_per_second: f64,
}

impl Probe {
    /// Whether a kernel comes up on it.
    pub fn usable(self) -> bool {
        self.instructions_per_second >= USABLE
    }
}

/// Why there is no KVM.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// Guest memory cannot be made.
    #[error("cannot make guest memory: {0}")]
    Memory(String),
    /// KVM refused something every KVM can do.
    #[error("cannot {step}")]
    Kvm {
        /// What it refused.
        step: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The vCPU did not halt at the end of the loop.
    #[error("a vCPU stopped where it should not: {0}")]
    Exit(String),
}

/// Measures how fast guest code runs at privilege level 0; takes some tens of milliseconds, whatever the speed.
///
/// # Errors
/// [`ProbeError`] when there is no KVM, or this process may not use it.
pub fn kvm_speed() -> Result<Probe, ProbeError> {
    let mut rounds = FEW;
    loop {
        let took = counted(rounds)?;
        if took >= TIMED || rounds >= MANY {
            return Ok(Probe { instructions_per_second: rate(rounds, took) });
        }
        rounds *= 10;
    }
}

/// Two instructions a round.
fn rate(rounds: u32, took: Duration) -> f64 {
    f64::from(rounds) * 2.0 / took.as_secs_f64().max(1e-9)
}

/// Runs a loop of `rounds` rounds in 64-bit mode; the time it takes.
fn counted(rounds: u32) -> Result<Duration, ProbeError> {
    let step = |step| move |error: kvm_ioctls::Error| ProbeError::Kvm { step, source: error.into() };
    let memory = memory(rounds)?;
    let kvm = Kvm::new().map_err(|error| ProbeError::Open(error.into()))?;
    let vm = kvm.create_vm().map_err(step("create a virtual machine"))?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(|error| ProbeError::Memory(error.to_string()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is all of `memory`, which was made before the virtual machine and so outlives it.
    unsafe { vm.set_user_memory_region(region) }.map_err(step("give a virtual machine memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(step("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(step("read a vCPU's registers"))?;
    regs::long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(step("set a vCPU's registers"))?;
    // Bit 1 of RFLAGS is always one.
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).map_err(step("set a vCPU's registers"))?;
    let begin = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(begin.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(ProbeError::Exit(format!("{other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(step("run a vCPU")(error)),
        }
    }
}

/// Memory with an identity mapping of the first 2 MiB, and the loop.
fn memory(rounds: u32) -> Result<GuestMemoryMmap, ProbeError> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|error| ProbeError::Memory(error.to_string()))?;
    let mut code = vec![0xb9]; // mov ecx, rounds
    code.extend(rounds.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xf4]); // 1: dec ecx; jnz 1b; hlt
    let table = |index: u64| layout::PML4 + index * 0x1000;
    // Present and writable; the last is a page of 2 MiB.
    let entries = [(table(0), table(1) | 3), (table(1), table(2) | 3), (table(2), 0x83)];
    entries
        .iter()
        .try_for_each(|(at, entry)| memory.write_slice(&entry.to_le_bytes(), GuestAddress(*at)))
        .and_then(|()| memory.write_slice(&code, GuestAddress(CODE)))
        .map_err(|error| ProbeError::Memory(error.to_string()))?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_their_verdicts() {
        assert_eq!(rate(1_000_000, Duration::from_millis(10)), 2e8);
        assert!(Probe { instructions_per_second: 6e8 }.usable());
        assert!(!Probe { instructions_per_second: 6e5 }.usable());
    }

    #[test]
    fn the_loop_fits_its_memory() {
        let memory = memory(7).unwrap();
        let mut code = [0; 10];
        memory.read_slice(&mut code, GuestAddress(CODE)).unwrap();
        assert_eq!(code, [0xb9, 7, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xf4]);
    }
}
