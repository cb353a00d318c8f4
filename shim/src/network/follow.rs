//! Interfaces, addresses, routes, rules and neighbours that change after the pod's start.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use husk_netlink::{Netlink, socket};
use husk_proto::agent::{Interface, NetworkRequest};
use nix::sched::{CloneFlags, setns};

use super::read::{self, Left, Link};
use super::{NetworkError, Tap, Wish, kernel, tap};

/// The groups of rtnetlink(7) that tell of what the guest is given.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE
    | libc::RTMGRP_IPV4_RULE
    | RTMGRP_IPV6_RULE
    | libc::RTMGRP_NEIGH;
/// The bit of RTNLGRP_IPV6_RULE, 19 (linux/rtnetlink.h), which has no such name of its own there.
const RTMGRP_IPV6_RULE: i32 = 1 << (19 - 1);

/// What looks at the namespace again.
#[derive(Debug)]
pub struct Follow {
    namespace: File,
    connected: Vec<Connected>,
    /// Those whose taps were given up: redirections to them are still there.
    given_up: Vec<Connected>,
    /// Addresses of the guest's devices whose interfaces are gone, since a look told of them.
    gone: Vec<[u8; 6]>,
    last: NetworkRequest,
    left: Left,
    wish: Wish,
}

/// An interface that has a tap.
#[derive(Debug)]
struct Connected {
    /// Its index.
    link: i32,
    /// The tap's.
    tap: i32,
    /// What the tap was made for: the guest's device has it for good.
    mac: [u8; 6],
}

impl Connected {
    fn by(tap: &Tap) -> Self {
        Self { link: tap.link, tap: tap.index, mac: tap.mac }
    }
}

/// How the namespace differs from what it was.
#[derive(Debug)]
pub struct Change {
    /// The taps of the interfaces that are new.
    pub taps: Vec<Tap>,
    /// The addresses of those that are gone.
    pub gone: Vec<[u8; 6]>,
    /// All that is there now.
    pub now: NetworkRequest,
}

impl Change {
    /// What is there beside the interfaces that are new: the guest forgets by it what went by the same names and addresses.
    pub fn without_new(&self) -> NetworkRequest {
        let mut rest = self.now.clone();
        let is_new = |mac: &str| self.taps.iter().any(|tap| read::print_mac(&tap.mac) == mac);
        let (new, old) = rest.interfaces.into_iter().partition(|interface: &Interface| is_new(&interface.mac));
        rest.interfaces = old;
        let is_new = |name: &str| new.iter().any(|interface: &Interface| interface.name == name);
        rest.routes.retain(|route| !is_new(&route.interface) && !route.hops.iter().any(|hop| is_new(&hop.interface)));
        rest.neighbours.retain(|neighbour| !is_new(&neighbour.interface));
        rest
    }
}

impl Follow {
    /// Begins in the current namespace, of which so much is given to the guest and so much not, and in which interfaces
    /// have `taps`.
    ///
    /// # Errors
    /// When the namespace has no name.
    pub(super) fn begin(taps: &[Tap], (last, left): (NetworkRequest, Left), wish: Wish) -> io::Result<Self> {
        Ok(Self {
            namespace: File::open("/proc/thread-self/ns/net")?,
            connected: taps.iter().map(Connected::by).collect(),
            given_up: Vec::new(),
            gone: Vec::new(),
            last,
            left,
            wish,
        })
    }

    /// Looks at the namespace and makes taps for interfaces that are new; none when nothing changed. Blocks, and enters
    /// the namespace for good: to be called in a thread that ends with it.
    ///
    /// # Errors
    /// [`NetworkError`]; the next look finds the same again.
    pub fn look(&mut self) -> Result<Option<Change>, NetworkError> {
        setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|error| kernel("be entered")(error.into()))?;
        let netlink = Netlink::open().map_err(kernel("open netlink"))?;
        let all = husk_netlink::links(&netlink).map_err(kernel("list interfaces"))?;
        let is_tap = |index| self.connected.iter().any(|connected| connected.tap == index);
        let links: Vec<Link> =
            all.iter().filter(|link| !is_tap(link.index)).cloned().filter_map(read::usable).collect();
        self.disconnect(&netlink, &all)?;
        let (now, left) = read::all(&netlink, &links)?;
        tell(left.difference(&self.left));
        self.left = left;
        let mut taps = Vec::new();
        for link in &links {
            if self.connected.iter().any(|connected| connected.link == link.index) {
                continue;
            }
            match tap::beside(&netlink, link, self.wish.of_each(1)) {
                Ok(tap) => taps.push(tap),
                Err(error) => {
                    // What leads to those that are there already would stand in the way of the next try.
                    self.given_up.extend(taps.iter().map(Connected::by));
                    return Err(error);
                }
            }
        }
        self.connected.extend(taps.iter().map(Connected::by));
        let changed = !taps.is_empty() || !self.gone.is_empty() || now != self.last;
        self.last.clone_from(&now);
        Ok(changed.then(|| Change { taps, gone: std::mem::take(&mut self.gone), now }))
    }

    /// Removes the taps of interfaces that are gone, or that have another hardware address by now: what comes in their place
    /// gets a tap of its own, and the guest a device.
    fn disconnect(&mut self, netlink: &Netlink, all: &[husk_netlink::Link]) -> Result<(), NetworkError> {
        let (stay, go) = std::mem::take(&mut self.connected).into_iter().partition(|connected: &Connected| {
            all.iter().any(|link| link.index == connected.link && link.mac == connected.mac)
        });
        self.connected = stay;
        let go: Vec<Connected> = go;
        self.gone.extend(go.iter().map(|connected| connected.mac));
        self.given_up.extend(go);
        while let Some(connected) = self.given_up.last() {
            tap::disconnect(netlink, connected.link, connected.tap).map_err(kernel("remove a tap"))?;
            self.given_up.pop();
        }
        Ok(())
    }

    /// What was found was not taken over, nor were the interfaces of `taps`: the next look finds all of it again.
    pub fn forget(&mut self, taps: &[Tap]) {
        self.last = NetworkRequest::default();
        let (kept, given_up): (Vec<_>, Vec<_>) = std::mem::take(&mut self.connected)
            .into_iter()
            .partition(|connected| taps.iter().all(|tap| tap.link != connected.link));
        self.connected = kept;
        self.given_up.extend(given_up);
    }
}

/// Says what the guest does not get.
pub(super) fn tell<'a>(left: impl IntoIterator<Item = &'a String>) {
    left.into_iter().for_each(|what| tracing::warn!("the pod's network has {what}: the guest does not"));
}

/// A socket that has something to read when the current namespace changed. Non-blocking.
///
/// # Errors
/// What the kernel says.
pub(super) fn notices() -> io::Result<OwnedFd> {
    socket(GROUPS as u32, libc::SOCK_NONBLOCK)
}
