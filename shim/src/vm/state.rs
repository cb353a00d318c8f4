//! The state of a sandbox's VM, and the transitions between states.

use std::sync::Arc;

use tokio::sync::watch;

use super::agent::Agent;

/// State of a sandbox's VM.
#[derive(Clone)]
pub enum State {
    /// The VM has not been launched, because containerd has not sent the sandbox's specification yet.
    Pending,
    /// The guest is booting.
    Booting,
    /// The VM is running, and the agent can create containers.
    Running(Agent),
    /// The launch or the boot failed, and the shim kills the VM. The text contains the error and its causes.
    Failed(Arc<str>),
    /// The VM has ended. The text says why.
    Gone(Arc<str>),
}

/// A [`State`] without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Pending,
    Booting,
    Running,
    Failed,
    Gone,
}

/// The allowed transitions. `Failed` has no transition to `Gone`, because a later Create request must report why the VM
/// failed.
const TRANSITIONS: [(Phase, Phase); 6] = [
    (Phase::Pending, Phase::Booting),
    (Phase::Pending, Phase::Gone),
    (Phase::Booting, Phase::Running),
    (Phase::Booting, Phase::Failed),
    (Phase::Booting, Phase::Gone),
    (Phase::Running, Phase::Gone),
];

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Pending => Phase::Pending,
            Self::Booting => Phase::Booting,
            Self::Running(_) => Phase::Running,
            Self::Failed(_) => Phase::Failed,
            Self::Gone(_) => Phase::Gone,
        }
    }

    /// Returns why the VM failed or ended. Returns `None` if the state is not final.
    fn end_reason(&self) -> Option<&Arc<str>> {
        match self {
            Self::Failed(reason) | Self::Gone(reason) => Some(reason),
            _ => None,
        }
    }

    /// Returns the agent, if the VM is running.
    pub fn agent(&self) -> Option<&Agent> {
        match self {
            Self::Running(agent) => Some(agent),
            _ => None,
        }
    }
}

/// The current state. Tasks can wait until the state changes.
#[derive(Clone)]
pub struct StateCell(Arc<watch::Sender<State>>);

impl Default for StateCell {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::Pending)))
    }
}

impl StateCell {
    /// Changes the state to `next`, if this transition is allowed. Returns whether the state changed.
    pub fn enter(&self, next: State) -> bool {
        self.0.send_if_modified(|state| {
            let (from, to) = (state.phase(), next.phase());
            let exists = TRANSITIONS.contains(&(from, to));
            if exists {
                tracing::debug!(?from, ?to, "the VM's state changed");
                *state = next;
            }
            exists
        })
    }

    /// Returns whether the state is not [`State::Pending`].
    pub fn is_launched(&self) -> bool {
        self.0.borrow().phase() != Phase::Pending
    }

    /// Returns the agent, if the VM is running.
    pub fn agent(&self) -> Option<Agent> {
        self.0.borrow().agent().cloned()
    }

    /// Waits until the VM is running, has failed or has ended. Returns the agent of the running VM.
    ///
    /// # Errors
    /// If the launch or the boot failed, or the VM has ended. The returned text says why. After a failure, the text
    /// contains the error and its causes.
    pub async fn wait_running(&self) -> Result<Agent, Arc<str>> {
        let mut state = self.0.subscribe();
        let decided = state.wait_for(|state| !matches!(state.phase(), Phase::Pending | Phase::Booting)).await;
        match decided.as_deref() {
            Ok(State::Running(agent)) => Ok(agent.clone()),
            Ok(State::Failed(error)) => Err(Arc::clone(error)),
            Ok(State::Gone(reason)) => Err(format!("the sandbox's VM has ended: {reason}").into()),
            // Unreachable: `wait_for` returns only the states above, and fails only after `self` is dropped.
            _ => Err("the state of the sandbox's VM is unknown".into()),
        }
    }

    /// Returns why the VM failed or ended. Returns `None` if the state is not final.
    pub fn end_reason(&self) -> Option<Arc<str>> {
        self.0.borrow().end_reason().cloned()
    }

    /// Waits until the state is final. Returns why the VM failed or ended.
    pub async fn wait_end(&self) -> Option<Arc<str>> {
        let mut state = self.0.subscribe();
        let ended = state.wait_for(|state| state.end_reason().is_some()).await;
        ended.ok().and_then(|state| state.end_reason().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn agent() -> Agent {
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        Agent::new(stream).unwrap()
    }

    /// Returns one state of each variant.
    async fn all() -> Vec<State> {
        vec![
            State::Pending,
            State::Booting,
            State::Running(agent().await),
            State::Failed("x".into()),
            State::Gone("y".into()),
        ]
    }

    #[tokio::test]
    async fn enter_allows_only_the_transitions_of_the_table() {
        for from in all().await {
            for to in all().await {
                let cell = StateCell(Arc::new(watch::Sender::new(from.clone())));
                let (before, after) = (from.phase(), to.phase());
                let expected = TRANSITIONS.contains(&(before, after));
                assert_eq!(cell.enter(to), expected, "{before:?} to {after:?}");
                assert_eq!(cell.0.borrow().phase(), if expected { after } else { before });
            }
        }
        // The final states `Failed` and `Gone` have no transitions to other states.
        assert!(!TRANSITIONS.iter().any(|(from, _)| matches!(from, Phase::Gone | Phase::Failed)));
    }

    #[tokio::test]
    async fn wait_running_waits_for_the_end_of_the_boot() {
        for (end, expected) in [
            (State::Running(agent().await), Ok(())),
            (State::Failed("no kernel".into()), Err("no kernel")),
            (State::Gone("killed".into()), Err("the sandbox's VM has ended: killed")),
        ] {
            let cell = StateCell::default();
            let waiting = tokio::spawn({
                let cell = cell.clone();
                async move { cell.wait_running().await }
            });
            assert!(!cell.is_launched() && cell.agent().is_none());
            assert!(cell.enter(State::Booting) && cell.is_launched());
            assert!(!cell.enter(State::Booting));
            cell.enter(end);
            assert_eq!(waiting.await.unwrap().map(drop), expected.map_err(Arc::from));
            // `Gone` does not replace `Failed`.
            cell.enter(State::Gone("a later reason".into()));
            assert_eq!(
                cell.wait_running().await.map(drop),
                Err(expected.err().unwrap_or("the sandbox's VM has ended: a later reason").into())
            );
        }
    }

    #[tokio::test]
    async fn end_reason_is_the_first_one_and_ends_the_wait() {
        for (end, later) in [
            (State::Gone("first".into()), State::Gone("second".into())),
            (State::Failed("first".into()), State::Gone("second".into())),
        ] {
            let cell = StateCell::default();
            cell.enter(State::Booting);
            assert_eq!(cell.end_reason(), None);
            let waiting = tokio::spawn({
                let cell = cell.clone();
                async move { cell.wait_end().await }
            });
            assert!(cell.enter(end) && !cell.enter(later));
            assert_eq!((waiting.await.unwrap(), cell.end_reason()), (Some("first".into()), Some("first".into())));
        }
    }
}
