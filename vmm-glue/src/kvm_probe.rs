//! Measures whether this host's KVM is fast enough to boot a guest.
//!
//! On some hosts, opening `/dev/kvm` and running vCPUs succeeds, but no guest can boot. Some hypervisors interpret
//! guest code at privilege level 0, which is a thousand times too slow for a kernel. Therefore, the probe runs a loop
//! of known length at privilege level 0 and measures the loop's duration.

use std::{
    io,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::mmap::FromRangesError;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryMmap};

use crate::arch::{layout, regs};

/// Minimum speed at which a kernel boots in useful time, in instructions per second at privilege level 0. Real hardware
/// reaches thousands of millions, emulated hardware hundreds of millions, and an interpreter about one million.
pub const USABLE: f64 = 50e6;

/// Size of guest memory, which holds the page tables and then the code.
const MEMORY: usize = 0x10_0000;
/// Address of the code, after the page tables.
const CODE: u64 = 0x2_0000;
/// Number of rounds of the loop in the first run.
const FIRST_ROUNDS: u32 = 2_000;
/// Maximum number of rounds of the loop in a later run.
const MAX_ROUNDS: u32 = 200_000_000;
/// Minimum duration of a measured run. In a shorter run, the time to enter and leave the guest would distort the
/// result.
const MIN_DURATION: Duration = Duration::from_millis(5);

/// Result of the measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Probe {
    /// Number of guest instructions per second at privilege level 0.
    pub instructions_per_second: f64,
}

impl Probe {
    /// Returns whether a guest kernel boots in useful time.
    pub fn usable(self) -> bool {
        self.instructions_per_second >= USABLE
    }
}

/// Error from measuring KVM.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// `/dev/kvm` cannot be opened.
    #[error("failed to open /dev/kvm")]
    Open(#[source] io::Error),
    /// Guest memory could not be mapped.
    #[error("failed to map guest memory")]
    Map(#[source] FromRangesError),
    /// Guest memory could not be accessed.
    #[error("failed to access guest memory")]
    Memory(#[from] GuestMemoryError),
    /// KVM refused an operation that every KVM supports.
    #[error("failed to {step}")]
    Kvm {
        /// The refused operation.
        step: &'static str,
        /// The error from KVM.
        #[source]
        source: io::Error,
    },
    /// The vCPU did not stop at the end of the loop.
    #[error("unexpected KVM exit: {0}")]
    Exit(String),
}

/// Measures the speed of guest code at privilege level 0. Takes some tens of milliseconds at any speed.
///
/// # Errors
/// [`ProbeError`] if the host does not have KVM, or if this process may not use KVM.
pub fn kvm_speed() -> Result<Probe, ProbeError> {
    let mut rounds = FIRST_ROUNDS;
    loop {
        let duration = run_loop(rounds)?;
        if duration >= MIN_DURATION || rounds >= MAX_ROUNDS {
            return Ok(Probe { instructions_per_second: rate(rounds, duration) });
        }
        rounds *= 10;
    }
}

/// Returns the number of instructions per second. A round has two instructions.
fn rate(rounds: u32, duration: Duration) -> f64 {
    f64::from(rounds) * 2.0 / duration.as_secs_f64().max(1e-9)
}

/// Runs a loop of `rounds` rounds in 64-bit mode and returns its duration.
fn run_loop(rounds: u32) -> Result<Duration, ProbeError> {
    let step = |step| move |error: kvm_ioctls::Error| ProbeError::Kvm { step, source: error.into() };
    let memory = memory(rounds)?;
    let kvm = Kvm::new().map_err(|error| ProbeError::Open(error.into()))?;
    let vm = kvm.create_vm().map_err(step("create a VM"))?;
    let host = memory.get_host_address(GuestAddress(0))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is all of `memory`. `memory` was declared before `vm`, and therefore is dropped after `vm`.
    unsafe { vm.set_user_memory_region(region) }.map_err(step("register guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(step("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(step("read a vCPU's registers"))?;
    regs::set_long_mode(&mut sregs);
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

/// Returns guest memory that holds the loop and page tables with an identity mapping of the first 2 MiB.
fn memory(rounds: u32) -> Result<GuestMemoryMmap, ProbeError> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(ProbeError::Map)?;
    let mut code = vec![0xb9]; // mov ecx, rounds
    code.extend(rounds.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xf4]); // 1: dec ecx; jnz 1b; hlt
    let table = |index: u64| layout::PML4 + index * 0x1000;
    // All entries are present and writable. The last entry maps a 2 MiB page.
    let entries = [(table(0), table(1) | 3), (table(1), table(2) | 3), (table(2), 0x83)];
    entries
        .iter()
        .try_for_each(|(at, entry)| memory.write_slice(&entry.to_le_bytes(), GuestAddress(*at)))
        .and_then(|()| memory.write_slice(&code, GuestAddress(CODE)))?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_depends_on_instructions_per_second() {
        assert_eq!(rate(1_000_000, Duration::from_millis(10)), 2e8);
        assert!(Probe { instructions_per_second: 6e8 }.usable());
        assert!(!Probe { instructions_per_second: 6e5 }.usable());
    }

    #[test]
    fn guest_memory_holds_the_loop() {
        let memory = memory(7).unwrap();
        let mut code = [0; 10];
        memory.read_slice(&mut code, GuestAddress(CODE)).unwrap();
        assert_eq!(code, [0xb9, 7, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xf4]);
    }
}
