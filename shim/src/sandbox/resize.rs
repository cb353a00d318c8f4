//! Makes a running virtual machine larger and smaller: one task, which asks the VMM and the agent in turn.
//!
//! What grows, grows before the answer: the host's limit, then memory, then processors. What shrinks, is asked for, and
//! comes as the guest can give it; the host's limit follows when it has.

use std::pin::Pin;
use std::time::Duration;

use husk_proto::agent::{HugePagesRequest, ProcessorsRequest, RescanRequest};
use husk_vmm::control::{Answer, Call, Pages};
use tokio::sync::{mpsc, oneshot, watch};

use super::agent::{Agent, timeouts, within};
use super::cgroup::Place;
use super::state::StateDir;
use super::vmm::{Vmm, VmmError};
use super::{Boot, hugepages, limits};
use crate::bundle::growth::{Growth, HostLimits, Size};
use crate::systemd::Unit;

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
    /// The node has not so many huge pages to give.
    #[error("the pod is to have {wanted_mib} MiB of huge pages of 2 MiB, the node has {free_mib} MiB of them to give")]
    NodeHugePages {
        /// What it does not have yet.
        wanted_mib: u64,
        /// What is free and promised to nobody.
        free_mib: u64,
    },
    /// The guest did not make huge pages of it.
    #[error("the guest made {count} of {wanted} huge pages")]
    HugePages {
        /// How many there are.
        count: u64,
        /// How many there should be.
        wanted: u64,
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
    /// Huge pages in MiB. They are not taken back: a volume may have them, and the node has counted them as the pod's.
    pub huge_mib: u64,
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
        cgroup: Option<(Place, Option<Unit>)>,
        dir: StateDir,
    ) -> Self {
        let (jobs, asked) = mpsc::unbounded_channel();
        let now = Target { size: growth.boot, huge_mib: 0, host: HostLimits::default() };
        let machine = Machine {
            vmm,
            boot,
            cgroup,
            dir,
            start: growth.boot,
            now,
            reached: true,
            slots: Slots::default(),
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
    /// With what systemd has of it, if that made it.
    cgroup: Option<(Place, Option<Unit>)>,
    /// Where `husk ps` finds the size.
    dir: StateDir,
    start: Size,
    /// What was asked for last.
    now: Target,
    /// Whether the guest took all of that: what it did not, it is asked for again.
    reached: bool,
    slots: Slots,
    /// The most that the guest may have plugged in.
    plugged_mib: u64,
    giving_back: Option<GivingBack>,
}

/// Where the memory devices are, once they are there and the guest was told.
#[derive(Default)]
struct Slots {
    ordinary: Option<u32>,
    huge: Option<u32>,
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
        if let Some((place, _)) = &self.cgroup {
            target.size.memory_mib = target.size.memory_mib.min(limits::room(place));
        }
        target.huge_mib = target.huge_mib.max(self.now.huge_mib);
        if target == self.now && self.reached {
            return Ok(());
        }
        let again = !std::mem::replace(&mut self.reached, false);
        let Target { size: before, huge_mib: huge_before, .. } = std::mem::replace(&mut self.now, target.clone());
        let wanted_mib = target.size.memory_mib.saturating_sub(self.start.memory_mib);
        let had_mib = before.memory_mib.saturating_sub(self.start.memory_mib);
        self.plugged_mib = self.plugged_mib.max(wanted_mib);
        self.set_host_limits().await;
        if wanted_mib > had_mib || (again && wanted_mib > 0 && wanted_mib == had_mib) {
            // The VMM ends an earlier wait with the new request: what it says then is not what is left.
            self.giving_back = None;
            self.grow_memory(Pages::Ordinary, wanted_mib).await?;
        } else if wanted_mib < had_mib {
            let vmm = self.vmm.clone();
            self.giving_back = Some(Box::pin(async move {
                match vmm.call(Call::Memory { pages: Pages::Ordinary, mib: wanted_mib }, &[]).await {
                    Ok((Answer::Memory { plugged_mib }, _)) => Some(plugged_mib),
                    _ => None,
                }
            }));
        }
        if target.huge_mib > huge_before || (again && target.huge_mib > 0) {
            // If not, the container that asked is not made: nobody else is to ask for its pages again.
            self.now.huge_mib = huge_before;
            self.grow_huge_pages(target.huge_mib, huge_before).await?;
            self.now.huge_mib = target.huge_mib;
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

    async fn grow_memory(&mut self, pages: Pages, wanted_mib: u64) -> Result<(), ResizeError> {
        let known = match pages {
            Pages::Ordinary => self.slots.ordinary,
            Pages::Huge => self.slots.huge,
        };
        if known.is_none() {
            let slot = match self.vmm.call(Call::AttachMemory(pages), &[]).await.map_err(ResizeError::Vmm)? {
                (Answer::Attached { slot }, _) => slot,
                _ => return Err(ResizeError::Vmm(VmmError::Unexpected)),
            };
            let request = RescanRequest { slot, ..Default::default() };
            let found = self.agent()?.sandbox.rescan(within(timeouts::QUICK), &request).await;
            found.map_err(|error| ResizeError::Agent("memory device", error))?;
            match pages {
                Pages::Ordinary => self.slots.ordinary = Some(slot),
                Pages::Huge => self.slots.huge = Some(slot),
            }
        }
        let plugged_mib =
            match tokio::time::timeout(PATIENCE, self.vmm.call(Call::Memory { pages, mib: wanted_mib }, &[])).await {
                Ok(answer) => answer.map_err(ResizeError::Vmm)?.0,
                Err(_) => self.vmm.call(Call::PluggedMemory(pages), &[]).await.map_err(ResizeError::Vmm)?.0,
            };
        match plugged_mib {
            Answer::Memory { plugged_mib } if plugged_mib >= wanted_mib => Ok(()),
            Answer::Memory { plugged_mib } => Err(ResizeError::Memory { plugged_mib, wanted_mib }),
            _ => Err(ResizeError::Vmm(VmmError::Unexpected)),
        }
    }

    /// Plugs huge pages of the host's in, and has the guest make huge pages of what it got.
    async fn grow_huge_pages(&mut self, wanted_mib: u64, had_mib: u64) -> Result<(), ResizeError> {
        let more = wanted_mib.saturating_sub(had_mib);
        match hugepages::free_mib() {
            // Asked before: a guest that is not given what it was promised asks again and again.
            free_mib if free_mib < more => return Err(ResizeError::NodeHugePages { wanted_mib: more, free_mib }),
            _ => self.grow_memory(Pages::Huge, wanted_mib).await?,
        }
        let wanted = wanted_mib / hugepages::PAGE_MIB;
        let request = HugePagesRequest { count: wanted, ..Default::default() };
        let made = self.agent()?.sandbox.huge_pages(within(timeouts::SLOW), &request).await;
        let count = made.map_err(|error| ResizeError::Agent("huge pages", error))?.count;
        if count >= wanted { Ok(()) } else { Err(ResizeError::HugePages { count, wanted }) }
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
        let Some((place, unit)) = self.cgroup.clone() else { return };
        let (limits, guest_mib) = (self.now.host.clone(), self.start.memory_mib.saturating_add(self.plugged_mib));
        let set = move || limits::set(&place, unit.as_ref(), &limits, guest_mib);
        if let Err(error) = tokio::task::spawn_blocking(set).await {
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
