//! The pod's network: interfaces found by hardware address, moved into the pod's namespace, named and configured.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use husk_proto::agent::{Interface, Neighbour, Route};
use tokio::time::{Instant, timeout_at};

use super::netlink::{Link, LinkNotices, Message, Netlink, link_header, links};
use super::{NET, namespaces};

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

/// Sets everything up.
///
/// # Errors
/// [`NetworkError`] naming the first thing that failed.
pub async fn configure(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<(), NetworkError> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let pod = namespaces::within(Netlink::open)?.map_err(kernel("open netlink"))?;
    for interface in interfaces {
        bring_in(interface, &pod).await?;
    }
    // A gateway is reachable only once the routes of its link are there.
    let (direct, through): (Vec<_>, Vec<_>) = routes.iter().partition(|route| route.gateway.is_empty());
    let index = |name: &str| find(interfaces, &pod, name);
    for route in direct {
        add_route(&pod, route, index(&route.interface)?)?;
    }
    for neighbour in neighbours {
        add_neighbour(&pod, neighbour, index(&neighbour.interface)?)?;
    }
    for route in through {
        add_route(&pod, route, index(&route.interface)?)?;
    }
    Ok(())
}

fn find(interfaces: &[Interface], pod: &Netlink, name: &str) -> Result<i32, NetworkError> {
    if name == "lo" {
        return Ok(1);
    }
    let interface = interfaces.iter().find(|i| i.name == name).ok_or_else(|| NetworkError::NoInterface(name.into()))?;
    let mac = parse_mac(&interface.mac)?;
    by_mac(pod, &mac)?.map(|link| link.index).ok_or_else(|| NetworkError::NoInterface(name.into()))
}

fn by_mac(netlink: &Netlink, mac: &[u8]) -> Result<Option<Link>, NetworkError> {
    Ok(links(netlink).map_err(kernel("list interfaces"))?.into_iter().find(|link| link.mac == mac))
}

async fn bring_in(interface: &Interface, pod: &Netlink) -> Result<(), NetworkError> {
    let mac = parse_mac(&interface.mac)?;
    let link = match by_mac(pod, &mac)? {
        Some(link) => link,
        None => {
            let found = wait_for(&mac).await?.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?;
            let namespace = File::open(NET).map_err(kernel("open the pod's network namespace"))?;
            let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(found.index, 0, 0))
                .number(libc::IFLA_NET_NS_FD, namespace.as_raw_fd().unsigned_abs());
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
        add_address(pod, link.index, address)?;
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

fn add_address(pod: &Netlink, index: i32, cidr: &str) -> Result<(), NetworkError> {
    let (address, prefix) = parse_cidr(cidr)?;
    let bytes = octets(address);
    let family = family(address);
    // An address of a pod has been checked for duplicates by whoever gave it out, and its routes come by themselves:
    // some networks have none to their own subnet.
    let flags = libc::IFA_F_NOPREFIXROUTE | if address.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
    let scope = if address.is_loopback() { libc::RT_SCOPE_HOST } else { libc::RT_SCOPE_UNIVERSE };
    // struct ifaddrmsg
    let mut fixed = [family, prefix, 0, scope, 0, 0, 0, 0];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes)
        .number(libc::IFA_FLAGS, flags);
    if let IpAddr::V4(v4) = address
        && prefix < 31
    {
        let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        message = message.attribute(libc::IFA_BROADCAST, &(u32::from(v4) | host).to_be_bytes());
    }
    pod.change(message).map_err(kernel(format!("add address {cidr}")))
}

fn add_route(pod: &Netlink, route: &Route, index: i32) -> Result<(), NetworkError> {
    let destination = match route.destination.as_str() {
        "" => None,
        cidr => Some(parse_cidr(cidr)?).filter(|(_, prefix)| *prefix > 0),
    };
    let gateway = Some(route.gateway.as_str()).filter(|text| !text.is_empty()).map(parse_ip).transpose()?;
    let source = Some(route.source.as_str()).filter(|text| !text.is_empty()).map(parse_ip).transpose()?;
    let family = match destination.map(|d| d.0).or(gateway).or(source) {
        Some(address) => family(address),
        None if route.ipv6 => libc::AF_INET6 as u8,
        None => libc::AF_INET as u8,
    };
    let scope = match (route.scope, gateway) {
        (0, None) if family == libc::AF_INET as u8 => libc::RT_SCOPE_LINK,
        (scope, _) => u8::try_from(scope).unwrap_or(libc::RT_SCOPE_UNIVERSE),
    };
    // RTNH_F_ONLINK of linux/rtnetlink.h.
    let flags: u32 = if route.onlink { 4 } else { 0 };
    let prefix = destination.map_or(0, |d| d.1);
    // struct rtmsg
    let mut fixed =
        [family, prefix, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, scope, libc::RTN_UNICAST, 0, 0, 0, 0];
    fixed[8..].copy_from_slice(&flags.to_ne_bytes());
    let mut message = Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed)
        .number(libc::RTA_OIF, index.unsigned_abs());
    if let Some((address, _)) = destination {
        message = message.attribute(libc::RTA_DST, &octets(address));
    }
    if let Some(address) = gateway {
        // A gateway of the other family (an IPv4 route over an IPv6 next hop) has an attribute of its own: struct rtvia.
        message = match family == self::family(address) {
            true => message.attribute(libc::RTA_GATEWAY, &octets(address)),
            false => {
                let via = [&u16::from(self::family(address)).to_ne_bytes()[..], &octets(address)].concat();
                message.attribute(libc::RTA_VIA, &via)
            }
        };
    }
    if let Some(address) = source {
        message = message.attribute(libc::RTA_PREFSRC, &octets(address));
    }
    if route.metric > 0 {
        message = message.number(libc::RTA_PRIORITY, route.metric);
    }
    if route.mtu > 0 {
        const RTAX_MTU: u16 = 2;
        let metrics = [&8u16.to_ne_bytes()[..], &RTAX_MTU.to_ne_bytes(), &route.mtu.to_ne_bytes()].concat();
        message = message.attribute(libc::RTA_METRICS, &metrics);
    }
    let what = format!("add route to {:?} by {:?}", route.destination, route.gateway);
    pod.change(message).map_err(kernel(what))
}

fn add_neighbour(pod: &Netlink, neighbour: &Neighbour, index: i32) -> Result<(), NetworkError> {
    let address = parse_ip(&neighbour.address)?;
    // struct ndmsg
    let mut fixed = [0u8; 12];
    fixed[0] = family(address);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    let message = Message::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed)
        .attribute(libc::NDA_DST, &octets(address))
        .attribute(libc::NDA_LLADDR, &parse_mac(&neighbour.mac)?);
    pod.change(message).map_err(kernel(format!("add neighbour {}", neighbour.address)))
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn parse_ip(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Malformed(text.to_owned(), "IP address"))
}

fn parse_cidr(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let malformed = || NetworkError::Malformed(text.to_owned(), "address with prefix length");
    let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
    let address = parse_ip(address)?;
    let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix <= longest { Ok((address, prefix)) } else { Err(malformed()) }
}

fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes.ok().filter(|mac| mac.len() == 6).ok_or_else(|| NetworkError::Malformed(text.to_owned(), "hardware address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses() {
        assert_eq!(parse_cidr("10.1.2.3/24").unwrap(), ("10.1.2.3".parse().unwrap(), 24));
        assert!(parse_cidr("10.1.2.3/33").is_err());
        assert!(parse_cidr("fd00::1/64").is_ok());
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        assert!(parse_mac("02:00").is_err());
    }

    proptest! {
        #[test]
        fn any_text_never_panics(text: String) {
            let _ = parse_cidr(&text);
            let _ = parse_mac(&text);
        }
    }
}
