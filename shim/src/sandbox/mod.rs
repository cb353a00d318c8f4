//! One sandbox: its virtual machine, its agent, its directory and cgroup on the host, and their end.

pub mod agent;
mod apparmor;
pub mod boot;
pub mod cgroup;
pub mod console;
pub mod disks;
pub mod forward;
pub mod hugepages;
pub mod legacy_metrics;
pub mod limits;
mod mounts;
mod network;
mod reclaim;
pub mod resize;
pub mod state;
pub mod timeline;
pub mod vmm;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use husk_proto::{ports, stream};
use husk_vmm::client::Spawned;
use tokio::sync::{mpsc, watch};

use agent::{Agent, Report};
use boot::Plan;
use cgroup::Cgroup;
use console::Tail;
use network::Follower;
use resize::Resizer;
use state::StateDir;
use timeline::Timeline;
use vmm::{Vmm, VmmError};

use crate::random;

/// How far a sandbox is.
#[derive(Clone)]
pub enum Boot {
    /// On its way.
    Booting,
    /// Takes containers.
    Ready(Agent),
    /// It will never; the whole chain of causes.
    Failed(Arc<str>),
}

/// What a boot starts from.
pub struct Prepared {
    /// Its cgroup.
    pub cgroup: Option<Cgroup>,
    /// The VMM's process, where it got that far.
    pub vmm: Option<Spawned>,
    /// What to boot, or why not.
    pub plan: Result<Plan, String>,
    /// Where the timeline goes at the end.
    pub timeline_log: PathBuf,
}

/// A sandbox.
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its start's timeline.
    pub timeline: Arc<Timeline>,
    dir: StateDir,
    cgroup: OnceLock<Cgroup>,
    vmm: OnceLock<Vmm>,
    boot: watch::Receiver<Boot>,
    /// Taken by the launch.
    update: Mutex<Option<watch::Sender<Boot>>>,
    resizer: OnceLock<Resizer>,
    tail: Tail,
    disks: disks::Plugged,
    propagation: mounts::Propagation,
    profiles: apparmor::Loaded,
    follower: Arc<OnceLock<Follower>>,
    timeline_log: OnceLock<PathBuf>,
}

/// Why a stream into the guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No connection.
    #[error("opening a stream into the guest")]
    Connect(#[source] VmmError),
    /// The kernel gives no random token.
    #[error("failed to get a random token for a stream into the guest")]
    Token(#[source] std::io::Error),
    /// The header cannot be written.
    #[error("naming a stream into the guest")]
    Header(#[source] std::io::Error),
}

impl Sandbox {
    /// A sandbox that nothing was made of yet but its directory; `vmm_log` is the read end of what the VMM will say on
    /// its standard error.
    pub fn new(id: &str, dir: StateDir, timeline: Arc<Timeline>, vmm_log: Option<OwnedFd>) -> Arc<Self> {
        let (update, boot) = watch::channel(Boot::Booting);
        let tail = Tail::default();
        if let Some(log) = vmm_log {
            boot::follow(log, "vmm", tail.clone());
        }
        Arc::new(Self {
            id: id.to_owned(),
            timeline,
            dir,
            cgroup: OnceLock::new(),
            vmm: OnceLock::new(),
            boot,
            update: Mutex::new(Some(update)),
            resizer: OnceLock::new(),
            tail,
            disks: disks::Plugged::default(),
            propagation: mounts::Propagation::default(),
            profiles: apparmor::Loaded::default(),
            follower: Arc::default(),
            timeline_log: OnceLock::new(),
        })
    }

    /// Starts the boot, once; what the agent reports goes to `reports`, which ends with the virtual machine.
    pub fn launch(&self, prepared: Prepared, reports: mpsc::UnboundedSender<Report>) {
        let Some(update) = crate::lock(&self.update).take() else { return };
        let Prepared { cgroup, vmm, plan, timeline_log } = prepared;
        let _ = self.timeline_log.set(timeline_log);
        if let Some(cgroup) = cgroup {
            let _ = self.cgroup.set(cgroup);
        }
        let (notify, notices) = mpsc::unbounded_channel();
        let attached = vmm.map(|spawned| Vmm::attach(spawned, notify).map_err(|e| crate::chain(&e))).transpose();
        let (vmm, plan) = match attached {
            Ok(vmm) => (vmm, plan),
            Err(error) => (None, Err(error)),
        };
        if let Some(vmm) = &vmm {
            let _ = self.vmm.set(vmm.clone());
        }
        if let (Ok(plan), Some(vmm)) = (&plan, &vmm) {
            let cgroup = self.cgroup.get().map(|cgroup| (cgroup.place().clone(), cgroup.unit().cloned()));
            let (growth, dir) = (plan.sizing.growth.clone(), self.dir.clone());
            let _ = self.resizer.set(Resizer::start(growth, vmm.clone(), self.boot.clone(), cgroup, dir));
        }
        let place = self.cgroup.get().map(|cgroup| cgroup.place().clone());
        let pids_max = self.cgroup.get().and_then(|cgroup| limits::pids(cgroup.place()));
        let (handle, marks, words) = (vmm, Arc::clone(&self.timeline), self.tail.clone());
        let follower = Arc::clone(&self.follower);
        tokio::spawn(async move {
            let booted = match (plan, &handle) {
                (Err(error), _) => Err(error),
                (Ok(_), None) => Err("there is no VMM".to_owned()),
                (Ok(mut plan), Some(vmm)) => {
                    plan.pod.pids_max = pids_max;
                    let (steer, follow) = (plan.pod.network.steer.take(), plan.pod.network.follow.take());
                    let agent = boot::boot(plan, vmm, notices, &marks, &words).await.map_err(|e| crate::chain(&e));
                    if let (Ok(_), Some(steer)) = (&agent, steer) {
                        forward::serve(steer, vmm);
                    }
                    if let Ok(agent) = &agent {
                        reclaim::start(place, agent.clone(), vmm.clone());
                    }
                    if let (Ok(agent), Some((follow, notices))) = (&agent, follow) {
                        let _ = follower.set(Follower::start(follow, notices, vmm.clone(), agent.clone()));
                    }
                    agent
                }
            };
            match (booted, &handle) {
                (Ok(agent), Some(vmm)) => live(agent, vmm, &update, &reports).await,
                (Ok(_), None) => {}
                (Err(error), vmm) => {
                    tracing::error!(error, "sandbox did not start");
                    update.send_replace(Boot::Failed(error.into()));
                    if let Some(vmm) = vmm {
                        vmm.kill();
                    }
                }
            }
            if let Some(vmm) = handle {
                vmm.wait().await;
            }
            // Dropping `reports` now tells that nothing will come any more.
            drop(reports);
        });
    }

    /// Whether its boot was started.
    pub fn is_launched(&self) -> bool {
        crate::lock(&self.update).is_none()
    }

    /// Its directory on the host.
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// The huge pages that the node lets the pod have as a whole, in MiB.
    pub fn huge_mib(&self) -> u64 {
        // Most nodes have none, and then nothing more is looked at: this is asked for every container.
        match (hugepages::pool_mib(), self.cgroup.get()) {
            (pool_mib @ 1.., Some(cgroup)) => limits::huge_mib(cgroup.place()).min(pool_mib),
            _ => 0,
        }
    }

    /// Its cgroup on the host, where it has one.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.get()
    }

    /// The pid reported for every task: a live process of the host that owns the sandbox' network namespace.
    pub fn pid(&self) -> u32 {
        self.vmm.get().map_or(0, Vmm::pid)
    }

    /// A pid of the host's for one container alone; [`Sandbox::give_back_pid`] follows.
    ///
    /// # Errors
    /// [`VmmError`] when there is none to be had.
    pub async fn take_pid(&self) -> Result<u32, VmmError> {
        self.vmm.get().ok_or(VmmError::Gone)?.take_pid().await
    }

    /// Gives back what [`Sandbox::take_pid`] gave.
    pub async fn give_back_pid(&self, pid: u32) {
        if let Some(vmm) = self.vmm.get() {
            vmm.give_back_pid(pid).await;
        }
    }

    /// Whether the virtual machine is gone.
    pub fn is_dead(&self) -> bool {
        self.vmm.get().is_none_or(|vmm| vmm.ended().is_some())
    }

    /// Where containers' directories are made for the guest.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// Waits until the guest takes containers.
    ///
    /// # Errors
    /// The whole chain of causes, as text: it is told to every caller.
    pub async fn ready(&self) -> Result<Agent, Arc<str>> {
        let mut boot = self.boot.clone();
        let state = boot.wait_for(|boot| !matches!(boot, Boot::Booting)).await.map(|boot| boot.clone());
        match state {
            Ok(Boot::Ready(agent)) => Ok(agent),
            Ok(Boot::Failed(error)) => Err(error),
            Ok(Boot::Booting) | Err(_) => Err("the sandbox is gone".into()),
        }
    }

    /// The agent, if it is there now.
    pub fn agent(&self) -> Option<Agent> {
        match &*self.boot.borrow() {
            Boot::Ready(agent) => Some(agent.clone()),
            _ => None,
        }
    }

    /// Waits until the guest has the network that the host has by now.
    ///
    /// # Errors
    /// Why the guest does not get what is new, the whole chain as text.
    pub async fn settle_network(&self) -> Result<(), String> {
        match self.follower.get() {
            Some(follower) => follower.settle().await,
            None => Ok(()),
        }
    }

    /// What changes the machine's size; none where there is no machine.
    pub fn resizer(&self) -> Option<&Resizer> {
        self.resizer.get()
    }

    /// Opens a stream of container stdio; the number names it in the request that uses it.
    ///
    /// # Errors
    /// [`StreamError`] when the guest does not take it.
    pub async fn open_stream(&self) -> Result<(u64, tokio::net::UnixStream), StreamError> {
        let vmm = self.vmm.get().ok_or(StreamError::Connect(VmmError::Gone))?;
        // It must not be guessable: a request that names a token gets its stream.
        let token = random::token().map_err(StreamError::Token)?;
        let stream = vmm.connect(ports::STREAM).await.map_err(StreamError::Connect)?;
        stream.set_nonblocking(true).map_err(StreamError::Header)?;
        let mut stream = tokio::net::UnixStream::from_std(stream).map_err(StreamError::Header)?;
        let header = stream::Header { token }.encode();
        tokio::io::AsyncWriteExt::write_all(&mut stream, &header).await.map_err(StreamError::Header)?;
        Ok((token, stream))
    }

    /// Has volumes show from now on what the host mounts in them.
    ///
    /// # Errors
    /// As [`mounts::Propagation::start`].
    pub fn follow_mounts(&self) -> std::io::Result<()> {
        self.propagation.start(&self.share())
    }

    /// Waits until volumes show what the host has mounted in them by now.
    pub async fn settle_mounts(&self) {
        self.propagation.settle().await;
    }

    /// Why the guest died, as far as its console tells.
    pub fn last_words(&self) -> String {
        self.tail.last_words()
    }

    /// Ends the virtual machine when its disks have what was written to them; [`Sandbox::tear_down`] waits for it.
    pub async fn end(&self) {
        self.flush_disks().await;
        self.kill();
    }

    /// Kills the virtual machine.
    pub fn kill(&self) {
        if let Some(vmm) = self.vmm.get() {
            vmm.kill();
        }
    }

    /// Ends the sandbox: nothing of it is left on the host afterwards.
    pub async fn tear_down(&self) {
        self.end().await;
        if let Some(vmm) = self.vmm.get() {
            vmm.wait().await;
        }
        self.timeline.mark("vmm gone");
        self.propagation.stop();
        if let Some(cgroup) = self.cgroup.get() {
            cgroup.leave_and_remove().await;
        }
        self.dir.remove();
        self.timeline.mark("torn down");
        if let Some(log) = self.timeline_log.get() {
            self.timeline.finish(log);
        }
    }
}

/// Follows the agent's events until the virtual machine ends.
async fn live(agent: Agent, vmm: &Vmm, update: &watch::Sender<Boot>, reports: &mpsc::UnboundedSender<Report>) {
    let mut events = match agent.events().await {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "the agent gives no events");
            update.send_replace(Boot::Failed(format!("the agent gives no events: {error}").into()));
            return vmm.kill();
        }
    };
    update.send_replace(Boot::Ready(agent));
    loop {
        match events.recv().await {
            Ok(Some(event)) => match agent::check(event) {
                Some(report) => drop(reports.send(report)),
                None => tracing::warn!("the agent sent an unknown event"),
            },
            // Without events no exit would ever be seen: a guest that stops telling is a dead one.
            Ok(None) => return vmm.kill(),
            Err(error) => {
                tracing::debug!(%error, "the agent's events ended");
                return vmm.kill();
            }
        }
    }
}
