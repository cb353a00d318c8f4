//! Launches a sandbox: prepares everything that a boot needs, according to the sandbox's specification.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use husk_config::{Config, Seccomp};
use husk_vmm::virtio::net::MAX_QUEUE_PAIRS;
use tokio::sync::{mpsc, oneshot};

use crate::chain;
use crate::launcher::Launcher;
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
use crate::sandbox::guest_image::GuestImages;
use crate::sandbox::policy::PodPolicies;
use crate::sandbox::state_dir::{ProcessId, StateDir};
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{LaunchInput, Sandbox};
use crate::vm::agent::Report;
use crate::vm::vmm;

/// Inputs of a launch that do not come from the sandbox's specification.
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

/// A launch that waits for the sandbox's specification.
pub struct DeferredLaunch {
    /// Inputs that do not come from the specification.
    pub context: LaunchContext,
    /// Directory on the host that the VMM serves to the guest as the share, or an error if the share could not be
    /// prepared.
    pub share: Result<PathBuf, String>,
    /// The bundle directory.
    pub dir: PathBuf,
    /// Starts the VMM process.
    pub launcher: Launcher,
    /// Channel to which the agent's reports are sent.
    pub reports: mpsc::Sender<Report>,
}

impl DeferredLaunch {
    /// Launches the sandbox.
    ///
    /// # Errors
    /// Fails if `share` is an error, if the specification is invalid, or if a thread cannot be started or panics. The
    /// returned text contains the error and its causes. [`Sandbox::ready`] reports later failures.
    pub async fn launch(self, spec: serde_json::Value, sandbox: &Sandbox) -> Result<(), String> {
        let Self { context, share, dir, launcher, reports } = self;
        let share = share?;
        let bundle = Bundle::from_value(&dir, spec).map_err(|e| chain(&e))?;
        bundle.check().map_err(|e| chain(&e))?;
        // Use a blocking thread, because waiting for systemd must not block the async runtime.
        let entered = tokio::task::spawn_blocking({
            let (context, path) = (context.clone(), bundle.spec.linux.cgroups_path.clone());
            move || (Installation::open(&context), enter_cgroup(&context, &path))
        });
        let (installation, cgroup) =
            entered.await.map_err(|error| format!("failed to enter the sandbox's cgroup: {error}"))?;
        let (done, wait) = oneshot::channel();
        // Use a separate thread, because a launch enters the pod's network namespace. If the thread cannot leave this
        // namespace, the thread must end.
        let thread = std::thread::Builder::new().name("launch".into()).spawn(move || {
            let mut partial = PartialLaunch::default();
            let spawned = cgroup.and_then(|cgroup| partial.spawn(&context, &bundle.spec, cgroup, Some(&launcher)));
            let plan = spawned.and_then(|network| partial.plan(&context, &bundle, &share, network, installation));
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

/// The node's configuration, and the files that it names.
struct Installation {
    config: Config,
    images: GuestImages,
}

impl Installation {
    /// Reads the configuration, and opens the guest kernel and the initrd. Must be called before [`enter_cgroup`].
    /// Otherwise, the copies that [`GuestImages::open`] makes would be charged to the sandbox's cgroup. These copies
    /// outlive the sandbox.
    fn open(context: &LaunchContext) -> Result<Self, String> {
        let config = config()?;
        if !context.debug {
            log::set_level(config.log_level);
        }
        let images = GuestImages::open(&config).map_err(|e| chain(&e))?;
        Ok(Self { config, images })
    }
}

/// Reads the node's configuration.
pub fn config() -> Result<Config, String> {
    let path = std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(husk_config::DEFAULT_PATH), Into::into);
    Config::load(&path).map_err(|e| chain(&e))
}

/// The resources that a launch has acquired so far. The sandbox keeps these resources even if a later step fails.
#[derive(Default)]
struct PartialLaunch {
    cgroup: Option<Cgroup>,
    vmm: Option<husk_vmm::client::Spawned>,
    /// The pod's network namespace, if it is new.
    new_network: Option<OwnedFd>,
    timeline_log: PathBuf,
}

/// Prepares a launch. The process must have a single thread.
pub fn prepare(context: &LaunchContext, bundle: &Bundle, share: &Path) -> LaunchInput {
    let mut partial = PartialLaunch::default();
    let spec = &bundle.spec;
    let installation = Installation::open(context);
    let entered = enter_cgroup(context, &spec.linux.cgroups_path);
    let spawned = entered.and_then(|cgroup| partial.spawn(context, spec, cgroup, None));
    let plan = spawned.and_then(|network| partial.plan(context, bundle, share, network, installation));
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

    /// Spawns the VMM process in the cgroup that this process has entered. If this process is confined, the launcher
    /// has to spawn the VMM process.
    fn spawn(
        &mut self,
        context: &LaunchContext,
        spec: &Spec,
        cgroup: Option<Cgroup>,
        launcher: Option<&Launcher>,
    ) -> Result<Network, String> {
        self.cgroup = cgroup;
        let network = spec.network().map_err(|e| chain(&e))?;
        let namespace = vmm::network_namespace(&network).map_err(|e| chain(&e))?;
        let spawned = match launcher {
            Some(launcher) => {
                let cgroups = self.cgroup.as_ref().map_or(Ok(Vec::new()), Cgroup::open_procs);
                let cgroups = cgroups.map_err(|error| format!("failed to open the sandbox's cgroup: {error}"))?;
                vmm::spawn_by_launcher(launcher, &namespace, &cgroups)
            }
            None => vmm::spawn(&namespace),
        };
        let vmm = self.vmm.insert(spawned.map_err(|e| chain(&e))?);
        self.new_network = matches!(network, Network::New).then_some(namespace);
        context.timeline.mark("vmm spawned");
        record_process(&context.dir, "vmm.pid", vmm.pid)?;
        oom_score::set(vmm.pid, oom_score::DEFAULT)
            .map_err(|error| format!("failed to set oom_score_adj of the VMM: {error}"))?;
        Ok(network)
    }

    /// Sizes the VM and connects the network.
    fn plan(
        &mut self,
        context: &LaunchContext,
        bundle: &Bundle,
        share: &Path,
        network: Network,
        installation: Result<Installation, String>,
    ) -> Result<BootPlan, String> {
        let Installation { config, images } = installation?;
        self.timeline_log.clone_from(&config.timeline_log);
        bundle.check().map_err(|e| chain(&e))?;
        let spec = &bundle.spec;
        let memory_limit_mib = self.cgroup.as_ref().map_or(u64::MAX, |cgroup| limits::max_guest_mib(cgroup.location()));
        let id_mappings = bundle.id_mappings().map_err(|e| chain(&e))?;
        let boot_size = resources::boot_size(spec, &config, memory_limit_mib).map_err(|e| chain(&e))?;
        let policies = PodPolicies::new(&spec.annotations, &config).map_err(|e| chain(&e))?;
        record_sandbox(context, spec, &boot_size, config.seccomp, self.vmm.as_ref().map_or(0, |vmm| vmm.pid));
        let rate_limits = resources::rate_limits(spec, &config).map_err(|e| chain(&e))?;
        // vhost-net does not apply rate limits. Without vhost-net, several queue pairs are not faster than one, because
        // the VMM moves all frames in one thread.
        let limited = rate_limits.net.is_limited();
        let tap_options = network::TapOptions {
            queue_pairs: if limited { 1 } else { usize::from(boot_size.vcpus).min(MAX_QUEUE_PAIRS) },
            vhost: config.vhost_net && !limited,
            rate_limits: rate_limits.net,
        };
        let network = match &network {
            // CNI configures a new network namespace later, in OCI hooks or between Create and Start. `ctr run --cni`
            // runs CNI between Create and Start. If the pod has a user namespace, containerd 1.7 also runs CNI between
            // Create and Start. The reason is that the user namespace must own the network namespace
            // (pkg/cri/server/sandbox_run.go).
            Network::New => match &self.new_network {
                Some(namespace) => network::watch_new(
                    &PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd())),
                    spec.annotations.is_sandbox(),
                    tap_options,
                )
                .map_err(|e| chain(&e))?,
                None => network::Network::default(),
            },
            Network::Path(path) => network::connect(path, tap_options).map_err(|e| chain(&e))?,
        };
        context.timeline.mark("network connected");
        let pod = pod(context, spec, id_mappings, network, policies, rate_limits);
        BootPlan::new(pod, config, images, boot_size, share.to_owned()).map_err(|e| chain(&e))
    }
}

/// Records the sandbox's properties for `husk ps`. Best effort.
fn record_sandbox(context: &LaunchContext, spec: &Spec, boot_size: &BootSize, seccomp: Seccomp, vmm_pid: u32) {
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
        configured_seccomp: Some(seccomp),
    };
    if let Err(error) = context.dir.record(&sandbox) {
        tracing::warn!(error = %chain(&error), "failed to record the sandbox for husk ps");
    }
}

/// Returns the part of the guest's configuration that depends on the pod.
///
/// The guest never creates a sandbox container. Therefore, the sysctls of a sandbox container are part of `Pod`, and
/// the agent applies them at `Setup`. The sysctls of a container without a pod are applied when the container is
/// created.
fn pod(
    context: &LaunchContext,
    spec: &Spec,
    id_mappings: Option<IdMappings>,
    network: network::Network,
    policies: PodPolicies,
    rate_limits: RateLimits,
) -> Pod {
    let is_sandbox = spec.annotations.is_sandbox();
    let sysctls = if is_sandbox { spec.linux.sysctl.clone() } else { Default::default() };
    let (id, hostname) = (context.sandbox.clone(), hostname(&spec.hostname));
    Pod {
        id,
        hostname,
        shared_memory: is_sandbox,
        sysctls,
        pids_max: None,
        id_mappings,
        network,
        policies,
        rate_limits,
    }
}

/// Returns `name`, the host name from the specification. If `name` is empty, returns the node's host name, as under
/// runc.
pub fn hostname(name: &str) -> String {
    if !name.is_empty() {
        return name.to_owned();
    }
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// Records process `pid` in the file `name` of the state directory.
///
/// # Errors
/// Fails if the process has ended, or if the file cannot be written. The returned text contains the error and its
/// causes.
pub fn record_process(dir: &StateDir, name: &str, pid: u32) -> Result<(), String> {
    let process =
        ProcessId::read(pid).ok_or_else(|| format!("failed to record process {pid}: it has already ended"))?;
    dir.write_process(name, process).map_err(|e| chain(&e))
}

/// Moves this process into the cgroup `path` from the specification. If `path` is empty, as with containerd's
/// `disable_cgroup`, the process stays in its current cgroup.
///
/// If the move fails, the sandbox does not start. Outside the cgroup, the sandbox would have no limits, and its usage
/// would be charged to containerd's cgroup. runc also fails if it cannot enter the cgroup, even in rootless mode
/// (libcontainer/cgroups/fs2/fs2.go, Apply).
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
