//! Connects the guest to the pod's network namespace, which CNI sets up on the host.
//!
//! Each Ethernet interface of the namespace gets a tap. tc filters redirect frames from the interface to the tap, and
//! from the tap to the interface. The interface keeps its name and IP addresses, because statistics and CNI's checks
//! expect this name and these addresses. The guest gets an interface with the same name, MAC address and IP addresses.
//! The guest also gets the namespace's routes, rules and neighbours. A tap exists as long as one of its fds is open.
//! Therefore, the tap disappears when the VMM ends.
//!
//! While [`connect`] runs, the calling thread is in the pod's network namespace. No other work of the shim may run in
//! this namespace. Therefore, the shim's daemon calls `connect` before the async runtime starts, or in a thread that
//! only launches the sandbox.

pub mod port_forwarding;
mod read;
mod sk_lookup;
pub mod sync;
mod tap;
mod watcher;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_netlink::Netlink;
use husk_proto::agent::UpdateNetworkRequest;
use husk_vmm::control::wire;
use nix::sched::{CloneFlags, setns};

use crate::host_view;
use crate::resources::rate_limits::NetRateLimits;
use read::Link;

pub use sk_lookup::PortForwarding;
pub use watcher::{NetworkChange, NetworkWatcher};

/// Private items that the fuzz targets use.
#[cfg(feature = "testing")]
pub mod testing {
    pub use super::read::{links, network};
}

/// Maximum number of fds in the message that creates a VM, not counting the fds of the taps.
const VM_FDS: usize = 4;

/// The taps of a pod's interfaces, and the network configuration for the guest.
#[derive(Debug, Default)]
pub struct Network {
    /// The taps, one for each interface.
    pub taps: Vec<Tap>,
    /// Interfaces with their addresses, and the configured routes, rules and neighbours.
    pub config: UpdateNetworkRequest,
    /// The watcher, and the socket that becomes readable when the network changes. `None` if the network cannot be
    /// watched.
    pub watcher: Option<(NetworkWatcher, OwnedFd)>,
    /// Accepts connections that host processes open in the pod's network namespace. `None` if port forwarding is not
    /// available.
    pub port_forwarding: Option<PortForwarding>,
}

/// Options for creating taps.
#[derive(Debug, Clone, Copy)]
pub struct TapOptions {
    /// Number of queue pairs of each tap, at least 1.
    pub queue_pairs: usize,
    /// Whether to use vhost-net if the host has it.
    pub vhost: bool,
    /// Rate limits of each tap.
    pub rate_limits: NetRateLimits,
}

impl TapOptions {
    /// Reduces the number of queue pairs if the fds of `interfaces` taps would not fit into the message that creates a
    /// VM.
    fn per_interface(self, interfaces: usize) -> Self {
        let fds = (wire::MAX_FDS - VM_FDS) / interfaces.max(1);
        Self { queue_pairs: self.queue_pairs.min(fds).max(1), ..self }
    }
}

/// A tap that exchanges frames with an interface of the pod.
#[derive(Debug)]
pub struct Tap {
    /// The open device, one fd per queue pair.
    pub fds: Vec<OwnedFd>,
    /// Whether vhost-net may carry the frames. If true, tc filters on the host do the MAC anti-spoofing. If false,
    /// the VMM does the MAC anti-spoofing.
    pub vhost: bool,
    /// The interface's index in the namespace.
    pub link: i32,
    /// The tap's index in the namespace.
    pub index: i32,
    /// The interface's MAC address.
    pub mac: [u8; 6],
    /// The interface's MTU in bytes.
    pub mtu: u16,
    /// The interface's rate limits.
    pub rate_limits: NetRateLimits,
}

/// A failure to connect a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A namespace cannot be opened.
    #[error("failed to open the network namespace {path}")]
    Open {
        /// The namespace.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The namespace cannot be entered or left.
    #[error("failed to enter the network namespace {path}")]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// The cause.
        #[source]
        source: nix::Error,
    },
    /// The namespace has too many addresses, routes, neighbours and rules.
    #[error(
        "the pod's network namespace has too many addresses, routes, neighbours and rules: Husk supports at most {max}",
        max = husk_proto::network::MAX_OBJECTS
    )]
    TooLarge,
    /// The kernel rejected an operation.
    #[error("pod network: failed to {step}")]
    Kernel {
        /// The operation that failed. The text completes the error message after "failed to".
        step: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Returns a conversion to [`NetworkError::Kernel`], for use with `map_err`.
fn kernel_error(step: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel { step: step.into(), source }
}

/// Reads the configuration of the network namespace at `path`, and creates a tap for each interface.
///
/// # Errors
/// [`NetworkError`]. Taps created before the failure are removed. The thread returns to its original namespace, unless
/// the error is [`NetworkError::Enter`] with the path `/proc/self/ns/net`.
pub fn connect(path: &Path, options: TapOptions) -> Result<Network, NetworkError> {
    in_namespace(path, || {
        let netlink = Netlink::open().map_err(kernel_error("open a netlink socket"))?;
        let list = || read::links(&netlink).map_err(kernel_error("list interfaces"));
        let create = |links: &[Link]| {
            let each = options.per_interface(links.len());
            links.iter().map(|link| tap::create(&netlink, link, each)).collect()
        };
        let (links, taps, notices) = create_watched(watcher::subscribe, list, create)?;
        let (config, unsupported) = read::network(&netlink, &links)?;
        watcher::log_unsupported(&unsupported);
        let watcher = notices
            .and_then(|notices| Ok((NetworkWatcher::new(&taps, (config.clone(), unsupported), options)?, notices)));
        let network = Network {
            taps,
            config,
            // Best effort. Without a watcher, the pod works, but later changes of its network do not reach the guest.
            watcher: watcher
                .inspect_err(|error| tracing::warn!(%error, "failed to watch the pod's network for changes"))
                .ok(),
            port_forwarding: start_port_forwarding(),
        };
        Ok(network)
    })?
}

/// Lists the interfaces and creates their taps. Returns the interfaces, the taps, and a subscription that misses no
/// later change of these interfaces.
fn create_watched<S>(
    subscribe: impl Fn() -> S,
    list: impl Fn() -> Result<Vec<Link>, NetworkError>,
    create: impl FnOnce(&[Link]) -> Result<Vec<Tap>, NetworkError>,
) -> Result<(Vec<Link>, Vec<Tap>, S), NetworkError> {
    // Subscribe before the first listing of the interfaces, because a later subscription could miss a change.
    let before = subscribe();
    let links = list()?;
    let taps = create(&links)?;
    // `before` contains messages about the new taps. These messages would wake the watcher unnecessarily. `after`
    // contains no such messages. If no interface has changed since the first listing, `after` misses no change. In
    // this case, use `after`.
    let after = subscribe();
    let notices = if without_taps(list()?, &taps) == links { after } else { before };
    Ok((links, taps, notices))
}

/// Removes the taps from a list of interfaces.
fn without_taps(mut links: Vec<Link>, taps: &[Tap]) -> Vec<Link> {
    links.retain(|link| taps.iter().all(|tap| tap.index != link.index));
    links
}

/// Starts port forwarding for the current network namespace. After a failure, logs the error and returns `None`.
fn start_port_forwarding() -> Option<PortForwarding> {
    sk_lookup::attach_to_current_namespace()
        .inspect_err(|error| tracing::warn!(%error, "failed to set up port forwarding for the pod"))
        .ok()
}

/// Watches the new network namespace at `path`, which has only a loopback interface. If `forward_ports` is true, also
/// starts port forwarding.
pub fn watch_new(path: &Path, forward_ports: bool, options: TapOptions) -> Result<Network, NetworkError> {
    in_namespace(path, || {
        let notices = watcher::subscribe();
        let watcher = notices.and_then(|notices| Ok((NetworkWatcher::new(&[], Default::default(), options)?, notices)));
        let watcher = Some(watcher.map_err(kernel_error("subscribe to changes"))?);
        Ok(Network {
            watcher,
            port_forwarding: forward_ports.then(start_port_forwarding).flatten(),
            ..Network::default()
        })
    })?
}

/// Runs `f` in the network namespace at `path`.
///
/// # Errors
/// [`NetworkError::Open`] or [`NetworkError::Enter`] if the namespace cannot be opened, entered or left.
pub fn in_namespace<T>(path: &Path, f: impl FnOnce() -> T) -> Result<T, NetworkError> {
    let open = |path: &Path| File::open(path).map_err(|source| NetworkError::Open { path: path.into(), source });
    let enter = |file: &File, path: &Path| {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|source| NetworkError::Enter { path: path.into(), source })
    };
    let original_path = Path::new("/proc/self/ns/net");
    let reached = host_view::of_process().reach(path);
    let reached = reached.map_err(|source| NetworkError::Open { path: path.into(), source })?;
    let (original, pod) = (open(original_path)?, open(&reached.path)?);
    enter(&pod, path)?;
    let result = f();
    enter(&original, original_path)?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn link(index: i32) -> Link {
        Link { index, name: format!("eth{index}"), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }
    }

    /// Returns the tap of interface 2. The tap's index is 7.
    fn tap() -> Tap {
        let (mac, rate_limits) = ([2, 0, 0, 0, 0, 1], NetRateLimits::default());
        Tap { fds: Vec::new(), vhost: false, link: 2, index: 7, mac, mtu: 1500, rate_limits }
    }

    /// Runs [`create_watched`] with these results of the two listings. Returns the steps in their order, and the number
    /// of the step that made the returned subscription.
    fn watched(first: Vec<Link>, second: Vec<Link>) -> (Vec<&'static str>, usize) {
        let steps = RefCell::new(Vec::new());
        let step = |name| {
            steps.borrow_mut().push(name);
            steps.borrow().len()
        };
        let listings = RefCell::new([first, second].into_iter());
        let list = || {
            step("list");
            Ok(listings.borrow_mut().next().unwrap())
        };
        let create = |_: &[Link]| {
            step("create");
            Ok(vec![tap()])
        };
        let (_, _, subscription) = create_watched(|| step("subscribe"), list, create).unwrap();
        (steps.into_inner(), subscription)
    }

    #[test]
    fn create_watched_subscribes_before_each_listing() {
        let order = ["subscribe", "list", "create", "subscribe", "list"];
        let unchanged = watched(vec![link(2)], vec![link(2), link(7)]);
        assert_eq!((unchanged.0.as_slice(), unchanged.1), (&order[..], 4));
        // Only the first subscription has the message about an interface that appeared after the first listing.
        let changed = watched(vec![link(2)], vec![link(2), link(7), link(3)]);
        assert_eq!((changed.0.as_slice(), changed.1), (&order[..], 1));
    }

    #[test]
    fn without_taps_removes_only_the_taps() {
        let before = vec![link(2)];
        assert_eq!(without_taps(vec![link(2), link(7)], &[tap()]), before);
        assert_ne!(without_taps(vec![link(2), link(3)], &[]), before);
        assert_ne!(without_taps(Vec::new(), &[]), before);
    }

    #[test]
    fn per_interface_fits_all_fds_into_one_message() {
        let options = TapOptions { queue_pairs: 8, vhost: true, rate_limits: NetRateLimits::default() };
        assert_eq!(options.per_interface(1).queue_pairs, 8);
        for interfaces in 1..=wire::MAX_FDS - VM_FDS {
            let each = options.per_interface(interfaces).queue_pairs;
            assert!(interfaces * each <= wire::MAX_FDS - VM_FDS, "{interfaces}");
        }
    }
}
