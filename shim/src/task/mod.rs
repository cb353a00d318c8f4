//! containerd's Task service over the containers of one sandbox.

mod container;
mod create;
mod delete;
mod exec;
mod pause;
mod pids;
mod process;
mod refusal;
mod resize;
mod sandbox;
mod sandbox_service;
mod service;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use husk_proto::containerd::events::task::{TaskExit, TaskOOM};
use husk_proto::containerd::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::Service;

use crate::daemon::Pending;
use crate::events::{Events, timestamp};
use crate::sandbox::Sandbox;
use crate::sandbox::agent::{Agent, Report};
use crate::stdio::{Paths, Relay, Stdio, Streams};
use container::{Container, Containers};
use process::{Exit, Process, Seen};
pub use refusal::Refusal;

/// Every service of the shim's.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut all = service::services(shim);
    all.extend(sandbox_service::services(shim));
    all
}

/// What a process gets as its status when its virtual machine died under it: as if killed.
const KILLED: u32 = 128 + 9;

/// The shim's state: one sandbox and its containers.
pub struct Shim {
    namespace: String,
    sandbox: Arc<Sandbox>,
    /// What containerd's sandbox controller made of it.
    api: sandbox::State,
    containers: Containers,
    sizes: resize::Sizes,
    pids: pids::Pids,
    events: Events,
    /// The virtual machine is gone, and everything in it was told of.
    gone: AtomicBool,
    finishing: AtomicBool,
    finished: watch::Sender<bool>,
}

/// Does work to its end, though whoever asked for it may give up: a request's handler is dropped when its time is over.
async fn whole<T: Send + 'static>(work: impl Future<Output = ttrpc::Result<T>> + Send + 'static) -> ttrpc::Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(Refusal::Failed(error.to_string()).into()))
}

impl Shim {
    /// Serves a sandbox; `reports` are what its agent says, `pending` what its creation takes where that is still to come.
    pub fn new(
        namespace: &str,
        sandbox: Arc<Sandbox>,
        events: Events,
        reports: mpsc::UnboundedReceiver<Report>,
        pending: Option<Pending>,
    ) -> Arc<Self> {
        let shim = Arc::new(Self {
            namespace: namespace.to_owned(),
            sandbox,
            api: sandbox::State::new(pending),
            containers: Containers::default(),
            sizes: resize::Sizes::default(),
            pids: pids::Pids::default(),
            events,
            gone: AtomicBool::new(false),
            finishing: AtomicBool::new(false),
            finished: watch::Sender::new(false),
        });
        tokio::spawn(Arc::clone(&shim).follow(reports));
        shim
    }

    /// Waits until the last container and the sandbox are gone.
    pub async fn finished(&self) {
        let _ = self.finished.subscribe().wait_for(|done| *done).await;
    }

    /// The events' queue.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Ends the sandbox, once; returns to everybody who asks for it when it has ended.
    pub async fn finish(self: &Arc<Self>) {
        if !self.finishing.swap(true, Ordering::Relaxed) {
            // Not by whoever asked first: a request is given up when its time is over.
            let shim = Arc::clone(self);
            tokio::spawn(async move {
                shim.sandbox.tear_down().await;
                shim.finished.send_replace(true);
            });
        }
        self.finished().await;
    }

    /// Turns what the agent says into exits and events, and the virtual machine's end into those that are missing.
    async fn follow(self: Arc<Self>, mut reports: mpsc::UnboundedReceiver<Report>) {
        while let Some(report) = reports.recv().await {
            match report {
                Report::Oom { container } => match self.containers.get(&container) {
                    Ok(container) => self.tell_oom(&container),
                    Err(_) => tracing::warn!(container, "the agent reported an unknown container out of memory"),
                },
                Report::Exit { container, exec, status, at, oom } => {
                    let Ok(container) = self.containers.get(&container) else {
                        tracing::warn!(container, exec, status, "the agent reported the exit of an unknown container");
                        continue;
                    };
                    let Ok(process) = container.process(&exec) else {
                        tracing::warn!(
                            container = container.id,
                            exec,
                            "the agent reported the exit of an unknown exec"
                        );
                        continue;
                    };
                    if oom {
                        self.tell_oom(&container);
                    }
                    let exit = Exit { status, at };
                    if process.ended(exit) == Seen::Now {
                        self.tell_exit(&process, exit);
                    }
                }
            }
        }
        self.gone.store(true, Ordering::Relaxed);
        for container in self.containers.all() {
            self.end_all(&container);
        }
        self.api.ended();
    }

    /// The virtual machine is gone: so is everything in it.
    fn end_all(&self, container: &Container) {
        let exit = Exit { status: KILLED, at: SystemTime::now() };
        for process in container.processes() {
            let told = process.exec.is_empty() || process.state() != process::State::Created;
            if process.ended(exit) == Seen::Now && told {
                self.tell_exit(&process, exit);
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn tell_oom(&self, container: &Container) {
        if container.tell_oom() {
            tracing::info!(container = container.id, "out of memory");
            let event = TaskOOM { container_id: container.id.clone(), ..Default::default() };
            self.events.publish(TASK_OOM_EVENT_TOPIC, &event);
        }
    }

    fn tell_exit(&self, process: &Process, exit: Exit) {
        if process.exec.is_empty() {
            self.sandbox.timeline.mark("exited");
        }
        tracing::debug!(container = process.container, exec = process.exec, status = exit.status, "exited");
        let event = TaskExit {
            container_id: process.container.clone(),
            id: process.event_id().to_owned(),
            pid: self.pid(&process.container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// The agent, for a request about something that exists.
    fn agent(&self) -> Result<Agent, Refusal> {
        if self.sandbox.is_dead() {
            return Err(Refusal::Gone);
        }
        self.sandbox.agent().ok_or(Refusal::Gone)
    }

    /// An error of the agent's; when the machine died it says why, as far as its console tells.
    fn agent_error(&self, what: &str, error: ttrpc::Error) -> ttrpc::Error {
        if self.sandbox.is_dead() {
            let words = self.sandbox.last_words();
            let words = if words.is_empty() { words } else { format!("; the last lines of its console:\n{words}") };
            return Refusal::Failed(format!("{what}: the virtual machine died{words}")).into();
        }
        crate::sandbox::agent::error(what, error)
    }

    /// Opens the streams a process' stdio wants, and starts copying; returns the names for the guest's request.
    async fn connect_stdio(&self, stdio: Stdio) -> Result<(Relay, Tokens), Refusal> {
        let wants = stdio.wants();
        let open = async |wanted: bool| match wanted {
            true => self.sandbox.open_stream().await.map(Some),
            false => Ok(None),
        };
        let failed = |error: &dyn std::error::Error| Refusal::Failed(crate::chain(error));
        let mut tokens = Tokens::default();
        let streams = if wants.terminal {
            let (token, stream) = self.sandbox.open_stream().await.map_err(|e| failed(&e))?;
            tokens.stdout = token.to_string();
            if wants.stdin {
                tokens.stdin.clone_from(&tokens.stdout);
            }
            Streams::Terminal(stream)
        } else {
            let (stdin, stdout, stderr) = tokio::join!(open(wants.stdin), open(wants.stdout), open(wants.stderr));
            let mut take = |name: fn(&mut Tokens) -> &mut String, opened: Result<Option<_>, _>| match opened {
                Ok(Some((token, stream))) => {
                    *name(&mut tokens) = u64::to_string(&token);
                    Ok(Some(stream))
                }
                Ok(None) => Ok(None),
                Err(error) => Err(failed(&error)),
            };
            Streams::Pipes {
                stdin: take(|t| &mut t.stdin, stdin)?,
                stdout: take(|t| &mut t.stdout, stdout)?,
                stderr: take(|t| &mut t.stderr, stderr)?,
            }
        };
        let relay = stdio.start(streams).map_err(|e| failed(&e))?;
        Ok((relay, tokens))
    }
}

/// The names of a process' streams in the guest's request.
#[derive(Debug, Default)]
struct Tokens {
    stdin: String,
    stdout: String,
    stderr: String,
}

fn paths(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Paths {
    Paths { stdin: stdin.to_owned(), stdout: stdout.to_owned(), stderr: stderr.to_owned(), terminal }
}
