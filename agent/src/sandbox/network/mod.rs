//! The pod's network: interfaces found by hardware address, moved into the pod's namespace, named and
//! configured, and kept as the host's are while these change.

mod parts;
mod route;
mod rule;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::Hash;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use husk_proto::agent::{Interface, Neighbour, Route, Rule};
use tokio::time::{Instant, timeout_at};

use super::netlink::{Link, LinkNotices, Message, Netlink, link_header, links};
use super::{NET, namespaces};
use parts::Op;

/// How long an interface may take to appear: its device is there before the guest is asked for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// An address, prefix or hardware address is malformed.
    #[error("{0:?} is no {1}")]
    Malformed(String, &'static str),
    /// No device with this hardware address came.
    #[error("no network device with address {0}")]
    NoDevice(String),
    /// A route or neighbour names an interface that the request does not.
    #[error("no interface {0:?}")]
    NoInterface(String),
    /// Another request is under way.
    #[error("the network is being changed already")]
    Busy,
    /// The kernel refused.
    #[error("cannot {0}")]
    Kernel(String, #[source] io::Error),
    /// The pod's namespaces could not be entered.
    #[error(transparent)]
    Namespace(#[from] namespaces::NamespaceError),
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel(what.into(), source)
}

/// What the pod's network is to be.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Asked {
    /// Interfaces with their addresses.
    pub interfaces: Vec<Interface>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
    /// Rules that lead to the tables.
    pub rules: Vec<Rule>,
    /// Neighbours that somebody set.
    pub neighbours: Vec<Neighbour>,
}

impl Asked {
    /// What there may be when `asked` was not reached from here: of the interfaces those that were there before.
    fn with(mut self, asked: Self) -> Self {
        fn more<T: PartialEq>(all: &mut Vec<T>, new: Vec<T>) {
            let new: Vec<T> = new.into_iter().filter(|part| !all.contains(part)).collect();
            all.extend(new);
        }
        more(&mut self.routes, asked.routes);
        more(&mut self.rules, asked.rules);
        more(&mut self.neighbours, asked.neighbours);
        self
    }
}

/// What the pod's network was made, so far.
struct Made {
    asked: Asked,
    /// Whether all of it is there; some of it may not be when a change failed.
    whole: bool,
}

/// The pod's network as it was last asked for. What a container adds by itself, a bridge or a route, is none of it.
pub struct Network(Mutex<Option<Made>>);

impl Default for Network {
    fn default() -> Self {
        Self(Mutex::new(Some(Made { asked: Asked::default(), whole: true })))
    }
}

impl Network {
    /// Makes it what is asked for now: only what differs from before is touched.
    ///
    /// # Errors
    /// [`NetworkError`] naming the first thing that failed; the next call makes anew whatever this one may have begun.
    pub async fn follow(&self, asked: Asked) -> Result<(), NetworkError> {
        let take = || self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let before = take().ok_or(NetworkError::Busy)?;
        let changed = change(&before, &asked).await;
        let now = match changed {
            Ok(()) => Made { asked, whole: true },
            Err(_) => Made { asked: before.asked.with(asked), whole: false },
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        changed
    }
}

async fn change(Made { asked: before, whole }: &Made, after: &Asked) -> Result<(), NetworkError> {
    if *whole && before == after {
        return Ok(());
    }
    let pod = namespaces::within(Netlink::open)?.map_err(kernel("open netlink"))?;
    let mut routes = differing(&before.routes, &after.routes, *whole, route::place);
    let rules = differing(&before.rules, &after.rules, *whole, rule::place);
    remove(before, after, (&routes, &rules), &pod)?;
    // Those whose routes and neighbours are gone, or never were.
    let mut fresh = Vec::new();
    for interface in after.interfaces.iter().filter(|interface| !before.interfaces.contains(interface)) {
        match before.interfaces.iter().find(|was| was.mac == interface.mac && was.name == interface.name) {
            Some(was) => adjust(was, interface, &pod)?,
            None => {
                bring_in(interface, &pod).await?;
                fresh.push(interface.name.as_str());
            }
        }
    }
    let is_fresh = |route: &&Route| route::interfaces(route).any(|name| fresh.contains(&name));
    routes.extend(after.routes.iter().filter(is_fresh).map(route::place));
    let is_new = |neighbour: &&Neighbour| {
        !whole || !before.neighbours.contains(neighbour) || fresh.contains(&neighbour.interface.as_str())
    };
    let neighbours: Vec<_> = after.neighbours.iter().filter(is_new).collect();
    add(after, (&routes, &neighbours, &rules), &pod)
}

/// Adds what is new: of routes and rules what is in these places.
fn add(
    after: &Asked,
    (routes, neighbours, rules): (&HashSet<route::Place<'_>>, &[&Neighbour], &HashSet<rule::Place>),
    pod: &Netlink,
) -> Result<(), NetworkError> {
    let indices = Indices::of(&after.interfaces, pod)?;
    // A gateway is reachable only once the routes of its link are there.
    let new = after.routes.iter().filter(|route| routes.contains(&route::place(route)));
    let (through, direct): (Vec<_>, Vec<_>) = new.partition(|route| route::is_through(route));
    let mut taken = HashSet::new();
    let mut op = |route| if taken.insert(route::place(route)) { Op::Add } else { Op::Append };
    for route in direct {
        route::change(pod, op(route), route, |name| indices.get(name))?;
    }
    for neighbour in neighbours {
        parts::neighbour(pod, Op::Add, neighbour, indices.get(&neighbour.interface)?)?;
    }
    for route in through {
        route::change(pod, op(route), route, |name| indices.get(name))?;
    }
    // What they lead to is there.
    let mut taken = HashSet::new();
    for rule in after.rules.iter().filter(|rule| rules.contains(&rule::place(rule))) {
        let op = if taken.insert(rule::place(rule)) { Op::Add } else { Op::Append };
        rule::change(pod, op, rule)?;
    }
    Ok(())
}

/// The places in which there is something else than before, or in another order, or if it is not known that all of it is
/// there: all there is in one is made anew.
fn differing<'a, T: PartialEq, P: Eq + Hash>(
    before: &'a [T],
    after: &'a [T],
    whole: bool,
    place: impl Fn(&'a T) -> P,
) -> HashSet<P> {
    let mut places: HashMap<P, (Vec<&T>, Vec<&T>)> = HashMap::new();
    before.iter().for_each(|part| places.entry(place(part)).or_default().0.push(part));
    after.iter().for_each(|part| places.entry(place(part)).or_default().1.push(part));
    places.into_iter().filter(|(_, (before, after))| !whole || before != after).map(|(place, _)| place).collect()
}

/// Takes away what is no longer asked for, the last first; of routes and rules what is in these places.
fn remove(
    before: &Asked,
    after: &Asked,
    (routes, rules): (&HashSet<route::Place<'_>>, &HashSet<rule::Place>),
    pod: &Netlink,
) -> Result<(), NetworkError> {
    let mut gone: Vec<_> = before.rules.iter().filter(|rule| rules.contains(&rule::place(rule))).collect();
    gone.sort_by_key(|rule| std::cmp::Reverse(rule::demands(rule)));
    for rule in gone {
        rule::change(pod, Op::Remove, rule)?;
    }
    if before.interfaces.is_empty() && before.routes.is_empty() && before.neighbours.is_empty() {
        return Ok(());
    }
    let indices = Indices::of(&before.interfaces, pod)?;
    for neighbour in before.neighbours.iter().filter(|neighbour| !after.neighbours.contains(neighbour)) {
        if let Some(index) = indices.find(&neighbour.interface) {
            parts::neighbour(pod, Op::Remove, neighbour, index)?;
        }
    }
    for route in before.routes.iter().rev().filter(|route| routes.contains(&route::place(route))) {
        match route::change(pod, Op::Remove, route, |name| indices.get(name)) {
            // It went with its interface.
            Err(NetworkError::NoInterface(_)) => {}
            result => result?,
        }
    }
    for interface in &before.interfaces {
        let Some(index) = indices.find(&interface.name) else { continue };
        let now = after.interfaces.iter().find(|now| now.mac == interface.mac);
        for address in &interface.addresses {
            if now.is_none_or(|now| !now.addresses.contains(address)) {
                parts::address(pod, Op::Remove, index, address)?;
            }
        }
        if now.is_none() {
            let down = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, libc::IFF_UP as u32));
            // Its device is taken out before another one comes by its name or its hardware address.
            pod.change(down).map_err(kernel(format!("take {} down", interface.name)))?;
        }
    }
    Ok(())
}

/// The guest's indices of the interfaces in a request, by name.
struct Indices<'a>(HashMap<&'a str, i32>);

impl<'a> Indices<'a> {
    fn of(interfaces: &'a [Interface], pod: &Netlink) -> Result<Self, NetworkError> {
        let links = links(pod).map_err(kernel("list interfaces"))?;
        // LOOPBACK_IFINDEX of include/net/flow.h
        let mut indices = HashMap::from([("lo", 1)]);
        for interface in interfaces {
            let mac = parts::parse_mac(&interface.mac)?;
            if let Some(link) = links.iter().find(|link| link.mac == mac) {
                indices.insert(interface.name.as_str(), link.index);
            }
        }
        Ok(Self(indices))
    }

    fn find(&self, name: &str) -> Option<i32> {
        self.0.get(name).copied()
    }

    fn get(&self, name: &str) -> Result<i32, NetworkError> {
        self.find(name).ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    }
}

fn by_mac(netlink: &Netlink, mac: &[u8]) -> Result<Option<Link>, NetworkError> {
    Ok(links(netlink).map_err(kernel("list interfaces"))?.into_iter().find(|link| link.mac == mac))
}

async fn bring_in(interface: &Interface, pod: &Netlink) -> Result<(), NetworkError> {
    let mac = parts::parse_mac(&interface.mac)?;
    let link = match by_mac(pod, &mac)? {
        Some(link) => link,
        None => {
            let found = wait_for(&mac).await?.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?;
            let namespace = File::open(NET).map_err(kernel("open the pod's network namespace"))?;
            let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(found.index, 0, 0))
                .number(libc::IFLA_NET_NS_FD, namespace.as_raw_fd().unsigned_abs())
                // Counts where its first name is taken there (Linux, do_setlink of net/core/rtnetlink.c).
                .text(libc::IFLA_IFNAME, &interface.name);
            let own = Netlink::open().map_err(kernel("open netlink"))?;
            own.change(message).map_err(kernel(format!("move {}", interface.name)))?;
            by_mac(pod, &mac)?.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?
        }
    };
    let up = libc::IFF_UP as u32;
    let mut rename =
        Message::new(libc::RTM_NEWLINK, 0, &link_header(link.index, 0, up)).text(libc::IFLA_IFNAME, &interface.name);
    if interface.mtu > 0 {
        rename = rename.number(libc::IFLA_MTU, interface.mtu);
    }
    pod.change(rename).map_err(kernel(format!("name {}", interface.name)))?;
    pod.change(Message::new(libc::RTM_NEWLINK, 0, &link_header(link.index, up, up)))
        .map_err(kernel(format!("bring {} up", interface.name)))?;
    for address in &interface.addresses {
        parts::address(pod, Op::Add, link.index, address)?;
    }
    Ok(())
}

/// What changed of an interface that stays up: with it down its routes would be gone.
fn adjust(was: &Interface, interface: &Interface, pod: &Netlink) -> Result<(), NetworkError> {
    let mac = parts::parse_mac(&interface.mac)?;
    let index = by_mac(pod, &mac)?.ok_or_else(|| NetworkError::NoInterface(interface.name.clone()))?.index;
    if interface.mtu > 0 && interface.mtu != was.mtu {
        let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, 0));
        pod.change(message.number(libc::IFLA_MTU, interface.mtu))
            .map_err(kernel(format!("set the MTU of {}", interface.name)))?;
    }
    for address in interface.addresses.iter().filter(|address| !was.addresses.contains(address)) {
        parts::address(pod, Op::Add, index, address)?;
    }
    Ok(())
}

async fn wait_for(mac: &[u8]) -> Result<Option<Link>, NetworkError> {
    let notices = LinkNotices::subscribe().map_err(kernel("watch interfaces"))?;
    let own = Netlink::open().map_err(kernel("open netlink"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(link) = by_mac(&own, mac)? {
            return Ok(Some(link));
        }
        match timeout_at(deadline, notices.next()).await {
            Ok(result) => result.map_err(kernel("watch interfaces"))?,
            Err(_) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(priority: u32, source: &str) -> Rule {
        Rule { priority, source: source.to_owned(), table: 100, ..Default::default() }
    }

    #[test]
    fn what_shares_a_place_is_made_anew_together() {
        let before = [rule(1, "10.0.0.0/8"), rule(1, ""), rule(2, "")];
        let after = [rule(1, ""), rule(1, "10.0.0.0/8"), rule(2, ""), rule(3, "")];
        // Their order counts.
        assert_eq!(differing(&before, &after, true, rule::place), HashSet::from([(false, 1), (false, 3)]));
        assert_eq!(differing(&after, &before, true, rule::place), HashSet::from([(false, 1), (false, 3)]));
        // Of what is half made nothing is taken for granted.
        assert_eq!(differing(&before, &before, false, rule::place), HashSet::from([(false, 1), (false, 2)]));
        let asked = |rules: &[Rule]| Asked { rules: rules.to_vec(), ..Asked::default() };
        assert_eq!(asked(&before).with(asked(&after)).rules, [&before[..], &after[3..]].concat());
        let rules = [rule(1, ""), Rule { ipv6: true, ..rule(1, "") }];
        assert_eq!(differing(&rules[..1], &rules, true, rule::place), HashSet::from([(true, 1)]));
    }

    proptest! {
        #[test]
        fn places_that_differ_turn_the_one_into_the_other(before: Vec<(u8, u8)>, after: Vec<(u8, u8)>) {
            let places = differing(&before, &after, true, |part| part.0);
            let mut now: Vec<_> = before.iter().filter(|part| !places.contains(&part.0)).copied().collect();
            now.extend(after.iter().filter(|part| places.contains(&part.0)));
            let of = |list: &[(u8, u8)], place| list.iter().filter(|part| part.0 == place).copied().collect::<Vec<_>>();
            for place in 0..=u8::MAX {
                prop_assert_eq!(of(&now, place), of(&after, place));
            }
        }
    }
}
