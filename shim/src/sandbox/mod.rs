//! A sandbox: its VM, agent, state directory and cgroup.

mod apparmor;
pub mod boot;
mod cgroup_record;
mod clock;
pub mod disks;
pub(crate) mod end;
mod guest_image;
pub mod host_sockets;
pub mod launch;
mod notices;
mod policy;
mod propagation;
pub mod state_dir;
mod teardown;
pub mod template;
pub mod template_builder;
pub mod timeline;
mod volume_updates;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use husk_config::{BaseTimeout, TimeoutFactor};
use husk_proto::{ports, stream};
use husk_vmm::client::Spawned;
use husk_vmm::config::RateLimit;
#[cfg(test)]
use husk_vmm::control::Notice;
use tokio::sync::{Notify, mpsc};

use crate::launcher::Launcher;
use crate::network::port_forwarding;
use crate::network::sync::NetworkSync;
use crate::random;
use crate::resources::cgroup::{Cgroup, CgroupLocation};
#[cfg(test)]
use crate::resources::growth::Growth;
use crate::resources::growth::Size;
use crate::resources::resize::Resizer;
use crate::resources::{hugepages, limits, reclaim};
use crate::sandbox::state_dir::StateDir;
use crate::vm::agent::{Agent, Report};
use crate::vm::console::LogTail;
use crate::vm::vmm::{Vmm, VmmError};
use crate::vm::{State, StateCell};
use boot::BootPlan;
use host_sockets::HostSockets;
use timeline::Timeline;

#[cfg(feature = "testing")]
pub use policy::PodPolicies;

/// Maximum number of notices from the VMM that wait until they are handled. If this number of notices is waiting, the
/// VMM has to wait before it can send another notice.
const MAX_NOTICES: usize = 64;
/// Timeout for the reason of the VM's end, after the VMM process has ended or has closed a connection.
const REASON_TIMEOUT: BaseTimeout = BaseTimeout::from_millis(400);
/// Why the VM ended, if a request ended the VM.
const ENDED_BY_REQUEST: &str = "a request stopped the sandbox";

/// Input of [`Sandbox::launch`].
pub struct LaunchInput {
    /// The sandbox's cgroup.
    pub cgroup: Option<Cgroup>,
    /// The VMM process, if it could be started.
    pub vmm: Option<Spawned>,
    /// The plan of the boot, or an error if the plan could not be prepared.
    pub plan: Result<BootPlan, String>,
    /// File to which the timeline is appended when the sandbox ends.
    pub timeline_log: PathBuf,
    /// The node's factor for timeouts.
    pub timeout_factor: TimeoutFactor,
    /// How long containers may take to exit after their stop signals.
    pub shutdown_grace: Duration,
}

/// A sandbox.
pub struct Sandbox {
    /// Sandbox id.
    pub id: String,
    /// Timeline of the start.
    pub timeline: Arc<Timeline>,
    dir: StateDir,
    state: StateCell,
    launched: OnceLock<Launched>,
    log_tail: LogTail,
    disks: disks::AttachedDisks,
    propagation: propagation::Propagation,
    profiles: apparmor::LoadedProfiles,
    network_sync: Arc<OnceLock<NetworkSync>>,
    /// Why the shim has killed the VM, if it has.
    kill_reason: Arc<OnceLock<Arc<str>>>,
    /// Whether the node's OOM killer has killed the VMM process.
    oom_killed: Arc<AtomicBool>,
    /// Notified when the VMM reports that it has received SIGTERM or SIGINT.
    terminated: Arc<Notify>,
    /// Whether the teardown has left the cgroup and the records to [`Sandbox::wait_for_stuck_vmm`].
    left_for_later: AtomicBool,
}

/// The resources that a launch acquires before the guest boots. If the boot fails, the sandbox keeps these resources.
struct Launched {
    cgroup: Option<Cgroup>,
    vmm: Option<Vmm>,
    resizer: Option<Resizer>,
    disk_rate_limit: RateLimit,
    host_sockets: Arc<HostSockets>,
    timeline_log: PathBuf,
    timeout_factor: TimeoutFactor,
    shutdown_grace: Duration,
}

/// A failure to open a stream to the guest.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The vsock connection failed.
    #[error("failed to open a stream to the guest")]
    Connect(#[source] VmmError),
    /// The kernel did not return random bytes for the token.
    #[error("failed to get a random token for a stream to the guest")]
    Token(#[source] std::io::Error),
    /// The header could not be written.
    #[error("failed to write the header of a stream to the guest")]
    Header(#[source] std::io::Error),
}

impl Sandbox {
    /// Returns a sandbox that has not been launched. `vmm_log` is the read end of the pipe for the VMM's stderr.
    pub fn new(id: &str, dir: StateDir, timeline: Arc<Timeline>, vmm_log: Option<OwnedFd>) -> Arc<Self> {
        let log_tail = LogTail::default();
        if let Some(log) = vmm_log {
            boot::log_lines(log, "vmm", log_tail.clone());
        }
        Arc::new(Self {
            id: id.to_owned(),
            timeline,
            dir,
            state: StateCell::default(),
            launched: OnceLock::new(),
            log_tail,
            disks: disks::AttachedDisks::default(),
            propagation: propagation::Propagation::default(),
            profiles: apparmor::LoadedProfiles::default(),
            network_sync: Arc::default(),
            kill_reason: Arc::default(),
            oom_killed: Arc::default(),
            terminated: Arc::default(),
            left_for_later: AtomicBool::new(false),
        })
    }

    /// Starts the boot. A second call does nothing. The agent's reports go to `reports`, which is closed when the VM
    /// ends.
    pub fn launch(&self, input: LaunchInput, launcher: &Launcher, reports: mpsc::Sender<Report>) {
        if !self.state.enter(State::Booting) {
            return;
        }
        let LaunchInput { cgroup, vmm, plan, timeline_log, timeout_factor, shutdown_grace } = input;
        let (notify, notices) = mpsc::channel(MAX_NOTICES);
        let attach = |spawned| Vmm::attach(spawned, notify, timeout_factor).map_err(|e| crate::chain(&e));
        let attached = vmm.map(attach).transpose();
        let (vmm, plan) = match attached {
            Ok(vmm) => (vmm, plan),
            Err(error) => (None, Err(error)),
        };
        if let Err(error) = &plan {
            // From here on, all requests fail.
            self.state.enter(State::Failed(error.as_str().into()));
        }
        let resizer = match (&plan, &vmm) {
            (Ok(plan), Some(vmm)) => Some(self.start_resizer(plan, vmm, cgroup.as_ref())),
            _ => None,
        };
        let location = cgroup.as_ref().map(|cgroup| cgroup.location().clone());
        let pids_max = cgroup.as_ref().and_then(|cgroup| limits::pids_max(cgroup.location()));
        let disk_rate_limit = plan.as_ref().map(|plan| plan.pod.rate_limits.disk).unwrap_or_default();
        let host_sockets = Arc::new(plan.as_ref().map(BootPlan::host_sockets).unwrap_or_default());
        let launched = Launched {
            cgroup,
            vmm: vmm.clone(),
            resizer,
            disk_rate_limit,
            host_sockets,
            timeline_log,
            timeout_factor,
            shutdown_grace,
        };
        let _ = self.launched.set(launched);
        let (handle, timeline, console) = (vmm, Arc::clone(&self.timeline), self.log_tail.clone());
        let (network_sync, launcher) = (Arc::clone(&self.network_sync), launcher.clone());
        let end = self.end_follower(location.clone());
        let mut progress = notices::watch(notices, Arc::clone(&timeline), Arc::clone(&self.terminated));
        tokio::spawn(async move {
            let booted = match (plan, &handle) {
                (Err(error), _) => Err(error),
                (Ok(_), None) => Err("the VMM was not started".to_owned()),
                (Ok(mut plan), Some(vmm)) => {
                    plan.pod.pids_max = pids_max;
                    let (forwarding, watcher) =
                        (plan.pod.network.port_forwarding.take(), plan.pod.network.watcher.take());
                    let wanted = plan.wanted.take();
                    let agent = boot::boot(plan, vmm, &mut progress, &timeline, &console).await;
                    let agent = agent.map_err(|e| crate::chain(&e));
                    if let (Ok(_), Some(forwarding)) = (&agent, forwarding) {
                        port_forwarding::serve(forwarding, vmm);
                    }
                    if let (Ok(_), Some(class)) = (&agent, wanted) {
                        template::start_builder(launcher, class);
                    }
                    if let Ok(agent) = &agent {
                        reclaim::start(location, agent.clone(), vmm.clone());
                        clock::start(agent.clone(), vmm.clone());
                    }
                    if let (Ok(agent), Some((watcher, notices))) = (&agent, watcher) {
                        let _ = network_sync.set(NetworkSync::start(watcher, notices, vmm.clone(), agent.clone()));
                    }
                    agent
                }
            };
            end.follow(booted, handle, &mut progress, &reports).await;
            // Closing `reports` tells the receiver that the VM has ended.
            drop(reports);
        });
    }

    fn start_resizer(&self, plan: &BootPlan, vmm: &Vmm, cgroup: Option<&Cgroup>) -> Resizer {
        let cgroup = cgroup.map(|cgroup| (cgroup.location().clone(), cgroup.unit().cloned()));
        let dir = self.dir.clone();
        let record = Arc::new(move |size: Size| {
            if let Err(error) = dir.record_size(size.vcpus, size.memory_mib) {
                tracing::warn!(error = %crate::chain(&error), "failed to record the VM's size for husk ps");
            }
        });
        Resizer::start(plan.boot_size.growth.clone(), plan.vm_size, vmm.clone(), self.state.clone(), cgroup, record)
    }

    /// Returns whether the VMM process was started and has not exited.
    pub fn has_vmm_process(&self) -> bool {
        self.vmm().is_some_and(|vmm| vmm.ended().is_none())
    }

    /// Returns whether the boot was started.
    pub fn is_launched(&self) -> bool {
        self.state.is_launched()
    }

    /// Returns the sandbox's state directory.
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// Returns the size, in MiB, of the huge pages that the pod may use. This is the node's pool or the pod's limit,
    /// whichever is lower.
    pub fn huge_mib(&self) -> u64 {
        // Most nodes have no huge pages. On these nodes, do not read the cgroup for every container.
        match (hugepages::pool_mib(), self.cgroup()) {
            (pool_mib @ 1.., Some(cgroup)) => limits::huge_mib(cgroup.location()).min(pool_mib),
            _ => 0,
        }
    }

    fn end_follower(&self, cgroup: Option<CgroupLocation>) -> end::End {
        let (kill_reason, oom_killed) = (Arc::clone(&self.kill_reason), Arc::clone(&self.oom_killed));
        end::End { state: self.state.clone(), kill_reason, cgroup, oom_killed }
    }

    /// Returns whether the node's OOM killer has killed the VMM process.
    pub fn is_oom_killed(&self) -> bool {
        self.oom_killed.load(Ordering::Relaxed)
    }

    /// Returns the sandbox's cgroup on the host, or `None` if the sandbox has no cgroup.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.launched.get()?.cgroup.as_ref()
    }

    fn vmm(&self) -> Option<&Vmm> {
        self.launched.get()?.vmm.as_ref()
    }

    /// Returns a timeout of this node. Before the launch, the configuration is not known, and the factor is 1.
    pub fn timeout(&self, base: BaseTimeout) -> Duration {
        self.launched.get().map(|launched| launched.timeout_factor).unwrap_or_default().of(base)
    }

    /// Returns how long containers may take to exit after their stop signals.
    pub fn shutdown_grace(&self) -> Duration {
        self.launched.get().map(|launched| launched.shutdown_grace).unwrap_or_default()
    }

    /// Returns the rate limit of each disk.
    fn disk_rate_limit(&self) -> RateLimit {
        self.launched.get().map(|launched| launched.disk_rate_limit).unwrap_or_default()
    }

    /// Returns the VMM's PID on the host, or 0 if the VMM was not started. The VMM runs in the sandbox's network
    /// namespace, which clients can open as /proc/PID/ns/net.
    pub fn pid(&self) -> u32 {
        self.vmm().map_or(0, Vmm::pid)
    }

    /// Acquires a PID on the host for one container. The caller must release the PID with [`Sandbox::release_pid`].
    ///
    /// # Errors
    /// Fails with a [`VmmError`] if the VMM cannot provide a PID.
    pub async fn acquire_pid(&self) -> Result<u32, VmmError> {
        self.vmm().ok_or(VmmError::Gone)?.acquire_pid().await
    }

    /// Releases a PID that [`Sandbox::acquire_pid`] returned. Returns at once, because the VMM may not answer.
    pub fn release_pid(&self, pid: u32) {
        if let Some(vmm) = self.vmm().cloned() {
            tokio::spawn(async move { vmm.release_pid(pid).await });
        }
    }

    /// Returns whether the VM has ended or was never started.
    pub fn is_dead(&self) -> bool {
        self.known_end_reason().is_some() || self.vmm().is_none_or(|vmm| vmm.ended().is_some())
    }

    /// Returns why the VM has failed or ended. Returns `None` if the VM has not ended.
    ///
    /// If the VMM process has just ended, or is ending, waits until the reason is known.
    pub async fn end_reason(&self) -> Option<Arc<str>> {
        if self.is_launched() && self.vmm().is_some_and(|vmm| vmm.is_closed() || vmm.ended().is_some()) {
            return self.wait_end().await;
        }
        self.known_end_reason()
    }

    /// Returns a sandbox whose boot ends when `booted` is ready. A test controls the agent and the VMM.
    #[cfg(test)]
    pub fn scripted(
        id: &str,
        booted: impl Future<Output = Agent> + Send + 'static,
        vmm: Vmm,
        notices: mpsc::Receiver<Notice>,
        reports: mpsc::Sender<Report>,
        (cgroup, growth): (CgroupLocation, Growth),
    ) -> Arc<Self> {
        let dir = StateDir::new("test", id);
        let timeline = Arc::new(Timeline::new("test", id, dir.timeline()));
        let sandbox = Self::new(id, dir, Arc::clone(&timeline), None);
        sandbox.state.enter(State::Booting);
        let resizer =
            Resizer::start(growth.clone(), growth.boot, vmm.clone(), sandbox.state.clone(), None, Arc::new(|_| ()));
        let launched = Launched {
            cgroup: None,
            vmm: Some(vmm.clone()),
            resizer: Some(resizer),
            disk_rate_limit: RateLimit::default(),
            host_sockets: Arc::default(),
            timeline_log: PathBuf::new(),
            timeout_factor: TimeoutFactor::default(),
            shutdown_grace: Duration::from_secs(10),
        };
        assert!(sandbox.launched.set(launched).is_ok());
        let end = sandbox.end_follower(Some(cgroup));
        let mut progress = notices::watch(notices, timeline, Arc::clone(&sandbox.terminated));
        tokio::spawn(async move { end.follow(Ok(booted.await), Some(vmm), &mut progress, &reports).await });
        sandbox
    }

    /// Waits until the VM has ended. Returns `None` if the VM has not ended before the timeout `REASON_TIMEOUT`.
    /// Otherwise, returns why the VM has ended.
    pub async fn wait_end(&self) -> Option<Arc<str>> {
        tokio::time::timeout(self.timeout(REASON_TIMEOUT), self.state.wait_end()).await.ok().flatten()
    }

    /// Returns why the VM has failed or ended, if the reason is known already.
    pub fn known_end_reason(&self) -> Option<Arc<str>> {
        self.state.end_reason()
    }

    /// Returns the path of the share on the host.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// Waits until the agent accepts containers.
    ///
    /// # Errors
    /// Fails if the boot has failed, or if the VM has ended. The returned text contains the error and its causes.
    pub async fn ready(&self) -> Result<Agent, Arc<str>> {
        self.state.wait_running().await
    }

    /// Returns the agent, if it is ready.
    pub fn agent(&self) -> Option<Agent> {
        self.state.agent()
    }

    /// Waits until the guest has the host's current network configuration.
    ///
    /// # Errors
    /// Fails if the guest's network cannot be updated. The returned text contains the error and its causes.
    pub async fn settle_network(&self) -> Result<(), String> {
        match self.network_sync.get() {
            Some(network_sync) => network_sync.settle().await,
            None => Ok(()),
        }
    }

    /// Returns the handle that resizes the VM, or `None` if the VM was not started.
    pub fn resizer(&self) -> Option<&Resizer> {
        self.launched.get()?.resizer.as_ref()
    }

    /// Opens a stream for a container's stdio. Returns the stream token and the stream.
    ///
    /// # Errors
    /// Fails with a [`StreamError`] if the stream cannot be opened.
    pub async fn open_stream(&self) -> Result<(u64, tokio::net::UnixStream), StreamError> {
        // The token must be unpredictable, because any request that contains it gets the stream.
        let token = random::token().map_err(StreamError::Token)?;
        Ok((token, self.open_stream_with(token).await?))
    }

    /// Opens a stream with a token that the agent has chosen.
    ///
    /// # Errors
    /// Fails with a [`StreamError`] if the stream cannot be opened.
    async fn open_stream_with(&self, token: u64) -> Result<tokio::net::UnixStream, StreamError> {
        let vmm = self.vmm().ok_or(StreamError::Connect(VmmError::Gone))?;
        let stream = vmm.connect(ports::STREAM).await.map_err(StreamError::Connect)?;
        stream.set_nonblocking(true).map_err(StreamError::Header)?;
        let mut stream = tokio::net::UnixStream::from_std(stream).map_err(StreamError::Header)?;
        let header = stream::Header { token }.encode();
        tokio::io::AsyncWriteExt::write_all(&mut stream, &header).await.map_err(StreamError::Header)?;
        Ok(stream)
    }

    /// Starts to propagate the host's new mounts to the pod's volumes.
    ///
    /// # Errors
    /// Fails if the mount list cannot be opened or polled.
    pub fn start_propagation(&self) -> std::io::Result<()> {
        self.propagation.start(&self.share())
    }

    /// Waits until the host's current mounts are in the pod's volumes. Waits at most two seconds.
    pub async fn wait_for_propagation(&self) {
        self.propagation.settle().await;
    }

    /// Returns the lines of the guest's console that may explain why the guest ended.
    pub fn console_tail(&self) -> String {
        self.log_tail.console_tail()
    }

    /// Kills the VM, because of a request.
    pub fn kill(&self) {
        self.kill_because(ENDED_BY_REQUEST.into());
    }

    /// Kills the VM, because the guest does not do what it must do. `reason` becomes the reason of the VM's end.
    pub fn fail(&self, reason: String) {
        tracing::error!(reason, "the shim kills the VM");
        self.kill_because(reason.into());
    }

    /// Waits until the VMM reports that it has received SIGTERM or SIGINT.
    pub async fn terminated(&self) {
        self.terminated.notified().await;
    }

    /// Kills the VM. `reason` becomes the reason of the VM's end, unless the VM was killed before.
    pub fn kill_because(&self, reason: Arc<str>) {
        if let Some(vmm) = self.vmm() {
            if !vmm.is_closed() {
                // The first reason stays.
                let _ = self.kill_reason.set(reason);
            }
            vmm.kill();
        }
    }
}
