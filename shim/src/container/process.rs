//! State machine of one process: a container's init process or an exec. The state's lock is never held during a call to
//! the agent.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::error::ServiceError;
use crate::lock;
use crate::stdio::{Paths, Relay};

/// Exit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, 0 to 255.
    pub status: u32,
    /// Time of the exit.
    pub at: SystemTime,
}

/// State of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Created, but not started.
    Created,
    /// The agent is starting the process.
    Starting,
    /// Running.
    Running,
    /// Exited.
    Stopped,
    /// Deleted, or being deleted.
    Deleted,
}

impl State {
    /// Returns the name of the state in error messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting | Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        }
    }
}

struct Inner {
    state: State,
    /// Exit that was recorded before the shim published the start event.
    deferred_exit: Option<Exit>,
    relay: Option<Arc<Relay>>,
}

/// A process.
pub struct Process {
    /// Id of the container.
    pub container: String,
    /// Id of the exec. Empty for the init process.
    pub exec: String,
    /// Paths of the stdio streams, as in the request.
    pub paths: Paths,
    inner: Mutex<Inner>,
    exit: watch::Sender<Option<Exit>>,
    /// Whether the agent is starting the process.
    starting: watch::Sender<bool>,
    /// Whether a client has killed the process while it was being started.
    start_killed: watch::Sender<bool>,
    /// Whether a request is deleting the process.
    deleting: watch::Sender<bool>,
}

/// How to handle a reported exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReport {
    /// Publish the exit event.
    Publish,
    /// Do not publish the exit event yet. [`Process::confirm_start`] returns the exit after the start event.
    Deferred,
    /// Ignore the exit, because an exit of this process has already been recorded.
    Duplicate,
}

impl Process {
    /// Returns a process in the state [`State::Created`].
    pub fn new(container: &str, exec: &str, paths: Paths) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            paths,
            inner: Mutex::new(Inner { state: State::Created, deferred_exit: None, relay: None }),
            exit: watch::Sender::new(None),
            starting: watch::Sender::new(false),
            start_killed: watch::Sender::new(false),
            deleting: watch::Sender::new(false),
        }
    }

    /// Returns the id for events: the exec's id or, for the init process, the container's id.
    pub fn event_id(&self) -> &str {
        if self.exec.is_empty() { &self.container } else { &self.exec }
    }

    /// Returns the current state.
    pub fn state(&self) -> State {
        lock(&self.inner).state
    }

    /// Returns the exit, or `None` if the process has not exited.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the exit.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // Unreachable: the wait fails only after the sender is dropped, but `self` owns the sender.
            _ => Exit { status: 255, at: SystemTime::now() },
        }
    }

    /// Stores the relay, which copies the streams.
    pub fn set_relay(&self, relay: Relay) {
        lock(&self.inner).relay = Some(Arc::new(relay));
    }

    /// Returns the relay, or `None` if the process has no relay.
    pub fn relay(&self) -> Option<Arc<Relay>> {
        lock(&self.inner).relay.clone()
    }

    /// Drops the relay. This ends the copying of the streams.
    pub fn drop_relay(&self) {
        let relay = lock(&self.inner).relay.take();
        drop(relay);
    }

    /// Changes the state from created to starting.
    ///
    /// # Errors
    /// [`ServiceError::Start`] if the process is in any other state.
    pub fn begin_start(&self) -> Result<(), ServiceError> {
        let mut inner = lock(&self.inner);
        if inner.state != State::Created || inner.deferred_exit.is_some() {
            return Err(ServiceError::Start(inner.state.name()));
        }
        inner.state = State::Starting;
        self.starting.send_replace(true);
        Ok(())
    }

    /// Records that the shim has published the start event. Returns the deferred exit, if there is one. The caller must
    /// publish this exit.
    pub fn confirm_start(&self) -> Option<Exit> {
        let exit = self.end_start();
        self.starting.send_replace(false);
        exit
    }

    fn end_start(&self) -> Option<Exit> {
        let mut inner = lock(&self.inner);
        match inner.deferred_exit.take() {
            Some(exit) => {
                inner.state = State::Stopped;
                drop(inner);
                self.exit.send_replace(Some(exit));
                Some(exit)
            }
            None => {
                if inner.state == State::Starting {
                    inner.state = State::Running;
                }
                None
            }
        }
    }

    /// Records that the start of the process has failed.
    ///
    /// As in runc's shim, the process then counts as stopped. Clients get `exit` as the exit of the process.
    pub fn start_failed(&self, exit: Exit) {
        let mut inner = lock(&self.inner);
        inner.deferred_exit = None;
        inner.state = State::Stopped;
        drop(inner);
        self.exit.send_if_modified(|e| e.is_none().then(|| *e = Some(exit)).is_some());
        self.starting.send_replace(false);
    }

    /// Waits while the agent is starting the process.
    pub async fn wait_start(&self) {
        // The wait does not fail, because `self` owns the sender.
        let _ = self.starting.subscribe().wait_for(|starting| !*starting).await;
    }

    /// Records that a client kills the process while it is being started. Returns false if the process is in another
    /// state.
    pub fn kill_start(&self) -> bool {
        // The lock is held so that the start does not end meanwhile.
        let inner = lock(&self.inner);
        let starting = inner.state == State::Starting;
        self.start_killed.send_if_modified(|killed| starting && !std::mem::replace(killed, true));
        starting
    }

    /// Whether a client has killed the process while it was being started.
    pub fn is_start_killed(&self) -> bool {
        *self.start_killed.borrow()
    }

    /// Waits until a client kills the process while it is being started.
    pub async fn wait_start_killed(&self) {
        // The wait does not fail, because `self` owns the sender.
        let _ = self.start_killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Records an exit of the process. Returns what the caller must do with this exit.
    pub fn record_exit(&self, exit: Exit) -> ExitReport {
        let mut inner = lock(&self.inner);
        match inner.state {
            State::Stopped | State::Deleted => ExitReport::Duplicate,
            State::Starting if inner.deferred_exit.is_some() => ExitReport::Duplicate,
            State::Starting => {
                inner.deferred_exit = Some(exit);
                ExitReport::Deferred
            }
            State::Created | State::Running => {
                inner.state = State::Stopped;
                drop(inner);
                self.exit.send_replace(Some(exit));
                ExitReport::Publish
            }
        }
    }

    /// Records an exit that the agent has not reported and will not report, because the process is being deleted. Ends
    /// the requests that wait for the process. Returns whether the caller must publish the exit.
    pub fn end_with_container(&self, exit: Exit) -> bool {
        let started = !matches!(self.state(), State::Created | State::Deleted);
        let publish = self.record_exit(exit) == ExitReport::Publish && started;
        if self.state() != State::Starting {
            self.exit.send_if_modified(|e| e.is_none().then(|| *e = Some(exit)).is_some());
        }
        publish
    }

    /// Begins the deletion, which [`Process::end_delete`] or [`Process::delete_failed`] ends. Returns the state before
    /// the deletion.
    ///
    /// # Errors
    /// [`ServiceError::Delete`] if the process is starting or running. The error is `deleted` if an earlier call has
    /// begun the deletion.
    pub fn begin_delete(&self, deleted: ServiceError) -> Result<State, ServiceError> {
        let mut inner = lock(&self.inner);
        match inner.state {
            State::Deleted => Err(deleted),
            State::Starting | State::Running => Err(ServiceError::Delete("running")),
            before @ (State::Created | State::Stopped) => {
                inner.state = State::Deleted;
                self.deleting.send_replace(true);
                Ok(before)
            }
        }
    }

    /// Records that the deletion has ended.
    pub fn end_delete(&self) {
        self.deleting.send_replace(false);
    }

    /// Restores the state that the process had before a failed deletion. The client can then retry the deletion.
    pub fn delete_failed(&self, before: State) {
        lock(&self.inner).state = before;
        self.end_delete();
    }

    /// Waits while a request is deleting the process.
    pub async fn wait_delete(&self) {
        // The wait does not fail, because `self` owns the sender.
        let _ = self.deleting.subscribe().wait_for(|deleting| !*deleting).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        let paths = Paths { stdin: String::new(), stdout: String::new(), stderr: String::new(), terminal: false };
        Process::new("c", "", paths)
    }

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH }
    }

    #[tokio::test]
    async fn exit_before_the_start_event_is_deferred() {
        let p = process();
        p.begin_start().unwrap();
        assert_eq!(p.record_exit(exit(3)), ExitReport::Deferred);
        assert_eq!(p.exit(), None);
        assert_eq!(p.record_exit(exit(4)), ExitReport::Duplicate);
        assert_eq!(p.confirm_start(), Some(exit(3)));
        assert_eq!(p.wait().await, exit(3));
        assert_eq!(p.state(), State::Stopped);
    }

    #[test]
    fn process_changes_state_on_start_exit_and_delete() {
        let p = process();
        p.begin_start().unwrap();
        assert!(matches!(p.begin_start(), Err(ServiceError::Start("running"))));
        assert_eq!(p.confirm_start(), None);
        assert!(matches!(p.begin_delete(ServiceError::NoContainer), Err(ServiceError::Delete("running"))));
        assert_eq!(p.record_exit(exit(0)), ExitReport::Publish);
        assert_eq!(p.record_exit(exit(9)), ExitReport::Duplicate);
        assert!(matches!(p.begin_start(), Err(ServiceError::Start("stopped"))));
        assert!(matches!(p.begin_delete(ServiceError::NoContainer), Ok(State::Stopped)));
        assert!(matches!(p.begin_delete(ServiceError::NoContainer), Err(ServiceError::NoContainer)));
        assert_eq!(p.exit(), Some(exit(0)));
    }

    #[test]
    fn exit_or_failed_start_stops_a_created_process() {
        let p = process();
        assert_eq!(p.record_exit(exit(137)), ExitReport::Publish);
        assert!(matches!(p.begin_start(), Err(ServiceError::Start("stopped"))));
        let p = process();
        assert!(matches!(p.begin_delete(ServiceError::NoContainer), Ok(State::Created)));
        p.delete_failed(State::Created);
        p.begin_start().unwrap();
        p.start_failed(exit(255));
        assert_eq!(p.exit(), Some(exit(255)));
    }
}
