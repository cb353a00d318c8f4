//! Sets up the pod's network: finds interfaces by MAC address, moves them to the pod's network namespace, names them
//! and configures them.
//!
//! When the pod's network on the host changes, a later request updates the network in the guest.

mod address;
mod operation;
mod parse;
mod parts;
mod route;
mod rule;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::Hash;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_base::sync::lock;
use husk_netlink::{Link, Message, Netlink, link_header, links};
use husk_proto::agent::{Interface, Neighbour, Route, Rule, UpdateNetworkRequest};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};

use super::link_notifications::LinkNotifications;
use super::{NET_NAMESPACE, namespaces};
use operation::Operation;
use parts::Parts;

/// Maximum time to wait for an interface. The shim hot-plugs the device before it sends the request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time for a change of the network. This is shorter than the shim's timeout of 60 s.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(50);

/// Reason why setting up or changing the network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A value of the request is malformed. The fields are the value and the kind of value that was expected.
    #[error("invalid network configuration: {0:?} is not a valid {1}")]
    Malformed(String, &'static str),
    /// No interface with this MAC address appeared.
    #[error("failed to find a network interface with MAC address {0}")]
    NoDevice(String),
    /// An interface does not exist in the pod, or a route or neighbour names an interface that the request does not
    /// contain.
    #[error("failed to find interface {0:?} in the pod's network")]
    NoInterface(String),
    /// An earlier part of the configuration is missing. The fields are the part's number and the expected number.
    #[error("failed to join the parts of the network configuration: got part {0} instead of part {1}")]
    Part(u32, u32),
    /// The configuration has too many addresses, routes, neighbours and rules.
    #[error(
        "the pod's network has at least {0} addresses, routes, neighbours and rules, but the maximum is {max}",
        max = husk_proto::network::MAX_OBJECTS
    )]
    TooLarge(usize),
    /// Another request is in progress.
    #[error("failed to change the pod's network: another change is in progress")]
    Busy,
    /// The kernel has not made the change in time.
    #[error("failed to change the pod's network within {} s", CHANGE_TIMEOUT.as_secs())]
    Timeout,
    /// The kernel rejected a netlink request or a system call.
    #[error("failed to {0}")]
    Kernel(String, #[source] io::Error),
    /// Failed to enter the pod's namespaces.
    #[error(transparent)]
    Namespace(#[from] namespaces::NamespaceError),
}

fn kernel_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel(action.into(), source)
}

/// Configuration of the pod's network.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct NetworkConfig {
    /// Interfaces with their addresses.
    pub interfaces: Vec<Interface>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
    /// Routing policy rules.
    pub rules: Vec<Rule>,
    /// Permanent neighbour entries.
    pub neighbours: Vec<Neighbour>,
}

impl NetworkConfig {
    /// Returns all parts that may exist after a failed change from `self` to `config`. The result contains only the
    /// interfaces of `self`, because the next change has to add the new interfaces of `config` again.
    fn merge(mut self, config: Self) -> Self {
        let missing = missing(&self.routes, &config.routes, route::key);
        self.routes.extend(chosen(config.routes, missing));
        let missing = self::missing(&self.rules, &config.rules, rule::key);
        self.rules.extend(chosen(config.rules, missing));
        let missing = self::missing(&self.neighbours, &config.neighbours, neighbour_key);
        self.neighbours.extend(chosen(config.neighbours, missing));
        self
    }
}

/// Returns for each part of `new` whether `all` lacks it. Compares only parts with equal keys.
fn missing<'a, T: PartialEq, K: Eq + Hash>(all: &'a [T], new: &'a [T], key: impl Fn(&'a T) -> K) -> Vec<bool> {
    let mut known: HashMap<K, Vec<&T>> = HashMap::new();
    all.iter().for_each(|part| known.entry(key(part)).or_default().push(part));
    new.iter().map(|part| known.get(&key(part)).is_none_or(|parts| !parts.contains(&part))).collect()
}

fn chosen<T>(parts: Vec<T>, choice: Vec<bool>) -> impl Iterator<Item = T> {
    parts.into_iter().zip(choice).filter(|(_, chosen)| *chosen).map(|(part, _)| part)
}

/// Key of a neighbour: its interface and its address.
fn neighbour_key(neighbour: &Neighbour) -> (&str, &str) {
    (&neighbour.interface, &neighbour.address)
}

/// Configuration that has been applied.
struct Applied {
    config: NetworkConfig,
    /// Whether all parts of `config` exist. False after a failed change.
    complete: bool,
}

/// The pod's network as last requested. Does not include a bridge or route that a container has added.
pub struct Network {
    /// `None` while a change is in progress.
    applied: Arc<Mutex<Option<Applied>>>,
    parts: Mutex<Parts>,
}

impl Default for Network {
    fn default() -> Self {
        let applied = Applied { config: NetworkConfig::default(), complete: true };
        Self { applied: Arc::new(Mutex::new(Some(applied))), parts: Mutex::default() }
    }
}

impl Network {
    /// Adds a part of a configuration. With the last part, changes the network to the configuration.
    ///
    /// # Errors
    /// If the parts do not form a configuration, or as [`Network::apply`].
    pub async fn update(&self, part: UpdateNetworkRequest) -> Result<(), NetworkError> {
        let config = lock(&self.parts).add(part)?;
        match config {
            Some(config) => self.apply(config).await,
            None => Ok(()),
        }
    }

    /// Changes the network to `config`. Touches only parts that differ from the previous configuration.
    ///
    /// The change is made on another thread, because the kernel makes network changes one after the other. A container
    /// can hold the kernel's lock for long (`rtnl_lock` in net/core/rtnetlink.c). The change runs to completion even if
    /// the caller gives up.
    ///
    /// # Errors
    /// Returns the first failure. The next call recreates all parts that this call may have changed. If the kernel does
    /// not answer, calls fail with [`NetworkError::Busy`] until it does.
    pub async fn apply(&self, config: NetworkConfig) -> Result<(), NetworkError> {
        let take_applied = || lock(&self.applied).take();
        let before = take_applied().ok_or(NetworkError::Busy)?;
        let (applied, runtime) = (Arc::clone(&self.applied), Handle::current());
        let changing = spawn_blocking(move || {
            let changed = runtime.block_on(change(&before, &config));
            let after = match changed {
                Ok(()) => Applied { config, complete: true },
                Err(_) => Applied { config: before.config.merge(config), complete: false },
            };
            *lock(&applied) = Some(after);
            changed
        });
        match timeout(CHANGE_TIMEOUT, changing).await {
            Ok(Ok(changed)) => changed,
            Ok(Err(error)) => Err(kernel_error("change the pod's network")(io::Error::other(error))),
            Err(_) => Err(NetworkError::Timeout),
        }
    }
}

/// Makes a change. Blocks the calling thread, except while it waits for an interface.
async fn change(Applied { config: before, complete }: &Applied, after: &NetworkConfig) -> Result<(), NetworkError> {
    if *complete && before == after {
        return Ok(());
    }
    let pod = namespaces::run_in_pod(Netlink::open)?.map_err(kernel_error("open a netlink socket"))?;
    let mut routes = changed_keys(&before.routes, &after.routes, *complete, route::key);
    let rules = changed_keys(&before.rules, &after.rules, *complete, rule::key);
    remove(before, after, (&routes, &rules), &pod)?;
    // Names of the interfaces that this change adds. All routes and neighbours of these interfaces have to be added,
    // even routes and neighbours that `before` also contains.
    let mut added = Vec::new();
    for interface in after.interfaces.iter().filter(|interface| !before.interfaces.contains(interface)) {
        match before.interfaces.iter().find(|previous| previous.mac == interface.mac && previous.name == interface.name)
        {
            Some(previous) => update_interface(previous, interface, &pod)?,
            None => {
                add_interface(interface, &pod).await?;
                added.push(interface.name.as_str());
            }
        }
    }
    let has_added_interface = |route: &&Route| route::interfaces(route).any(|name| added.contains(&name));
    routes.extend(after.routes.iter().filter(has_added_interface).map(route::key));
    let changed = changed_keys(&before.neighbours, &after.neighbours, *complete, neighbour_key);
    let is_new = |neighbour: &&Neighbour| {
        changed.contains(&neighbour_key(neighbour)) || added.contains(&neighbour.interface.as_str())
    };
    let neighbours: Vec<_> = after.neighbours.iter().filter(is_new).collect();
    add(after, (&routes, &neighbours, &rules), &pod)
}

/// Adds the routes and rules with the given keys, and the given neighbours.
fn add(
    after: &NetworkConfig,
    (routes, neighbours, rules): (&HashSet<route::Key<'_>>, &[&Neighbour], &HashSet<rule::Key>),
    pod: &Netlink,
) -> Result<(), NetworkError> {
    let indices = InterfaceIndices::read(&after.interfaces, pod)?;
    // Direct routes are added first, because the kernel accepts a gateway only if a direct route leads to the gateway.
    let new = after.routes.iter().filter(|route| routes.contains(&route::key(route)));
    let (via_gateway, direct): (Vec<_>, Vec<_>) = new.partition(|route| route::has_gateway(route));
    let mut seen_keys = HashSet::new();
    let mut op = |route| if seen_keys.insert(route::key(route)) { Operation::Add } else { Operation::Append };
    for route in direct {
        route::change(pod, op(route), route, |name| indices.get(name))?;
    }
    for neighbour in neighbours {
        address::change_neighbour(pod, Operation::Add, neighbour, indices.get(&neighbour.interface)?)?;
    }
    for route in via_gateway {
        route::change(pod, op(route), route, |name| indices.get(name))?;
    }
    // Rules are added last, because the tables that they look up must be filled first.
    let mut seen_keys = HashSet::new();
    for rule in after.rules.iter().filter(|rule| rules.contains(&rule::key(rule))) {
        let op = if seen_keys.insert(rule::key(rule)) { Operation::Add } else { Operation::Append };
        rule::change(pod, op, rule)?;
    }
    Ok(())
}

/// Adds all parts of `config`. Each address goes to the interface with index 2.
#[cfg(feature = "testing")]
pub fn add_all(config: &NetworkConfig, pod: &Netlink) -> Result<(), NetworkError> {
    for address in config.interfaces.iter().flat_map(|interface| &interface.addresses) {
        address::change(pod, Operation::Add, 2, address)?;
    }
    let routes = changed_keys(&[], &config.routes, true, route::key);
    let rules = changed_keys(&[], &config.rules, true, rule::key);
    add(config, (&routes, &config.neighbours.iter().collect::<Vec<_>>(), &rules), pod)
}

/// Returns the keys of the parts that differ between `before` and `after`, in content or in order. All parts with a
/// returned key have to be recreated together. If `complete` is false, returns all keys.
fn changed_keys<'a, T: PartialEq, P: Eq + Hash>(
    before: &'a [T],
    after: &'a [T],
    complete: bool,
    key: impl Fn(&'a T) -> P,
) -> HashSet<P> {
    let mut parts: HashMap<P, (Vec<&T>, Vec<&T>)> = HashMap::new();
    before.iter().for_each(|part| parts.entry(key(part)).or_default().0.push(part));
    after.iter().for_each(|part| parts.entry(key(part)).or_default().1.push(part));
    parts.into_iter().filter(|(_, (before, after))| !complete || before != after).map(|(key, _)| key).collect()
}

/// Removes the parts that are no longer configured, and all routes and rules with the given keys. The parts that were
/// added last are removed first.
fn remove(
    before: &NetworkConfig,
    after: &NetworkConfig,
    (routes, rules): (&HashSet<route::Key<'_>>, &HashSet<rule::Key>),
    pod: &Netlink,
) -> Result<(), NetworkError> {
    let mut removed_rules: Vec<_> = before.rules.iter().filter(|rule| rules.contains(&rule::key(rule))).collect();
    removed_rules.sort_by_key(|rule| std::cmp::Reverse(rule::selector_count(rule)));
    for rule in removed_rules {
        rule::change(pod, Operation::Remove, rule)?;
    }
    if before.interfaces.is_empty() && before.routes.is_empty() && before.neighbours.is_empty() {
        return Ok(());
    }
    let indices = InterfaceIndices::read(&before.interfaces, pod)?;
    let changed = changed_keys(&before.neighbours, &after.neighbours, true, neighbour_key);
    for neighbour in before.neighbours.iter().filter(|neighbour| changed.contains(&neighbour_key(neighbour))) {
        if let Some(index) = indices.find(&neighbour.interface) {
            address::change_neighbour(pod, Operation::Remove, neighbour, index)?;
        }
    }
    for route in before.routes.iter().rev().filter(|route| routes.contains(&route::key(route))) {
        match route::change(pod, Operation::Remove, route, |name| indices.get(name)) {
            // The kernel removed the route together with its interface.
            Err(NetworkError::NoInterface(_)) => {}
            result => result?,
        }
    }
    for interface in &before.interfaces {
        let Some(index) = indices.find(&interface.name) else { continue };
        let current = after.interfaces.iter().find(|current| current.mac == interface.mac);
        for address in &interface.addresses {
            if current.is_none_or(|current| !current.addresses.contains(address)) {
                address::change(pod, Operation::Remove, index, address)?;
            }
        }
        if current.is_none() {
            let down = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, libc::IFF_UP as u32));
            // The agent only brings the interface down. The interface disappears when the shim hot-unplugs its device.
            // The shim does so before it adds another device with the same name or MAC address.
            pod.change(down).map_err(kernel_error(format!("bring down interface {}", interface.name)))?;
        }
    }
    Ok(())
}

/// Maps the names of a request's interfaces to their interface indices in the guest.
struct InterfaceIndices<'a>(HashMap<&'a str, i32>);

impl<'a> InterfaceIndices<'a> {
    fn read(interfaces: &'a [Interface], pod: &Netlink) -> Result<Self, NetworkError> {
        let links = links(pod).map_err(kernel_error("list interfaces"))?;
        // LOOPBACK_IFINDEX of include/net/flow.h
        let mut indices = HashMap::from([("lo", 1)]);
        for interface in interfaces {
            let mac = parse::parse_mac(&interface.mac)?;
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
    Ok(links(netlink).map_err(kernel_error("list interfaces"))?.into_iter().find(|link| link.mac == mac))
}

async fn add_interface(interface: &Interface, pod: &Netlink) -> Result<(), NetworkError> {
    let mac = parse::parse_mac(&interface.mac)?;
    let link = match by_mac(pod, &mac)? {
        Some(link) => link,
        None => {
            let found = wait_for_link(&mac).await?.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?;
            let namespace = File::open(NET_NAMESPACE).map_err(kernel_error("open the pod's network namespace"))?;
            let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(found.index, 0, 0))
                .number(libc::IFLA_NET_NS_FD, namespace.as_raw_fd().unsigned_abs())
                // The move includes a rename, because the pod's namespace may already have an interface with the old
                // name (Linux, `do_setlink` of net/core/rtnetlink.c).
                .text(libc::IFLA_IFNAME, &interface.name);
            let agent_netlink = Netlink::open().map_err(kernel_error("open a netlink socket"))?;
            agent_netlink
                .change(message)
                .map_err(kernel_error(format!("move interface {} to the pod's network namespace", interface.name)))?;
            by_mac(pod, &mac)?.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?
        }
    };
    let up = libc::IFF_UP as u32;
    let mut rename =
        Message::new(libc::RTM_NEWLINK, 0, &link_header(link.index, 0, up)).text(libc::IFLA_IFNAME, &interface.name);
    if interface.mtu > 0 {
        rename = rename.number(libc::IFLA_MTU, interface.mtu);
    }
    pod.change(rename).map_err(kernel_error(format!("set the name and MTU of interface {}", interface.name)))?;
    pod.change(Message::new(libc::RTM_NEWLINK, 0, &link_header(link.index, up, up)))
        .map_err(kernel_error(format!("bring up interface {}", interface.name)))?;
    for address in &interface.addresses {
        address::change(pod, Operation::Add, link.index, address)?;
    }
    Ok(())
}

/// Updates an interface while it stays up. If the interface went down, the kernel would remove its routes.
fn update_interface(previous: &Interface, interface: &Interface, pod: &Netlink) -> Result<(), NetworkError> {
    let mac = parse::parse_mac(&interface.mac)?;
    let index = by_mac(pod, &mac)?.ok_or_else(|| NetworkError::NoInterface(interface.name.clone()))?.index;
    if interface.mtu > 0 && interface.mtu != previous.mtu {
        let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, 0, 0));
        pod.change(message.number(libc::IFLA_MTU, interface.mtu))
            .map_err(kernel_error(format!("set the MTU of interface {}", interface.name)))?;
    }
    for address in interface.addresses.iter().filter(|address| !previous.addresses.contains(address)) {
        address::change(pod, Operation::Add, index, address)?;
    }
    Ok(())
}

async fn wait_for_link(mac: &[u8]) -> Result<Option<Link>, NetworkError> {
    let notifications = LinkNotifications::subscribe().map_err(kernel_error("subscribe to link notifications"))?;
    let agent_netlink = Netlink::open().map_err(kernel_error("open a netlink socket"))?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(link) = by_mac(&agent_netlink, mac)? {
            return Ok(Some(link));
        }
        match timeout_at(deadline, notifications.next()).await {
            Ok(result) => result.map_err(kernel_error("receive link notifications"))?,
            Err(_) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc::channel;

    use proptest::prelude::*;
    use tokio::runtime::Builder;
    use tokio::time::{advance, pause};

    use super::*;

    fn rule(priority: u32, source: &str) -> Rule {
        Rule { priority, source: source.to_owned(), table: 100, ..Default::default() }
    }

    #[test]
    fn changed_keys_returns_keys_with_changed_content_or_order() {
        let before = [rule(1, "10.0.0.0/8"), rule(1, ""), rule(2, "")];
        let after = [rule(1, ""), rule(1, "10.0.0.0/8"), rule(2, ""), rule(3, "")];
        // Parts with the same key also count as changed if only their order differs.
        assert_eq!(changed_keys(&before, &after, true, rule::key), HashSet::from([(false, 1), (false, 3)]));
        assert_eq!(changed_keys(&after, &before, true, rule::key), HashSet::from([(false, 1), (false, 3)]));
        // After a failed change, all keys have to be recreated.
        assert_eq!(changed_keys(&before, &before, false, rule::key), HashSet::from([(false, 1), (false, 2)]));
        let config = |rules: &[Rule]| NetworkConfig { rules: rules.to_vec(), ..NetworkConfig::default() };
        assert_eq!(config(&before).merge(config(&after)).rules, [&before[..], &after[3..]].concat());
        let rules = [rule(1, ""), Rule { ipv6: true, ..rule(1, "") }];
        assert_eq!(changed_keys(&rules[..1], &rules, true, rule::key), HashSet::from([(true, 1)]));
    }

    #[test]
    fn change_of_the_network_does_not_block_the_async_thread_and_has_a_limit() {
        let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let (release, released) = channel::<()>();
        let occupied = runtime.spawn_blocking(move || released.recv());
        runtime.block_on(async {
            pause();
            let network = Network::default();
            // The namespaces of the pod do not exist. The change fails as soon as it has a thread.
            let config = || NetworkConfig { rules: vec![rule(1, "")], ..Default::default() };
            let hanging = {
                let mut change = pin!(network.apply(config()));
                let begin = Instant::now();
                loop {
                    tokio::select! {
                        biased;
                        changed = &mut change => break changed,
                        () = advance(Duration::from_secs(1)) => assert!(begin.elapsed() <= CHANGE_TIMEOUT * 2),
                    }
                }
            };
            assert!(matches!(hanging, Err(NetworkError::Timeout)), "{hanging:?}");
            assert!(matches!(network.apply(config()).await, Err(NetworkError::Busy)));
            drop(release);
            occupied.await.unwrap().unwrap_err();
            // The only thread has then ended the change.
            spawn_blocking(|| {}).await.unwrap();
            let next = network.apply(config()).await;
            assert!(matches!(next, Err(NetworkError::Namespace(_))), "{next:?}");
        });
    }

    proptest! {
        #[test]
        fn recreating_changed_keys_yields_the_new_list(before: Vec<(u8, u8)>, after: Vec<(u8, u8)>) {
            let keys = changed_keys(&before, &after, true, |part| part.0);
            let mut current: Vec<_> = before.iter().filter(|part| !keys.contains(&part.0)).copied().collect();
            current.extend(after.iter().filter(|part| keys.contains(&part.0)));
            let of = |list: &[(u8, u8)], key| list.iter().filter(|part| part.0 == key).copied().collect::<Vec<_>>();
            for key in 0..=u8::MAX {
                prop_assert_eq!(of(&current, key), of(&after, key));
            }
        }
    }
}
