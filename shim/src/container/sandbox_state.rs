//! The state of the sandbox for containerd's Sandbox service. The requests of this service create, start, stop and shut
//! down the sandbox.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use husk_config::BaseTimeout;
use husk_proto::cri::PodSandboxConfig;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::blocking;
use crate::container::process::Exit;
use crate::container::{EXIT_STATUS_KILLED, Shim};
use crate::error::ServiceError;
use crate::lock;
use crate::pod;
use crate::sandbox::launch::DeferredLaunch;
use crate::sandbox::launch::hostname;

/// Timeout for the arrival of the CreateSandbox request. containerd sends this request as soon as the shim's
/// `start` action has replied.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long StopSandbox waits for the sandbox's end after the shim has killed the VMM process. This is longer than
/// `VMM_EXIT_TIMEOUT` with the last events. Only a launch that hangs takes longer: its VMM process is not known yet.
pub const SANDBOX_END_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(3);

/// State of the sandbox for containerd's Sandbox service.
pub struct SandboxState {
    /// Input of a launch that waits for a CreateSandbox request. `None` if the sandbox has been launched or stopped.
    pending: Mutex<Option<DeferredLaunch>>,
    /// Set if a CreateSandbox request created the sandbox. Such a sandbox can exist without containers.
    created: OnceLock<Created>,
    /// Whether a request to stop the sandbox has arrived.
    stopping: Mutex<bool>,
    /// Whether the sandbox is being launched.
    launching: watch::Sender<bool>,
    /// Exit of the sandbox.
    exit: watch::Sender<Option<Exit>>,
    created_at: SystemTime,
}

struct Created {
    /// Specification that this shim made for the sandbox. It is `{}` if the bundle has a specification.
    spec: Value,
    /// Directory of the pod's files. `None` if this shim did not write these files.
    files: Option<PathBuf>,
}

/// A launch in progress.
pub(crate) struct Launching<'a>(&'a watch::Sender<bool>);

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

impl SandboxState {
    /// Returns the initial state. `pending` is `Some` if the launch waits for a CreateSandbox request.
    pub fn new(pending: Option<DeferredLaunch>) -> Self {
        Self {
            pending: Mutex::new(pending),
            created: OnceLock::new(),
            stopping: Mutex::new(false),
            launching: watch::Sender::new(false),
            exit: watch::Sender::new(None),
            created_at: SystemTime::now(),
        }
    }

    /// Takes the launch that waits for a CreateSandbox request. While the second value exists, the sandbox counts as
    /// being launched.
    fn take_pending(&self) -> Option<(DeferredLaunch, Launching<'_>)> {
        lock(&self.pending).take().map(|pending| (pending, self.begin_launch()))
    }

    pub(crate) fn begin_launch(&self) -> Launching<'_> {
        self.launching.send_replace(true);
        Launching(&self.launching)
    }

    /// Waits while the sandbox is being launched. Its processes and its cgroup are not known before.
    pub async fn wait_launch(&self) {
        // The wait does not fail, because `self` owns the sender.
        let _ = self.launching.subscribe().wait_for(|launching| !*launching).await;
    }

    /// Returns whether the sandbox is being launched.
    pub fn is_launching(&self) -> bool {
        *self.launching.borrow()
    }

    /// Returns whether a CreateSandbox request created the sandbox.
    pub fn is_created(&self) -> bool {
        self.created.get().is_some()
    }

    /// Returns the time at which the shim began to serve the sandbox.
    pub fn created_at(&self) -> SystemTime {
        self.created_at
    }

    /// Returns the exit, or `None` if the sandbox has not ended.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Returns the specification that this shim made, or null if no CreateSandbox request created the sandbox.
    pub fn spec(&self) -> Value {
        self.created.get().map_or(Value::Null, |created| created.spec.clone())
    }

    /// Returns the directory of the pod's files, such as `/etc/hosts`. Returns `None` if this shim did not write these
    /// files.
    pub fn files(&self) -> Option<PathBuf> {
        self.created.get()?.files.clone()
    }

    /// Records that the sandbox is being stopped. Its exit status is then 0.
    pub fn begin_stop(&self) {
        *lock(&self.stopping) = true;
    }

    /// Records that the VM has ended.
    pub fn record_end(&self) {
        let status = if *lock(&self.stopping) { 0 } else { EXIT_STATUS_KILLED };
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert(Exit { status, at: SystemTime::now() });
            first
        });
    }

    /// Waits until the sandbox has ended, and returns its exit.
    pub async fn wait(&self) -> Exit {
        let ended = self.exit.subscribe().wait_for(Option::is_some).await.map(|exit| *exit);
        // The fallback is unreachable: the wait fails only after the sender is dropped, but `self` owns the sender.
        ended.ok().flatten().unwrap_or_else(|| Exit { status: EXIT_STATUS_KILLED, at: SystemTime::now() })
    }
}

impl Shim {
    /// Creates the sandbox from the pod's configuration, and launches the sandbox's VM.
    ///
    /// If the bundle has a specification, this process has launched the VM before it accepted requests. In this case,
    /// this function only records the creation.
    pub(crate) async fn create_sandbox(&self, config: &PodSandboxConfig, netns: &str) -> Result<(), ServiceError> {
        self.check_not_ending()?;
        let (pending, _launching) = self.sandbox_state.take_pending().unzip();
        let (created, launch) = match pending {
            None if self.sandbox_state.is_created() || self.sandbox.is_dead() => {
                return Err(ServiceError::Exists(self.sandbox.id.clone()));
            }
            None => (Created { spec: json!({}), files: None }, None),
            Some(pending) => {
                let spec = pod::specification(&self.sandbox.id, config, netns);
                let dir = self.sandbox.dir().path().to_owned();
                let (files, pod_config, name) = (dir.clone(), config.clone(), hostname(&config.hostname));
                let written = blocking::spawn(move || pod::write(&dir, &pod_config, &name)).await;
                written
                    .map_err(|e| e.to_string())
                    .and_then(|done| done.map_err(|e| crate::chain(&e)))
                    .map_err(ServiceError::failed)?;
                (Created { spec, files: Some(files) }, Some(pending))
            }
        };
        let spec = created.spec.clone();
        if self.sandbox_state.created.set(created).is_err() {
            return Err(ServiceError::Exists(self.sandbox.id.clone()));
        }
        if let Some(pending) = launch {
            pending.launch(spec, &self.sandbox).await.map_err(ServiceError::failed)?;
            // End the VM now if a request to stop the sandbox arrived before the VM existed.
            if *lock(&self.sandbox_state.stopping) {
                self.sandbox.kill();
            }
        }
        Ok(())
    }

    /// Ends the VM, and waits until the sandbox's exit has been recorded, at most for [`SANDBOX_END_TIMEOUT`]. While the
    /// pod ends in an orderly way, waits as [`Shim::end_vm_by_request`] does.
    ///
    /// If the sandbox has not ended by then, its launch hangs. The sandbox counts as ended, because it has no container.
    /// `create_sandbox` kills the VM as soon as the launch has ended.
    pub(crate) async fn stop_sandbox(&self) {
        self.sandbox_state.begin_stop();
        // If the sandbox was never launched, this drop closes the channel for the agent's reports.
        // `Shim::handle_reports` then records the exit.
        drop(lock(&self.sandbox_state.pending).take());
        self.end_vm_by_request(Duration::MAX).await;
        if self.is_ending() {
            return;
        }
        let limit = self.sandbox.timeout(SANDBOX_END_TIMEOUT);
        if tokio::time::timeout(limit, self.sandbox_state.wait()).await.is_err() {
            tracing::error!("the sandbox's launch hangs; the shim will kill the VM when the launch ends");
            self.sandbox_state.record_end();
        }
    }

    /// Returns after `CREATE_TIMEOUT` if the sandbox is still waiting for a CreateSandbox request. Otherwise, never
    /// returns.
    pub async fn create_timed_out(self: &Arc<Self>) {
        if lock(&self.sandbox_state.pending).is_none() {
            return std::future::pending().await;
        }
        tokio::time::sleep(CREATE_TIMEOUT).await;
        if lock(&self.sandbox_state.pending).is_none() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use async_trait::async_trait;
    use husk_proto::containerd::shim::event::Envelope;
    use tokio::sync::mpsc;
    use tokio::time::Instant;

    use super::*;
    use crate::container::escalation::VM_END_TIMEOUT;
    use crate::container::model_tests::BUDGET;
    use crate::events::{Events, Publish, PublishError, RetryPolicy};
    use crate::launcher::Launcher;
    use crate::sandbox::Sandbox;
    use crate::sandbox::state_dir::StateDir;
    use crate::sandbox::timeline::Timeline;

    struct NoContainerd;

    #[async_trait]
    impl Publish for NoContainerd {
        async fn publish(&mut self, _: &Envelope) -> Result<(), PublishError> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn stop_and_shutdown_of_a_sandbox_do_not_wait_for_a_launch_that_hangs() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::at(root.path());
        let timeline = Arc::new(Timeline::new("test", "launching", dir.timeline()));
        let sandbox = Sandbox::new("launching", dir, timeline, None);
        let events = Events::start("test", NoContainerd, RetryPolicy::default());
        // The channel stays open until the VM ends. Here, the launch holds it.
        let (_reports, reported) = mpsc::channel(1);
        let shim = Shim::new("test", sandbox, events, Launcher::ended(), reported, None);
        let launching = shim.sandbox_state.begin_launch();
        let begin = Instant::now();
        shim.stop_sandbox().await;
        assert_eq!(shim.sandbox_state.exit().map(|exit| exit.status), Some(0));
        // RemovePodSandbox stops the sandbox again, and shuts it down.
        shim.stop_sandbox().await;
        shim.finish_by_request(shim.sandbox.timeout(VM_END_TIMEOUT)).await;
        assert!(begin.elapsed() < BUDGET, "{:?}", begin.elapsed());
        assert!(shim.finishing.load(Ordering::Relaxed) && !*shim.finished.borrow(), "the launch has not ended");
        drop(launching);
        tokio::time::timeout(BUDGET, shim.wait_finished()).await.unwrap();
    }
}
