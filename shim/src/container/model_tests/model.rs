//! A shim whose services and clients are the real ones, with a scripted agent, VMM and containerd. Most tests use it
//! with tokio's paused clock, so that timeouts take no time.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_config::Config;
use husk_proto::containerd::api::{
    DeleteRequest, DeleteResponse, Empty, KillRequest, StartRequest, StateRequest, Status, WaitRequest,
};
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::shim_async::{Client, TaskClient};
use husk_vmm::control::{Notice, wire};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use ttrpc::r#async::{Server, Service};
use ttrpc::asynchronous::transport::{Listener, Socket};

use super::agent::{Script, services};
use super::vmm::{self, Host};
use crate::container::containers::Container;
use crate::container::process::Process;
use crate::container::{Shim, stdio_paths};
use crate::events::{Events, Publish, PublishError, RetryPolicy};
use crate::launcher::Launcher;
use crate::lock;
use crate::oci::Spec;
use crate::resources;
use crate::resources::cgroup::CgroupLocation;
use crate::sandbox::Sandbox;
use crate::stdio::{LoggerContext, Stdio};
use crate::vm::agent::Agent;
use crate::vm::vmm::{ScriptedVmm, Vmm};

/// The limit of every request that ends a container or a pod, with the factor 1.
pub const BUDGET: Duration = Duration::from_secs(9);
/// The sandbox's id.
pub const SANDBOX: &str = "model";

/// Receives the events instead of containerd.
struct Recorder {
    events: Arc<Mutex<Vec<Envelope>>>,
    /// Whether containerd does not answer.
    down: Arc<AtomicBool>,
}

#[async_trait]
impl Publish for Recorder {
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
        if self.down.load(Ordering::Relaxed) {
            return Err(PublishError::Timeout);
        }
        lock(&self.events).push(event.clone());
        Ok(())
    }
}

/// A shim with a VM.
pub struct Model {
    pub shim: Arc<Shim>,
    pub script: Arc<Script>,
    pub host: Arc<Host>,
    /// The events that containerd has got.
    pub events: Arc<Mutex<Vec<Envelope>>>,
    pub containerd_down: Arc<AtomicBool>,
    /// Whether the guest stops reading from the connection to the agent.
    pub frozen: watch::Sender<bool>,
    pub socket: PathBuf,
    pub vmm: Vmm,
    /// Sends notices of the VMM.
    pub notices: mpsc::WeakSender<Notice>,
    pub process: AbortHandle,
    /// Ends the VMM process by itself.
    pub crash: Arc<Notify>,
    /// Ends the boot.
    pub boot: Option<oneshot::Sender<()>>,
    servers: [Server; 2],
    tasks: JoinSet<()>,
    pub dir: TempDir,
}

async fn serve(path: &Path, services: HashMap<String, Service>) -> Server {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut server = Server::new().add_listener(Listener::try_from(listener).unwrap()).register_service(services);
    server.start().await.unwrap();
    server
}

/// Copies from the shim to the agent while the guest runs.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut frozen: watch::Receiver<bool>) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        if frozen.wait_for(|frozen| !*frozen).await.is_err() {
            return;
        }
        let Ok(length @ 1..) = from.read(&mut bytes).await else { return };
        if frozen.wait_for(|frozen| !*frozen).await.is_err() || to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}

impl Model {
    /// Starts a shim whose VM runs. If `mortal` is true, the VMM process exits when it is killed.
    pub async fn start(mortal: bool) -> Self {
        let mut model = Self::boot(mortal).await;
        model.finish_boot().await;
        model
    }

    /// Ends the boot.
    pub async fn finish_boot(&mut self) {
        if let Some(boot) = self.boot.take() {
            boot.send(()).unwrap();
            self.shim.sandbox.ready().await.unwrap();
        }
    }

    /// Ends the boot, unless the VM has ended.
    pub async fn finish_boot_if_alive(&mut self) {
        if let Some(boot) = self.boot.take() {
            let _ = boot.send(());
        }
    }

    /// Starts a shim whose VM is still booting. A message to the field `boot` ends the boot.
    pub async fn boot(mortal: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let (script, host) = (Script::new(), Arc::<Host>::default());
        let agent_socket = dir.path().join("agent");
        let agent_server = serve(&agent_socket, services(&script)).await;
        let mut tasks = JoinSet::new();
        let (stream, guest) = std::os::unix::net::UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let (from, to) = tokio::net::UnixStream::from_std(guest).unwrap().into_split();
        let (mut back, on) = tokio::net::UnixStream::connect(&agent_socket).await.unwrap().into_split();
        let frozen = watch::Sender::new(false);
        tasks.spawn(forward(from, on, frozen.subscribe()));
        let mut to = to;
        tasks.spawn(async move { drop(tokio::io::copy(&mut back, &mut to).await) });
        let connection = stream.try_clone().unwrap();
        let agent = Agent::new(stream).unwrap();
        let (control, vmm_end) = wire::pair().unwrap();
        husk_base::sys::fd::set_nonblocking(&control).unwrap();
        husk_base::sys::fd::set_nonblocking(&vmm_end).unwrap();
        let answering = tasks.spawn(vmm::serve(vmm_end, Arc::clone(&host), Arc::clone(&script)));
        let (notify, notices) = mpsc::channel(1);
        let weak_notify = notify.downgrade();
        let ScriptedVmm { vmm, mut killed, died } = Vmm::scripted(control, notify).unwrap();
        let crash = Arc::<Notify>::default();
        let (crashed, guest) = (Arc::clone(&crash), Arc::clone(&script));
        let process = tasks.spawn(async move {
            let by_shim = async {
                let _ = killed.wait_for(Option::is_some).await;
                lock(&guest.log).push("the VMM ends".to_owned());
                if !mortal {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = by_shim => {}
                () = crashed.notified() => {}
            }
            // The kernel closes the process's sockets.
            answering.abort();
            lock(&guest.streams).clear();
            let _ = connection.shutdown(Shutdown::Both);
            died.send_replace(Some(ExitStatus::from_raw(libc::SIGKILL)));
        });
        let (report, reports) = mpsc::channel(8);
        let (boot, booted) = oneshot::channel();
        let booted = async move {
            let _ = booted.await;
            agent
        };
        let cgroup = CgroupLocation::V2(dir.path().to_owned());
        let growth = resources::boot_size(&Spec::default(), &Config::default(), u64::MAX).unwrap().growth;
        let sandbox = Sandbox::scripted(SANDBOX, booted, vmm.clone(), notices, report, (cgroup, growth));
        let (events, containerd_down) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicBool>::default());
        let recorder = Recorder { events: Arc::clone(&events), down: Arc::clone(&containerd_down) };
        let queue = Events::start("test", recorder, RetryPolicy::default());
        let shim = Shim::new("test", sandbox, queue, Launcher::ended(), reports, None);
        let socket = dir.path().join("shim");
        let server = serve(&socket, crate::service::services(&shim)).await;
        let (boot, servers) = (Some(boot), [server, agent_server]);
        Self {
            shim,
            script,
            host,
            events,
            containerd_down,
            frozen,
            socket,
            vmm,
            notices: weak_notify,
            process,
            crash,
            boot,
            servers,
            tasks,
            dir,
        }
    }

    /// Mounts the share, so that containers can be created. The caller must have a mount namespace of its own.
    pub fn mount_share(&self) {
        self.shim.sandbox.dir().create().unwrap();
    }

    /// Ends everything that does not belong to the shim.
    pub async fn end(mut self) {
        self.script.end();
        self.frozen.send_replace(false);
        tokio::time::sleep(Duration::from_secs(1)).await;
        for server in &mut self.servers {
            let _ = server.shutdown().await;
        }
        self.tasks.shutdown().await;
    }

    /// Returns a ttrpc client with a connection of its own.
    pub fn connect(&self) -> Client {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).unwrap();
        stream.set_nonblocking(true).unwrap();
        Client::new(Socket::new(tokio::net::UnixStream::from_std(stream).unwrap()))
    }

    /// Returns a client with a connection of its own.
    pub fn client(&self) -> TaskClient {
        TaskClient::new(self.connect())
    }

    /// Adds a container that has been created.
    pub fn add(&self, id: &str) -> Arc<Container> {
        self.add_with(id, &[])
    }

    /// Adds a container with annotations that has been created.
    pub fn add_with(&self, id: &str, annotations: &[(&str, &str)]) -> Arc<Container> {
        let init = Process::new(id, "", stdio_paths("", "", "", false));
        let mut spec = Spec::default();
        spec.annotations.0.extend(annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let container = Arc::new(Container::new(id, "/", spec, init, JoinSet::new()));
        let reservation = self.shim.containers.reserve(id).unwrap();
        self.shim.containers.insert(Arc::clone(&container));
        drop(reservation);
        container
    }

    /// Adds a container and starts it.
    pub async fn run(&self, id: &str) -> Arc<Container> {
        let container = self.add(id);
        let request = StartRequest { id: id.to_owned(), ..Default::default() };
        self.client().start(within(BUDGET), &request).await.unwrap();
        container
    }

    /// Gives a container an output that never ends, and to which the guest writes nothing.
    pub async fn attach_silent_output(&self, container: &Container) {
        let path = self.dir.path().join("output");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let paths = stdio_paths("", path.to_str().unwrap(), "", false);
        let context = LoggerContext { id: &container.id, namespace: "test", launcher: &self.shim.launcher };
        let stdio = Stdio::open(&paths, &context).await.unwrap();
        container.init.set_relay(self.shim.connect_stdio(stdio).await.unwrap().relay);
    }

    pub async fn kill(&self, id: &str, signal: i32) -> ttrpc::Result<Empty> {
        let request = KillRequest { id: id.to_owned(), signal: signal.unsigned_abs(), ..Default::default() };
        self.client().kill(within(BUDGET), &request).await
    }

    pub async fn delete(&self, id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
        self.client().delete(within(BUDGET), &request).await
    }

    pub async fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest { id: id.to_owned(), ..Default::default() };
        self.client().wait(within(BUDGET), &request).await.unwrap().exit_status
    }

    pub async fn status(&self, id: &str) -> Status {
        let request = StateRequest { id: id.to_owned(), ..Default::default() };
        self.client().state(within(Duration::from_secs(1)), &request).await.unwrap().status.unwrap()
    }

    pub fn reason(&self) -> String {
        self.shim.sandbox.known_end_reason().unwrap_or_default().to_string()
    }

    /// Returns how many events of a topic containerd has got.
    pub fn count(&self, topic: &str) -> usize {
        lock(&self.events).iter().filter(|event| event.topic == topic).count()
    }
}

pub fn within(limit: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(limit)
}
