//! The sandbox as containerd's sandbox controller has it: created, started, stopped and shut down by requests of its own,
//! whatever containers come and go in it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use husk_proto::cri::PodSandboxConfig;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::process::Exit;
use super::{KILLED, Refusal, Shim};
use crate::daemon::Pending;
use crate::daemon::launch::hostname;
use crate::lock;
use crate::pod;
use crate::spec::Spec;

/// How long a shim waits for the request that creates its sandbox: containerd sends it with the answer to `start`.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the requests have made of it.
pub struct State {
    /// What the launch takes, until then.
    pending: Mutex<Option<Pending>>,
    /// Whether it was created by a request: then it stays until one ends it.
    created: OnceLock<Created>,
    /// Whether it was told to stop.
    stopping: Mutex<bool>,
    /// Its end.
    exit: watch::Sender<Option<Exit>>,
    began: SystemTime,
}

struct Created {
    /// Its specification, where this shim made it.
    spec: Value,
    /// Where the pod's files are, where this shim made them.
    files: Option<PathBuf>,
}

impl State {
    /// A sandbox; `pending` where its specification is still to come.
    pub fn new(pending: Option<Pending>) -> Self {
        Self {
            pending: Mutex::new(pending),
            created: OnceLock::new(),
            stopping: Mutex::new(false),
            exit: watch::Sender::new(None),
            began: SystemTime::now(),
        }
    }

    /// Whether a request created it.
    pub fn is_created(&self) -> bool {
        self.created.get().is_some()
    }

    /// When it began.
    pub fn began(&self) -> SystemTime {
        self.began
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Its specification as far as this shim made it.
    pub fn spec(&self) -> Value {
        self.created.get().map_or(Value::Null, |created| created.spec.clone())
    }

    /// Where the files are that its containers see as their own.
    pub fn files(&self) -> Option<PathBuf> {
        self.created.get()?.files.clone()
    }

    /// The virtual machine is gone.
    pub fn ended(&self) {
        let status = if *lock(&self.stopping) { 0 } else { KILLED };
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert(Exit { status, at: SystemTime::now() });
            first
        });
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let ended = self.exit.subscribe().wait_for(Option::is_some).await.map(|exit| *exit);
        // The sender lives as long as this does.
        ended.ok().flatten().unwrap_or(Exit { status: KILLED, at: SystemTime::now() })
    }
}

impl Shim {
    /// Creates the sandbox by its pod's configuration, and starts its boot. One whose bundle has a specification boots
    /// already.
    pub(super) async fn create_sandbox(&self, config: &PodSandboxConfig, netns: &str) -> Result<(), Refusal> {
        let pending = lock(&self.api.pending).take();
        let (created, launch) = match pending {
            None if self.api.is_created() || self.sandbox.is_dead() => {
                return Err(Refusal::Exists(self.sandbox.id.clone()));
            }
            None => (Created { spec: json!({}), files: None }, None),
            Some(pending) => {
                let spec = pod::specification(&self.sandbox.id, config, netns);
                let own = Spec { hostname: config.hostname.clone(), ..Spec::default() };
                let dir = self.sandbox.dir().path().to_owned();
                let (files, wanted, name) = (dir.clone(), config.clone(), hostname(&own));
                let written = tokio::task::spawn_blocking(move || pod::write(&dir, &wanted, &name)).await;
                written
                    .map_err(|e| e.to_string())
                    .and_then(|done| done.map_err(|e| crate::chain(&e)))
                    .map_err(Refusal::Failed)?;
                (Created { spec, files: Some(files) }, Some(pending))
            }
        };
        let text = created.spec.to_string();
        if self.api.created.set(created).is_err() {
            return Err(Refusal::Exists(self.sandbox.id.clone()));
        }
        if let Some(pending) = launch {
            pending.launch(&text, &self.sandbox).await.map_err(Refusal::Failed)?;
            // Told to stop meanwhile, when there was nothing to kill yet.
            if *lock(&self.api.stopping) {
                self.sandbox.kill();
            }
        }
        Ok(())
    }

    /// Stops the sandbox with everything that still runs in it, and waits until it is gone.
    pub(super) async fn stop_sandbox(&self) {
        *lock(&self.api.stopping) = true;
        // Without a launch its reports end here.
        drop(lock(&self.api.pending).take());
        self.sandbox.end().await;
        self.api.wait().await;
    }

    /// Ends when it is certain that nobody will create this sandbox.
    pub async fn forsaken(self: &Arc<Self>) {
        if lock(&self.api.pending).is_none() {
            return std::future::pending().await;
        }
        tokio::time::sleep(PATIENCE).await;
        if lock(&self.api.pending).is_none() {
            std::future::pending().await
        }
    }
}
