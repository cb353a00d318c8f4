//! The parts of an interface's configuration, each of them one request to the kernel.

use std::io;
use std::net::IpAddr;

use husk_netlink::{Message, Netlink};
use husk_proto::agent::{Neighbour, Route};

use super::NetworkError;

/// What is done with a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// It is there afterwards.
    Add,
    /// It is not there afterwards.
    Remove,
}

impl Op {
    fn message(self, add: u16, remove: u16, fixed: &[u8]) -> Message {
        match self {
            Self::Add => Message::new(add, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, fixed),
            Self::Remove => Message::new(remove, 0, fixed),
        }
    }

    fn change(self, pod: &Netlink, message: Message, what: String) -> Result<(), NetworkError> {
        const GONE: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];
        match pod.change(message) {
            Ok(()) => Ok(()),
            // With its interface, or by the pod's own hand.
            Err(error) if self == Self::Remove && error.raw_os_error().is_some_and(|code| GONE.contains(&code)) => {
                Ok(())
            }
            Err(error) => Err(kernel(if self == Self::Add { "add" } else { "remove" }, &what)(error)),
        }
    }
}

fn kernel(verb: &str, what: &str) -> impl FnOnce(io::Error) -> NetworkError {
    let text = format!("{verb} {what}");
    move |source| NetworkError::Kernel(text, source)
}

/// An address of the interface `index`, in CIDR form.
pub fn address(pod: &Netlink, op: Op, index: i32, cidr: &str) -> Result<(), NetworkError> {
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
    let mut message = op
        .message(libc::RTM_NEWADDR, libc::RTM_DELADDR, &fixed)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes)
        .number(libc::IFA_FLAGS, flags);
    if let IpAddr::V4(v4) = address
        && prefix < 31
    {
        let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        message = message.attribute(libc::IFA_BROADCAST, &(u32::from(v4) | host).to_be_bytes());
    }
    op.change(pod, message, format!("address {cidr}"))
}

/// A route by the interface `index`.
pub fn route(pod: &Netlink, op: Op, route: &Route, index: i32) -> Result<(), NetworkError> {
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
    let mut message =
        op.message(libc::RTM_NEWROUTE, libc::RTM_DELROUTE, &fixed).number(libc::RTA_OIF, index.unsigned_abs());
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
    op.change(pod, message, format!("route to {:?} by {:?}", route.destination, route.gateway))
}

/// A neighbour at the interface `index`.
pub fn neighbour(pod: &Netlink, op: Op, neighbour: &Neighbour, index: i32) -> Result<(), NetworkError> {
    let address = parse_ip(&neighbour.address)?;
    // struct ndmsg
    let mut fixed = [0u8; 12];
    fixed[0] = family(address);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    let message = op
        .message(libc::RTM_NEWNEIGH, libc::RTM_DELNEIGH, &fixed)
        .attribute(libc::NDA_DST, &octets(address))
        .attribute(libc::NDA_LLADDR, &parse_mac(&neighbour.mac)?);
    op.change(pod, message, format!("neighbour {}", neighbour.address))
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

/// Six bytes in hexadecimal, with colons between them.
pub fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
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
