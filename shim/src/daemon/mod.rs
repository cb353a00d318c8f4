//! Runs the shim's daemon, which lives from the fork in `start` to the end of the sandbox.

pub mod mount_namespace;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use husk_base::sys::heap;
use husk_vmm::config::SeccompMode;
use tokio::net::unix::pipe;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::address::Address;
use crate::chain;
use crate::confinement;
use crate::container::Shim;
use crate::events::{Destination, Events, RetryPolicy};
use crate::host_view::HostView;
use crate::launcher::Launcher;
use crate::log;
use crate::oci::Bundle;
use crate::sandbox::boot::{BootPlan, pipe_pair, seccomp_mode};
use crate::sandbox::launch::{self, DeferredLaunch, LaunchContext};
use crate::sandbox::state_dir::StateDir;
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{LaunchInput, Sandbox};
use crate::vm::console;

/// Timeout for delivering the last events to containerd when the daemon ends.
const EVENT_FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for sending the last responses when the daemon ends.
const SERVER_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of reports from the agent that wait until they are handled. If this number of reports is waiting, the
/// agent has to wait before it can send another report.
const MAX_REPORTS: usize = 64;

/// Paths that the shim may use in its own mount namespace, for every sandbox: the node's files for a pod's `/etc`, and
/// the sockets of systemd.
const NEEDED: [&str; 4] = ["/etc/hosts", "/etc/resolv.conf", "/run/systemd", "/run/dbus"];

/// Arguments of [`run`].
pub struct DaemonArgs {
    /// The containerd namespace of the sandbox.
    pub namespace: String,
    /// The sandbox's id.
    pub sandbox: String,
    /// The sandbox's bundle directory.
    pub dir: PathBuf,
    /// The sandbox's bundle. `None` if the bundle has no `config.json`.
    pub bundle: Option<Bundle>,
    /// The containerd instance that receives the events.
    pub destination: Destination,
    /// Whether to log at debug level.
    pub debug: bool,
    /// The address of this shim.
    pub address: Address,
    /// The listening socket at `address`.
    pub listener: UnixListener,
    /// Time of the monotonic clock, in nanoseconds, at which `start` began.
    pub started_ns: u64,
}

/// Runs the daemon and returns its exit code.
pub fn run(args: DaemonArgs) -> i32 {
    // A node runs one daemon for each sandbox, and most daemons are idle. Therefore, each daemon's heap must stay
    // small.
    heap::keep_small();
    let vmm_log = detach();
    // The launcher is forked first. It has this process's rights, mounts and cgroup at this point, and a small heap.
    let launcher = match Launcher::start() {
        Ok(launcher) => launcher,
        Err(error) => {
            log::init(&args.dir, &args.namespace, &args.sandbox, args.debug);
            tracing::error!(error = %chain(&error), "the shim ends, because it cannot start programs");
            args.address.remove();
            return 1;
        }
    };
    log::init(&args.dir, &args.namespace, &args.sandbox, args.debug);
    let state = StateDir::new(&args.namespace, &args.sandbox);
    let timeline = Arc::new(Timeline::new(&args.namespace, &args.sandbox, state.timeline()));
    timeline.mark_at("shim start", args.started_ns);
    timeline.mark("shim daemon");
    let (context, share) = prepare(&args, state, timeline);
    // `launch::prepare` first spawns the VMM process, and then connects the pod's network. Therefore, the VMM process
    // starts while this process connects the network.
    let mut launch = match (&args.bundle, share) {
        (None, share) => Launch::Deferred(share),
        (Some(_), Err(error)) => Launch::Immediate(Box::new(launch::failed(error))),
        (Some(bundle), Ok(share)) => Launch::Immediate(Box::new(launch::prepare(&context, bundle, &share))),
    };
    // From here on, this process handles messages of the VMM and the agent.
    let refused_calls = confinement::enter(launch.seccomp()).unwrap_or_else(|error| {
        launch.fail(format!("failed to confine the shim: {}", chain(&error)));
        None
    });
    // Leave the bundle directory, because containerd removes the directory before the shim ends.
    let _ = std::env::set_current_dir("/");
    let (address, dir) = (args.address.clone(), context.dir.clone());
    let ended = run_async(async {
        if let Some(pipe) = refused_calls {
            log_refused_calls(pipe);
        }
        serve(args, context, launch, launcher, vmm_log).await
    });
    ended.unwrap_or_else(|error| {
        tracing::error!(%error, "failed to start the async runtime");
        address.remove();
        dir.remove();
        1
    })
}

/// Runs `future` on this thread. Returns when `future` is ready, although a blocking call may hang on another thread,
/// for example in a file system of the node. Such threads end with the process.
///
/// # Errors
/// If the runtime cannot be started.
fn run_async<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let output = runtime.block_on(future);
    // To drop the runtime would wait for its threads.
    runtime.shutdown_background();
    Ok(output)
}

/// Leaves containerd's session. Closes the pipes to containerd, because containerd waits for EOF on these pipes.
///
/// Replaces stderr with a pipe, which the VMM inherits. The shim copies the VMM's lines from this pipe to the log.
/// Returns the pipe's read end, or `None` if `/dev/null` cannot be opened or the pipe cannot be created.
fn detach() -> Option<OwnedFd> {
    let _ = nix::unistd::setsid();
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").ok()?;
    let pipe = pipe_pair().ok();
    let _ = nix::unistd::dup2_stdin(&null);
    let _ = nix::unistd::dup2_stdout(&null);
    let _ = match &pipe {
        Some((_, input)) => nix::unistd::dup2_stderr(input),
        None => nix::unistd::dup2_stderr(&null),
    };
    pipe.map(|(out, _)| out)
}

/// Creates the mount namespace and the state directory. Must run before the process has other threads, except those of
/// the host view, because unshare(2) moves only the calling thread to the new namespace.
///
/// Returns the launch context, and the directory that the VMM serves to the guest. After a failure, the second value is
/// the error. The shim returns this error to a later request.
fn prepare(args: &DaemonArgs, dir: StateDir, timeline: Arc<Timeline>) -> (LaunchContext, Result<PathBuf, String>) {
    let made = enter_mount_namespace(args, &dir)
        .map_err(|e| format!("failed to create the mount namespace: {e}"))
        .and_then(|()| {
            let share = dir.create().map_err(|e| chain(&e))?;
            launch::record_process(&dir, "shim.pid", std::process::id()).map_err(|e| chain(&e))?;
            dir.write("address", &args.address.uri()).map_err(|e| chain(&e))?;
            Ok(share.guest)
        });
    let (namespace, sandbox, debug) = (args.namespace.clone(), args.sandbox.clone(), args.debug);
    (LaunchContext { namespace, sandbox, debug, dir, timeline }, made)
}

/// Starts the host view, and moves this process to a new mount namespace.
fn enter_mount_namespace(args: &DaemonArgs, state: &StateDir) -> Result<(), String> {
    HostView::start().map_err(|error| error.to_string())?.install();
    let mut needed = vec![args.dir.clone(), state.path().to_owned(), args.address.path().to_owned()];
    needed.extend(args.destination.sockets());
    needed.extend(launch::needed_files());
    needed.extend(NEEDED.map(PathBuf::from));
    mount_namespace::enter(&needed).map_err(|error| chain(&error))
}

/// When the VM boots.
enum Launch {
    /// The VM boots immediately, because the specification is known.
    Immediate(Box<LaunchInput>),
    /// The VM boots when a CreateSandbox request arrives. The field is the second value from [`prepare`].
    Deferred(Result<PathBuf, String>),
}

impl Launch {
    /// Returns what happens when this process makes a system call that its filter does not allow.
    fn seccomp(&self) -> SeccompMode {
        match self {
            Self::Immediate(input) => input.plan.as_ref().map_or(SeccompMode::Enforce, BootPlan::seccomp),
            Self::Deferred(_) => launch::config().map_or(SeccompMode::Enforce, |config| seccomp_mode(&config)),
        }
    }

    /// Lets the launch fail.
    fn fail(&mut self, error: String) {
        match self {
            Self::Immediate(input) => input.plan = Err(error),
            Self::Deferred(share) => *share = Err(error),
        }
    }
}

/// Logs each system call that this process's filter refuses. Such a call is a defect of Husk, or the effect of an
/// attack.
fn log_refused_calls(pipe: OwnedFd) {
    match pipe::Receiver::from_owned_fd(pipe) {
        Ok(pipe) => drop(tokio::spawn(console::read_lines(pipe, |line| tracing::error!("the shim {line}")))),
        Err(error) => tracing::error!(%error, "failed to read the log of refused system calls"),
    }
}

async fn serve(
    args: DaemonArgs,
    context: LaunchContext,
    launch: Launch,
    launcher: Launcher,
    vmm_log: Option<OwnedFd>,
) -> i32 {
    let DaemonArgs { namespace, mut destination, address, listener, dir, .. } = args;
    destination.set_launcher(launcher.clone());
    tokio::spawn({
        let launcher = launcher.clone();
        async move {
            match launcher.wait_end().await {
                Ok(()) => tracing::error!("the launcher has ended: the pod runs on, but the shim starts no programs"),
                Err(error) => tracing::warn!(%error, "failed to watch the launcher"),
            }
        }
    });
    let (reports, reported) = mpsc::channel(MAX_REPORTS);
    let sandbox = Sandbox::new(&context.sandbox, context.dir.clone(), Arc::clone(&context.timeline), vmm_log);
    let pending = match launch {
        Launch::Immediate(input) => {
            sandbox.launch(*input, &launcher, reports);
            None
        }
        Launch::Deferred(share) => Some(DeferredLaunch { context, share, dir, launcher: launcher.clone(), reports }),
    };
    let events = Events::start(&namespace, destination, RetryPolicy::default());
    let shim = Shim::new(&namespace, sandbox, events, launcher, reported, pending);
    let mut termination = Termination::watch();
    let code = match listen(listener, &shim).await {
        Ok(mut server) => {
            tokio::select! {
                () = shim.wait_finished() => {}
                () = shim.create_timed_out() => {
                    tracing::warn!("the shim ends, because no request to create the sandbox arrived in time");
                }
                () = termination.received() => {
                    tracing::info!("the shim ends the pod after SIGTERM or SIGINT");
                    shim.end_orderly().await;
                    shim.wait_last_requests().await;
                }
                () = shim.vmm_terminated() => {
                    tracing::info!("the shim ends the pod after SIGTERM or SIGINT to the VMM");
                    shim.end_orderly().await;
                    shim.wait_last_requests().await;
                }
            }
            shim.finish().await;
            address.remove();
            shim.events().flush(EVENT_FLUSH_TIMEOUT).await;
            // Give the server time to send the last responses.
            let _ = tokio::time::timeout(SERVER_SHUTDOWN_TIMEOUT, server.shutdown()).await;
            tokio::select! {
                () = shim.wait_for_stuck_vmm() => {}
                () = termination.received() => tracing::warn!("the shim ends although the VMM process runs"),
            }
            0
        }
        Err(error) => {
            tracing::error!(error, "failed to serve requests on the sandbox's socket");
            shim.finish().await;
            address.remove();
            1
        }
    };
    tracing::debug!("the shim ends");
    code
}

async fn listen(listener: UnixListener, shim: &Arc<Shim>) -> Result<Server, String> {
    let listener = Listener::try_from(listener).map_err(|e| e.to_string())?;
    let mut server = Server::new().add_listener(listener).register_service(crate::service::services(shim));
    server.start().await.map_err(|e| e.to_string())?;
    Ok(server)
}

/// The signals SIGTERM and SIGINT. A signal that arrives while nothing waits for it is not lost.
struct Termination(Option<[Signal; 2]>);

impl Termination {
    /// Replaces the signals' default action, which would end this process at once.
    fn watch() -> Self {
        let signals = signal(SignalKind::terminate()).and_then(|term| Ok([term, signal(SignalKind::interrupt())?]));
        Self(signals.inspect_err(|error| tracing::error!(%error, "failed to watch for SIGTERM and SIGINT")).ok())
    }

    /// Waits for a signal.
    async fn received(&mut self) {
        let Some([term, int]) = &mut self.0 else { return std::future::pending().await };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn daemon_ends_although_a_blocking_call_hangs() {
        let (end_call, call_ended) = mpsc::channel::<()>();
        let (call_began, began) = tokio::sync::oneshot::channel();
        let code = run_async(async {
            // The call of a library of the shim, for example of tokio's name lookup.
            drop(tokio::task::spawn_blocking(move || {
                let _ = call_began.send(());
                let _ = call_ended.recv();
            }));
            began.await.map_or(1, |()| 0)
        });
        assert_eq!(code.unwrap(), 0);
        drop(end_call);
    }

    #[tokio::test]
    async fn signal_that_arrives_while_nothing_waits_is_not_lost() {
        let mut termination = Termination::watch();
        for _ in 0..2 {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
            termination.received().await;
        }
    }
}
