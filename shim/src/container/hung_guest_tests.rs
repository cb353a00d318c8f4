//! Tests of requests while the guest or the VMM hangs, and of requests whose caller disconnects or whose timeout
//! expires.
//!
//! The shim, its services and its clients are the real ones. The agent and the VMM process are scripted. The clock is
//! tokio's paused clock, so that timeouts take no time.

use std::collections::{HashMap, HashSet};
use std::net::Shutdown;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use husk_proto::agent::{Event, EventsRequest, Exit as Exited};
use husk_proto::agent_ttrpc;
use husk_proto::containerd::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, KillRequest, PidsRequest,
    PidsResponse, ShutdownRequest, StartRequest, StartResponse, StateRequest, StatsRequest, StatsResponse, Status,
    WaitRequest,
};
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::shim_async::{Client, Task, TaskClient, create_task};
use husk_vmm::control::wire;
use protobuf::well_known_types::any::Any;
use tempfile::TempDir;
use tokio::sync::{broadcast, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};
use ttrpc::asynchronous::transport::{Listener, Socket};

use super::*;
use crate::container::escalation::{KILL_ANSWER_TIMEOUT, KILL_EXIT_TIMEOUT, SIGNAL_TIMEOUT};
use crate::events::{Publish, PublishError, RetryPolicy};
use crate::lock;
use crate::oci::Spec;
use crate::resources::cgroup::CgroupLocation;
use crate::sandbox::end::OOM_KILLED;
use crate::vm::agent::timeouts;
use crate::vm::vmm::{EXIT_TIMEOUT, ScriptedVmm, Vmm};

/// The limit of every request that ends a container or a pod.
const BUDGET: Duration = Duration::from_secs(45);

/// What the scripted agent does.
struct Script {
    /// The methods that the agent does not answer. `*` stands for all.
    hung: Mutex<HashSet<&'static str>>,
    /// Whether killed containers do not exit.
    immortal: AtomicBool,
    /// Whether the agent answers Kill requests with an error.
    refuses_kill: AtomicBool,
    /// How long the agent takes for a Start request.
    start_delay: Mutex<Duration>,
    events: broadcast::Sender<Event>,
}

impl Script {
    fn hang(&self, method: &'static str) {
        lock(&self.hung).insert(method);
    }

    fn exit(&self, container: &str, status: u32) {
        let mut event = Event::new();
        event.set_exit(Exited { container_id: container.to_owned(), status, ..Default::default() });
        self.events.send(event).unwrap();
    }

    /// Returns unless the agent hangs in `method`.
    async fn call(&self, method: &'static str) {
        while lock(&self.hung).contains(method) || lock(&self.hung).contains("*") {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

struct ScriptedAgent(Arc<Script>);

#[async_trait]
impl Task for ScriptedAgent {
    async fn start(&self, _: &TtrpcContext, _: StartRequest) -> ttrpc::Result<StartResponse> {
        let delay = *lock(&self.0.start_delay);
        tokio::time::sleep(delay).await;
        self.0.call("start").await;
        Ok(StartResponse::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        if self.0.refuses_kill.load(Ordering::Relaxed) {
            return Err(ttrpc::error::get_rpc_status(ttrpc::Code::INTERNAL, "no"));
        }
        let script = Arc::clone(&self.0);
        let kill = async move {
            script.call("kill").await;
            if !script.immortal.load(Ordering::Relaxed) {
                script.exit(&request.id, 128 + request.signal);
            }
        };
        // When a hung guest recovers, it handles the requests that it has received, even if their timeouts have
        // expired.
        tokio::spawn(kill).await.unwrap();
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, _: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.0.call("delete").await;
        Ok(DeleteResponse::new())
    }

    async fn pids(&self, _: &TtrpcContext, _: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.0.call("pids").await;
        Ok(PidsResponse::new())
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.0.call("stats").await;
        let any = Any { type_url: husk_proto::metrics::TYPE_URL.to_owned(), ..Default::default() };
        Ok(StatsResponse { stats: Some(any).into(), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.0.call("connect").await;
        Ok(ConnectResponse::new())
    }
}

#[async_trait]
impl agent_ttrpc::Sandbox for ScriptedAgent {
    async fn events(&self, _: &TtrpcContext, _: EventsRequest, to: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let mut events = self.0.events.subscribe();
        while let Ok(event) = events.recv().await {
            to.send(&event).await?;
        }
        Ok(())
    }
}

/// Receives the events instead of containerd, and records their topics.
struct Recorder(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Publish for Recorder {
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
        lock(&self.0).push(event.topic.clone());
        Ok(())
    }
}

/// A shim with a running VM.
struct Model {
    shim: Arc<Shim>,
    script: Arc<Script>,
    events: Arc<Mutex<Vec<String>>>,
    socket: std::path::PathBuf,
    vmm: Vmm,
    process: AbortHandle,
    /// Ends the boot.
    boot: Option<oneshot::Sender<()>>,
    _servers: [Server; 2],
    dir: TempDir,
}

async fn serve(path: &std::path::Path, services: HashMap<String, ttrpc::r#async::Service>) -> Server {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut server = Server::new().add_listener(Listener::try_from(listener).unwrap()).register_service(services);
    server.start().await.unwrap();
    server
}

impl Model {
    /// Starts a shim whose VM runs. The VMM process exits when it is killed, if `mortal`.
    async fn start(mortal: bool) -> Self {
        let mut model = Self::boot(mortal).await;
        model.boot.take().unwrap().send(()).unwrap();
        model.shim.sandbox.ready().await.unwrap();
        model
    }

    /// Starts a shim whose VM is still booting. A message to the field `boot` ends the boot.
    async fn boot(mortal: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let script = Arc::new(Script {
            hung: Mutex::default(),
            immortal: AtomicBool::new(false),
            refuses_kill: AtomicBool::new(false),
            start_delay: Mutex::default(),
            events: broadcast::channel(64).0,
        });
        let agent = |script: &Arc<Script>| Arc::new(ScriptedAgent(Arc::clone(script)));
        let mut services = create_task(agent(&script));
        services.extend(agent_ttrpc::create_sandbox(agent(&script)));
        let agent_socket = dir.path().join("agent");
        let agent_server = serve(&agent_socket, services).await;
        let stream = std::os::unix::net::UnixStream::connect(&agent_socket).unwrap();
        let connection = stream.try_clone().unwrap();
        let agent = Agent::new(stream).unwrap();
        let (control, _vmm_end) = wire::pair().unwrap();
        husk_base::sys::fd::set_nonblocking(&control).unwrap();
        let ScriptedVmm { vmm, mut killed, died } = Vmm::scripted(control).unwrap();
        let (notify, notices) = mpsc::channel(1);
        let process = tokio::spawn(async move {
            killed.wait_for(Option::is_some).await.unwrap();
            if !mortal {
                std::future::pending::<()>().await;
            }
            drop(notify);
            connection.shutdown(Shutdown::Both).unwrap();
            died.send_replace(Some(ExitStatus::from_raw(libc::SIGKILL)));
        });
        let (report, reports) = mpsc::channel(8);
        let (boot, booted) = oneshot::channel();
        let booted = async move {
            let _ = booted.await;
            agent
        };
        let cgroup = CgroupLocation::V2(dir.path().to_owned());
        let sandbox = Sandbox::scripted("model", booted, vmm.clone(), notices, report, cgroup);
        let published = Arc::<Mutex<Vec<String>>>::default();
        let events = Events::start("test", Recorder(Arc::clone(&published)), RetryPolicy::default());
        let shim = Shim::new("test", sandbox, events, Launcher::ended(), reports, None);
        let socket = dir.path().join("shim");
        let server = serve(&socket, crate::service::services(&shim)).await;
        let process = process.abort_handle();
        Self {
            shim,
            script,
            events: published,
            socket,
            vmm,
            process,
            boot: Some(boot),
            _servers: [server, agent_server],
            dir,
        }
    }

    /// Returns a client with a connection of its own.
    fn client(&self) -> TaskClient {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).unwrap();
        stream.set_nonblocking(true).unwrap();
        TaskClient::new(Client::new(Socket::new(tokio::net::UnixStream::from_std(stream).unwrap())))
    }

    /// Adds a container that has been created.
    fn add(&self, id: &str) -> Arc<Container> {
        let init = Process::new(id, "", stdio_paths("", "", "", false));
        let container = Arc::new(Container::new(id, "/", Spec::default(), init, JoinSet::new()));
        let reservation = self.shim.containers.reserve(id).unwrap();
        self.shim.containers.insert(Arc::clone(&container));
        drop(reservation);
        container
    }

    /// Adds a container and starts it.
    async fn run(&self, id: &str) -> Arc<Container> {
        let container = self.add(id);
        let request = StartRequest { id: id.to_owned(), ..Default::default() };
        self.client().start(within(BUDGET), &request).await.unwrap();
        container
    }

    async fn kill(&self, id: &str, signal: i32) -> ttrpc::Result<Empty> {
        let request = KillRequest { id: id.to_owned(), signal: signal.unsigned_abs(), ..Default::default() };
        self.client().kill(within(BUDGET), &request).await
    }

    async fn delete(&self, id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
        self.client().delete(within(BUDGET), &request).await
    }

    async fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest { id: id.to_owned(), ..Default::default() };
        self.client().wait(within(BUDGET), &request).await.unwrap().exit_status
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest { id: id.to_owned(), ..Default::default() };
        self.client().state(within(Duration::from_secs(1)), &request).await.unwrap().status.unwrap()
    }

    fn reason(&self) -> String {
        self.shim.sandbox.known_end_reason().unwrap_or_default().to_string()
    }
}

fn within(limit: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(limit)
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_agent_does_not_answer() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("b").await;
    model.script.hang("*");
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert!(begin.elapsed() < KILL_ANSWER_TIMEOUT + Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!((model.wait("a").await, model.wait("b").await), (137, 137));
    assert_eq!(model.reason(), "the agent did not kill container a within 10 s");
    assert_eq!(model.status("a").await, Status::STOPPED);
    for id in ["a", "b"] {
        assert_eq!(model.delete(id).await.unwrap().exit_status, 137);
    }
    assert!(begin.elapsed() < BUDGET);
    assert_eq!(lock(&model.events).iter().filter(|topic| *topic == TASK_EXIT_EVENT_TOPIC).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn running_containers_report_an_oom_kill_of_the_vmm() {
    for (kills, reason, oom_events) in [(0, "the VMM process ended with signal: 9 (SIGKILL)", 0), (1, OOM_KILLED, 1)] {
        let model = Model::start(true).await;
        model.run("running").await;
        model.add("created");
        std::fs::write(model.dir.path().join("memory.events"), format!("oom 1\noom_kill {kills}\n")).unwrap();
        model.vmm.kill();
        assert_eq!(model.wait("running").await, 137);
        assert!(model.reason().starts_with(reason), "{}", model.reason());
        let count = || lock(&model.events).iter().filter(|topic| *topic == TASK_OOM_EVENT_TOPIC).count();
        assert_eq!(count(), oom_events);
    }
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_container_does_not_exit() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.immortal.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(model.wait("a").await, 137);
    assert!(begin.elapsed() < KILL_EXIT_TIMEOUT + Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(model.reason(), "container a did not exit within 25 s after SIGKILL");
}

#[tokio::test(start_paused = true)]
async fn sigkill_ends_the_pod_if_the_agent_answers_with_an_error() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.refuses_kill.store(true, Ordering::Relaxed);
    assert!(model.kill("a", libc::SIGTERM).await.is_err());
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(model.wait("a").await, 137);
    assert_eq!(model.reason(), "container a did not exit within 25 s after SIGKILL");
}

#[tokio::test(start_paused = true)]
async fn container_that_exits_after_sigkill_does_not_end_the_pod() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("b").await;
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(model.wait("a").await, 137);
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    tokio::time::sleep(KILL_EXIT_TIMEOUT * 2).await;
    assert_eq!((model.reason(), model.status("b").await), (String::new(), Status::RUNNING));
}

#[tokio::test(start_paused = true)]
async fn other_signals_succeed_and_end_nothing_while_the_agent_hangs() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.hang("kill");
    let begin = Instant::now();
    // A client that gets an error for SIGTERM never sends SIGKILL.
    model.kill("a", libc::SIGTERM).await.unwrap();
    assert!(begin.elapsed() < SIGNAL_TIMEOUT + Duration::from_secs(1), "{:?}", begin.elapsed());
    tokio::time::sleep(BUDGET).await;
    assert_eq!((model.reason(), model.status("a").await), (String::new(), Status::RUNNING));
    // The agent gets the signal when it continues.
    lock(&model.script.hung).clear();
    assert_eq!(model.wait("a").await, 128 + 15);
}

#[tokio::test(start_paused = true)]
async fn delete_ends_the_pod_if_the_agent_does_not_answer() {
    for created_only in [false, true] {
        let model = Model::start(true).await;
        model.run("other").await;
        if created_only {
            model.add("a");
        } else {
            model.run("a").await;
            model.script.exit("a", 3);
            assert_eq!(model.wait("a").await, 3);
        }
        model.script.hang("delete");
        let begin = Instant::now();
        let status = if created_only { 137 } else { 3 };
        assert_eq!(model.delete("a").await.unwrap().exit_status, status);
        assert!(begin.elapsed() < BUDGET);
        assert_eq!(model.reason(), "the agent did not delete container a within 25 s");
        assert_eq!(model.wait("other").await, 137);
    }
}

#[tokio::test(start_paused = true)]
async fn containers_end_although_the_vmm_process_does_not_exit() {
    let model = Model::start(false).await;
    model.run("a").await;
    model.script.hang("*");
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    // The request ends only when the container counts as exited, and the time for the exit does not begin anew.
    let limit = KILL_ANSWER_TIMEOUT + EXIT_TIMEOUT + Duration::from_secs(1);
    assert!(begin.elapsed() < limit, "{:?}", begin.elapsed());
    assert_eq!(model.status("a").await, Status::STOPPED);
    assert_eq!(model.wait("a").await, 137);
    assert!(model.reason().contains("the VMM process did not exit within 10 s after SIGKILL"), "{}", model.reason());
    assert_eq!(model.delete("a").await.unwrap().exit_status, 137);
    let request = ShutdownRequest { id: "a".to_owned(), ..Default::default() };
    model.client().shutdown(within(BUDGET), &request).await.unwrap();
    assert!(begin.elapsed() < BUDGET + EXIT_TIMEOUT, "{:?}", begin.elapsed());
    model.process.abort();
}

#[tokio::test(start_paused = true)]
async fn pids_answers_within_its_limit_while_the_agent_hangs() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.script.hang("*");
    let begin = Instant::now();
    let request = PidsRequest { id: "a".to_owned(), ..Default::default() };
    let pids = model.client().pids(within(BUDGET), &request).await.unwrap();
    // The scripted VMM has this PID, and a container without a PID of its own has the VMM's PID.
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [u32::MAX]);
    assert!(begin.elapsed() < timeouts::QUERY + Duration::from_millis(500), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn stats_fail_at_once_after_two_misses_until_the_agent_answers() {
    let model = Model::start(true).await;
    model.run("a").await;
    let request = StatsRequest { id: "a".to_owned(), ..Default::default() };
    let stats = async || {
        let begin = Instant::now();
        let result = model.client().stats(within(BUDGET), &request).await;
        (result.is_ok(), begin.elapsed())
    };
    assert!(stats().await.0);
    model.script.hang("*");
    for _ in 0..2 {
        let (answered, elapsed) = stats().await;
        assert!(!answered && elapsed < timeouts::QUERY + Duration::from_millis(500), "{elapsed:?}");
    }
    let (answered, elapsed) = stats().await;
    assert!(!answered && elapsed < Duration::from_millis(100), "{elapsed:?}");
    lock(&model.script.hung).clear();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(stats().await.0);
}

#[tokio::test(start_paused = true)]
async fn start_completes_although_its_caller_disconnects() {
    let model = Model::start(true).await;
    for caller_closes_connection in [false, true] {
        let id = if caller_closes_connection { "a" } else { "b" };
        model.add(id);
        *lock(&model.script.start_delay) = Duration::from_secs(5);
        let request = StartRequest { id: id.to_owned(), ..Default::default() };
        let client = model.client();
        if caller_closes_connection {
            let call = tokio::time::timeout(Duration::from_secs(1), client.start(within(BUDGET), &request));
            assert!(call.await.is_err());
            drop(client);
        } else {
            assert!(client.start(within(Duration::from_secs(1)), &request).await.is_err());
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(model.status(id).await, Status::RUNNING);
    }
}

/// Begins to create a container while the guest boots. The caller's connection ends at once.
async fn begin_create(model: &Model) {
    let bundle = model.dir.path().join("bundle");
    std::fs::create_dir(&bundle).unwrap();
    // A sandbox container needs no mounts.
    let spec = r#"{ "ociVersion": "1.0.2", "annotations": { "io.kubernetes.cri.container-type": "sandbox" } }"#;
    std::fs::write(bundle.join("config.json"), spec).unwrap();
    let bundle = bundle.to_str().unwrap().to_owned();
    let request = CreateTaskRequest { id: "model".to_owned(), bundle, ..Default::default() };
    let client = model.client();
    let call = tokio::time::timeout(Duration::from_secs(1), client.create(within(BUDGET), &request));
    assert!(call.await.is_err());
    assert!(!model.shim.containers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn create_completes_although_its_caller_disconnects() {
    let mut model = Model::boot(true).await;
    begin_create(&model).await;
    model.boot.take().unwrap().send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(model.status("model").await, Status::CREATED);
}

#[tokio::test(start_paused = true)]
async fn delete_and_shutdown_cancel_a_creation() {
    for deletes in [true, false] {
        let model = Model::boot(true).await;
        begin_create(&model).await;
        if deletes {
            let error = model.delete("model").await.unwrap_err().to_string();
            assert!(error.contains("container not created: not found"), "{error}");
            assert!(model.shim.containers.is_empty());
        }
        let request = ShutdownRequest { id: "model".to_owned(), ..Default::default() };
        model.client().shutdown(within(BUDGET), &request).await.unwrap();
        assert!(model.shim.containers.is_empty());
        // The shim has torn the sandbox down.
        tokio::time::timeout(BUDGET, model.shim.wait_finished()).await.unwrap();
    }
}
