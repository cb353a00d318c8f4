//! Interfaces, addresses, routes and neighbours that change after the pod's start.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use husk_netlink::{Netlink, socket};
use husk_proto::agent::NetworkRequest;
use nix::sched::{CloneFlags, setns};

use super::read::{self, Link};
use super::{NetworkError, Tap, Wish, kernel, tap};

/// The groups of rtnetlink(7) that tell of what the guest is given.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE
    | libc::RTMGRP_NEIGH;

/// What looks at the namespace again.
#[derive(Debug)]
pub struct Follow {
    namespace: File,
    /// The interfaces that have a tap, by their indices.
    connected: Vec<i32>,
    /// The taps, by theirs.
    taps: Vec<i32>,
    last: NetworkRequest,
    wish: Wish,
}

/// How the namespace differs from what it was.
#[derive(Debug)]
pub struct Change {
    /// The taps of the interfaces that are new.
    pub taps: Vec<Tap>,
    /// All that is there now.
    pub now: NetworkRequest,
}

impl Follow {
    /// Begins in the current namespace, of which `last` is known and in which `links` have `taps`.
    ///
    /// # Errors
    /// When the namespace has no name.
    pub(super) fn begin(links: &[Link], taps: &[Tap], last: NetworkRequest, wish: Wish) -> io::Result<Self> {
        Ok(Self {
            namespace: File::open("/proc/thread-self/ns/net")?,
            connected: links.iter().map(|link| link.index).collect(),
            taps: taps.iter().map(|tap| tap.index).collect(),
            last,
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
        let mut links = read::links(&netlink).map_err(kernel("list interfaces"))?;
        links.retain(|link| !self.taps.contains(&link.index));
        let now = read::all(&netlink, &links)?;
        let new = links.iter().filter(|link| !self.connected.contains(&link.index));
        let taps = new.map(|link| tap::beside(&netlink, link, self.wish.of_each(1))).collect::<Result<Vec<_>, _>>()?;
        self.connected.extend(taps.iter().map(|tap| tap.link));
        self.taps.extend(taps.iter().map(|tap| tap.index));
        let changed = !taps.is_empty() || now != self.last;
        self.last.clone_from(&now);
        Ok(changed.then_some(Change { taps, now }))
    }

    /// What was found was not taken over, nor were the interfaces of `taps`: the next look finds all of it again.
    pub fn forget(&mut self, taps: &[Tap]) {
        self.last = NetworkRequest::default();
        self.connected.retain(|index| taps.iter().all(|tap| tap.link != *index));
    }
}

/// A socket that has something to read when the current namespace changed. Non-blocking.
///
/// # Errors
/// What the kernel says.
pub(super) fn notices() -> io::Result<OwnedFd> {
    socket(GROUPS as u32, libc::SOCK_NONBLOCK)
}
