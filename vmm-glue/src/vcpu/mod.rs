//! vCPU threads: they start paused, run until they are paused, and end with the process.
//!
//! A signal pauses a thread. The signal handler sets `immediate_exit` in the thread's own `kvm_run`, so that a signal
//! just before KVM_RUN is not lost. A thread parks only after KVM_RUN has returned EINTR. At that point, no I/O or
//! memory access of the guest is incomplete.

pub mod factory;

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_base::error::chain;
use husk_base::sync::{lock, wait, wait_timeout};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, kvm_run};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, Effect};
use crate::control::{BootStep, ExitReason, VcpuPlace};
use crate::jail::{Kind, confine};
use crate::reporter::Reporter;
use crate::serial::Console;
use factory::{CreateVcpuError, VcpuFactory};

/// Stack size of a vCPU thread in bytes. The thread's calls are not nested deeply.
const STACK: usize = 128 << 10;

/// How long [`Vcpus::inspect`] waits for the vCPUs to stop.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The interrupt flag of RFLAGS.
const INTERRUPTS: u64 = 1 << 9;

/// Error from starting vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The signal handler that interrupts vCPUs could not be installed.
    #[error("failed to install the vCPU signal handler")]
    Signal(#[source] io::Error),
    /// A thread could not be started.
    #[error("failed to start a vCPU thread")]
    Thread(#[source] io::Error),
    /// KVM could not create a vCPU.
    #[error(transparent)]
    Create(#[from] CreateVcpuError),
    /// The VM was built for fewer vCPUs.
    #[error("{wanted} vCPUs were requested, but this VM was built for at most {max}")]
    TooMany {
        /// The requested number of vCPUs.
        wanted: u8,
        /// The maximum number of vCPUs of this VM.
        max: u8,
    },
}

/// All vCPU threads of the VM.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    factory: VcpuFactory,
    bus: Arc<Bus>,
    reporter: Arc<Reporter>,
}

/// The gate at which vCPU threads wait while the VM is paused.
struct Gate {
    open: AtomicBool,
    parked: Mutex<usize>,
    changed: Condvar,
    /// Where the vCPUs are. `None` unless [`Vcpus::inspect`] asks for it.
    places: Mutex<Option<Vec<Option<VcpuPlace>>>>,
}

thread_local! {
    /// The `kvm_run` of this thread, for the signal handler. The handler may access this variable, because the variable
    /// has neither a lazy initializer nor a destructor.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

impl Vcpus {
    /// Starts a thread for each vCPU. All threads wait for [`Self::resume`]. `factory` creates the vCPUs that are
    /// hot-plugged later.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        factory: VcpuFactory,
        bus: &Arc<Bus>,
        reporter: &Arc<Reporter>,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), on_signal)
            .map_err(|error| VcpuError::Signal(io::Error::from_raw_os_error(error.errno())))?;
        let gate = Arc::new(Gate {
            open: AtomicBool::new(false),
            parked: Mutex::new(0),
            changed: Condvar::new(),
            places: Mutex::new(None),
        });
        let threads = Vec::with_capacity(vcpus.len());
        let mut this = Self { threads, gate, factory, bus: bus.clone(), reporter: reporter.clone() };
        for vcpu in vcpus {
            this.spawn(vcpu)?;
        }
        Ok(this)
    }

    /// Creates vCPUs until the VM has `count` vCPUs. The new vCPUs wait until the guest's kernel starts them. vCPUs are
    /// never removed. A vCPU that the guest has taken offline costs one sleeping thread.
    ///
    /// # Errors
    /// [`VcpuError`]. vCPUs that were created before the error stay.
    pub fn hotplug(&mut self, count: u8) -> Result<(), VcpuError> {
        let max = self.factory.max();
        if count > max {
            return Err(VcpuError::TooMany { wanted: count, max });
        }
        while let Some(id) = u8::try_from(self.threads.len()).ok().filter(|&id| id < count) {
            let vcpu = self.factory.create(id, None)?;
            self.spawn(vcpu)?;
        }
        Ok(())
    }

    fn spawn(&mut self, vcpu: VcpuFd) -> Result<(), VcpuError> {
        let index = self.threads.len();
        let (gate, bus, reporter) = (self.gate.clone(), self.bus.clone(), self.reporter.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || run(vcpu, index, &gate, &bus, &reporter))
            .map_err(VcpuError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Returns the console.
    pub fn console(&self) -> &Console {
        &self.bus.console
    }

    /// Resumes all vCPUs.
    pub fn resume(&self) {
        let _guard = lock(&self.gate.parked);
        self.gate.open.store(true, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// Pauses all vCPUs. Returns when all vCPUs have stopped.
    pub fn pause(&self) {
        let mut parked = lock(&self.gate.parked);
        self.interrupt();
        while *parked < self.threads.len() {
            parked = wait(&self.gate.changed, parked);
        }
    }

    /// Stops the vCPUs for a moment. Returns where each vCPU is, or `None` for a vCPU that did not stop in time.
    pub fn inspect(&self) -> Vec<Option<VcpuPlace>> {
        *lock(&self.gate.places) = Some(vec![None; self.threads.len()]);
        let end = Instant::now() + INSPECT_TIMEOUT;
        let mut parked = lock(&self.gate.parked);
        self.interrupt();
        // A thread can still wait since an earlier pause.
        self.gate.changed.notify_all();
        while self.gate.is_any_place_missing() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (parked, _) = wait_timeout(&self.gate.changed, parked, left);
        }
        drop(parked);
        self.resume();
        lock(&self.gate.places).take().unwrap_or_default()
    }

    /// Closes the gate, and makes the vCPUs leave the guest.
    fn interrupt(&self) {
        self.gate.open.store(false, Ordering::SeqCst);
        for thread in &self.threads {
            // The signal does not end the process, because the signal has a handler. Sending cannot fail, because the
            // thread has not been joined.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Gate {
    /// Waits until the gate is open. Meanwhile, tells [`Vcpus::inspect`] where the vCPU is.
    fn wait_until_open(&self, vcpu: &mut VcpuFd, index: usize) {
        let mut parked = lock(&self.parked);
        *parked += 1;
        self.changed.notify_all();
        while !self.open.load(Ordering::SeqCst) {
            if self.is_place_missing(index) {
                drop(parked);
                self.record(index, place_of(vcpu));
                parked = lock(&self.parked);
                self.changed.notify_all();
            } else {
                parked = wait(&self.changed, parked);
            }
        }
        *parked -= 1;
    }

    fn is_place_missing(&self, index: usize) -> bool {
        lock(&self.places).as_ref().and_then(|places| places.get(index)).is_some_and(Option::is_none)
    }

    fn is_any_place_missing(&self) -> bool {
        lock(&self.places).as_ref().is_some_and(|places| places.contains(&None))
    }

    fn record(&self, index: usize, place: VcpuPlace) {
        if let Some(missing) = lock(&self.places).as_mut().and_then(|places| places.get_mut(index)) {
            *missing = Some(place);
        }
    }
}

/// Makes the current or the next KVM_RUN return at once.
extern "C" fn on_signal(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is not null. Therefore, it points to the `kvm_run` mapping of this thread's vCPU, which
        // stays mapped while the thread runs its vCPU. There is no data race, because the handler runs on this thread.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        compiler_fence(Ordering::SeqCst);
    }
}

/// Returns where a vCPU is. KVM_RUN returns the registers, and does not enter the guest, so that the seccomp filter need
/// not allow another ioctl.
fn place_of(vcpu: &mut VcpuFd) -> VcpuPlace {
    vcpu.set_sync_valid_reg(SyncReg::Register);
    vcpu.set_kvm_immediate_exit(1);
    // The call fails with EINTR.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
    vcpu.clear_sync_valid_reg(SyncReg::Register);
    let regs = vcpu.sync_regs().regs;
    VcpuPlace { address: regs.rip, interrupts: regs.rflags & INTERRUPTS != 0 }
}

/// Main function of a vCPU thread.
fn run(mut vcpu: VcpuFd, index: usize, gate: &Gate, bus: &Bus, reporter: &Reporter) {
    if let Err(error) = confine(Kind::Vcpu) {
        reporter.exit(ExitReason::Failed(chain(&error)));
    }
    KVM_RUN.set(vcpu.get_kvm_run());
    gate.wait_until_open(&mut vcpu, index);
    if index == 0 {
        reporter.report_boot_step(BootStep::FirstInstruction);
    }
    loop {
        match vcpu.run() {
            Ok(exit) => match handle(exit, bus, reporter) {
                None => {}
                Some(reason) => reporter.exit(reason),
            },
            Err(error) if error.errno() == libc::EINTR => {
                vcpu.set_kvm_immediate_exit(0);
                if !gate.open.load(Ordering::SeqCst) {
                    gate.wait_until_open(&mut vcpu, index);
                    // Tells the guest that its clock was stopped, so that the guest does not report a lockup. KVM
                    // refuses this call until the guest uses kvmclock. Until then, the call is not needed.
                    let _ = vcpu.kvmclock_ctrl();
                }
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => reporter.exit(ExitReason::Failed(format!("ioctl KVM_RUN failed: {error}"))),
        }
    }
}

/// Serves one VM exit. Returns a reason if the VM ends.
fn handle(exit: VcpuExit<'_>, bus: &Bus, reporter: &Reporter) -> Option<ExitReason> {
    match exit {
        VcpuExit::MmioRead(address, data) => bus.slots.read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.slots.write(address, data),
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => match bus.port_write(port, data) {
            Effect::None => {}
            Effect::Reset => return Some(ExitReason::Reset),
            Effect::BootStep(step) => reporter.report_boot_step(step),
        },
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        // A triple fault is another way to reset a PC.
        VcpuExit::Shutdown => return Some(ExitReason::Reset),
        VcpuExit::SystemEvent(kind, _) if kind == KVM_SYSTEM_EVENT_CRASH => {
            return Some(ExitReason::Failed("the guest reported a crash".to_owned()));
        }
        VcpuExit::SystemEvent(..) => return Some(ExitReason::Reset),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(ExitReason::Failed(format!("KVM failed to enter the guest: reason {reason:#x} on CPU {cpu}")));
        }
        VcpuExit::InternalError => return Some(ExitReason::Failed("KVM reported an internal error".to_owned())),
        other => return Some(ExitReason::Failed(format!("unexpected KVM exit: {other:?}"))),
    }
    None
}
