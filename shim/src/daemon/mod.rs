//! The shim's daemon: from the fork in `start` to the end of the sandbox.

pub mod launch;
pub mod log;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::address::Address;
use crate::bundle::Bundle;
use crate::chain;
use crate::cli::bootstrap::Params;
use crate::events::{Destination, Events, Patience};
use crate::sandbox::boot::pipe_pair;
use crate::sandbox::state::StateDir;
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{Prepared, Sandbox};
use crate::spec::Spec;
use crate::task::{self, Shim};
pub use launch::{About, Pending};

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
    /// The shim's part of its configuration; none where the sandbox is created by a request.
    pub spec: Option<Spec>,
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
    let (about, share) = prepare(&start, state, timeline);
    // In an order that has the VMM's process start while the configuration is read.
    let launch = match (&start.spec, share) {
        (None, share) => Launch::Later(share),
        (Some(_), Err(error)) => Launch::Now(Box::new(launch::failed(error))),
        (Some(spec), Ok(share)) => {
            let bundle = || Bundle::load(&start.bundle).map_err(|e| chain(&e));
            Launch::Now(Box::new(launch::prepare(&about, spec, &share, bundle)))
        }
    };
    // The bundle's directory goes before the shim does.
    let _ = std::env::set_current_dir("/");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(serve(start, about, launch, vmm_log)),
        Err(error) => {
            tracing::error!(%error, "no runtime");
            start.address.remove();
            about.dir.remove();
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

/// What is done before there is a runtime. Whatever fails is told by Create, or by the sandbox's start.
fn prepare(start: &Start, dir: StateDir, timeline: Arc<Timeline>) -> (About, Result<PathBuf, String>) {
    let made = own_mounts().map_err(|e| format!("leaving the host's mount namespace: {e}")).and_then(|()| {
        let share = dir.create().map_err(|e| chain(&e))?;
        launch::note(&dir, "shim.pid", std::process::id())?;
        dir.write("address", &start.address.uri()).map_err(|e| chain(&e))?;
        Ok(share.guest)
    });
    let (namespace, sandbox, debug) = (start.namespace.clone(), start.sandbox.clone(), start.params.debug);
    (About { namespace, sandbox, debug, dir, timeline }, made)
}

/// A mount namespace of the pod's own: the host's mounts go on coming in, nothing goes out, and everything mounted
/// for the pod vanishes with its processes.
fn own_mounts() -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&Path>)
}

/// When the boot begins.
enum Launch {
    /// At once: there is a specification.
    Now(Box<Prepared>),
    /// When the sandbox is created; with the guest's view of the share, or why there is none.
    Later(Result<PathBuf, String>),
}

async fn serve(start: Start, about: About, launch: Launch, vmm_log: Option<OwnedFd>) -> i32 {
    let Start { namespace, params, address, listener, bundle, .. } = start;
    let (reports, reported) = mpsc::unbounded_channel();
    let sandbox = Sandbox::new(&about.sandbox, about.dir.clone(), Arc::clone(&about.timeline), vmm_log);
    let pending = match launch {
        Launch::Now(prepared) => {
            sandbox.launch(*prepared, reports);
            None
        }
        Launch::Later(share) => Some(Pending { about, share, bundle, reports }),
    };
    let destination = Destination::new(params.ttrpc_address, params.address, params.publish_binary);
    let events = Events::start(&namespace, destination, Patience::default());
    let shim = Shim::new(&namespace, sandbox, events, reported, pending);
    let code = match listen(listener, &shim).await {
        Ok(mut server) => {
            tokio::select! {
                () = shim.finished() => {}
                () = shim.forsaken() => tracing::warn!("nobody created the sandbox"),
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
