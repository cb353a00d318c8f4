//! Makes a running virtual machine larger and smaller: one task, which asks the VMM and the agent in turn.
//!
//! What grows, grows before the answer: the host's limit, then memory, then processors. What shrinks, is asked for, and
//! comes as the guest can give it; the host's limit follows when it has.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use husk_proto::agent::{ProcessorsRequest, RescanRequest};
use husk_vmm::control::{Answer, Call};
use tokio::sync::{mpsc, oneshot, watch};

use super::agent::{Agent, timeouts, within};
use super::state::StateDir;
use super::vmm::{Vmm, VmmError};
use super::{Boot, limits};
use crate::bundle::growth::{Growth, HostLimits, Size};

/// How long a guest may take to have the memory it gets.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a machine did not grow.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The VMM refused.
    #[error("growing the virtual machine")]
    Vmm(#[source] VmmError),
    /// The guest refused.
    #[error("the guest's {0}")]
    Agent(&'static str, #[source] ttrpc::Error),
    /// The guest has fewer processors than it was given.
    #[error("the guest runs {online} of {wanted} processors")]
    Processors {
        /// What it runs.
        online: u32,
        /// What it should.
        wanted: u8,
    },
    /// The guest did not take all of its memory.
    #[error("the guest took {plugged_mib} of {wanted_mib} MiB of memory")]
    Memory {
        /// What it took, beside that of its start.
        plugged_mib: u64,
        /// What it was given.
        wanted_mib: u64,
    },
    /// There is no machine any more.
    #[error("the virtual machine is gone")]
    Gone,
}

/// What a pod is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The machine's size.
    pub size: Size,
    /// What the host allows.
    pub host: HostLimits,
}

struct Job {
    target: Target,
    done: oneshot::Sender<Result<(), ResizeError>>,
}

/// Asks for another size.
pub struct Resizer {
    /// The rules.
    pub growth: Growth,
    jobs: mpsc::UnboundedSender<Job>,
}

impl Resizer {
    /// Starts the task; it ends with this handle.
    pub fn start(
        growth: Growth,
        vmm: Vmm,
        boot: watch::Receiver<Boot>,
        cgroup: Option<PathBuf>,
        dir: StateDir,
    ) -> Self {
        let (jobs, asked) = mpsc::unbounded_channel();
        let now = Target { size: growth.boot, host: HostLimits::default() };
        let machine = Machine {
            vmm,
            boot,
            cgroup,
            dir,
            start: growth.boot,
            now,
            reached: true,
            slot: None,
            plugged_mib: 0,
            giving_back: None,
        };
        tokio::spawn(machine.run(asked));
        Self { growth, jobs }
    }

    /// Like [`Resizer::resize`], for who does not wait.
    pub fn post(&self, target: Target) {
        // The task lives as long as this handle.
        let _ = self.jobs.send(Job { target, done: oneshot::channel().0 });
    }

    /// Makes the pod as large as `target`: returns when what grows has grown.
    ///
    /// # Errors
    /// [`ResizeError`]; what had grown by then stays, until the next target.
    pub async fn resize(&self, target: Target) -> Result<(), ResizeError> {
        let (done, wait) = oneshot::channel();
        self.jobs.send(Job { target, done }).map_err(|_| ResizeError::Gone)?;
        wait.await.map_err(|_| ResizeError::Gone)?
    }
}

/// Memory that the guest is giving back: how many MiB it has left beside those of its start.
type GivingBack = Pin<Box<dyn Future<Output = Option<u64>> + Send>>;

/// The task's state.
struct Machine {
    vmm: Vmm,
    boot: watch::Receiver<Boot>,
    cgroup: Option<PathBuf>,
    /// Where `husk ps` finds the size.
    dir: StateDir,
    start: Size,
    /// What was asked for last.
    now: Target,
    /// Whether the guest took all of that: what it did not, it is asked for again.
    reached: bool,
    /// Where the memory device is, once it is there and the guest was told.
    slot: Option<u32>,
    /// The most that the guest may have plugged in.
    plugged_mib: u64,
    giving_back: Option<GivingBack>,
}

impl Machine {
    async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        loop {
            let giving_back = async {
                match self.giving_back.as_mut() {
                    Some(left) => left.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                job = jobs.recv() => {
                    let Some(Job { target, done }) = job else { return };
                    if let Err(Err(error)) = done.send(self.apply(target).await) {
                        tracing::warn!(error = %crate::chain(&error), "the pod has not the size it should have");
                    }
                }
                left = giving_back => {
                    self.giving_back = None;
                    if let Some(left) = left {
                        tracing::debug!(plugged_mib = left, "memory was given back");
                        self.plugged_mib = left;
                        self.set_host_limits().await;
                        self.note_size().await;
                    }
                }
            }
        }
    }

    /// Grows what has to grow, and asks for back what may shrink.
    async fn apply(&mut self, mut target: Target) -> Result<(), ResizeError> {
        if let Some(path) = &self.cgroup {
            target.size.memory_mib = target.size.memory_mib.min(limits::room(path));
        }
        if target == self.now && self.reached {
            return Ok(());
        }
        let again = !std::mem::replace(&mut self.reached, false);
        let before = std::mem::replace(&mut self.now, target.clone()).size;
        let wanted_mib = target.size.memory_mib.saturating_sub(self.start.memory_mib);
        let had_mib = before.memory_mib.saturating_sub(self.start.memory_mib);
        self.plugged_mib = self.plugged_mib.max(wanted_mib);
        self.set_host_limits().await;
        if wanted_mib > had_mib || (again && wanted_mib > 0 && wanted_mib == had_mib) {
            // The VMM ends an earlier wait with the new request: what it says then is not what is left.
            self.giving_back = None;
            self.grow_memory(wanted_mib).await?;
        } else if wanted_mib < had_mib {
            let vmm = self.vmm.clone();
            self.giving_back = Some(Box::pin(async move {
                match vmm.call(Call::Memory { mib: wanted_mib }, &[]).await {
                    Ok((Answer::Memory { plugged_mib }, _)) => Some(plugged_mib),
                    _ => None,
                }
            }));
        }
        if again || target.size.vcpus != before.vcpus {
            self.switch_processors(target.size.vcpus).await?;
        }
        if target.size != before {
            tracing::info!(vcpus = target.size.vcpus, memory_mib = target.size.memory_mib, "the pod has another size");
            self.note_size().await;
        }
        self.reached = true;
        Ok(())
    }

    async fn grow_memory(&mut self, wanted_mib: u64) -> Result<(), ResizeError> {
        if self.slot.is_none() {
            let slot = match self.vmm.call(Call::AttachMemory, &[]).await.map_err(ResizeError::Vmm)? {
                (Answer::Attached { slot }, _) => slot,
                _ => return Err(ResizeError::Vmm(VmmError::Unexpected)),
            };
            let request = RescanRequest { slot, ..Default::default() };
            let found = self.agent()?.sandbox.rescan(within(timeouts::QUICK), &request).await;
            found.map_err(|error| ResizeError::Agent("memory device", error))?;
            self.slot = Some(slot);
        }
        let plugged_mib =
            match tokio::time::timeout(PATIENCE, self.vmm.call(Call::Memory { mib: wanted_mib }, &[])).await {
                Ok(answer) => answer.map_err(ResizeError::Vmm)?.0,
                Err(_) => self.vmm.call(Call::PluggedMemory, &[]).await.map_err(ResizeError::Vmm)?.0,
            };
        match plugged_mib {
            Answer::Memory { plugged_mib } if plugged_mib >= wanted_mib => Ok(()),
            Answer::Memory { plugged_mib } => Err(ResizeError::Memory { plugged_mib, wanted_mib }),
            _ => Err(ResizeError::Vmm(VmmError::Unexpected)),
        }
    }

    async fn switch_processors(&mut self, wanted: u8) -> Result<(), ResizeError> {
        self.vmm.call(Call::Vcpus { count: wanted }, &[]).await.map_err(ResizeError::Vmm)?;
        let request = ProcessorsRequest { count: wanted.into(), ..Default::default() };
        let switched = self.agent()?.sandbox.processors(within(timeouts::SLOW), &request).await;
        let online = switched.map_err(|error| ResizeError::Agent("processors", error))?.online;
        if online == u32::from(wanted) { Ok(()) } else { Err(ResizeError::Processors { online, wanted }) }
    }

    /// Sets the limits on the host for what the guest may have by now. Lowering one waits for memory to be reclaimed.
    async fn set_host_limits(&mut self) {
        let Some(path) = self.cgroup.clone() else { return };
        let (limits, guest_mib) = (self.now.host.clone(), self.start.memory_mib.saturating_add(self.plugged_mib));
        if let Err(error) = tokio::task::spawn_blocking(move || limits::set(&path, &limits, guest_mib)).await {
            tracing::warn!(%error, "the host's limits are not set");
        }
    }

    /// Notes for `husk ps` what the pod has by now.
    async fn note_size(&mut self) {
        let (dir, vcpus) = (self.dir.clone(), self.now.size.vcpus);
        let memory_mib = self.start.memory_mib.saturating_add(self.plugged_mib);
        match tokio::task::spawn_blocking(move || dir.note_size(vcpus, memory_mib)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = %crate::chain(&error), "size not noted for husk ps"),
            Err(error) => tracing::warn!(%error, "size not noted for husk ps"),
        }
    }

    fn agent(&self) -> Result<Agent, ResizeError> {
        match &*self.boot.borrow() {
            Boot::Ready(agent) => Ok(agent.clone()),
            _ => Err(ResizeError::Gone),
        }
    }
}
