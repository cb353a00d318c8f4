//! Resizes a running VM. One task handles all requests in sequence.
//!
//! For a larger target, the task first raises the sandbox's limits on the host. Then memory, huge pages and vCPUs grow,
//! in this order. The task answers the request when all resources have grown.
//!
//! For a smaller target, the task answers before the guest returns memory. When the guest has returned memory, the task
//! lowers the memory limit on the host.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::agent::{BindDeviceRequest, SetHugePagesRequest, SetOnlineVcpusRequest};
use husk_vmm::control::{Answer, Call, PageKind};
use tokio::sync::{mpsc, oneshot};

use crate::blocking;
use crate::resources::cgroup::CgroupLocation;
use crate::resources::growth::{Growth, HostLimits, Size};
use crate::resources::{hugepages, limits};
use crate::systemd::Unit;
use crate::vm::StateCell;
use crate::vm::agent::{Agent, timeouts, within};
use crate::vm::vmm::{Vmm, VmmError};

/// Timeout for the guest to accept hot-plugged memory.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(60);

/// A failure to resize a VM.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// A request to the VMM failed.
    #[error("failed to resize the VM")]
    Vmm(#[source] VmmError),
    /// A request to the agent failed.
    #[error("failed to set up the {0} in the guest")]
    Agent(&'static str, #[source] ttrpc::Error),
    /// The number of vCPUs that are online in the guest differs from the requested number.
    #[error("failed to set the number of vCPUs: the guest has {online} of {wanted} vCPUs online")]
    Vcpus {
        /// vCPUs that are online.
        online: u32,
        /// vCPUs that were requested.
        wanted: u8,
    },
    /// The guest did not accept all of the hot-plugged memory.
    #[error("failed to grow memory: the guest accepted {plugged_mib} of {wanted_mib} MiB of hot-plugged memory")]
    Memory {
        /// Hot-plugged memory that the guest accepted.
        plugged_mib: u64,
        /// Hot-plugged memory that the shim requested.
        wanted_mib: u64,
    },
    /// The node has too few free huge pages.
    #[error("failed to reserve {wanted_mib} MiB of 2 MiB huge pages: the node has {free_mib} MiB available")]
    NodeHugePages {
        /// Size of the additional huge pages that the pod needs.
        wanted_mib: u64,
        /// Size of the node's huge pages that are neither in use nor reserved.
        free_mib: u64,
    },
    /// The guest could not allocate the huge pages.
    #[error("failed to allocate huge pages: the guest allocated {count} of {wanted} huge pages")]
    HugePages {
        /// Number of huge pages in the guest.
        count: u64,
        /// Number of huge pages that was requested.
        wanted: u64,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Gone,
}

/// Size and limits that a pod should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Size of the VM.
    pub size: Size,
    /// Total size of the huge pages in MiB. The task never reduces the pod's huge pages, because a volume may use the
    /// huge pages.
    pub huge_mib: u64,
    /// Limits on the host.
    pub host: HostLimits,
}

struct Job {
    target: Target,
    done: oneshot::Sender<Result<(), ResizeError>>,
}

/// Handle of the task that resizes the VM.
pub struct Resizer {
    /// Rules that compute the VM's size from the containers' limits.
    pub growth: Growth,
    /// Size of the VM when its guest began.
    pub start: Size,
    jobs: mpsc::UnboundedSender<Job>,
}

impl Resizer {
    /// Starts the task for a VM of size `start`. The task ends when the returned handle is dropped.
    pub fn start(
        growth: Growth,
        start: Size,
        vmm: Vmm,
        state: StateCell,
        cgroup: Option<(CgroupLocation, Option<Unit>)>,
        record: RecordSize,
    ) -> Self {
        let (jobs, requests) = mpsc::unbounded_channel();
        let current = Target { size: start, huge_mib: 0, host: HostLimits::default() };
        let task = ResizeTask {
            vmm,
            state,
            cgroup,
            record,
            start,
            current,
            complete: true,
            slots: Slots::default(),
            plugged_mib: 0,
            shrinking: None,
        };
        tokio::spawn(task.run(requests));
        Self { growth, start, jobs }
    }

    /// Queues a resize to `target`, and does not wait for the result. If the resize fails, the task logs the error.
    pub fn queue(&self, target: Target) {
        // Sending does not fail, because the task lives as long as this handle.
        let _ = self.jobs.send(Job { target, done: oneshot::channel().0 });
    }

    /// Resizes the pod to `target`. Waits until all resources that must grow have grown.
    ///
    /// # Errors
    /// Fails with the [`ResizeError`] of the first step that fails. Resources that grew before the error keep the new
    /// size until another resize.
    pub async fn resize(&self, target: Target) -> Result<(), ResizeError> {
        let (done, wait) = oneshot::channel();
        self.jobs.send(Job { target, done }).map_err(|_| ResizeError::Gone)?;
        wait.await.map_err(|_| ResizeError::Gone)?
    }
}

/// A function that records the pod's current size for `husk ps`. The function may block.
pub type RecordSize = Arc<dyn Fn(Size) + Send + Sync>;

/// Pending request to shrink memory. The future returns the hot-plugged memory that remains in the guest, in MiB, or
/// `None` if the request fails.
type Shrinking = Pin<Box<dyn Future<Output = Option<u64>> + Send>>;

/// The task's state.
struct ResizeTask {
    vmm: Vmm,
    state: StateCell,
    /// The cgroup, and its systemd unit if systemd created the cgroup.
    cgroup: Option<(CgroupLocation, Option<Unit>)>,
    record: RecordSize,
    start: Size,
    /// Latest target.
    current: Target,
    /// Whether the pod has reached `current`. If not, the next request retries the failed steps.
    complete: bool,
    slots: Slots,
    /// Upper bound on the guest's current hot-plugged memory, in MiB.
    plugged_mib: u64,
    shrinking: Option<Shrinking>,
}

/// Slots of the memory devices that the guest has found.
#[derive(Default)]
struct Slots {
    ordinary: Option<u32>,
    huge: Option<u32>,
}

impl ResizeTask {
    async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        // Set the limits before the first job. If no container has limits, there may never be a job.
        self.set_host_limits().await;
        loop {
            let shrinking = async {
                match self.shrinking.as_mut() {
                    Some(unplug) => unplug.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                job = jobs.recv() => {
                    let Some(Job { target, done }) = job else { return };
                    if let Err(Err(error)) = done.send(self.apply(target).await) {
                        tracing::warn!(error = %crate::chain(&error), "failed to resize the pod");
                    }
                }
                plugged = shrinking => {
                    self.shrinking = None;
                    if let Some(plugged_mib) = plugged {
                        tracing::debug!(plugged_mib, "the guest returned memory");
                        self.plugged_mib = plugged_mib;
                        self.set_host_limits().await;
                        self.record_size().await;
                    }
                }
            }
        }
    }

    /// Resizes the pod to `target`. Does not wait until the guest has returned memory.
    async fn apply(&mut self, mut target: Target) -> Result<(), ResizeError> {
        if let Some((location, _)) = &self.cgroup {
            target.size.memory_mib = target.size.memory_mib.min(limits::max_guest_mib(location));
        }
        target.huge_mib = target.huge_mib.max(self.current.huge_mib);
        if target == self.current && self.complete {
            return Ok(());
        }
        let retry = !std::mem::replace(&mut self.complete, false);
        let Target { size: before, huge_mib: huge_before, .. } = std::mem::replace(&mut self.current, target.clone());
        let wanted_mib = target.size.memory_mib.saturating_sub(self.start.memory_mib);
        let previous_mib = before.memory_mib.saturating_sub(self.start.memory_mib);
        self.plugged_mib = self.plugged_mib.max(wanted_mib);
        self.set_host_limits().await;
        if wanted_mib > previous_mib || (retry && wanted_mib > 0 && wanted_mib == previous_mib) {
            // When the new request arrives, the VMM immediately answers a pending request to shrink memory. Ignore this
            // answer, because its amount of memory becomes outdated when memory grows.
            self.shrinking = None;
            self.grow_memory(PageKind::Ordinary, wanted_mib).await?;
        } else if wanted_mib < previous_mib {
            let vmm = self.vmm.clone();
            self.shrinking = Some(Box::pin(async move {
                loop {
                    let request = Call::RequestMemory { pages: PageKind::Ordinary, mib: wanted_mib };
                    match vmm.call(request, &[]).await {
                        Ok(Answer::PluggedMemory { plugged_mib }) => return Some(plugged_mib),
                        // A guest that uses its memory can return it at any later time.
                        Err(VmmError::Timeout { .. }) => {}
                        _ => return None,
                    }
                }
            }));
        }
        if target.huge_mib > huge_before || (retry && target.huge_mib > 0) {
            // If the guest does not get the huge pages, the container is not created. Therefore, count the container's
            // huge pages only after the guest has allocated them.
            self.current.huge_mib = huge_before;
            self.grow_huge_pages(target.huge_mib, huge_before).await?;
            self.current.huge_mib = target.huge_mib;
        }
        if retry || target.size.vcpus != before.vcpus {
            self.set_vcpus(target.size.vcpus).await?;
        }
        if target.size != before {
            tracing::info!(vcpus = target.size.vcpus, memory_mib = target.size.memory_mib, "resized the pod");
            self.record_size().await;
        }
        self.complete = true;
        Ok(())
    }

    async fn grow_memory(&mut self, pages: PageKind, wanted_mib: u64) -> Result<(), ResizeError> {
        let known = match pages {
            PageKind::Ordinary => self.slots.ordinary,
            PageKind::Huge => self.slots.huge,
        };
        if known.is_none() {
            let answer = self.vmm.call(Call::AttachMem(pages), &[]).await.map_err(ResizeError::Vmm)?;
            let Answer::Attached { slot } = answer else {
                return Err(ResizeError::Vmm(VmmError::Unexpected));
            };
            let request = BindDeviceRequest { slot, ..Default::default() };
            let found = self.agent()?.sandbox.bind_device(within(timeouts::QUICK), &request).await;
            found.map_err(|error| ResizeError::Agent("memory device", error))?;
            match pages {
                PageKind::Ordinary => self.slots.ordinary = Some(slot),
                PageKind::Huge => self.slots.huge = Some(slot),
            }
        }
        let plugged_mib = match tokio::time::timeout(
            MEMORY_TIMEOUT,
            self.vmm.call(Call::RequestMemory { pages, mib: wanted_mib }, &[]),
        )
        .await
        {
            Ok(answer) => answer.map_err(ResizeError::Vmm)?,
            Err(_) => self.vmm.call(Call::GetPluggedMemory(pages), &[]).await.map_err(ResizeError::Vmm)?,
        };
        match plugged_mib {
            Answer::PluggedMemory { plugged_mib } if plugged_mib >= wanted_mib => Ok(()),
            Answer::PluggedMemory { plugged_mib } => Err(ResizeError::Memory { plugged_mib, wanted_mib }),
            _ => Err(ResizeError::Vmm(VmmError::Unexpected)),
        }
    }

    /// Hot-plugs memory from the host's huge pages, and tells the guest to allocate huge pages in this memory.
    async fn grow_huge_pages(&mut self, wanted_mib: u64, previous_mib: u64) -> Result<(), ResizeError> {
        let more = wanted_mib.saturating_sub(previous_mib);
        match hugepages::free_mib() {
            // Check the node's pool first, because a guest that cannot plug all offered memory retries forever.
            free_mib if free_mib < more => return Err(ResizeError::NodeHugePages { wanted_mib: more, free_mib }),
            _ => self.grow_memory(PageKind::Huge, wanted_mib).await?,
        }
        let wanted = wanted_mib / hugepages::PAGE_MIB;
        let request = SetHugePagesRequest { count: wanted, ..Default::default() };
        let made = self.agent()?.sandbox.set_huge_pages(within(timeouts::SLOW), &request).await;
        let count = made.map_err(|error| ResizeError::Agent("huge pages", error))?.count;
        if count >= wanted { Ok(()) } else { Err(ResizeError::HugePages { count, wanted }) }
    }

    async fn set_vcpus(&mut self, wanted: u8) -> Result<(), ResizeError> {
        self.vmm.call(Call::HotplugVcpus { count: wanted }, &[]).await.map_err(ResizeError::Vmm)?;
        let request = SetOnlineVcpusRequest { count: wanted.into(), ..Default::default() };
        let switched = self.agent()?.sandbox.set_online_vcpus(within(timeouts::SLOW), &request).await;
        let online = switched.map_err(|error| ResizeError::Agent("vCPUs", error))?.online;
        if online == u32::from(wanted) { Ok(()) } else { Err(ResizeError::Vcpus { online, wanted }) }
    }

    /// Sets the sandbox's limits on the host. The memory limit allows the boot memory and `plugged_mib` MiB of
    /// hot-plugged memory. If the memory limit is lowered, waits while the kernel reclaims memory.
    async fn set_host_limits(&mut self) {
        let Some((location, unit)) = self.cgroup.clone() else { return };
        let (limits, guest_mib) = (self.current.host.clone(), self.start.memory_mib.saturating_add(self.plugged_mib));
        let set = move || limits::set(&location, unit.as_ref(), &limits, guest_mib);
        if let Err(error) = blocking::spawn(set).await {
            tracing::warn!(%error, "failed to set the sandbox's limits on the host");
        }
    }

    /// Records the pod's current size for `husk ps`.
    async fn record_size(&mut self) {
        let (record, vcpus) = (Arc::clone(&self.record), self.current.size.vcpus);
        let memory_mib = self.start.memory_mib.saturating_add(self.plugged_mib);
        if let Err(error) = blocking::spawn(move || record(Size { vcpus, memory_mib })).await {
            tracing::warn!(%error, "failed to record the VM's size for husk ps");
        }
    }

    fn agent(&self) -> Result<Agent, ResizeError> {
        self.state.agent().ok_or(ResizeError::Gone)
    }
}
