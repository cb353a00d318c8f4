//! Carries changes of the pod's network to the guest, as long as both are there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use husk_proto::agent::RescanRequest;
use husk_vmm::config::{FdIndex, NetConfig};
use husk_vmm::control::{Answer, Call};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::agent::{Agent, timeouts, within};
use super::vmm::{Vmm, VmmError};
use crate::network::{Change, Follow, NetworkError, Tap};

/// How long after a change the others that belong to it are waited for: an interface, its address and its routes come
/// one after another.
const SETTLE: Duration = Duration::from_millis(50);

/// Why a change does not reach the guest.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    /// The host's side.
    #[error(transparent)]
    Look(#[from] NetworkError),
    /// The machine does not take the interface.
    #[error("plugging an interface into the virtual machine")]
    Plug(#[source] VmmError),
    /// The guest does not.
    #[error("the guest's network")]
    Guest(#[source] ttrpc::Error),
}

/// A request to take over what has changed by now, and the answer when it is: why it cannot be, the whole chain as text.
type Ask = oneshot::Sender<Result<(), String>>;

/// What carries changes over.
pub struct Follower(mpsc::UnboundedSender<Ask>);

impl Follower {
    /// Follows until the virtual machine ends.
    pub fn start(follow: Follow, notices: OwnedFd, vmm: Vmm, agent: Agent) -> Self {
        let (ask, asks) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            tokio::select! {
                result = watch(follow, notices, asks, &vmm, &agent) => if let Err(error) = result {
                    tracing::warn!(%error, "changes of the pod's network go unnoticed from now on");
                },
                _ = vmm.wait() => {}
            }
        });
        Self(ask)
    }

    /// Returns when the guest has what there is by now.
    ///
    /// # Errors
    /// Why it does not get what is new.
    pub async fn settle(&self) -> Result<(), String> {
        let (ask, answer) = oneshot::channel();
        // Nobody follows any more when the machine is gone, which the caller hears of by itself.
        if self.0.send(ask).is_ok() { answer.await.unwrap_or(Ok(())) } else { Ok(()) }
    }
}

async fn watch(
    mut follow: Follow,
    notices: OwnedFd,
    mut asks: mpsc::UnboundedReceiver<Ask>,
    vmm: &Vmm,
    agent: &Agent,
) -> io::Result<()> {
    // SAFETY: the descriptor is moved into the registration and closed with it, not before.
    let notices = unsafe { AsyncFd::register_with_interest(notices, Interest::READABLE)? };
    loop {
        let ask = tokio::select! {
            ready = notices.readable() => {
                ready?.clear_ready();
                tokio::select! {
                    () = tokio::time::sleep(SETTLE) => None,
                    // Whoever asks knows that there is nothing more to come.
                    ask = asks.recv() => ask,
                }
            }
            ask = asks.recv() => match ask {
                Some(ask) => Some(ask),
                None => return Ok(()),
            },
        };
        let mut taken = Ok(());
        if drain(&notices)? {
            let (looked, result) = look(follow).await?;
            follow = looked;
            taken = take_over(&mut follow, result, vmm, agent).await;
        }
        if let Some(ask) = ask {
            // Whoever asked may be gone.
            let _ = ask.send(taken);
        }
    }
}

async fn take_over(
    follow: &mut Follow,
    looked: Result<Option<Change>, NetworkError>,
    vmm: &Vmm,
    agent: &Agent,
) -> Result<(), String> {
    let (result, taps) = match looked {
        Ok(None) => return Ok(()),
        Ok(Some(mut change)) => (carry(&mut change, vmm, agent).await, change.taps),
        Err(error) => (Err(error.into()), Vec::new()),
    };
    if let Err(error) = result {
        follow.forget(&taps);
        let error = crate::chain(&error);
        tracing::warn!(error, "a change of the pod's network does not reach the guest");
        return Err(error);
    }
    tracing::info!("the pod's network has changed");
    Ok(())
}

/// Takes all notices there are; whether there was one.
fn drain(notices: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    let mut some = false;
    loop {
        let mut bytes = [0u8; 8192];
        // SAFETY: the buffer lives through the call and the length is its own.
        let read = unsafe { libc::recv(notices.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match (read, io::Error::last_os_error()) {
            (0.., _) => some = true,
            // Notices were lost: all the more reason to look.
            (_, error) if error.raw_os_error() == Some(libc::ENOBUFS) => some = true,
            (_, error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(some),
            (_, error) => return Err(error),
        }
    }
}

/// Looks from a thread of its own, which is in the pod's network namespace from then on.
async fn look(mut follow: Follow) -> io::Result<(Follow, Result<Option<Change>, NetworkError>)> {
    let (done, looked) = oneshot::channel();
    std::thread::Builder::new().name("pod-network".into()).spawn(move || {
        let result = follow.look();
        // Nobody waits when the sandbox has ended.
        let _ = done.send((follow, result));
    })?;
    looked.await.map_err(io::Error::other)
}

/// What the VMM is told of a tap, whose descriptors are added to those that go with it.
pub fn net_config<'a>(tap: &'a Tap, fds: &mut Vec<BorrowedFd<'a>>) -> NetConfig {
    let mut add = |fd: &'a OwnedFd| {
        fds.push(fd.as_fd());
        FdIndex(fds.len() - 1)
    };
    let taps = tap.fds.iter().map(&mut add).collect();
    NetConfig { taps, vhost: tap.vhost.as_ref().map(add), mac: tap.mac, mtu: tap.mtu }
}

/// Gives the guest what is new; the taps that it has are taken out of `change`.
async fn carry(change: &mut Change, vmm: &Vmm, agent: &Agent) -> Result<(), FollowError> {
    if !change.taps.is_empty() {
        agent.sandbox.network(within(timeouts::SLOW), &change.without_new()).await.map_err(FollowError::Guest)?;
    }
    while let Some(tap) = change.taps.first() {
        let mut fds = Vec::new();
        let config = net_config(tap, &mut fds);
        let slot = match vmm.call(Call::AttachNet(config), &fds).await.map_err(FollowError::Plug)? {
            (Answer::Attached { slot }, _) => slot,
            _ => return Err(FollowError::Plug(VmmError::Unexpected)),
        };
        change.taps.remove(0);
        let request = RescanRequest { slot, ..Default::default() };
        agent.sandbox.rescan(within(timeouts::QUICK), &request).await.map_err(FollowError::Guest)?;
    }
    agent.sandbox.network(within(timeouts::SLOW), &change.now).await.map_err(FollowError::Guest)?;
    Ok(())
}
