//! Detects changes of the pod's interfaces, addresses, routes, rules and neighbours while the pod runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use husk_netlink::{Netlink, socket};
use husk_proto::agent::{Interface, UpdateNetworkRequest};
use nix::sched::{CloneFlags, setns};

use super::read::{self, Link, Unsupported};
use super::{NetworkError, Tap, TapOptions, kernel_error, tap};

/// The rtnetlink(7) multicast groups for the network configuration that the shim copies to the guest.
const MULTICAST_GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE
    | libc::RTMGRP_IPV4_RULE
    | RTMGRP_IPV6_RULE
    | libc::RTMGRP_NEIGH;
/// The bit of group RTNLGRP_IPV6_RULE, which has number 19 (linux/rtnetlink.h). The kernel does not define an RTMGRP_
/// constant for this group.
const RTMGRP_IPV6_RULE: i32 = 1 << (19 - 1);

/// Reads a namespace's network configuration repeatedly, and reports changes.
#[derive(Debug)]
pub struct NetworkWatcher {
    namespace: File,
    tap_links: Vec<TapLink>,
    /// Interfaces whose taps and tc filters must be removed.
    stale: Vec<TapLink>,
    /// MAC addresses of removed interfaces that no [`NetworkChange`] has reported yet.
    removed: Vec<[u8; 6]>,
    last: UpdateNetworkRequest,
    unsupported: Unsupported,
    options: TapOptions,
}

/// An interface that has a tap.
#[derive(Debug)]
struct TapLink {
    /// Index of the interface.
    link: i32,
    /// Index of the tap.
    tap: i32,
    /// MAC address of the interface when the tap was created. The guest's device keeps this address.
    mac: [u8; 6],
}

impl TapLink {
    fn from_tap(tap: &Tap) -> Self {
        Self { link: tap.link, tap: tap.index, mac: tap.mac }
    }
}

/// A change of a namespace's network configuration.
#[derive(Debug)]
pub struct NetworkChange {
    /// The taps of new interfaces.
    pub taps: Vec<Tap>,
    /// The MAC addresses of removed interfaces.
    pub removed: Vec<[u8; 6]>,
    /// The complete current configuration.
    pub current: UpdateNetworkRequest,
}

impl NetworkChange {
    /// Returns `current` without the new interfaces, and without the new interfaces' routes and neighbours.
    ///
    /// The agent applies this configuration before the new interfaces' devices are hot-plugged. The agent thereby
    /// removes the configuration of removed interfaces. This order is needed, because a new interface may have a
    /// removed interface's name or MAC address.
    pub fn without_new(&self) -> UpdateNetworkRequest {
        let mut rest = self.current.clone();
        let is_new = |mac: &str| self.taps.iter().any(|tap| read::format_mac(&tap.mac) == mac);
        let (new, old) = rest.interfaces.into_iter().partition(|interface: &Interface| is_new(&interface.mac));
        rest.interfaces = old;
        let is_new = |name: &str| new.iter().any(|interface: &Interface| interface.name == name);
        rest.routes
            .retain(|route| !is_new(&route.interface) && !route.next_hops.iter().any(|hop| is_new(&hop.interface)));
        rest.neighbours.retain(|neighbour| !is_new(&neighbour.interface));
        rest
    }
}

impl NetworkWatcher {
    /// Returns a watcher of the current namespace. `taps` are the taps of the namespace's interfaces. `last` and
    /// `unsupported` are the result of [`read::network`]. `options` apply to new taps.
    pub(super) fn new(
        taps: &[Tap],
        (last, unsupported): (UpdateNetworkRequest, Unsupported),
        options: TapOptions,
    ) -> io::Result<Self> {
        Ok(Self {
            namespace: File::open("/proc/thread-self/ns/net")?,
            tap_links: taps.iter().map(TapLink::from_tap).collect(),
            stale: Vec::new(),
            removed: Vec::new(),
            last,
            unsupported,
            options,
        })
    }

    /// Reads the namespace and creates taps for new interfaces. Returns `None` if nothing has changed.
    ///
    /// Blocks, and moves the calling thread to the namespace permanently. Therefore, call this function in a
    /// separate thread.
    ///
    /// # Errors
    /// [`NetworkError`]. A failed call loses no changes, because the next call reports these changes.
    pub fn read_change(&mut self) -> Result<Option<NetworkChange>, NetworkError> {
        setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|error| kernel_error("enter the network namespace")(error.into()))?;
        let netlink = Netlink::open().map_err(kernel_error("open a netlink socket"))?;
        let all = husk_netlink::links(&netlink).map_err(kernel_error("list interfaces"))?;
        let is_tap = |index| self.tap_links.iter().any(|tap_link| tap_link.tap == index);
        let links: Vec<Link> =
            all.iter().filter(|link| !is_tap(link.index)).cloned().filter_map(read::to_guest_link).collect();
        self.remove_taps(&netlink, &all)?;
        let (current, unsupported) = read::network(&netlink, &links)?;
        log_unsupported(unsupported.difference(&self.unsupported));
        self.unsupported = unsupported;
        let mut taps = Vec::new();
        for link in &links {
            if self.tap_links.iter().any(|tap_link| tap_link.link == link.index) {
                continue;
            }
            match tap::create(&netlink, link, self.options.per_interface(1)) {
                Ok(tap) => taps.push(tap),
                Err(error) => {
                    // The next call must first remove the taps that this call created. Otherwise, the taps' tc filters
                    // would still be on the interfaces, and creating the same filters again would fail.
                    self.stale.extend(taps.iter().map(TapLink::from_tap));
                    return Err(error);
                }
            }
        }
        self.tap_links.extend(taps.iter().map(TapLink::from_tap));
        let changed = !taps.is_empty() || !self.removed.is_empty() || current != self.last;
        self.last.clone_from(&current);
        Ok(changed.then(|| NetworkChange { taps, removed: std::mem::take(&mut self.removed), current }))
    }

    /// Removes an interface's tap if the interface was removed or its MAC address has changed.
    ///
    /// After a change of the MAC address, the interface counts as a new interface, which gets a new tap and a new
    /// device.
    fn remove_taps(&mut self, netlink: &Netlink, all: &[husk_netlink::Link]) -> Result<(), NetworkError> {
        let (kept, removed) = std::mem::take(&mut self.tap_links).into_iter().partition(|tap_link: &TapLink| {
            all.iter().any(|link| link.index == tap_link.link && link.mac == tap_link.mac)
        });
        self.tap_links = kept;
        let removed: Vec<TapLink> = removed;
        self.removed.extend(removed.iter().map(|tap_link| tap_link.mac));
        self.stale.extend(removed);
        while let Some(tap_link) = self.stale.last() {
            tap::remove(netlink, tap_link.link, tap_link.tap).map_err(kernel_error("remove a tap"))?;
            self.stale.pop();
        }
        Ok(())
    }

    /// Removes all taps, and the tc filters on the pod's interfaces. A network namespace that a client made may outlive
    /// the pod. Best effort, because the namespace may have been removed.
    ///
    /// Blocks, and moves the calling thread to the namespace permanently, as [`NetworkWatcher::read_change`] does.
    pub fn remove_all(&mut self) {
        let entered = setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        let removed = entered.and_then(|()| {
            let netlink = Netlink::open()?;
            let links = self.tap_links.drain(..).chain(self.stale.drain(..));
            links.map(|tap_link| tap::remove(&netlink, tap_link.link, tap_link.tap)).fold(Ok(()), io::Result::and)
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "failed to remove the pod's tc filters");
        }
    }

    /// Records that the guest did not get the change which `read_change` returned. `taps` contains the new interfaces'
    /// taps that were not attached to the VM.
    ///
    /// The next [`NetworkWatcher::read_change`] reports a change, and creates new taps in place of `taps`.
    pub fn mark_undelivered(&mut self, taps: &[Tap]) {
        self.last = UpdateNetworkRequest::default();
        let (kept, stale): (Vec<_>, Vec<_>) = std::mem::take(&mut self.tap_links)
            .into_iter()
            .partition(|tap_link| taps.iter().all(|tap| tap.link != tap_link.link));
        self.tap_links = kept;
        self.stale.extend(stale);
    }
}

/// Logs the entries of the pod's network that Husk does not support.
pub(super) fn log_unsupported<'a>(unsupported: impl IntoIterator<Item = &'a String>) {
    unsupported
        .into_iter()
        .for_each(|what| tracing::warn!("ignored {what} in the pod's network, because Husk does not support them"));
}

/// Opens a non-blocking socket that becomes readable when the network of the current namespace changes.
pub(super) fn subscribe() -> io::Result<OwnedFd> {
    socket(MULTICAST_GROUPS as u32, libc::SOCK_NONBLOCK)
}
