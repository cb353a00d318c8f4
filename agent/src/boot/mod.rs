//! The boot sequence of PID 1, from its first instruction until it serves its API.

mod boot_mark;
mod kernel_settings;
mod mounts;
mod template;
mod trial;

use std::process::ExitCode;
use std::sync::Arc;

use husk_base::error::chain;
use husk_proto::boot_mark::BootMark;
use husk_proto::{agent_ttrpc, containerd, ports};

use crate::io::streams::Streams;
use crate::sandbox::service::SandboxService;
use crate::sandbox::{Sandbox, port_forwarding, share};
use crate::task::{Tasks, service::TaskService};
use crate::{events, fatal, log, reaper, vsock};

/// Reason why the agent failed to boot.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Mount(#[from] mounts::MountError),
    #[error("failed to set up the cgroup hierarchy")]
    Cgroup(#[source] std::io::Error),
    #[error("failed to build the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error("failed to listen on vsock port {port}")]
    Listen {
        port: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to install the SIGCHLD handler")]
    Reaper(#[source] std::io::Error),
    #[error("failed to start the API server")]
    Serve(#[source] ttrpc::Error),
}

/// Runs the agent. Returns only if this process is not PID 1.
pub fn main() -> ExitCode {
    boot_mark::write(BootMark::AgentStarted);
    if std::process::id() != 1 {
        eprintln!("husk-agent must be PID 1 of a Husk guest; it cannot be started by hand");
        return ExitCode::FAILURE;
    }
    fatal::install_panic_hook();
    match run() {
        Ok(never) => match never {},
        Err(error) => fatal::die(&chain(&error)),
    }
}

fn run() -> Result<std::convert::Infallible, BootError> {
    mounts::leave_rootfs()?;
    mounts::mount_all()?;
    log::init();
    kernel_settings::apply();
    crate::cgroup::init_root().map_err(BootError::Cgroup)?;
    let is_template = template::is_template();
    if !is_template && let Err(error) = share::mount() {
        tracing::error!("{}", chain(&error));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(BootError::Runtime)?;
    runtime.block_on(serve(is_template))
}

async fn serve(is_template: bool) -> Result<std::convert::Infallible, BootError> {
    let listen = |port| vsock::Listener::bind(port).map_err(|source| BootError::Listen { port, source });
    let (api, stream_port, log_port) = (listen(ports::AGENT)?, listen(ports::STREAM)?, listen(ports::LOG)?);
    let forward_port = listen(ports::PORT_FORWARDING)?;

    let (hub, streams, reaper) = (events::EventHub::default(), Streams::default(), reaper::Reaper::default());
    let mut children = reaper.signals().map_err(BootError::Reaper)?;
    let sandbox = Arc::new(Sandbox::default());
    let tasks = Arc::new(Tasks::new(hub.clone(), streams.clone(), reaper.clone(), sandbox.clone()));
    let trial_port = is_template.then(|| listen(ports::TRIAL)).transpose()?;
    let own_tasks = tasks.clone();
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(api.into_ttrpc())
        .register_service(containerd::shim_async::create_task(Arc::new(TaskService::new(tasks))))
        .register_service(agent_ttrpc::create_sandbox(Arc::new(SandboxService::new(
            sandbox.clone(),
            hub,
            streams.clone(),
            is_template,
        ))));
    server.start().await.map_err(BootError::Serve)?;
    tokio::spawn(streams.serve(stream_port));
    tokio::spawn(log::serve(log_port));
    tokio::spawn(port_forwarding::serve(forward_port, sandbox.clone()));
    if !is_template {
        boot_mark::write(BootMark::AgentReady);
    }
    // The agent creates the pod's namespaces while the shim connects, so that Setup takes less time. If the creation
    // fails, Setup retries it and reports the error.
    if let Err(error) = sandbox.prepare(None) {
        tracing::error!("{}", chain(&error));
    }
    if let Some(port) = trial_port {
        template::shrink().await;
        tokio::spawn(template::prepare(port, own_tasks));
        boot_mark::write(BootMark::AgentReady);
    }
    loop {
        children.recv().await;
        reaper.reap();
    }
}
