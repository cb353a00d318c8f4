//! Reads the configuration of a network namespace through rtnetlink(7).

mod route;
mod rule;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_netlink::{Message, Netlink, attributes};
use husk_proto::agent::{Interface, Neighbour, UpdateNetworkRequest};
use husk_proto::network::MAX_OBJECTS;

use super::{NetworkError, kernel_error};

/// A parsed entry of a netlink dump.
#[derive(Debug, PartialEq)]
enum Entry<T> {
    /// The guest gets the entry.
    Supported(T),
    /// The guest does not need the entry. Either the guest's kernel creates the same entry, or the entry has no meaning
    /// in a guest.
    Implicit,
    /// The guest needs the entry, but Husk does not support such entries. The text describes such entries for the log.
    Unsupported(String),
}

/// Descriptions of the entries that Husk does not support, for the log.
pub type Unsupported = BTreeSet<String>;

/// An Ethernet interface that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index in the namespace.
    pub index: i32,
    /// Name.
    pub name: String,
    /// MAC address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u16,
}

/// Lists the interfaces that the guest gets.
///
/// Omits interfaces that are down, and interfaces that are not Ethernet (such as `lo` and `tunl0`).
pub fn links(netlink: &Netlink) -> io::Result<Vec<Link>> {
    Ok(husk_netlink::links(netlink)?.into_iter().filter_map(to_guest_link).collect())
}

/// Converts an interface. Returns `None` if the guest does not get the interface.
pub fn to_guest_link(link: husk_netlink::Link) -> Option<Link> {
    let (up, loopback) = (libc::IFF_UP as u32, libc::IFF_LOOPBACK as u32);
    if link.hardware != libc::ARPHRD_ETHER || link.flags & up == 0 || link.flags & loopback != 0 {
        return None;
    }
    let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
    Some(Link { index: link.index, name: link.name, mac: link.mac.try_into().ok()?, mtu })
}

/// Reads the network configuration for the guest. `links` are the interfaces that the guest gets. The second result
/// describes the entries that Husk does not support.
///
/// # Errors
/// [`NetworkError::TooLarge`] if the configuration has more than [`MAX_OBJECTS`] objects, or [`NetworkError::Kernel`].
pub fn network(netlink: &Netlink, links: &[Link]) -> Result<(UpdateNetworkRequest, Unsupported), NetworkError> {
    network_of(netlink, links, MAX_OBJECTS)
}

fn network_of(
    netlink: &Netlink,
    links: &[Link],
    max: usize,
) -> Result<(UpdateNetworkRequest, Unsupported), NetworkError> {
    let names: HashMap<u32, &str> = links.iter().map(|link| (link.index.unsigned_abs(), link.name.as_str())).collect();
    let (mut unsupported, mut dumps) = (Unsupported::new(), Dumps { netlink, left: max });
    let (routes, rules) = (libc::RTM_GETROUTE, libc::RTM_GETRULE);
    let request = UpdateNetworkRequest {
        interfaces: interfaces(&mut dumps, links)?,
        routes: dumps.both_families("list routes", routes, &mut unsupported, |body| route::parse(body, &names))?,
        neighbours: neighbours(&mut dumps, links)?,
        rules: dumps.both_families("list rules", rules, &mut unsupported, rule::parse)?,
        ..Default::default()
    };
    Ok((request, unsupported))
}

/// Dumps whose lists together have a maximum length.
struct Dumps<'a> {
    netlink: &'a Netlink,
    /// How many objects the further dumps may have.
    left: usize,
}

impl Dumps<'_> {
    /// Sends a dump request, and parses the replies. `step` completes an error message that begins with "failed to".
    fn dump<T>(
        &mut self,
        step: &'static str,
        request: Message,
        parse: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetworkError> {
        let found = self.netlink.dump(request, self.left, parse).map_err(kernel_error(step))?;
        let found = found.ok_or(NetworkError::TooLarge)?;
        self.left -= found.len();
        Ok(found)
    }

    /// Sends a dump request for each address family and parses the replies.
    fn both_families<T>(
        &mut self,
        step: &'static str,
        request: u16,
        unsupported: &mut Unsupported,
        parse: impl Fn(&[u8]) -> Option<Entry<T>>,
    ) -> Result<Vec<T>, NetworkError> {
        let mut entries = Vec::new();
        for family in [husk_netlink::IPV4, husk_netlink::IPV6] {
            // struct rtmsg and struct fib_rule_hdr have 12 bytes, and begin with the family.
            let mut fixed = [0; 12];
            fixed[0] = family;
            let message = Message::new(request, libc::NLM_F_DUMP, &fixed);
            entries.extend(self.dump(step, message, |kind, body| {
                let new = kind == libc::RTM_NEWROUTE || kind == libc::RTM_NEWRULE;
                match new.then(|| parse(body)).flatten()? {
                    Entry::Supported(found) => Some(found),
                    Entry::Unsupported(what) => {
                        unsupported.insert(what);
                        None
                    }
                    Entry::Implicit => None,
                }
            })?);
        }
        Ok(entries)
    }
}

/// Returns `links` with their addresses. Omits link-local IPv6 addresses, because the guest's kernel generates these
/// addresses.
fn interfaces(dumps: &mut Dumps<'_>, links: &[Link]) -> Result<Vec<Interface>, NetworkError> {
    // The request's body is a struct ifaddrmsg.
    let request = Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &[0; 8]);
    let found = dumps.dump("list addresses", request, |kind, body| {
        (kind == libc::RTM_NEWADDR).then(|| parse_address(body)).flatten()
    })?;
    let mut addresses: HashMap<i32, Vec<String>> = HashMap::new();
    for (index, address) in found {
        addresses.entry(index).or_default().push(address);
    }
    let interface = |link: &Link| Interface {
        name: link.name.clone(),
        mac: format_mac(&link.mac),
        mtu: link.mtu.into(),
        addresses: addresses.remove(&link.index).unwrap_or_default(),
        ..Default::default()
    };
    Ok(links.iter().map(interface).collect())
}

fn parse_address(body: &[u8]) -> Option<(i32, String)> {
    let [family, prefix, ..] = *body.first_chunk::<4>()?;
    let index = i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let mut found = None;
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            // If IFA_LOCAL is present, IFA_LOCAL is the interface's address, and IFA_ADDRESS can be the peer's address.
            libc::IFA_LOCAL => found = ip(family, value),
            libc::IFA_ADDRESS if found.is_none() => found = ip(family, value),
            _ => {}
        }
    }
    let address = found.filter(|address| !is_link_local(*address))?;
    Some((index, format!("{address}/{prefix}")))
}

/// Reads the permanent neighbours. Only configured neighbours are permanent. The guest's kernel itself discovers all
/// other neighbours.
fn neighbours(dumps: &mut Dumps<'_>, links: &[Link]) -> Result<Vec<Neighbour>, NetworkError> {
    // The request's body is a struct ndmsg.
    let request = Message::new(libc::RTM_GETNEIGH, libc::NLM_F_DUMP, &[0; 12]);
    dumps.dump("list neighbours", request, |kind, body| {
        (kind == libc::RTM_NEWNEIGH).then(|| parse_neighbour(body, links)).flatten()
    })
}

fn parse_neighbour(body: &[u8], links: &[Link]) -> Option<Neighbour> {
    let family = *body.first()?;
    let index = i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let state = u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?);
    if state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let interface = links.iter().find(|link| link.index == index)?.name.clone();
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(body.get(12..)?) {
        match kind {
            libc::NDA_DST => address = ip(family, value),
            libc::NDA_LLADDR => mac = <[u8; 6]>::try_from(value).ok(),
            _ => {}
        }
    }
    Some(Neighbour { address: address?.to_string(), mac: format_mac(&mac?), interface, ..Default::default() })
}

fn ip(family: u8, value: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// Returns whether the address is in fe80::/10.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Returns the MAC address as text, such as `02:00:00:00:00:0a`.
pub fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use husk_netlink::nest;
    use proptest::prelude::*;

    use super::*;

    fn eth0() -> Link {
        Link { index: 2, name: "eth0".into(), mac: [2, 0, 0, 0, 0, 10], mtu: 1450 }
    }

    #[test]
    fn network_with_too_many_objects_is_an_error() {
        let netlink = Netlink::open().unwrap();
        // The loopback interface has an address and routes.
        let loopback = husk_netlink::links(&netlink).unwrap().into_iter().find(|link| link.index == 1).unwrap();
        let lo = Link { index: 1, name: loopback.name, mac: [0; 6], mtu: 1500 };
        let (config, _) = network(&netlink, std::slice::from_ref(&lo)).unwrap();
        let addresses: usize = config.interfaces.iter().map(|interface| interface.addresses.len()).sum();
        assert!(addresses > 0);
        let objects = config.routes.len() + config.neighbours.len() + config.rules.len();
        let links = std::slice::from_ref(&lo);
        let too_large = |max| matches!(network_of(&netlink, links, max), Err(NetworkError::TooLarge));
        assert!(too_large(addresses - 1) && too_large(addresses + objects - 1) && !too_large(MAX_OBJECTS));
    }

    #[test]
    fn to_guest_link_accepts_only_ethernet_interfaces_that_are_up() {
        let link = |hardware, flags: i32| {
            let (name, mac) = ("eth0".to_owned(), vec![2, 0, 0, 0, 0, 10]);
            to_guest_link(husk_netlink::Link { index: 2, hardware, flags: flags as u32, name, mac, mtu: 1450 })
        };
        assert_eq!(link(libc::ARPHRD_ETHER, libc::IFF_UP), Some(eth0()));
        assert_eq!(link(libc::ARPHRD_ETHER, 0), None);
        assert_eq!(link(libc::ARPHRD_LOOPBACK, libc::IFF_UP | libc::IFF_LOOPBACK), None);
    }

    #[test]
    fn parse_address_prefers_ifa_local_and_rejects_link_local_addresses() {
        let address = |family: i32, prefix: u8, list: &[(u16, &[u8])]| {
            let body = [&[family as u8, prefix, 0, 0][..], &2i32.to_ne_bytes(), &nest(list)].concat();
            parse_address(&body).map(|(_, address)| address)
        };
        let peer = [(libc::IFA_ADDRESS, &[10, 0, 0, 1][..]), (libc::IFA_LOCAL, &[10, 0, 0, 2])];
        assert_eq!(address(libc::AF_INET, 32, &peer).as_deref(), Some("10.0.0.2/32"));
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets();
        assert_eq!(address(libc::AF_INET6, 64, &[(libc::IFA_ADDRESS, &link_local)]), None);
        let global = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets();
        assert_eq!(address(libc::AF_INET6, 64, &[(libc::IFA_ADDRESS, &global)]).as_deref(), Some("fd00::1/64"));
    }

    #[test]
    fn parse_neighbour_accepts_only_permanent_neighbours() {
        let body = |state: u16| {
            let list = [(libc::NDA_DST, &[10, 0, 0, 9][..]), (libc::NDA_LLADDR, &[2, 0, 0, 0, 0, 9])];
            [&[libc::AF_INET as u8, 0, 0, 0][..], &2i32.to_ne_bytes(), &state.to_ne_bytes(), &[0; 2], &nest(&list)]
                .concat()
        };
        let found = parse_neighbour(&body(libc::NUD_PERMANENT), &[eth0()]).unwrap();
        assert_eq!((found.address.as_str(), found.mac.as_str()), ("10.0.0.9", "02:00:00:00:00:09"));
        assert_eq!(parse_neighbour(&body(2), &[eth0()]), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes: Vec<u8>) {
            parse_address(&bytes);
            parse_neighbour(&bytes, &[eth0()]);
        }
    }
}
