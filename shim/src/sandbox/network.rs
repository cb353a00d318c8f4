//! Carries changes of the pod's network to the guest, as long as both are there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_proto::agent::{ReleaseRequest, RescanRequest};
use husk_vmm::config::{FdIndex, NetConfig};
use husk_vmm::control::{Answer, Call};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::agent::{Agent, timeouts, within};
use super::vmm::{Vmm, VmmError};
use crate::lock;
use crate::network::{Change, Follow, NetworkError, Tap};

/// How long after a change the others that belong to it are waited for: an interface, its address and its routes come
/// one after another.
const SETTLE: Duration = Duration::from_millis(50);
/// After which what did not reach the guest is tried again, at first; then after twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
/// And at last.
const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

/// Why a change does not reach the guest.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    /// The host's side.
    #[error(transparent)]
    Look(#[from] NetworkError),
    /// It cannot be looked at all.
    #[error("looking at the pod's network")]
    Thread(#[source] io::Error),
    /// The machine does not take the interface, or does not give it back.
    #[error("plugging an interface into the virtual machine, or taking one out")]
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
        let (ask, mut asks) = mpsc::unbounded_channel();
        let end = vmm.clone();
        let mut guest =
            Guest { follow: Arc::new(Mutex::new(follow)), vmm, agent, unseen: Vec::new(), gone: Vec::new() };
        let following = async move {
            let Err(error) = watch(notices, &mut asks, &mut guest).await else { return };
            tracing::warn!(%error, "changes of the pod's network go unnoticed from now on");
            while let Some(ask) = asks.recv().await {
                let _ = ask.send(Err(format!("changes of the pod's network go unnoticed: {error}")));
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                () = following => {}
                _ = end.wait() => {}
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

/// Where changes are carried to.
trait Carry {
    /// Looks at what there is, and carries over what is new.
    fn carry(&mut self) -> impl Future<Output = Result<(), FollowError>> + Send;
}

/// What the guest still lacks, since the last try failed.
struct Behind {
    error: String,
    again: Instant,
    wait: Duration,
}

impl Behind {
    fn next(before: Option<Self>, error: FollowError) -> Self {
        let error = crate::chain(&error);
        if before.as_ref().is_none_or(|before| before.error != error) {
            tracing::warn!(error, "a change of the pod's network does not reach the guest yet");
        }
        let wait = before.map_or(AGAIN, |before| (before.wait * 2).min(AGAIN_AT_MOST));
        Self { error, again: Instant::now() + wait, wait }
    }
}

/// Carries over what changes, until nobody may ask any more.
async fn watch(notices: OwnedFd, asks: &mut mpsc::UnboundedReceiver<Ask>, guest: &mut impl Carry) -> io::Result<()> {
    // SAFETY: the descriptor is moved into the registration and closed with it, not before.
    let notices = unsafe { AsyncFd::register_with_interest(notices, Interest::READABLE)? };
    let mut behind: Option<Behind> = None;
    loop {
        let again = behind.as_ref().map(|behind| behind.again);
        let ask = tokio::select! {
            // Every try makes taps, and so notices of its own: these do not hasten the next.
            ready = notices.readable(), if again.is_none() => {
                ready?.clear_ready();
                tokio::select! {
                    () = tokio::time::sleep(SETTLE) => None,
                    // Whoever asks knows that there is nothing more to come.
                    ask = asks.recv() => ask,
                }
            }
            () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => None,
            ask = asks.recv() => match ask {
                Some(ask) => Some(ask),
                None => return Ok(()),
            },
        };
        if drain(&notices)? || behind.is_some() {
            behind = match guest.carry().await {
                Ok(()) => None,
                Err(error) => Some(Behind::next(behind.take(), error)),
            };
        }
        if let Some(ask) = ask {
            // Whoever asked may be gone.
            let _ = ask.send(behind.as_ref().map_or(Ok(()), |behind| Err(behind.error.clone())));
        }
    }
}

/// The pod's guest.
struct Guest {
    follow: Arc<Mutex<Follow>>,
    vmm: Vmm,
    agent: Agent,
    /// Slots with interfaces that the guest has not looked at yet.
    unseen: Vec<u32>,
    /// Addresses of devices whose interfaces are gone.
    gone: Vec<[u8; 6]>,
}

impl Carry for Guest {
    async fn carry(&mut self) -> Result<(), FollowError> {
        let Some(mut change) = look(&self.follow).await? else { return Ok(()) };
        self.gone.append(&mut change.gone);
        let carried = self.give(&mut change).await;
        match &carried {
            Ok(()) => tracing::info!("the pod's network has changed"),
            Err(_) => lock(&self.follow).forget(&change.taps),
        }
        carried
    }
}

impl Guest {
    /// Gives the guest what is new; the taps that it has are taken out of `change`.
    async fn give(&mut self, change: &mut Change) -> Result<(), FollowError> {
        self.have_seen().await?;
        if !change.taps.is_empty() || !self.gone.is_empty() {
            let rest = change.without_new();
            self.agent.sandbox.network(within(timeouts::SLOW), &rest).await.map_err(FollowError::Guest)?;
        }
        // Before one comes that may have the same address.
        self.take_out().await?;
        while let Some(tap) = change.taps.first() {
            let mut fds = Vec::new();
            let config = net_config(tap, &mut fds);
            let slot = match self.call(Call::AttachNet(config), &fds).await? {
                (Answer::Attached { slot }, _) => slot,
                _ => return Err(FollowError::Plug(VmmError::Unexpected)),
            };
            change.taps.remove(0);
            self.unseen.push(slot);
            self.have_seen().await?;
        }
        self.agent.sandbox.network(within(timeouts::SLOW), &change.now).await.map_err(FollowError::Guest)?;
        Ok(())
    }

    /// Takes the devices out whose interfaces are gone: others may come in their slots.
    async fn take_out(&mut self) -> Result<(), FollowError> {
        while let Some(&mac) = self.gone.last() {
            if let (Answer::Attached { slot }, _) = self.call(Call::FindNet(mac), &[]).await? {
                let request = ReleaseRequest { slot, ..Default::default() };
                self.agent.sandbox.release(within(timeouts::SLOW), &request).await.map_err(FollowError::Guest)?;
                self.call(Call::Detach { slot }, &[]).await?;
            }
            self.gone.pop();
        }
        Ok(())
    }

    async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Option<OwnedFd>), FollowError> {
        self.vmm.call(call, fds).await.map_err(FollowError::Plug)
    }

    /// Has the guest look at the slots that something was plugged into.
    async fn have_seen(&mut self) -> Result<(), FollowError> {
        while let Some(&slot) = self.unseen.last() {
            let request = RescanRequest { slot, ..Default::default() };
            self.agent.sandbox.rescan(within(timeouts::QUICK), &request).await.map_err(FollowError::Guest)?;
            self.unseen.pop();
        }
        Ok(())
    }
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
async fn look(follow: &Arc<Mutex<Follow>>) -> Result<Option<Change>, FollowError> {
    let (done, looked) = oneshot::channel();
    let follow = Arc::clone(follow);
    let thread = std::thread::Builder::new().name("pod-network".into()).spawn(move || {
        // Nobody waits when the sandbox has ended.
        let _ = done.send(lock(&follow).look());
    });
    thread.map_err(FollowError::Thread)?;
    Ok(looked.await.map_err(|error| FollowError::Thread(io::Error::other(error)))??)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// A guest that takes a change at the try of that number, and tells of every try.
    struct Fails {
        tries: mpsc::UnboundedSender<Instant>,
        left: u32,
        notices: UnixStream,
    }

    impl Carry for Fails {
        async fn carry(&mut self) -> Result<(), FollowError> {
            self.tries.send(Instant::now()).unwrap();
            // As a tap does that is made for the try.
            self.notices.write_all(b"x").unwrap();
            match self.left {
                0 => Ok(()),
                _ => {
                    self.left -= 1;
                    Err(FollowError::Plug(VmmError::Unexpected))
                }
            }
        }
    }

    /// What watches, with the first try still to come: what notices come by, and the tries' times.
    fn watched(left: u32) -> (Follower, UnixStream, mpsc::UnboundedReceiver<Instant>) {
        let (notices, input) = UnixStream::pair().unwrap();
        notices.set_nonblocking(true).unwrap();
        let (ask, mut asks) = mpsc::unbounded_channel();
        let (tries, tried) = mpsc::unbounded_channel();
        let mut guest = Fails { tries, left, notices: input.try_clone().unwrap() };
        tokio::spawn(async move { watch(notices.into(), &mut asks, &mut guest).await.unwrap() });
        (Follower(ask), input, tried)
    }

    #[tokio::test(start_paused = true)]
    async fn what_did_not_reach_the_guest_is_tried_again() {
        let (_follower, mut input, mut tried) = watched(7);
        input.write_all(b"x").unwrap();
        let mut last = tried.recv().await.unwrap();
        for secs in [1, 2, 4, 8, 16, 30, 30] {
            let at = tried.recv().await.unwrap();
            // By the clock of the runtime, which is exact to a millisecond.
            assert_eq!((at - last).as_secs(), secs);
            last = at;
        }
        // The last one went well: its own notice is looked into, and then nothing more is tried.
        assert!((tried.recv().await.unwrap() - last) < AGAIN);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_asks_hears_what_is_lacking_and_has_it_tried_again() {
        let (follower, mut input, mut tried) = watched(2);
        assert_eq!(follower.settle().await, Ok(()));
        assert!(tried.try_recv().is_err(), "nothing changed");
        input.write_all(b"x").unwrap();
        let began = Instant::now();
        assert!(follower.settle().await.unwrap_err().contains("plugging"));
        assert!(follower.settle().await.is_err());
        assert_eq!(follower.settle().await, Ok(()));
        assert!(began.elapsed() < AGAIN);
    }
}
