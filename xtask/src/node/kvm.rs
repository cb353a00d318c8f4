//! Decides whether this machine's KVM can run the node. KVM must be fast enough, and must support nested
//! virtualisation.
//!
//! On some hypervisors /dev/kvm works, but guest code at privilege level 0 is interpreted. An interpreter is a thousand
//! times too slow for a kernel. Therefore this module measures a loop of known length at level 0.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

/// Minimum rate in instructions per second. At a lower rate, a kernel boots too slowly.
const MIN_RATE: f64 = 50e6;
/// Minimum duration of a measurement.
const MIN_DURATION: Duration = Duration::from_millis(100);
/// Size of the guest's memory in bytes. The memory has the page tables, and the code at a higher address.
const MEMORY: usize = 0x10000;
/// Address of the code.
const CODE: u64 = 0x8000;

/// The result of the check.
pub enum Verdict {
    /// Guests are fast enough, and can use KVM themselves.
    Usable {
        /// Instructions per second at privilege level 0.
        rate: f64,
    },
    /// The node has to be emulated. The text is the reason.
    Not(String),
}

/// Decides whether the node can use this machine's KVM.
pub fn judge() -> Verdict {
    match usable() {
        Err(why) => Verdict::Not(why),
        Ok(_) if !nested() => {
            Verdict::Not("this machine's KVM does not support nested virtualisation (module parameter nested)".into())
        }
        Ok(rate) => Verdict::Usable { rate },
    }
}

/// Returns the rate of this machine's KVM in instructions per second, if KVM is fast enough to run Husk without a test
/// node. The error is the reason why KVM cannot be used.
pub fn usable() -> Result<f64, String> {
    match measure() {
        Err(error) => Err(format!("this machine has no usable KVM ({error:#})")),
        Ok(rate) if rate < MIN_RATE => Err(format!("this machine's KVM is too slow ({})", speed(rate))),
        Ok(rate) => Ok(rate),
    }
}

/// Formats a rate.
pub fn speed(rate: f64) -> String {
    format!("{:.1} million guest instructions per second", rate / 1e6)
}

fn nested() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
    })
}

/// Measures the instructions per second of a loop at privilege level 0.
fn measure() -> Result<f64> {
    // The first guest entries are slow, so a short run says nothing. Therefore the number of rounds grows until a run
    // takes `MIN_DURATION`. If the loop is interpreted, a small number of rounds takes that long.
    let mut rounds = 2_000;
    loop {
        let duration = run_loop(rounds)?;
        if duration >= MIN_DURATION || rounds >= 20_000_000 {
            return Ok(rate(rounds, duration));
        }
        rounds *= 10;
    }
}

/// Returns the instructions per second. A round has two instructions.
fn rate(rounds: u32, duration: Duration) -> f64 {
    f64::from(rounds) * 2.0 / duration.as_secs_f64().max(1e-9)
}

/// The guest's memory. It is unmapped when this value is dropped.
struct Memory(*mut libc::c_void);

impl Memory {
    fn new() -> Result<Self> {
        // SAFETY: the kernel chooses the address of the new private mapping, so no other mapping is replaced.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            bail!("failed to map the guest's memory: {}", std::io::Error::last_os_error());
        }
        Ok(Memory(at))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(at)?;
        if at.checked_add(bytes.len()).is_none_or(|end| end > MEMORY) {
            bail!("failed to write {} bytes at {at:#x}: the range ends outside of guest memory", bytes.len());
        }
        // SAFETY: the check above ensures that the range is inside the mapping. No vCPU runs during the write.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.cast::<u8>().add(at), bytes.len()) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping. In `run_loop`, the VM is declared after the `Memory` value. Rust drops local
        // variables in reverse order, so the VM is dropped before this unmapping.
        unsafe { libc::munmap(self.0, MEMORY) };
    }
}

/// Runs a loop of `rounds` rounds in 64-bit mode at privilege level 0. Returns its duration.
fn run_loop(rounds: u32) -> Result<Duration> {
    let mut memory = Memory::new()?;
    // Identity mapping of the first 2 MiB: PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000 with one large page.
    memory.write(0x1000, &0x2003_u64.to_le_bytes())?;
    memory.write(0x2000, &0x3003_u64.to_le_bytes())?;
    memory.write(0x3000, &0x83_u64.to_le_bytes())?;
    let mut code = vec![0xb9]; // mov ecx, rounds
    code.extend(rounds.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xf4]); // 1: dec ecx; jnz 1b; hlt
    memory.write(CODE, &code)?;

    let kvm = Kvm::new().context("failed to open /dev/kvm")?;
    let vm = kvm.create_vm().context("failed to create a VM")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the region is the mapping of `memory`, which outlives the VM because it was declared earlier.
    unsafe { vm.set_user_memory_region(region) }.context("failed to set the memory of a VM")?;
    let mut vcpu = vm.create_vcpu(0).context("failed to create a vCPU")?;
    long_mode(&vcpu).context("failed to set a vCPU's registers")?;
    let begin = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(begin.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => bail!("unexpected exit of a vCPU: {other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error).context("failed to run a vCPU"),
        }
    }
}

fn long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let data =
        kvm_segment { limit: 0xffff_ffff, type_: 3, present: 1, db: 1, s: 1, g: 1, selector: 16, ..Default::default() };
    sregs.cs = kvm_segment { type_: 11, db: 0, l: 1, selector: 8, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr3 = 0x1000;
    sregs.cr4 = 0x20; // PAE
    sregs.cr0 = 0x8000_0011; // PG, ET, PE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs)
}
