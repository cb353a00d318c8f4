//! vCPU threads: they start paused, run until told to pause, and end with the process.
//!
//! Pausing is a signal: its handler sets `immediate_exit` of the thread's own `kvm_run`, so that a signal that comes
//! just before KVM_RUN is not lost. A thread parks only when KVM_RUN has returned EINTR, and then no access of the
//! guest is half done.

pub mod make;

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, Effect};
use crate::child::Reporter;
use crate::control::{ExitReason, Step};
use make::{MakeError, Maker};

/// Stack of a vCPU thread: it calls nothing deep.
const STACK: usize = 128 << 10;

/// Why the vCPUs could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The signal that interrupts them could not be prepared.
    #[error("cannot install the vCPU signal handler")]
    Signal(#[source] io::Error),
    /// A thread could not be made.
    #[error("cannot start a vCPU thread")]
    Thread(#[source] io::Error),
    /// KVM refused one.
    #[error(transparent)]
    Make(#[from] MakeError),
    /// The guest's kernel was not told of so many.
    #[error("{wanted} vCPUs wanted, this machine can have {most}")]
    TooMany {
        /// What was asked for.
        wanted: u8,
        /// What it was built for.
        most: u8,
    },
}

/// All vCPU threads of the machine.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    maker: Maker,
    bus: Arc<Bus>,
    reporter: Arc<Reporter>,
}

/// Where threads wait while the machine is paused.
struct Gate {
    open: AtomicBool,
    parked: Mutex<usize>,
    changed: Condvar,
}

thread_local! {
    /// The `kvm_run` of this thread, for the signal handler. Without initialiser or destructor it is safe to use there.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

impl Vcpus {
    /// Starts a thread for each vCPU; all wait for [`Self::resume`]. `maker` makes those that come later.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn start(
        vcpus: Vec<VcpuFd>,
        maker: Maker,
        bus: &Arc<Bus>,
        reporter: &Arc<Reporter>,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), on_signal)
            .map_err(|error| VcpuError::Signal(io::Error::from_raw_os_error(error.errno())))?;
        let gate = Arc::new(Gate { open: AtomicBool::new(false), parked: Mutex::new(0), changed: Condvar::new() });
        let threads = Vec::with_capacity(vcpus.len());
        let mut this = Self { threads, gate, maker, bus: bus.clone(), reporter: reporter.clone() };
        for vcpu in vcpus {
            this.spawn(vcpu)?;
        }
        Ok(this)
    }

    /// Makes vCPUs until there are `count`; they wait until the guest's kernel starts them. There are never fewer again:
    /// one that the guest has taken offline costs a thread that sleeps.
    ///
    /// # Errors
    /// [`VcpuError`]; those made before the error stay.
    pub fn grow(&mut self, count: u8) -> Result<(), VcpuError> {
        let most = self.maker.most();
        if count > most {
            return Err(VcpuError::TooMany { wanted: count, most });
        }
        while let Some(id) = u8::try_from(self.threads.len()).ok().filter(|&id| id < count) {
            let vcpu = self.maker.make(id, None)?;
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

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        let _guard = self.gate.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.open.store(true, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// Stops all vCPUs and returns when every one stands still.
    pub fn pause(&self) {
        let mut parked = self.gate.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.open.store(false, Ordering::SeqCst);
        for thread in &self.threads {
            // SAFETY: the thread has not been joined, so its pthread_t is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
        while *parked < self.threads.len() {
            parked = self.gate.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Gate {
    /// Waits until the gate is open.
    fn pass(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
        while !self.open.load(Ordering::SeqCst) {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
    }
}

/// Makes the KVM_RUN under way, or the next one, return at once.
extern "C" fn on_signal(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is this thread's own mapping, which lives while the thread runs its vCPU.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        compiler_fence(Ordering::SeqCst);
    }
}

/// A vCPU thread's life.
fn run(mut vcpu: VcpuFd, index: usize, gate: &Gate, bus: &Bus, reporter: &Reporter) {
    KVM_RUN.set(vcpu.get_kvm_run());
    gate.pass();
    if index == 0 {
        reporter.mark(Step::FirstInstruction);
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
                    gate.pass();
                    // Tells the guest that its clock stood still, so that it does not suspect a lock-up. KVM refuses
                    // while the guest has no kvmclock yet: then there is nobody to tell.
                    let _ = vcpu.kvmclock_ctrl();
                }
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => reporter.exit(ExitReason::Failed(format!("KVM_RUN: {error}"))),
        }
    }
}

/// Serves one exit; a reason ends the machine.
fn handle(exit: VcpuExit<'_>, bus: &Bus, reporter: &Reporter) -> Option<ExitReason> {
    match exit {
        VcpuExit::MmioRead(address, data) => bus.slots.read(address, data),
        VcpuExit::MmioWrite(address, data) => bus.slots.write(address, data),
        VcpuExit::IoIn(port, data) => bus.port_read(port, data),
        VcpuExit::IoOut(port, data) => match bus.port_write(port, data) {
            Effect::None => {}
            Effect::Reset => return Some(ExitReason::Reset),
            Effect::Mark(step) => reporter.mark(step),
        },
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        // A triple fault is the PC's other way to reset.
        VcpuExit::Shutdown => return Some(ExitReason::Reset),
        VcpuExit::SystemEvent(kind, _) if kind == KVM_SYSTEM_EVENT_CRASH => {
            return Some(ExitReason::Failed("the guest reported a crash".to_owned()));
        }
        VcpuExit::SystemEvent(..) => return Some(ExitReason::Reset),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(ExitReason::Failed(format!("KVM could not enter the guest: reason {reason:#x} on CPU {cpu}")));
        }
        VcpuExit::InternalError => return Some(ExitReason::Failed("KVM internal error".to_owned())),
        other => return Some(ExitReason::Failed(format!("unexpected KVM exit: {other:?}"))),
    }
    None
}
