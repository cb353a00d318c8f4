//! Whether this machine's KVM can hold the node: decided by measuring it, and by whether it nests.
//!
//! Some hypervisors hand out a /dev/kvm that works and interprets guest code at privilege level 0, a thousand times
//! too slow for a kernel. So a loop of known length runs there, at level 0, and is timed.

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::fs;
use std::time::{Duration, Instant};

/// Instructions a second below which a kernel does not come up in useful time.
const USABLE: f64 = 50e6;
/// A run that takes this long can be timed.
const LONG_ENOUGH: Duration = Duration::from_millis(100);
/// Guest memory: page tables, then the code.
const MEMORY: usize = 0x10000;
const CODE: u64 = 0x8000;

/// What there is to say about this machine's KVM.
pub enum Verdict {
    /// Guests run in it well, and can use KVM themselves.
    Usable {
        /// Instructions a second at privilege level 0.
        rate: f64,
    },
    /// Why it is no use for the node.
    Not(String),
}

/// Judges this machine's KVM for the node.
pub fn judge() -> Verdict {
    match usable() {
        Err(why) => Verdict::Not(why),
        Ok(_) if !nested() => Verdict::Not("this machine's KVM does not nest (module parameter nested)".into()),
        Ok(rate) => Verdict::Usable { rate },
    }
}

/// The rate of a KVM that is fast enough to run Husk on this machine itself, or why there is none.
pub fn usable() -> Result<f64, String> {
    match measure() {
        Err(error) => Err(format!("this machine has no KVM to use ({error:#})")),
        Ok(rate) if rate < USABLE => Err(format!("this machine's KVM is too slow ({})", speed(rate))),
        Ok(rate) => Ok(rate),
    }
}

/// A rate in words.
pub fn speed(rate: f64) -> String {
    format!("{:.1} million guest instructions a second", rate / 1e6)
}

fn nested() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
    })
}

/// Instructions a second of a loop at privilege level 0.
fn measure() -> Result<f64> {
    // The first entries into a guest have a cost of their own: only a run that takes its time says something. Where
    // the loop is interpreted that is a short one.
    let mut rounds = 2_000;
    loop {
        let took = counted(rounds)?;
        if took >= LONG_ENOUGH || rounds >= 20_000_000 {
            return Ok(rate(rounds, took));
        }
        rounds *= 10;
    }
}

/// Two instructions a round.
fn rate(rounds: u32, took: Duration) -> f64 {
    f64::from(rounds) * 2.0 / took.as_secs_f64().max(1e-9)
}

/// Guest memory, mapped for as long as this lives.
struct Memory(*mut libc::c_void);

impl Memory {
    fn new() -> Result<Self> {
        // SAFETY: a new private mapping that nothing else knows of.
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
            bail!("cannot map memory: {}", std::io::Error::last_os_error());
        }
        Ok(Memory(at))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(at)?;
        if at.checked_add(bytes.len()).is_none_or(|end| end > MEMORY) {
            bail!("outside of guest memory");
        }
        // SAFETY: the range lies within the mapping, checked above, and no vCPU runs while it is written.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.cast::<u8>().add(at), bytes.len()) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and the virtual machine that used it is gone (declared later).
        unsafe { libc::munmap(self.0, MEMORY) };
    }
}

/// Runs a loop of `rounds` rounds in 64-bit mode at privilege level 0; the time it takes.
fn counted(rounds: u32) -> Result<Duration> {
    let mut memory = Memory::new()?;
    // Identity mapping of the first 2 MiB: PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000 with one large page.
    memory.write(0x1000, &0x2003_u64.to_le_bytes())?;
    memory.write(0x2000, &0x3003_u64.to_le_bytes())?;
    memory.write(0x3000, &0x83_u64.to_le_bytes())?;
    let mut code = vec![0xb9]; // mov ecx, rounds
    code.extend(rounds.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xf4]); // 1: dec ecx; jnz 1b; hlt
    memory.write(CODE, &code)?;

    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a virtual machine")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the region is the mapping, which outlives the virtual machine: it was declared before it.
    unsafe { vm.set_user_memory_region(region) }.context("cannot give the virtual machine memory")?;
    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    long_mode(&vcpu).context("cannot set a vCPU's registers")?;
    let begin = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(begin.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => bail!("a vCPU stopped where it should not: {other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(error).context("cannot run a vCPU"),
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
