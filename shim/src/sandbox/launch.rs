//! Launches a sandbox: prepares everything that a boot needs, according to the sandbox's specification.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use husk_base::failpoint;
use husk_config::{Config, ConfigError, Seccomp, TimeoutFactor};
use husk_proto::sysctls::{self, SysctlError};
use husk_vmm::virtio::net::MAX_QUEUE_PAIRS;
use tokio::sync::{mpsc, oneshot};

use crate::blocking;
use crate::chain;
use crate::launcher::Launcher;
use crate::lock;
use crate::log;
use crate::network;
use crate::network::NetworkError;
use crate::oci::{Bundle, BundleError, IdMappings, Network, Spec};
use crate::resources;
use crate::resources::cgroup::{Cgroup, CgroupError, PlannedCgroup};
use crate::resources::limits;
use crate::resources::oom_score;
use crate::resources::rate_limits::{RateLimitError, RateLimits};
use crate::resources::{BootSize, BootSizeError};
use crate::sandbox::boot::{BootError, BootPlan, Pod};
use crate::sandbox::cgroup_record;
use crate::sandbox::guest_image::{self, GuestImages, ImageError};
use crate::sandbox::policy::{PodPolicies, PolicyError};
use crate::sandbox::state_dir::{ProcessId, StateDir, StateError};
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{LaunchInput, Sandbox};
use crate::vm::agent::Report;
use crate::vm::spawn;
use crate::vm::vmm::VmmError;

/// Why a sandbox cannot be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The shim's daemon could not prepare the share. The text has the error and its causes.
    #[error("{0}")]
    Share(String),
    /// The sandbox's specification is invalid.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The node's configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The guest kernel or the initrd cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The size of the VM cannot be determined.
    #[error(transparent)]
    BootSize(#[from] BootSizeError),
    /// A sysctl of the pod does not belong to a namespace of the pod.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The pod's policy is invalid.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The pod's rate limits are invalid.
    #[error(transparent)]
    RateLimit(#[from] RateLimitError),
    /// The pod's network cannot be connected.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The VMM process cannot be started.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// A file of the state directory cannot be written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The boot cannot be prepared.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The task that enters the sandbox's cgroup cannot be started, or panicked.
    #[error("failed to run the task that enters the sandbox's cgroup")]
    EnterTask(#[source] io::Error),
    /// The sandbox's cgroup cannot be entered.
    #[error("failed to enter the sandbox's cgroup {path}")]
    EnterCgroup {
        /// Path of the cgroup in the specification.
        path: String,
        /// Cause.
        #[source]
        source: Box<CgroupError>,
    },
    /// The files `cgroup.procs`, through which the VMM process enters the cgroup, cannot be opened.
    #[error("failed to open the sandbox's cgroup")]
    OpenCgroup(#[source] io::Error),
    /// The thread that launches the sandbox cannot be started.
    #[error("failed to start the thread that launches the sandbox")]
    Thread(#[source] io::Error),
    /// The thread that launches the sandbox panicked.
    #[error("the thread that launches the sandbox panicked")]
    Panicked,
    /// The VMM's OOM score cannot be set.
    #[error("failed to set oom_score_adj of the VMM")]
    OomScore(#[source] io::Error),
    /// A failpoint of the chaos test.
    #[error("failed at a failpoint")]
    Failpoint(#[source] io::Error),
    /// A process ended before its start time could be read.
    #[error("failed to record process {0}: it has already ended")]
    ProcessEnded(u32),
}

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
    /// Fails if `share` is an error, if the specification is invalid, or if the cgroup's task fails. [`Sandbox::ready`]
    /// reports later failures.
    pub async fn launch(self, spec: serde_json::Value, sandbox: &Sandbox) -> Result<(), LaunchError> {
        let Self { context, share, dir, launcher, reports } = self;
        let share = share.map_err(LaunchError::Share)?;
        let bundle = Bundle::from_value(&dir, spec)?;
        bundle.check()?;
        // Use a blocking thread, because waiting for systemd must not block the async runtime.
        let entered = blocking::spawn({
            let (context, path) = (context.clone(), bundle.spec.linux.cgroups_path.clone());
            move || (Installation::open(&context), enter_cgroup(&context, &path))
        });
        let (installation, cgroup) = entered.await.map_err(LaunchError::EnterTask)?;
        let mut partial = PartialLaunch::default();
        let own_launcher = launcher.clone();
        let entered = cgroup.map(|cgroup| partial.cgroup = cgroup);
        let input = on_thread(partial, move |partial| {
            entered?;
            let network = partial.spawn(&context, &bundle.spec, Some(&launcher))?;
            partial.plan(&context, &bundle, &share, network, installation)
        });
        sandbox.launch(input.await, &own_launcher, reports);
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
    fn open(context: &LaunchContext) -> Result<Self, LaunchError> {
        let config = config()?;
        if !context.debug {
            log::set_level(config.log_level);
        }
        let images = GuestImages::open(&config)?;
        Ok(Self { config, images })
    }
}

/// Reads the node's configuration.
pub fn config() -> Result<Config, ConfigError> {
    Config::load(&config_path())
}

fn config_path() -> PathBuf {
    std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(husk_config::DEFAULT_PATH), Into::into)
}

/// Returns the paths of the files that a launch needs: the node's configuration, and the files that it names.
pub fn needed_files() -> Vec<PathBuf> {
    let mut paths = vec![config_path(), guest_image::COPIES.into()];
    if let Ok(Config { kernel, initrd, timeline_log, .. }) = config() {
        paths.extend([kernel, initrd, timeline_log, husk_config::template::STORE.into()]);
    }
    paths
}

/// The resources that a launch has acquired so far. The sandbox keeps these resources even if a later step fails.
#[derive(Default)]
struct PartialLaunch {
    cgroup: Option<Cgroup>,
    vmm: Option<husk_vmm::client::Spawned>,
    /// The pod's network namespace, if it is new.
    new_network: Option<OwnedFd>,
    timeline_log: PathBuf,
    timeout_factor: TimeoutFactor,
    shutdown_grace: Duration,
}

/// Prepares a launch. The process must have a single thread, apart from the threads of the host view.
pub fn prepare(context: &LaunchContext, bundle: &Bundle, share: &Path) -> LaunchInput {
    let mut partial = PartialLaunch::default();
    let spec = &bundle.spec;
    let installation = Installation::open(context);
    let entered = enter_cgroup(context, &spec.linux.cgroups_path).map(|cgroup| partial.cgroup = cgroup);
    let spawned = entered.and_then(|()| partial.spawn(context, spec, None));
    let plan = spawned.and_then(|network| partial.plan(context, bundle, share, network, installation));
    partial.finish(plan)
}

/// Returns the input of a launch that failed because the share could not be prepared. `error` is the error and its
/// causes.
pub fn failed(error: String) -> LaunchInput {
    PartialLaunch::default().finish(Err(LaunchError::Share(error)))
}

/// Continues a launch on a separate thread, because a launch enters the pod's network namespace. If the thread cannot
/// leave this namespace, the thread must end.
///
/// The sandbox gets what the launch has acquired even if the thread cannot be started or panics. The sandbox then reaps
/// the VMM process, and removes the cgroup.
async fn on_thread(
    partial: PartialLaunch,
    work: impl FnOnce(&mut PartialLaunch) -> Result<BootPlan, LaunchError> + Send + 'static,
) -> LaunchInput {
    let partial = Arc::new(Mutex::new(partial));
    let (done, wait) = oneshot::channel();
    let shared = Arc::clone(&partial);
    let thread = std::thread::Builder::new().name("launch".into()).spawn(move || {
        let plan = work(&mut lock(&shared));
        let _ = done.send(plan);
    });
    let plan = match thread {
        Ok(_) => wait.await.unwrap_or(Err(LaunchError::Panicked)),
        Err(error) => Err(LaunchError::Thread(error)),
    };
    let partial = std::mem::take(&mut *lock(&partial));
    partial.finish(plan)
}

impl PartialLaunch {
    fn finish(self, plan: Result<BootPlan, LaunchError>) -> LaunchInput {
        let plan = plan.map_err(|error| chain(&error));
        let Self { cgroup, vmm, timeline_log, timeout_factor, shutdown_grace, .. } = self;
        LaunchInput { cgroup, vmm, plan, timeline_log, timeout_factor, shutdown_grace }
    }

    /// Spawns the VMM process in the cgroup that this process has entered. If this process is confined, the launcher
    /// has to spawn the VMM process.
    fn spawn(
        &mut self,
        context: &LaunchContext,
        spec: &Spec,
        launcher: Option<&Launcher>,
    ) -> Result<Network, LaunchError> {
        failpoint!("shim.launch.entered").map_err(LaunchError::Failpoint)?;
        let network = spec.network()?;
        let namespace = spawn::network_namespace(&network)?;
        let spawned = match launcher {
            Some(launcher) => {
                let cgroups = self.cgroup.as_ref().map_or(Ok(Vec::new()), Cgroup::open_procs);
                let cgroups = cgroups.map_err(LaunchError::OpenCgroup)?;
                spawn::spawn_by_launcher(launcher, &namespace, &cgroups)
            }
            None => spawn::spawn(&namespace),
        };
        let vmm = self.vmm.insert(spawned?);
        failpoint!("shim.launch.spawned").map_err(LaunchError::Failpoint)?;
        self.new_network = matches!(network, Network::New).then_some(namespace);
        context.timeline.mark("vmm spawned");
        record_process(&context.dir, "vmm.pid", vmm.pid)?;
        oom_score::set(vmm.pid, oom_score::DEFAULT).map_err(LaunchError::OomScore)?;
        Ok(network)
    }

    /// Sizes the VM and connects the network.
    fn plan(
        &mut self,
        context: &LaunchContext,
        bundle: &Bundle,
        share: &Path,
        network: Network,
        installation: Result<Installation, LaunchError>,
    ) -> Result<BootPlan, LaunchError> {
        let Installation { config, images } = installation?;
        self.timeline_log.clone_from(&config.timeline_log);
        self.timeout_factor = config.timeout_factor;
        self.shutdown_grace = Duration::from_secs(config.shutdown_grace_secs);
        bundle.check()?;
        let spec = &bundle.spec;
        let memory_limit_mib = self.cgroup.as_ref().map_or(u64::MAX, |cgroup| limits::max_guest_mib(cgroup.location()));
        let id_mappings = bundle.id_mappings()?;
        let boot_size = resources::boot_size(spec, &config, memory_limit_mib)?;
        let policies = PodPolicies::new(&spec.annotations, &config)?;
        record_sandbox(context, spec, &boot_size, config.seccomp, self.vmm.as_ref().map_or(0, |vmm| vmm.pid));
        let rate_limits = resources::rate_limits(spec, &config)?;
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
                )?,
                None => network::Network::default(),
            },
            Network::Path(path) => network::connect(path, tap_options)?,
        };
        context.timeline.mark("network connected");
        failpoint!("shim.launch.connected").map_err(LaunchError::Failpoint)?;
        let pod = pod(context, spec, id_mappings, network, policies, rate_limits)?;
        Ok(BootPlan::new(pod, config, images, boot_size, share.to_owned())?)
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
) -> Result<Pod, SysctlError> {
    let is_sandbox = spec.annotations.is_sandbox();
    let sysctls = if is_sandbox { spec.linux.sysctl.clone() } else { Default::default() };
    for name in sysctls.keys() {
        sysctls::check(name, id_mappings.is_some())?;
    }
    let (id, hostname) = (context.sandbox.clone(), hostname(&spec.hostname));
    Ok(Pod {
        id,
        name: spec.annotations.pod(),
        hostname,
        shared_memory: is_sandbox,
        sysctls,
        pids_max: None,
        id_mappings,
        network,
        policies,
        rate_limits,
    })
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
/// Fails if the process has ended, or if the file cannot be written.
pub fn record_process(dir: &StateDir, name: &str, pid: u32) -> Result<(), LaunchError> {
    let process = ProcessId::read(pid).ok_or(LaunchError::ProcessEnded(pid))?;
    Ok(dir.write_process(name, process)?)
}

/// Moves this process into the cgroup `path` from the specification. If `path` is empty, as with containerd's
/// `disable_cgroup`, the process stays in its current cgroup.
///
/// If the move fails, the sandbox does not start. Outside the cgroup, the sandbox would have no limits, and its usage
/// would be charged to containerd's cgroup. runc also fails if it cannot enter the cgroup, even in rootless mode
/// (libcontainer/cgroups/fs2/fs2.go, Apply).
fn enter_cgroup(context: &LaunchContext, path: &str) -> Result<Option<Cgroup>, LaunchError> {
    if path.is_empty() {
        return Ok(None);
    }
    let failed = |source| LaunchError::EnterCgroup { path: path.to_owned(), source: Box::new(source) };
    let planned = PlannedCgroup::new(path, &context.namespace).map_err(failed)?;
    cgroup_record::enter(&context.dir, planned)?.map(Some).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn launch_whose_thread_fails_keeps_what_it_has_acquired() {
        let input = on_thread(PartialLaunch::default(), |partial| {
            partial.timeline_log = "/kept".into();
            panic!("of the test");
        });
        let LaunchInput { plan, timeline_log, .. } = input.await;
        assert!(plan.is_err_and(|error| error == LaunchError::Panicked.to_string()));
        assert_eq!(timeline_log, Path::new("/kept"));
    }
}
