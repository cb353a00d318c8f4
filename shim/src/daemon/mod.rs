//! The shim's daemon: from the fork in `start` to the end of the sandbox.

pub mod log;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use husk_config::Config;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::address::Address;
use crate::bundle::{self, Bundle, Sizing};
use crate::chain;
use crate::cli::bootstrap::Params;
use crate::events::{Destination, Events, Patience};
use crate::network;
use crate::sandbox::boot::{Plan, Pod, pipe_pair};
use crate::sandbox::cgroup::{self, Cgroup};
use crate::sandbox::state::{ProcessId, StateDir};
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{Prepared, Sandbox, vmm};
use crate::spec::{self, Spec};
use crate::task::{self, Shim};

/// How long events may take to reach containerd once everything else is over.
const LAST_EVENTS: Duration = Duration::from_secs(10);
/// How long the last answers may take.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// What `start` found out before it forked.
pub struct Start {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox.
    pub sandbox: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The shim's part of its configuration.
    pub spec: Spec,
    /// How containerd is reached.
    pub params: Params,
    /// Where this shim listens.
    pub address: Address,
    /// The bound socket.
    pub listener: UnixListener,
    /// When the program started.
    pub started_ns: u64,
}

/// Runs the daemon; returns its exit code.
pub fn run(start: Start) -> i32 {
    small_heap();
    let vmm_log = detach();
    log::init(&start.bundle, &start.namespace, &start.sandbox, start.params.debug);
    let state = StateDir::new(&start.namespace, &start.sandbox);
    let timeline = Arc::new(Timeline::new(&start.namespace, &start.sandbox, state.timeline()));
    timeline.mark_at("shim start", start.started_ns);
    timeline.mark("shim daemon");
    let prepared = Prepared { vmm_log, ..prepare(&start, state, timeline) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(serve(start, prepared)),
        Err(error) => {
            tracing::error!(%error, "no runtime");
            start.address.remove();
            prepared.dir.remove();
            1
        }
    }
}

/// One heap for all threads, and freed memory given back early: the daemon idles most of its life.
fn small_heap() {
    // SAFETY: mallopt changes settings of the allocator only; this process has one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    }
}

/// Leaves containerd's session and its pipes: it waits for their end. Standard error, which the VMM inherits, becomes
/// a pipe whose lines go to the log; its read end is returned.
fn detach() -> Option<OwnedFd> {
    let _ = nix::unistd::setsid();
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").ok()?;
    let pipe = pipe_pair().ok();
    let error = pipe.as_ref().map_or(null.as_raw_fd(), |(_, input)| input.as_raw_fd());
    for (from, to) in [(null.as_raw_fd(), 0), (null.as_raw_fd(), 1), (error, 2)] {
        // SAFETY: dup2 of two valid descriptors; what stdin, stdout and stderr were before is no longer used.
        unsafe { libc::dup2(from, to) };
    }
    pipe.map(|(out, _)| out)
}

/// Everything that is done before there is a runtime, in an order that has the VMM's process start while the
/// configuration is read. Whatever fails is told by Create.
fn prepare(start: &Start, dir: StateDir, timeline: Arc<Timeline>) -> Prepared {
    let mut cgroup = None;
    let mut timeline_log = PathBuf::new();
    let mut spawned = None;
    let plan = (|| {
        own_mounts().map_err(|e| format!("leaving the host's mount namespace: {e}"))?;
        let network = start.spec.network().map_err(|e| chain(&e))?;
        let share = dir.create().map_err(|e| chain(&e))?;
        note(&dir, "shim.pid", std::process::id())?;
        dir.write("address", &start.address.uri()).map_err(|e| chain(&e))?;
        cgroup = enter_cgroup(start, &dir);
        let vmm = spawned.insert(vmm::spawn(&network).map_err(|e| chain(&e))?);
        timeline.mark("vmm spawned");
        note(&dir, "vmm.pid", vmm.pid)?;
        let path = std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(husk_config::DEFAULT_PATH), Into::into);
        let config = Config::load(&path).map_err(|e| chain(&e))?;
        if !start.params.debug {
            log::set_level(config.log_level);
        }
        timeline_log.clone_from(&config.timeline_log);
        let bundle = Bundle::load(&start.bundle).map_err(|e| chain(&e))?;
        let sizing = bundle::sizing(&bundle.spec, &config).map_err(|e| chain(&e))?;
        describe(start, &dir, &sizing, vmm.pid);
        let network = match &network {
            // What CNI does to a new one comes later, by hooks.
            spec::Network::New => network::Network::default(),
            spec::Network::Path(path) => network::connect(path).map_err(|e| chain(&e))?,
        };
        timeline.mark("network connected");
        let pod = pod(start, network);
        Plan::open(pod, config, sizing, share.guest).map_err(|e| chain(&e))
    })();
    // The bundle's directory goes before the shim does.
    let _ = std::env::set_current_dir("/");
    Prepared { id: start.sandbox.clone(), dir, cgroup, vmm: spawned, vmm_log: None, plan, timeline, timeline_log }
}

/// Notes for `husk ps` what this sandbox is.
fn describe(start: &Start, dir: &StateDir, sizing: &Sizing, vmm_pid: u32) {
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let sandbox = husk_config::sandbox::Sandbox {
        id: start.sandbox.clone(),
        namespace: start.namespace.clone(),
        pod: start.spec.pod_name(),
        vcpus: sizing.vcpus,
        memory_mib: sizing.memory_mib,
        started: started.as_secs(),
        vmm_pid,
        shim_pid: std::process::id(),
    };
    let written = serde_json::to_string(&sandbox).map_err(|e| e.to_string());
    if let Err(error) = written.and_then(|text| dir.write("sandbox.json", &text).map_err(|e| chain(&e))) {
        tracing::warn!(error, "sandbox not noted for husk ps");
    }
}

/// What the guest is set up as. The settings of a lone container's namespaces are its own, those of a pod's sandbox the
/// pod's: its container is never made.
fn pod(start: &Start, network: network::Network) -> Pod {
    let is_sandbox = start.spec.is_sandbox();
    let sysctls = if is_sandbox { start.spec.linux.sysctl.clone() } else { Default::default() };
    Pod { id: start.sandbox.clone(), hostname: hostname(&start.spec), shared_memory: is_sandbox, sysctls, network }
}

/// The sandbox' host name: a container whose specification has none sees the host's under runc.
fn hostname(spec: &Spec) -> String {
    if !spec.hostname.is_empty() {
        return spec.hostname.clone();
    }
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

fn note(dir: &StateDir, name: &str, pid: u32) -> Result<(), String> {
    let process = ProcessId::of(pid).ok_or_else(|| format!("process {pid} ended at once"))?;
    dir.write_process(name, process).map_err(|e| chain(&e))
}

/// A mount namespace of the pod's own: the host's mounts go on coming in, nothing goes out, and everything mounted
/// for the pod vanishes with its processes.
fn own_mounts() -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&Path>)
}

/// Moves into the cgroup the specification names. A host that does not allow it is not refused: the pod runs, and is
/// accounted to containerd.
fn enter_cgroup(start: &Start, dir: &StateDir) -> Option<Cgroup> {
    let path = &start.spec.linux.cgroups_path;
    if path.is_empty() || !cgroup::is_unified() {
        return None;
    }
    match Cgroup::enter(path, &start.namespace) {
        Ok(cgroup) => {
            if let Err(error) = dir.write("cgroup", &cgroup.path().display().to_string()) {
                tracing::warn!(error = %chain(&error), "cgroup not noted");
            }
            Some(cgroup)
        }
        Err(error) => {
            tracing::warn!(error = %chain(&error), "no cgroup for the sandbox");
            None
        }
    }
}

async fn serve(start: Start, prepared: Prepared) -> i32 {
    let Start { namespace, params, address, listener, .. } = start;
    let (reports, reported) = mpsc::unbounded_channel();
    let sandbox = Sandbox::start(prepared, reports);
    let destination = Destination::new(params.ttrpc_address, params.address, params.publish_binary);
    let events = Events::start(&namespace, destination, Patience::default());
    let shim = Shim::new(&namespace, sandbox, events, reported);
    let code = match listen(listener, &shim).await {
        Ok(mut server) => {
            tokio::select! {
                () = shim.finished() => {}
                () = signalled() => tracing::info!("told to end by a signal"),
            }
            shim.finish().await;
            address.remove();
            shim.events().flush(LAST_EVENTS).await;
            // The answer to the last request may still be on its way.
            let _ = tokio::time::timeout(LAST_ANSWERS, server.shutdown()).await;
            0
        }
        Err(error) => {
            tracing::error!(error, "cannot serve");
            shim.finish().await;
            address.remove();
            1
        }
    };
    tracing::debug!("shim ends");
    code
}

async fn listen(listener: UnixListener, shim: &Arc<Shim>) -> Result<Server, String> {
    let listener = Listener::try_from(listener).map_err(|e| e.to_string())?;
    let mut server = Server::new().add_listener(listener).register_service(task::services(shim));
    server.start().await.map_err(|e| e.to_string())?;
    Ok(server)
}

/// Waits for a signal that means the end.
async fn signalled() {
    let streams = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut term), Ok(mut int)) = streams else { return std::future::pending().await };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
