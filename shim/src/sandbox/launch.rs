//! Launches a sandbox: prepares everything that a boot needs, according to the sandbox's specification.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use husk_config::Config;
use husk_vmm::virtio::net::MAX_QUEUE_PAIRS;
use tokio::sync::{mpsc, oneshot};

use crate::chain;
use crate::log;
use crate::network;
use crate::oci::{Bundle, IdMappings, Network, Spec};
use crate::resources;
use crate::resources::BootSize;
use crate::resources::cgroup::Cgroup;
use crate::resources::limits;
use crate::resources::oom_score;
use crate::resources::rate_limits::RateLimits;
use crate::sandbox::boot::{BootPlan, Pod};
use crate::sandbox::state_dir::{ProcessId, StateDir};
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{LaunchInput, Sandbox};
use crate::vm::agent::Report;
use crate::vm::vmm;

/// Properties of a sandbox that are known before its specification.
#[derive(Clone)]
pub struct LaunchContext {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub sandbox: String,
    /// Whether to log at debug level, even if the configuration sets another level.
    pub debug: bool,
    /// The sandbox's state directory.
    pub dir: StateDir,
    /// The timeline of the sandbox's start.
    pub timeline: Arc<Timeline>,
}

/// A sandbox that is launched later, when its specification arrives.
pub struct DeferredLaunch {
    /// Properties of the sandbox.
    pub context: LaunchContext,
    /// The guest's view of the share, or the error of preparing the share.
    pub share: Result<PathBuf, String>,
    /// The bundle directory.
    pub dir: PathBuf,
    /// Channel to which the agent's reports are sent.
    pub reports: mpsc::UnboundedSender<Report>,
}

impl DeferredLaunch {
    /// Launches the sandbox. Must be called from the main thread, because the VMM process ends with the thread that
    /// spawned it.
    ///
    /// # Errors
    /// If the share or the specification cannot be used. The text contains the error and its causes. The sandbox itself
    /// reports later failures.
    pub async fn launch(self, spec: serde_json::Value, sandbox: &Sandbox) -> Result<(), String> {
        let Self { context, share, dir, reports } = self;
        let share = share?;
        let bundle = Bundle::from_value(&dir, spec).map_err(|e| chain(&e))?;
        bundle.check().map_err(|e| chain(&e))?;
        // Use a blocking thread, because waiting for systemd must not block the async runtime.
        let entered = tokio::task::spawn_blocking({
            let (context, path) = (context.clone(), bundle.spec.linux.cgroups_path.clone());
            move || enter_cgroup(&context, &path)
        });
        let cgroup =
            entered.await.unwrap_or_else(|error| Err(format!("failed to enter the sandbox's cgroup: {error}")));
        let mut partial = PartialLaunch::default();
        let spawned = cgroup.and_then(|cgroup| partial.spawn(&context, &bundle.spec, cgroup));
        let (done, wait) = oneshot::channel();
        // Use a separate thread, because a launch enters the pod's network namespace. A thread that cannot leave this
        // namespace must end.
        let thread = std::thread::Builder::new().name("launch".into()).spawn(move || {
            let plan = spawned.and_then(|network| partial.plan(&context, &bundle, &share, network));
            let _ = done.send(partial.finish(plan));
        });
        let input = match thread {
            Ok(_) => wait.await.map_err(|_| "the thread that launches the sandbox panicked".to_owned())?,
            Err(error) => return Err(format!("failed to start the thread that launches the sandbox: {error}")),
        };
        sandbox.launch(input, reports);
        Ok(())
    }
}

/// The resources that a launch has acquired so far. The sandbox keeps these resources even if a later step fails.
#[derive(Default)]
struct PartialLaunch {
    cgroup: Option<Cgroup>,
    vmm: Option<husk_vmm::client::Spawned>,
    timeline_log: PathBuf,
}

/// Prepares a launch. The process must have a single thread.
pub fn prepare(context: &LaunchContext, bundle: &Bundle, share: &Path) -> LaunchInput {
    let mut partial = PartialLaunch::default();
    let spec = &bundle.spec;
    let entered = enter_cgroup(context, &spec.linux.cgroups_path);
    let spawned = entered.and_then(|cgroup| partial.spawn(context, spec, cgroup));
    let plan = spawned.and_then(|network| partial.plan(context, bundle, share, network));
    partial.finish(plan)
}

/// Returns the input of a launch that failed before it acquired a resource.
pub fn failed(error: String) -> LaunchInput {
    PartialLaunch::default().finish(Err(error))
}

impl PartialLaunch {
    fn finish(self, plan: Result<BootPlan, String>) -> LaunchInput {
        LaunchInput { cgroup: self.cgroup, vmm: self.vmm, plan, timeline_log: self.timeline_log }
    }

    /// Spawns the VMM process, which inherits the cgroup that this process has entered.
    fn spawn(&mut self, context: &LaunchContext, spec: &Spec, cgroup: Option<Cgroup>) -> Result<Network, String> {
        self.cgroup = cgroup;
        let network = spec.network().map_err(|e| chain(&e))?;
        let vmm = self.vmm.insert(vmm::spawn(&network).map_err(|e| chain(&e))?);
        context.timeline.mark("vmm spawned");
        record_process(&context.dir, "vmm.pid", vmm.pid)?;
        oom_score::set(vmm.pid, oom_score::DEFAULT)
            .map_err(|error| format!("failed to set oom_score_adj of the VMM: {error}"))?;
        Ok(network)
    }

    /// Reads the configuration, sizes the VM, connects the network and opens the files that the VM needs.
    fn plan(
        &mut self,
        context: &LaunchContext,
        bundle: &Bundle,
        share: &Path,
        network: Network,
    ) -> Result<BootPlan, String> {
        let path = std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(husk_config::DEFAULT_PATH), Into::into);
        let config = Config::load(&path).map_err(|e| chain(&e))?;
        if !context.debug {
            log::set_level(config.log_level);
        }
        self.timeline_log.clone_from(&config.timeline_log);
        bundle.check().map_err(|e| chain(&e))?;
        let spec = &bundle.spec;
        let memory_limit_mib = self.cgroup.as_ref().map_or(u64::MAX, |cgroup| limits::max_guest_mib(cgroup.location()));
        let id_mappings = bundle.id_mappings().map_err(|e| chain(&e))?;
        let boot_size = resources::boot_size(spec, &config, memory_limit_mib).map_err(|e| chain(&e))?;
        record_sandbox(context, spec, &boot_size, self.vmm.as_ref().map_or(0, |vmm| vmm.pid));
        let rate_limits = resources::rate_limits(spec, &config).map_err(|e| chain(&e))?;
        // vhost-net would move frames past the limits. Without vhost-net, several queue pairs are not faster, because
        // the VMM moves all frames in one thread.
        let limited = rate_limits.net.is_limited();
        let tap_options = network::TapOptions {
            queue_pairs: if limited { 1 } else { usize::from(boot_size.vcpus).min(MAX_QUEUE_PAIRS) },
            vhost: config.vhost_net && !limited,
            rate_limits: rate_limits.net,
        };
        let network = match &network {
            // CNI sets up a new namespace later: in hooks, or between Create and Start. `ctr run --cni` runs CNI
            // between Create and Start. containerd 1.7 also runs CNI then for pods with a user namespace, because the
            // user namespace must own the network namespace (pkg/cri/server/sandbox_run.go).
            Network::New => match &self.vmm {
                Some(vmm) => network::watch_new(
                    &PathBuf::from(format!("/proc/{}/ns/net", vmm.pid)),
                    spec.annotations.is_sandbox(),
                    tap_options,
                )
                .map_err(|e| chain(&e))?,
                None => network::Network::default(),
            },
            Network::Path(path) => network::connect(path, tap_options).map_err(|e| chain(&e))?,
        };
        context.timeline.mark("network connected");
        let pod = pod(context, spec, id_mappings, network, rate_limits);
        BootPlan::open(pod, config, boot_size, share.to_owned()).map_err(|e| chain(&e))
    }
}

/// Records the sandbox's properties for `husk ps`. Best effort.
fn record_sandbox(context: &LaunchContext, spec: &Spec, boot_size: &BootSize, vmm_pid: u32) {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let sandbox = husk_config::sandbox::Sandbox {
        id: context.sandbox.clone(),
        namespace: context.namespace.clone(),
        pod: spec.annotations.pod(),
        vcpus: boot_size.vcpus,
        memory_mib: boot_size.memory_mib,
        started: started.as_secs(),
        vmm_pid,
        shim_pid: std::process::id(),
    };
    if let Err(error) = context.dir.record(&sandbox) {
        tracing::warn!(error = %chain(&error), "failed to record the sandbox for husk ps");
    }
}

/// Returns the configuration of the guest that depends on the pod.
///
/// The sysctls of a sandbox container belong to the pod, because that container is never created. The sysctls of a
/// container without a pod are applied when the container is created.
fn pod(
    context: &LaunchContext,
    spec: &Spec,
    id_mappings: Option<IdMappings>,
    network: network::Network,
    rate_limits: RateLimits,
) -> Pod {
    let is_sandbox = spec.annotations.is_sandbox();
    let sysctls = if is_sandbox { spec.linux.sysctl.clone() } else { Default::default() };
    let (id, hostname) = (context.sandbox.clone(), hostname(&spec.hostname));
    Pod { id, hostname, shared_memory: is_sandbox, sysctls, pids_max: None, id_mappings, network, rate_limits }
}

/// Returns the sandbox's host name. As under runc, this is the host's name if the specification does not set a name.
pub fn hostname(name: &str) -> String {
    if !name.is_empty() {
        return name.to_owned();
    }
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// Records a process in the sandbox's state directory.
///
/// # Errors
/// If the process has ended, or the file cannot be written. The text contains the error and its causes.
pub fn record_process(dir: &StateDir, name: &str, pid: u32) -> Result<(), String> {
    let process =
        ProcessId::read(pid).ok_or_else(|| format!("failed to record process {pid}: it has already ended"))?;
    dir.write_process(name, process).map_err(|e| chain(&e))
}

/// Moves this process into the cgroup that the specification names.
///
/// If this move fails, the sandbox does not start. Outside the cgroup, the sandbox would run without limits, and its
/// resource usage would count for containerd's cgroup. runc, even rootless runc, also fails if it cannot enter the
/// cgroup (libcontainer/cgroups/fs2/fs2.go, Apply). If the specification does not name a cgroup, as with containerd's
/// `disable_cgroup`, the process stays in its cgroup.
fn enter_cgroup(context: &LaunchContext, path: &str) -> Result<Option<Cgroup>, String> {
    if path.is_empty() {
        return Ok(None);
    }
    let cgroup = Cgroup::enter(path, &context.namespace)
        .map_err(|error| format!("failed to enter the sandbox's cgroup {path}: {}", chain(&error)))?;
    let dirs: Vec<_> = cgroup.location().dirs().map(|dir| dir.display().to_string()).collect();
    let recorded = context.dir.write("cgroup", &dirs.join("\n"));
    let recorded = recorded.and_then(|()| cgroup.unit().map_or(Ok(()), |unit| context.dir.write("unit", unit.name())));
    if let Err(error) = recorded {
        tracing::warn!(error = %chain(&error), "failed to record the sandbox's cgroup");
    }
    Ok(Some(cgroup))
}
