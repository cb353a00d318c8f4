//! One process of a container, its first or an exec's: a state machine that no lock guards across a call.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

use super::refusal::Refusal;
use crate::lock;
use crate::stdio::{Paths, Relay};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// The agent is starting it.
    Starting,
    /// Runs.
    Running,
    /// Has ended.
    Stopped,
    /// Is being deleted, or is.
    Deleted,
}

impl State {
    /// The word for it in errors.
    pub fn word(self) -> &'static str {
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
    /// An exit that came before the start was told of.
    early: Option<Exit>,
    relay: Option<Arc<Relay>>,
}

/// A process.
pub struct Process {
    /// Its container.
    pub container: String,
    /// Its exec id; empty for the container's first.
    pub exec: String,
    /// Its streams, as the request named them.
    pub paths: Paths,
    inner: Mutex<Inner>,
    exit: watch::Sender<Option<Exit>>,
}

/// What an exit means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Tell containerd now.
    Now,
    /// The start was not told of yet; [`Process::started`] will give it back.
    Later,
    /// It ended before.
    Again,
}

impl Process {
    /// A process that was made.
    pub fn new(container: &str, exec: &str, paths: Paths) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            paths,
            inner: Mutex::new(Inner { state: State::Created, early: None, relay: None }),
            exit: watch::Sender::new(None),
        }
    }

    /// Its id in events: the exec's, or the container's for the first process.
    pub fn event_id(&self) -> &str {
        if self.exec.is_empty() { &self.container } else { &self.exec }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        lock(&self.inner).state
    }

    /// How it ended, if it did.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The sender is `self`: it cannot be gone.
            _ => Exit { status: 255, at: SystemTime::now() },
        }
    }

    /// Keeps the copies of its streams going.
    pub fn set_relay(&self, relay: Relay) {
        lock(&self.inner).relay = Some(Arc::new(relay));
    }

    /// The copies of its streams.
    pub fn relay(&self) -> Option<Arc<Relay>> {
        lock(&self.inner).relay.clone()
    }

    /// Ends the copies of its streams.
    pub fn drop_relay(&self) {
        let relay = lock(&self.inner).relay.take();
        drop(relay);
    }

    /// From created to starting.
    ///
    /// # Errors
    /// [`Refusal::Start`] from any other state.
    pub fn begin_start(&self) -> Result<(), Refusal> {
        let mut inner = lock(&self.inner);
        if inner.state != State::Created || inner.early.is_some() {
            return Err(Refusal::Start(inner.state.word()));
        }
        inner.state = State::Starting;
        Ok(())
    }

    /// The agent started it, and containerd was told. An exit that came meanwhile is to be told next.
    pub fn started(&self) -> Option<Exit> {
        let mut inner = lock(&self.inner);
        match inner.early.take() {
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

    /// The agent could not start it. runc's shim counts such a process as stopped: an exec with 255 as its status.
    pub fn start_failed(&self, exit: Exit) {
        let mut inner = lock(&self.inner);
        inner.early = None;
        inner.state = State::Stopped;
        drop(inner);
        self.exit.send_if_modified(|e| e.is_none().then(|| *e = Some(exit)).is_some());
    }

    /// It ended.
    pub fn ended(&self, exit: Exit) -> Seen {
        let mut inner = lock(&self.inner);
        match inner.state {
            State::Stopped | State::Deleted => Seen::Again,
            State::Starting if inner.early.is_some() => Seen::Again,
            State::Starting => {
                inner.early = Some(exit);
                Seen::Later
            }
            State::Created | State::Running => {
                inner.state = State::Stopped;
                drop(inner);
                self.exit.send_replace(Some(exit));
                Seen::Now
            }
        }
    }

    /// Nobody else deletes it from here on.
    ///
    /// # Errors
    /// [`Refusal::Delete`] while it runs, `gone` when it is deleted already.
    pub fn begin_delete(&self, gone: Refusal) -> Result<State, Refusal> {
        let mut inner = lock(&self.inner);
        match inner.state {
            State::Deleted => Err(gone),
            State::Starting | State::Running => Err(Refusal::Delete("running")),
            before @ (State::Created | State::Stopped) => {
                inner.state = State::Deleted;
                Ok(before)
            }
        }
    }

    /// The deletion failed; it may be tried again.
    pub fn delete_failed(&self, before: State) {
        lock(&self.inner).state = before;
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
    async fn an_exit_before_the_start_returned_is_held_back() {
        let p = process();
        p.begin_start().unwrap();
        assert_eq!(p.ended(exit(3)), Seen::Later);
        assert_eq!(p.exited(), None);
        assert_eq!(p.ended(exit(4)), Seen::Again);
        assert_eq!(p.started(), Some(exit(3)));
        assert_eq!(p.wait().await, exit(3));
        assert_eq!(p.state(), State::Stopped);
    }

    #[test]
    fn life() {
        let p = process();
        p.begin_start().unwrap();
        assert_eq!(p.begin_start(), Err(Refusal::Start("running")));
        assert_eq!(p.started(), None);
        assert_eq!(p.begin_delete(Refusal::NoContainer), Err(Refusal::Delete("running")));
        assert_eq!(p.ended(exit(0)), Seen::Now);
        assert_eq!(p.ended(exit(9)), Seen::Again);
        assert_eq!(p.begin_start(), Err(Refusal::Start("stopped")));
        assert_eq!(p.begin_delete(Refusal::NoContainer), Ok(State::Stopped));
        assert_eq!(p.begin_delete(Refusal::NoContainer), Err(Refusal::NoContainer));
        assert_eq!(p.exited(), Some(exit(0)));
    }

    #[test]
    fn never_started() {
        let p = process();
        assert_eq!(p.ended(exit(137)), Seen::Now);
        assert_eq!(p.begin_start(), Err(Refusal::Start("stopped")));
        let p = process();
        assert_eq!(p.begin_delete(Refusal::NoContainer), Ok(State::Created));
        p.delete_failed(State::Created);
        p.begin_start().unwrap();
        p.start_failed(exit(255));
        assert_eq!(p.exited(), Some(exit(255)));
    }
}
