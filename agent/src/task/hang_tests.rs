//! Tests with a kernel that hangs: an ordinary directory stands for the container's cgroup, and the only thread of the
//! blocking pool is occupied.
//!
//! While the thread is occupied, a file that changes was changed by the async thread. In the guest, the agent would
//! then do nothing else until the kernel returns from the system call.

use std::fs;
use std::future::poll_fn;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::{Pin, pin};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use husk_base::sync::lock;
use husk_base::sys::pidfd;
use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::{
    CreateTaskRequest, Empty, KillRequest, PauseRequest, PidsRequest, StateRequest, StatsRequest, Status,
    UpdateTaskRequest,
};
use husk_proto::containerd::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::time::{Instant, advance, pause, timeout};
use ttrpc::asynchronous::TtrpcContext;

use super::process::{Phase, Process, StreamTokens};
use super::service::TaskService;
use super::{Container, ProcessSpec, Tasks, kill};
use crate::cgroup::Cgroup;
use crate::events::EventHub;
use crate::oom::{FileWatch, OomWatch};
use crate::reaper::ProcessExit;

const ID: &str = "c";
/// The shim's timeout for Pause, Resume, Kill and Update (`QUICK` in shim/src/vm/agent.rs).
const SHIM_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns a container whose cgroup is in the hierarchy `root`, but does not exist.
pub fn container_below(root: &Path, id: &str) -> Arc<Container> {
    let cgroup = Cgroup::below(root, id);
    Arc::new(Container {
        id: id.to_owned(),
        bundle: String::new(),
        oom: Arc::new(OomWatch::new(id, cgroup.clone(), EventHub::default())),
        cgroup,
        init: Process::new("", StreamTokens::default(), None),
        process: ProcessSpec::default(),
        dir: root.join(format!("task-{id}")),
        seccomp: None,
        oom_score_adj: None,
        shares_pid_namespace: false,
        volumes: Vec::new(),
        oom_task: Mutex::default(),
        paused: false.into(),
        freezer: Default::default(),
        update_turn: Arc::new(Semaphore::new(1)),
        execs: Mutex::default(),
    })
}

/// A container in the phase `phase`, and the directories and services that it needs.
struct Guest {
    _root: TempDir,
    container: Arc<Container>,
    tasks: Arc<Tasks>,
    service: TaskService,
}

impl Guest {
    fn new(phase: Phase) -> Self {
        Self::with(phase, false)
    }

    fn with(phase: Phase, shares_pid_namespace: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut container = container_below(root.path(), ID);
        Arc::get_mut(&mut container).unwrap().shares_pid_namespace = shares_pid_namespace;
        fs::create_dir_all(container.cgroup.path()).unwrap();
        fs::write(root.path().join("cgroup.controllers"), "memory pids").unwrap();
        for (file, content) in [
            ("cgroup.events", "populated 1\nfrozen 0\n"),
            ("cgroup.freeze", "unchanged"),
            ("cgroup.kill", "unchanged"),
            ("cgroup.procs", "12\n34\n"),
            ("memory.max", "unchanged"),
        ] {
            fs::write(container.cgroup.path().join(file), content).unwrap();
        }
        container.init.advance(phase);
        let mut tasks = Tasks::new(EventHub::default(), Default::default(), Default::default(), Default::default());
        tasks.cgroups = root.path().to_owned();
        let tasks = Arc::new(tasks);
        tasks.insert(&container).unwrap();
        Self { service: TaskService::new(Arc::clone(&tasks)), _root: root, container, tasks }
    }

    /// Adds the exec `e` in the phase `phase`.
    fn add_exec(&self, phase: Phase) -> Arc<Process> {
        let exec = Process::new("e", StreamTokens::default(), Some(Default::default()));
        exec.advance(phase);
        lock(&self.container.execs).insert(exec.exec_id.clone(), Arc::clone(&exec));
        exec
    }

    async fn kill_exec(&self, signal: i32) -> ttrpc::Result<Empty> {
        let (id, exec_id, signal) = (ID.to_owned(), "e".to_owned(), signal.unsigned_abs());
        self.service.kill(&context(), KillRequest { id, exec_id, signal, ..Default::default() }).await
    }

    fn file(&self, name: &str) -> String {
        self.container.cgroup.read(name).unwrap()
    }

    /// Waits until the file `name` contains `content`, for at most a minute of the paused clock.
    async fn wait_for_content(&self, name: &str, content: &str) {
        let watch = FileWatch::new(&self.container.cgroup.path().join(name)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let ended = watch.wait_until(deadline, || self.file(name) == content).await;
        ended.unwrap_or_else(|error| panic!("{name} contains {:?}: {error}", self.file(name)));
    }
}

/// Returns a runtime with the agent's number of async threads, and a value that occupies its blocking pool until it is
/// dropped.
fn occupied_pool() -> (Runtime, Sender<()>) {
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let (release, released) = channel();
    runtime.spawn_blocking(move || released.recv());
    (runtime, release)
}

/// Polls a request, and all async tasks that it starts.
async fn poll_all<F: Future>(mut request: Pin<&mut F>) -> Poll<F::Output> {
    for _ in 0..8 {
        if let Poll::Ready(output) = poll_fn(|context| Poll::Ready(request.as_mut().poll(context))).await {
            return Poll::Ready(output);
        }
        tokio::task::yield_now().await;
    }
    Poll::Pending
}

fn context() -> TtrpcContext {
    TtrpcContext::default()
}

fn pause_request() -> PauseRequest {
    PauseRequest { id: ID.into(), ..Default::default() }
}

#[tokio::test(start_paused = true)]
async fn failed_freeze_is_undone_before_the_timeout_of_the_shim() {
    let guest = Guest::new(Phase::Running(7));
    let begin = Instant::now();
    guest.service.pause(&context(), pause_request()).await.unwrap_err();
    assert!(begin.elapsed() < SHIM_TIMEOUT, "the shim would not learn that the freeze was undone");
    assert_eq!(guest.file("cgroup.freeze"), "0");
    let request = StateRequest { id: ID.into(), ..Default::default() };
    assert_eq!(guest.service.state(&context(), request).await.unwrap().status, Status::RUNNING.into());
}

#[tokio::test(start_paused = true)]
async fn failed_freeze_is_undone_if_the_client_disconnects() {
    let guest = Guest::new(Phase::Running(7));
    {
        let context = context();
        let request = pin!(guest.service.pause(&context, pause_request()));
        assert!(poll_all(request).await.is_pending());
    }
    guest.wait_for_content("cgroup.freeze", "0").await;
}

#[test]
fn freeze_that_hangs_in_the_kernel_is_undone_when_the_kernel_returns() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        pause();
        let guest = Guest::new(Phase::Running(7));
        let (context, begin) = (context(), Instant::now());
        let mut request = pin!(guest.service.pause(&context, pause_request()));
        while poll_all(request.as_mut()).await.is_pending() {
            assert_eq!(guest.file("cgroup.freeze"), "unchanged");
            assert!(begin.elapsed() < SHIM_TIMEOUT, "the request is still in progress");
            advance(Duration::from_millis(100)).await;
        }
        drop(occupied);
        guest.wait_for_content("cgroup.freeze", "0").await;
    });
}

#[test]
fn update_does_not_write_limits_on_the_async_thread() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        let guest = Guest::new(Phase::Running(7));
        let resources = Any { value: br#"{"memory":{"limit":65536}}"#.into(), ..Default::default() };
        let request =
            UpdateTaskRequest { id: ID.into(), resources: MessageField::some(resources), ..Default::default() };
        let context = context();
        let mut request = pin!(guest.service.update(&context, request));
        assert!(poll_all(request.as_mut()).await.is_pending());
        assert_eq!(guest.file("memory.max"), "unchanged");
        let request_of_state = StateRequest { id: ID.into(), ..Default::default() };
        guest.service.state(&context, request_of_state).await.unwrap();
        drop(occupied);
        request.await.unwrap();
        assert!(guest.file("memory.max").starts_with("65536"));
    });
}

#[test]
fn pids_and_stats_do_not_read_the_cgroup_on_the_async_thread() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        let guest = Guest::new(Phase::Running(7));
        let (context, id) = (context(), ID.to_owned());
        let mut pids = pin!(guest.service.pids(&context, PidsRequest { id: id.clone(), ..Default::default() }));
        let mut stats = pin!(guest.service.stats(&context, StatsRequest { id, ..Default::default() }));
        assert!(poll_all(pids.as_mut()).await.is_pending());
        assert!(poll_all(stats.as_mut()).await.is_pending());
        drop(occupied);
        let pids = pids.await.unwrap().processes;
        assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [12, 34]);
        stats.await.unwrap();
    });
}

#[test]
fn kill_does_not_write_to_the_cgroup_on_the_async_thread() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        let guest = Guest::new(Phase::Running(7));
        let request = KillRequest { id: ID.into(), signal: 9, all: true, ..Default::default() };
        let context = context();
        {
            let request = pin!(guest.service.kill(&context, request));
            assert!(poll_all(request).await.is_pending());
            assert_eq!(guest.file("cgroup.kill"), "unchanged");
        }
        drop(occupied);
        // The client has disconnected, but the processes are killed nevertheless.
        guest.wait_for_content("cgroup.kill", "1").await;
    });
}

#[test]
fn kill_after_the_exit_of_init_ends_if_the_kernel_hangs() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        pause();
        let guest = Guest::new(Phase::Running(7));
        let begin = Instant::now();
        let mut killing = pin!(kill::rest(&guest.container));
        while poll_all(killing.as_mut()).await.is_pending() {
            assert_eq!(guest.file("cgroup.kill"), "unchanged");
            assert!(begin.elapsed() < Duration::from_secs(60), "the wait has no limit");
            advance(Duration::from_secs(1)).await;
        }
        drop(occupied);
        guest.wait_for_content("cgroup.kill", "1nchanged").await;
    });
}

#[tokio::test]
async fn kill_all_signals_the_processes_of_the_cgroup() {
    let guest = Guest::new(Phase::Running(7));
    let mut children: Vec<_> = (0..2).map(|_| Command::new("sleep").arg("1000").spawn().unwrap()).collect();
    let list: String = children.iter().map(|child| format!("{}\n", child.id())).collect();
    guest.container.cgroup.write("cgroup.procs", &list).unwrap();
    let request = KillRequest { id: ID.into(), signal: 15, all: true, ..Default::default() };
    guest.service.kill(&context(), request).await.unwrap();
    for child in &mut children {
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(libc::SIGTERM));
    }
}

#[tokio::test(start_paused = true)]
async fn delete_fails_if_the_killed_init_does_not_exit() {
    let guest = Guest::new(Phase::Created(7));
    let deleted = timeout(Duration::from_secs(60), guest.tasks.delete(ID, "", None)).await;
    deleted.expect("the wait has no limit").unwrap_err();
    assert_eq!(guest.file("cgroup.kill"), "1");
    guest.tasks.get(ID).unwrap();
}

#[test]
fn pid_of_a_reaped_init_is_not_used() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        // This process stands for a process that has got the PID of the init.
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = other.id().cast_signed();
        let guest = Guest::with(Phase::Running(pid), true);
        guest.tasks.watch_exit(&guest.container, &guest.container.init, pid);
        guest.tasks.reaper.record_exit(pid, ProcessExit { status: 3, at_ns: 1 });
        // The agent cannot kill the container's other processes yet, so the container has not ended.
        let state = StateRequest { id: ID.into(), ..Default::default() };
        assert_eq!(guest.service.state(&context(), state).await.unwrap().status, Status::RUNNING.into());

        let request = KillRequest { id: ID.into(), signal: 15, ..Default::default() };
        let killed = guest.service.kill(&context(), request).await;
        other.kill().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&other.wait().unwrap()), Some(libc::SIGKILL));
        killed.unwrap_err();
        guest.tasks.pid_namespace(ID).unwrap_err();
        guest.tasks.start_init(&guest.container).unwrap_err();
        let exec = Process::new("e", StreamTokens::default(), Some(Default::default()));
        let starting = pin!(guest.tasks.start_exec(&guest.container, &exec));
        assert!(matches!(poll_all(starting).await, Poll::Ready(Err(_))));

        drop(occupied);
        assert_eq!(guest.container.init.wait().await, Some((pid, ProcessExit { status: 3, at_ns: 1 })));
        assert!(guest.file("cgroup.kill").starts_with('1'));
    });
}

#[test]
fn late_undo_of_a_freeze_does_not_reverse_a_newer_request() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        pause();
        let guest = Guest::new(Phase::Running(7));
        let context = context();
        let mut failing = pin!(guest.service.pause(&context, pause_request()));
        while poll_all(failing.as_mut()).await.is_pending() {
            advance(Duration::from_millis(100)).await;
        }
        let mut newer = pin!(guest.service.pause(&context, pause_request()));
        assert!(poll_all(newer.as_mut()).await.is_pending());
        guest.container.cgroup.write("cgroup.events", "populated 1\nfrozen 1\n").unwrap();
        drop(occupied);
        newer.await.unwrap();
        // The only thread of the pool has then completed all writes.
        tokio::task::spawn_blocking(|| {}).await.unwrap();
        assert_eq!(guest.file("cgroup.freeze"), "1");
        assert!(guest.container.is_paused());
    });
}

#[tokio::test]
async fn delete_waits_for_a_container_whose_cgroup_is_being_created() {
    let guest = Guest::new(Phase::Running(7));
    let reservation = guest.tasks.reserve("new").unwrap();
    assert!(guest.tasks.reserve("new").is_err());
    let mut deleting = pin!(guest.tasks.delete("new", "", None));
    assert!(poll_all(deleting.as_mut()).await.is_pending());
    let container = container_below(&guest.tasks.cgroups, "new");
    container.init.advance(Phase::Stopped(9, ProcessExit { status: 0, at_ns: 1 }));
    guest.tasks.insert(&container).unwrap();
    drop(reservation);
    assert_eq!(deleting.await.unwrap().0, 9);
}

#[tokio::test]
async fn sigkill_ends_an_exec_that_hangs_in_its_start() {
    for is_created in [true, false] {
        let guest = Guest::new(Phase::Running(7));
        let exec = guest.add_exec(Phase::Starting);
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let created = pidfd::open(child.id().cast_signed()).unwrap();
        // As with runc, other signals fail until the process has executed its program.
        guest.kill_exec(libc::SIGTERM).await.unwrap_err();
        if is_created {
            exec.set_child(created);
            guest.kill_exec(libc::SIGKILL).await.unwrap();
        } else {
            guest.kill_exec(libc::SIGKILL).await.unwrap();
            exec.set_child(created);
        }
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(libc::SIGKILL));
        assert!(exec.end_start().0);
    }
}

#[tokio::test]
async fn killed_exec_cannot_be_started_later() {
    let guest = Guest::new(Phase::Running(7));
    let exec = guest.add_exec(Phase::New);
    guest.kill_exec(libc::SIGKILL).await.unwrap();
    guest.tasks.start_exec(&guest.container, &exec).await.unwrap_err();
    assert_eq!(guest.tasks.delete(ID, "e", None).await.unwrap().1.status, 137);
}

#[test]
fn create_does_not_change_cgroups_on_the_async_thread() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        let guest = Guest::new(Phase::Running(7));
        guest.tasks.sandbox.policy.accept(&[], &[]).unwrap();
        guest.tasks.sandbox.prepare_with(None, |_| Ok(())).unwrap();
        // The specification is invalid, because it has no root. The agent finds this after it has made the cgroup.
        let options = CreateOptions { spec: br#"{"ociVersion":"1.0.2"}"#.into(), ..Default::default() };
        let options = Any { value: options.write_to_bytes().unwrap(), ..Default::default() };
        let request =
            CreateTaskRequest { id: "new".into(), options: MessageField::some(options), ..Default::default() };
        let cgroup = Cgroup::below(&guest.tasks.cgroups, "new");
        let mut creating = pin!(guest.tasks.create(request));
        let polled = poll_all(creating.as_mut()).await;
        assert!(polled.is_pending(), "{polled:?}");
        assert!(!cgroup.path().exists());
        drop(occupied);
        let error = creating.await.unwrap_err().to_string();
        assert!(error.contains("no root"), "{error}");
        assert!(!cgroup.path().exists());
    });
}

#[test]
fn updates_of_a_container_do_not_overlap_and_do_not_wait_forever() {
    let (runtime, occupied) = occupied_pool();
    runtime.block_on(async {
        pause();
        let guest = Guest::new(Phase::Running(7));
        let update = |limit: u64| {
            let value = format!(r#"{{"memory":{{"limit":{limit}}}}}"#).into_bytes();
            let resources = MessageField::some(Any { value, ..Default::default() });
            UpdateTaskRequest { id: ID.into(), resources, ..Default::default() }
        };
        let context = context();
        let mut hanging = pin!(guest.service.update(&context, update(65536)));
        assert!(poll_all(hanging.as_mut()).await.is_pending());
        let begin = Instant::now();
        let mut second = pin!(guest.service.update(&context, update(131_072)));
        let refused = loop {
            if let Poll::Ready(result) = poll_all(second.as_mut()).await {
                break result;
            }
            assert!(begin.elapsed() < SHIM_TIMEOUT, "the shim would not learn that the update has not been made");
            advance(Duration::from_millis(100)).await;
        };
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("another update is in progress"), "{error}");
        // The third update waits for the first one, although the client of the first one has given up.
        let mut third = pin!(guest.service.update(&context, update(262_144)));
        assert!(poll_all(third.as_mut()).await.is_pending());
        drop(occupied);
        hanging.await.unwrap();
        third.await.unwrap();
        assert!(guest.file("memory.max").starts_with("262144"));
    });
}

#[tokio::test]
async fn opened_pid_namespace_stays_that_of_the_container() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let guest = Guest::new(Phase::Running(child.id().cast_signed()));
    let namespace = guest.tasks.pid_namespace(ID).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let (own, opened) = (fs::metadata("/proc/self/ns/pid").unwrap(), namespace.metadata().unwrap());
    assert_eq!((opened.dev(), opened.ino()), (own.dev(), own.ino()));
}
