//! The scripted agent: a guest that has containers and execs, and that answers as a test says.

use std::collections::{HashMap, HashSet};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_proto::agent::{
    BindDeviceRequest, BindDeviceResponse, Event, EventsRequest, Exit, SetOnlineVcpusRequest, SetOnlineVcpusResponse,
    SyncRequest, SyncResponse,
};
use husk_proto::agent_ttrpc;
use husk_proto::containerd::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest,
    StartRequest, StartResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use husk_proto::containerd::cgroups_v2::metrics::{MemoryStat, Metrics};
use husk_proto::containerd::shim_async::{Task, create_task};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::{broadcast, watch};
use ttrpc::Code;
use ttrpc::r#async::{ServerStreamSender, Service, TtrpcContext};

use crate::lock;

/// How the agent answers a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// At once.
    Normal,
    /// After a delay.
    Late(Duration),
    /// The agent does what it was asked to do, and answers after a delay.
    DoneLate(Duration),
    /// When the answer of the method changes.
    Never,
    /// With an error, and without doing anything.
    Error,
    /// With success, although the agent does nothing.
    Lie,
}

/// State of a process in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Exited,
}

#[derive(Default)]
struct Guest {
    /// The processes by container and exec. The exec of an init process is empty.
    processes: HashMap<(String, String), Phase>,
    /// The tokens of each process's streams.
    tokens: HashMap<(String, String), Vec<String>>,
}

/// What the agent does, and what the guest has.
pub struct Script {
    answers: watch::Sender<HashMap<&'static str, Answer>>,
    /// Whether killed containers do not exit.
    pub immortal: AtomicBool,
    /// The signals that containers ignore.
    pub ignored: Mutex<HashSet<u32>>,
    /// What happened in the guest when the pod ended, in order. The last entry is the end of the VMM process.
    pub log: Mutex<Vec<String>>,
    /// Whether the agent has always done what it was asked to do, although it may have done it late.
    pub honest: AtomicBool,
    /// Whether a process exits before the agent answers the request to start it.
    pub exits_early: AtomicBool,
    /// Whether an exec that is killed exits a second later.
    pub exits_late: AtomicBool,
    /// The memory of each container in bytes, and how much less it is after each query.
    pub memory: Mutex<(u64, u64)>,
    guest: Mutex<Guest>,
    /// The guest's ends of the streams, by token.
    pub streams: Mutex<HashMap<String, UnixStream>>,
    events: broadcast::Sender<Event>,
    ended: watch::Sender<bool>,
}

impl Script {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            answers: watch::Sender::new(HashMap::new()),
            immortal: AtomicBool::new(false),
            ignored: Mutex::default(),
            log: Mutex::default(),
            honest: AtomicBool::new(true),
            exits_early: AtomicBool::new(false),
            exits_late: AtomicBool::new(false),
            memory: Mutex::default(),
            guest: Mutex::default(),
            streams: Mutex::default(),
            events: broadcast::channel(256).0,
            ended: watch::Sender::new(false),
        })
    }

    /// Ends all calls that have no answer yet.
    pub fn end(&self) {
        self.ended.send_replace(true);
    }

    async fn wait_end(&self) {
        // The sender lives as long as `self`.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Sets the answer of `method`. `*` stands for all methods that have no answer of their own.
    pub fn set(&self, method: &'static str, answer: Answer) {
        if matches!(answer, Answer::Error | Answer::Lie) {
            self.honest.store(false, Ordering::Relaxed);
        }
        self.answers.send_modify(|answers| {
            answers.insert(method, answer);
        });
    }

    /// Stops the answers to `method`.
    pub fn hang(&self, method: &'static str) {
        self.set(method, Answer::Never);
    }

    /// Lets the agent answer all methods again.
    pub fn recover(&self) {
        self.answers.send_modify(HashMap::clear);
    }

    /// Sends the exit of a process, and closes the process's streams.
    pub fn exit_of(&self, container: &str, exec: &str, status: u32) {
        let key = (container.to_owned(), exec.to_owned());
        let mut guest = lock(&self.guest);
        guest.processes.insert(key.clone(), Phase::Exited);
        for token in guest.tokens.remove(&key).unwrap_or_default() {
            lock(&self.streams).remove(&token);
        }
        drop(guest);
        let mut event = Event::new();
        let (container_id, exec_id) = key;
        event.set_exit(Exit { container_id, exec_id, status, ..Default::default() });
        // There can be no subscriber.
        let _ = self.events.send(event);
    }

    /// Sends the exits of a container: first those of its execs, as the agent does.
    pub fn exit(&self, container: &str, status: u32) {
        let running: Vec<_> = lock(&self.guest)
            .processes
            .iter()
            .filter(|((id, exec), phase)| id == container && !exec.is_empty() && **phase == Phase::Running)
            .map(|((_, exec), _)| exec.clone())
            .collect();
        running.iter().for_each(|exec| self.exit_of(container, exec, 137));
        self.exit_of(container, "", status);
    }

    /// Sends the exits of a container, if it runs.
    pub fn exit_running(&self, container: &str, status: u32) {
        if self.phase(container, "") == Some(Phase::Running) {
            self.exit(container, status);
        }
    }

    /// Returns whether a process runs in the guest.
    pub fn runs(&self, container: &str, exec: &str) -> bool {
        self.phase(container, exec) == Some(Phase::Running)
    }

    /// Returns the containers and execs that the guest has.
    pub fn known(&self) -> Vec<(String, String)> {
        lock(&self.guest).processes.keys().cloned().collect()
    }

    fn phase(&self, id: &str, exec: &str) -> Option<Phase> {
        lock(&self.guest).processes.get(&(id.to_owned(), exec.to_owned())).copied()
    }

    fn set_phase(&self, id: &str, exec: &str, phase: Phase) {
        lock(&self.guest).processes.insert((id.to_owned(), exec.to_owned()), phase);
    }

    fn add(&self, id: &str, exec: &str, tokens: [String; 3]) -> ttrpc::Result<()> {
        if self.phase(id, exec).is_some() {
            return Err(ttrpc::error::get_rpc_status(Code::ALREADY_EXISTS, "exists"));
        }
        self.set_phase(id, exec, Phase::Created);
        lock(&self.guest).tokens.insert((id.to_owned(), exec.to_owned()), tokens.to_vec());
        Ok(())
    }

    /// Returns whether to do the work, and the delay of the answer after the work.
    async fn answer(&self, method: &str) -> ttrpc::Result<(bool, Duration)> {
        let mut answers = self.answers.subscribe();
        loop {
            let find = |answers: &HashMap<_, _>| answers.get(method).or_else(|| answers.get("*")).copied();
            let answer = find(&answers.borrow_and_update()).unwrap_or(Answer::Normal);
            match answer {
                Answer::Normal => return Ok((true, Duration::ZERO)),
                Answer::DoneLate(delay) => return Ok((true, delay)),
                Answer::Late(delay) => {
                    tokio::time::sleep(delay).await;
                    return Ok((true, Duration::ZERO));
                }
                Answer::Error => return Err(ttrpc::error::get_rpc_status(Code::INTERNAL, "no")),
                Answer::Lie => return Ok((false, Duration::ZERO)),
                Answer::Never => drop(answers.changed().await),
            }
        }
    }
}

/// Runs `work` unless the agent answers with an error or without doing anything. Like the real agent, completes the
/// work although the caller has given up.
async fn call<T: Default + Send + 'static>(
    script: &Arc<Script>,
    method: &'static str,
    work: impl FnOnce(&Script) -> ttrpc::Result<T> + Send + 'static,
) -> ttrpc::Result<T> {
    let script = Arc::clone(script);
    let all = async move {
        let answer = tokio::select! {
            answer = script.answer(method) => answer?,
            () = script.wait_end() => (false, Duration::ZERO),
        };
        let (works, delay) = answer;
        let result = if works { work(&script) } else { Ok(T::default()) };
        tokio::time::sleep(delay).await;
        result
    };
    tokio::spawn(all).await.unwrap()
}

/// The agent's services.
pub struct ScriptedAgent(pub Arc<Script>);

/// Returns the agent's services.
pub fn services(script: &Arc<Script>) -> HashMap<String, Service> {
    let agent = || Arc::new(ScriptedAgent(Arc::clone(script)));
    let mut services = create_task(agent());
    services.extend(agent_ttrpc::create_sandbox(agent()));
    services
}

#[async_trait]
impl Task for ScriptedAgent {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        call(&self.0, "create", move |script| {
            script.add(&request.id, "", [request.stdin, request.stdout, request.stderr])?;
            Ok(CreateTaskResponse::new())
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        call(&self.0, "exec", move |script| {
            script.add(&request.id, &request.exec_id, [request.stdin, request.stdout, request.stderr])?;
            Ok(Empty::new())
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let method = if request.exec_id.is_empty() { "start" } else { "start_exec" };
        call(&self.0, method, move |script| {
            match script.phase(&request.id, &request.exec_id) {
                Some(Phase::Exited) => {
                    return Err(ttrpc::error::get_rpc_status(Code::FAILED_PRECONDITION, "exited"));
                }
                None if !request.exec_id.is_empty() => {
                    return Err(ttrpc::error::get_rpc_status(Code::NOT_FOUND, "no such exec"));
                }
                _ => {}
            }
            script.set_phase(&request.id, &request.exec_id, Phase::Running);
            if script.exits_early.load(Ordering::Relaxed) {
                script.exit_of(&request.id, &request.exec_id, 3);
            }
            Ok(StartResponse::new())
        })
        .await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let late = Arc::clone(&self.0);
        call(&self.0, "kill", move |script| {
            lock(&script.log).push(format!("{} gets {}", request.id, request.signal));
            match script.phase(&request.id, &request.exec_id) {
                Some(Phase::Exited) => return Err(ttrpc::error::get_rpc_status(Code::NOT_FOUND, "exited")),
                None if !request.exec_id.is_empty() => {
                    return Err(ttrpc::error::get_rpc_status(Code::NOT_FOUND, "no such exec"));
                }
                _ if script.immortal.load(Ordering::Relaxed) => {}
                _ if lock(&script.ignored).contains(&request.signal) => {}
                _ if request.exec_id.is_empty() => script.exit(&request.id, 128 + request.signal),
                _ if script.exits_late.load(Ordering::Relaxed) => {
                    let script = Arc::clone(&late);
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        script.exit_of(&request.id, &request.exec_id, 128 + request.signal);
                    });
                }
                _ => script.exit_of(&request.id, &request.exec_id, 128 + request.signal),
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let mut events = self.0.events.subscribe();
        while self.0.phase(&request.id, &request.exec_id) == Some(Phase::Running) {
            tokio::select! {
                event = events.recv() => drop(event),
                () = self.0.wait_end() => break,
            }
        }
        Ok(WaitResponse::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        call(&self.0, "delete", move |script| {
            if script.phase(&request.id, &request.exec_id) == Some(Phase::Running) {
                return Err(ttrpc::error::get_rpc_status(Code::FAILED_PRECONDITION, "running"));
            }
            let mut guest = lock(&script.guest);
            let all = request.exec_id.is_empty();
            guest.processes.retain(|(id, exec), _| *id != request.id || !(all || *exec == request.exec_id));
            guest.tokens.retain(|(id, exec), tokens| {
                let keep = *id != request.id || !(all || *exec == request.exec_id);
                if !keep {
                    tokens.iter().for_each(|token| drop(lock(&script.streams).remove(token)));
                }
                keep
            });
            Ok(DeleteResponse::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, _: PidsRequest) -> ttrpc::Result<PidsResponse> {
        call(&self.0, "pids", |_| Ok(PidsResponse::new())).await
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<Empty> {
        call(&self.0, "pause", |_| Ok(Empty::new())).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        call(&self.0, "resume", move |script| {
            lock(&script.log).push(format!("{} is resumed", request.id));
            Ok(Empty::new())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        call(&self.0, "update", |_| Ok(Empty::new())).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> ttrpc::Result<Empty> {
        call(&self.0, "resize_pty", |_| Ok(Empty::new())).await
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        call(&self.0, "stats", |script| {
            let mut memory = lock(&script.memory);
            let stat = MemoryStat { anon: memory.0, ..Default::default() };
            memory.0 = memory.0.saturating_sub(memory.1);
            let metrics = Metrics { memory: Some(stat).into(), ..Default::default() };
            let type_url = husk_proto::metrics::TYPE_URL.to_owned();
            let any = Any { type_url, value: metrics.write_to_bytes().unwrap(), ..Default::default() };
            Ok(StatsResponse { stats: Some(any).into(), ..Default::default() })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        call(&self.0, "connect", |_| Ok(ConnectResponse::new())).await
    }
}

#[async_trait]
impl agent_ttrpc::Sandbox for ScriptedAgent {
    async fn events(&self, _: &TtrpcContext, _: EventsRequest, to: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let mut events = self.0.events.subscribe();
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.0.wait_end() => return Ok(()),
            };
            match event {
                Ok(event) => to.send(&event).await?,
                Err(_) => return Ok(()),
            }
        }
    }

    async fn sync(&self, _: &TtrpcContext, _: SyncRequest) -> ttrpc::Result<SyncResponse> {
        call(&self.0, "sync", |script| {
            lock(&script.log).push("sync".to_owned());
            Ok(SyncResponse::new())
        })
        .await
    }

    async fn bind_device(&self, _: &TtrpcContext, _: BindDeviceRequest) -> ttrpc::Result<BindDeviceResponse> {
        call(&self.0, "bind_device", |_| Ok(BindDeviceResponse::new())).await
    }

    async fn set_online_vcpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineVcpusRequest,
    ) -> ttrpc::Result<SetOnlineVcpusResponse> {
        let online = request.count;
        call(&self.0, "set_online_vcpus", move |_| Ok(SetOnlineVcpusResponse { online, ..Default::default() })).await
    }
}
