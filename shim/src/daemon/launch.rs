//! A sandbox's launch: from its specification to everything a boot needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use husk_config::Config;
use husk_vmm::virtio::net::MOST_PAIRS;
use tokio::sync::{mpsc, oneshot};

use super::log;
use crate::bundle::{self, Bundle, Sizing, Users};
use crate::chain;
use crate::network;
use crate::sandbox::agent::Report;
use crate::sandbox::boot::{Plan, Pod};
use crate::sandbox::cgroup::Cgroup;
use crate::sandbox::limits;
use crate::sandbox::state::{ProcessId, StateDir};
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{Prepared, Sandbox, vmm};
use crate::spec::{self, Spec};

/// What is known of a sandbox before its specification.
#[derive(Clone)]
pub struct About {
    /// containerd's namespace.
    pub namespace: String,
    /// Its id.
    pub sandbox: String,
    /// Log at debug level whatever the configuration says.
    pub debug: bool,
    /// Its directory.
    pub dir: StateDir,
    /// Its start's timeline.
    pub timeline: Arc<Timeline>,
}

/// A sandbox whose specification is still to come.
pub struct Pending {
    /// The sandbox.
    pub about: About,
    /// The guest's view of the shared directory, or why there is none.
    pub share: Result<PathBuf, String>,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Where the agent's reports go.
    pub reports: mpsc::UnboundedSender<Report>,
}

impl Pending {
    /// Launches the sandbox. Call it from the main thread, which the VMM's process dies with.
    ///
    /// # Errors
    /// The chain of causes, when the specification cannot be. What fails later is told by the sandbox.
    pub async fn launch(self, spec: &str, sandbox: &Sandbox) -> Result<(), String> {
        let Self { about, share, bundle, reports } = self;
        let share = share?;
        let bundle = Bundle::of_text(&bundle, spec.as_bytes()).map_err(|e| chain(&e))?;
        let spec: Spec = serde_json::from_str(spec).map_err(|e| e.to_string())?;
        // Not here, where a service manager that takes its time would hold everything up.
        let entered = tokio::task::spawn_blocking({
            let (about, spec) = (about.clone(), spec.clone());
            move || enter_cgroup(&about, &spec)
        });
        let cgroup = entered.await.unwrap_or_else(|error| Err(format!("entering the sandbox' cgroup: {error}")));
        let mut got = Got::default();
        let spawned = cgroup.and_then(|cgroup| got.spawn(&about, &spec, cgroup));
        let (done, wait) = oneshot::channel();
        // A thread of its own: it goes to the pod's network namespace, and one that does not get back must end.
        let thread = std::thread::Builder::new().name("launch".into()).spawn(move || {
            let plan = spawned.and_then(|network| got.plan(&about, &spec, &share, network, || Ok(bundle)));
            let _ = done.send(got.finish(plan));
        });
        let prepared = match thread {
            Ok(_) => wait.await.map_err(|_| "the thread that launches the sandbox died".to_owned())?,
            Err(error) => return Err(format!("starting a thread: {error}")),
        };
        sandbox.launch(prepared, reports);
        Ok(())
    }
}

/// What was had so far, whatever comes next.
#[derive(Default)]
struct Got {
    cgroup: Option<Cgroup>,
    vmm: Option<husk_vmm::client::Spawned>,
    timeline_log: PathBuf,
}

/// Does all of it, while this process has one thread.
pub fn prepare(about: &About, spec: &Spec, share: &Path, bundle: impl FnOnce() -> Result<Bundle, String>) -> Prepared {
    let mut got = Got::default();
    let spawned = enter_cgroup(about, spec).and_then(|cgroup| got.spawn(about, spec, cgroup));
    let plan = spawned.and_then(|network| got.plan(about, spec, share, network, bundle));
    got.finish(plan)
}

/// A launch that did not get anywhere.
pub fn failed(error: String) -> Prepared {
    Got::default().finish(Err(error))
}

impl Got {
    fn finish(self, plan: Result<Plan, String>) -> Prepared {
        Prepared { cgroup: self.cgroup, vmm: self.vmm, plan, timeline_log: self.timeline_log }
    }

    /// Starts the VMM's process, in the cgroup that was entered.
    fn spawn(&mut self, about: &About, spec: &Spec, cgroup: Option<Cgroup>) -> Result<spec::Network, String> {
        self.cgroup = cgroup;
        let network = spec.network().map_err(|e| chain(&e))?;
        let vmm = self.vmm.insert(vmm::spawn(&network).map_err(|e| chain(&e))?);
        about.timeline.mark("vmm spawned");
        note(&about.dir, "vmm.pid", vmm.pid)?;
        Ok(network)
    }

    /// Reads what says how the machine is, connects the network, and opens the files.
    fn plan(
        &mut self,
        about: &About,
        spec: &Spec,
        share: &Path,
        network: spec::Network,
        bundle: impl FnOnce() -> Result<Bundle, String>,
    ) -> Result<Plan, String> {
        let path = std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(husk_config::DEFAULT_PATH), Into::into);
        let config = Config::load(&path).map_err(|e| chain(&e))?;
        if !about.debug {
            log::set_level(config.log_level);
        }
        self.timeline_log.clone_from(&config.timeline_log);
        let bundle = bundle()?;
        let room = self.cgroup.as_ref().map_or(u64::MAX, |cgroup| limits::room(cgroup.place()));
        let users = bundle.users().map_err(|e| chain(&e))?;
        let sizing = bundle::sizing(&bundle.spec, &config, room).map_err(|e| chain(&e))?;
        describe(about, spec, &sizing, self.vmm.as_ref().map_or(0, |vmm| vmm.pid));
        let wish = network::Wish { pairs: usize::from(sizing.vcpus).min(MOST_PAIRS), vhost: config.vhost_net };
        let network = match &network {
            // What CNI does to a new one comes later: by hooks, or between Create and Start as with `ctr run --cni` and
            // for containerd 1.7's pods with a user namespace, which is to own it (pkg/cri/server/sandbox_run.go).
            spec::Network::New => match &self.vmm {
                Some(vmm) => {
                    network::fresh(&PathBuf::from(format!("/proc/{}/ns/net", vmm.pid)), spec.is_sandbox(), wish)
                        .map_err(|e| chain(&e))?
                }
                None => network::Network::default(),
            },
            spec::Network::Path(path) => network::connect(path, wish).map_err(|e| chain(&e))?,
        };
        about.timeline.mark("network connected");
        let pod = pod(about, spec, users, network);
        Plan::open(pod, config, sizing, share.to_owned()).map_err(|e| chain(&e))
    }
}

/// Notes for `husk ps` what this sandbox is.
fn describe(about: &About, spec: &Spec, sizing: &Sizing, vmm_pid: u32) {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let sandbox = husk_config::sandbox::Sandbox {
        id: about.sandbox.clone(),
        namespace: about.namespace.clone(),
        pod: spec.pod_name(),
        vcpus: sizing.vcpus,
        memory_mib: sizing.memory_mib,
        started: started.as_secs(),
        vmm_pid,
        shim_pid: std::process::id(),
    };
    if let Err(error) = about.dir.note(&sandbox) {
        tracing::warn!(error = %chain(&error), "sandbox not noted for husk ps");
    }
}

/// What the guest is set up as. The settings of a lone container's namespaces are its own, those of a pod's sandbox the
/// pod's: its container is never made.
fn pod(about: &About, spec: &Spec, users: Option<Users>, network: network::Network) -> Pod {
    let is_sandbox = spec.is_sandbox();
    let sysctls = if is_sandbox { spec.linux.sysctl.clone() } else { Default::default() };
    let (id, hostname) = (about.sandbox.clone(), hostname(spec));
    Pod { id, hostname, shared_memory: is_sandbox, sysctls, pids_max: None, users, network }
}

/// The sandbox' host name: a container whose specification has none sees the host's under runc.
pub fn hostname(spec: &Spec) -> String {
    if !spec.hostname.is_empty() {
        return spec.hostname.clone();
    }
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// Notes a process in the sandbox's directory.
///
/// # Errors
/// The chain of causes.
pub fn note(dir: &StateDir, name: &str, pid: u32) -> Result<(), String> {
    let process = ProcessId::of(pid).ok_or_else(|| format!("process {pid} ended at once"))?;
    dir.write_process(name, process).map_err(|e| chain(&e))
}

/// Moves into the cgroup the specification names. Where that cannot be, the sandbox does not start, as with runc, even a
/// rootless one (libcontainer/cgroups/fs2/fs2.go, Apply): it would run without limits, and be accounted to containerd. One
/// whose specification names none, as containerd's `disable_cgroup` makes it, does without.
fn enter_cgroup(about: &About, spec: &Spec) -> Result<Option<Cgroup>, String> {
    let path = &spec.linux.cgroups_path;
    if path.is_empty() {
        return Ok(None);
    }
    let cgroup = Cgroup::enter(path, &about.namespace)
        .map_err(|error| format!("entering the sandbox' cgroup {path}: {}", chain(&error)))?;
    let dirs: Vec<_> = cgroup.place().dirs().map(|dir| dir.display().to_string()).collect();
    let noted = about.dir.write("cgroup", &dirs.join("\n"));
    let noted = noted.and_then(|()| cgroup.unit().map_or(Ok(()), |unit| about.dir.write("unit", unit.name())));
    if let Err(error) = noted {
        tracing::warn!(error = %chain(&error), "cgroup not noted");
    }
    Ok(Some(cgroup))
}
