//! The pod's network, as CNI made it in a namespace of the host, carried over to the guest.
//!
//! Beside each interface of the namespace a tap is made, and traffic control redirects every frame from one to the
//! other, both ways. The interface keeps its name and addresses, which statistics and CNI's own checks look for; the
//! guest gets an interface of the same name, hardware address, addresses, routes, rules and neighbours. The taps live as
//! long as somebody holds their descriptors: with the VMM they are gone.
//!
//! [`connect`] runs before the daemon has a second thread: it changes the network namespace of the process.

mod follow;
mod read;
mod steer;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use follow::{Change, Follow};
use husk_netlink::Netlink;
use husk_proto::agent::NetworkRequest;
use husk_vmm::control::wire;
use nix::sched::{CloneFlags, setns};
pub use steer::Steer;

/// Descriptors that a machine is made of beside its interfaces', at most.
const MACHINE_FDS: usize = 4;

/// What the guest is given.
#[derive(Debug, Default)]
pub struct Network {
    /// The host's ends, one for each interface.
    pub taps: Vec<Tap>,
    /// Interfaces with their addresses, routes, rules, neighbours that were set.
    pub given: NetworkRequest,
    /// What tells of changes.
    pub follow: Option<(Follow, OwnedFd)>,
    /// What takes connections that are dialled within the namespace.
    pub steer: Option<Steer>,
}

/// How taps are made.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Queues of each, 1 or more.
    pub pairs: usize,
    /// Whether the host's kernel is to carry the guest's frames where it can.
    pub vhost: bool,
}

impl Wish {
    /// For so many interfaces, whose descriptors go to the VMM in one message beside the machine's own: with very many
    /// there are fewer queues.
    fn of_each(self, interfaces: usize) -> Self {
        let room = (wire::MAX_FDS - MACHINE_FDS) / interfaces.max(1);
        Self { pairs: self.pairs.min(room.saturating_sub(usize::from(self.vhost))).max(1), ..self }
    }
}

/// A tap whose frames go to and from an interface of the pod.
#[derive(Debug)]
pub struct Tap {
    /// The open device, once for each of its queues.
    pub fds: Vec<OwnedFd>,
    /// `/dev/vhost-net` where the host's kernel may carry the frames: it drops those with a foreign hardware address. Where
    /// it may not, the VMM is to drop them.
    pub vhost: Option<OwnedFd>,
    /// The interface's index in the namespace.
    pub link: i32,
    /// Its own.
    pub index: i32,
    /// The interface's hardware address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u16,
}

/// Why a pod's network cannot be carried over.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A namespace cannot be opened.
    #[error("opening the network namespace {path}")]
    Open {
        /// The namespace.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace cannot be entered or left.
    #[error("changing to the network namespace {path}")]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// The kernel refused.
    #[error("pod's network: cannot {step}")]
    Kernel {
        /// What was being done.
        step: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn kernel(step: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel { step: step.into(), source }
}

/// Reads the network of the namespace at `path` and puts a tap beside each of its interfaces.
///
/// # Errors
/// [`NetworkError`]; taps made until then are gone. The process is back in its own namespace, but for
/// [`NetworkError::Enter`] of that one.
pub fn connect(path: &Path, wish: Wish) -> Result<Network, NetworkError> {
    within(path, || {
        let netlink = Netlink::open().map_err(kernel("open netlink"))?;
        let links = read::links(&netlink).map_err(kernel("list interfaces"))?;
        let each = wish.of_each(links.len());
        let taps = links.iter().map(|link| tap::beside(&netlink, link, each)).collect::<Result<Vec<_>, _>>()?;
        // What changes after it was read is told; that the taps were made is not.
        let notices = follow::notices();
        let (given, left) = read::all(&netlink, &links)?;
        follow::tell(&left);
        let follow = notices.and_then(|notices| Ok((Follow::begin(&taps, (given.clone(), left), wish)?, notices)));
        let network = Network {
            taps,
            given,
            // The pod runs without it.
            follow: follow.inspect_err(|error| tracing::warn!(%error, "changes of the network go unnoticed")).ok(),
            steer: steered(),
        };
        Ok(network)
    })?
}

/// What carries connections to localhost in the current namespace to the guest.
fn steered() -> Option<Steer> {
    // The pod runs without it.
    steer::current_namespace()
        .inspect_err(|error| tracing::warn!(%error, "no port-forward: connections cannot be steered"))
        .ok()
}

/// What follows a new namespace, at `path`, in which nothing but a loopback interface is yet; with `steer`, ports of its
/// localhost are the guest's.
///
/// # Errors
/// [`NetworkError`], as of [`connect`].
pub fn fresh(path: &Path, steer: bool, wish: Wish) -> Result<Network, NetworkError> {
    within(path, || {
        let notices = follow::notices();
        let follow = notices.and_then(|notices| Ok((Follow::begin(&[], Default::default(), wish)?, notices)));
        let follow = Some(follow.map_err(kernel("watch the namespace"))?);
        Ok(Network { follow, steer: steer.then(steered).flatten(), ..Network::default() })
    })?
}

/// Runs `f` in the network namespace at `path`.
///
/// # Errors
/// [`NetworkError::Open`] and [`NetworkError::Enter`].
pub fn within<T>(path: &Path, f: impl FnOnce() -> T) -> Result<T, NetworkError> {
    let open = |path: &Path| File::open(path).map_err(|source| NetworkError::Open { path: path.into(), source });
    let enter = |file: &File, path: &Path| {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|source| NetworkError::Enter { path: path.into(), source })
    };
    let own = Path::new("/proc/self/ns/net");
    let (home, pod) = (open(own)?, open(path)?);
    enter(&pod, path)?;
    let result = f();
    enter(&home, own)?;
    Ok(result)
}
