//! Adds and removes the addresses and neighbours of interfaces, with one netlink request each. Also contains the
//! parsers for the addresses of routes and rules.

use std::fmt::Display;
use std::io;
use std::net::IpAddr;

use husk_netlink::{Message, Netlink};
use husk_proto::agent::Neighbour;

use super::NetworkError;

/// Operation on a part of the network configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Adds the part and replaces an existing part with the same key.
    Add,
    /// Adds the part after existing parts with the same key.
    Append,
    /// Removes the part.
    Remove,
}

impl Op {
    /// Returns the netlink message of this operation. `flags` apply only to [`Op::Add`] and [`Op::Append`].
    pub(super) fn message(self, (add, flags): (u16, i32), remove: u16, fixed: &[u8]) -> Message {
        match self {
            Self::Add | Self::Append => Message::new(add, libc::NLM_F_CREATE | flags, fixed),
            Self::Remove => Message::new(remove, 0, fixed),
        }
    }

    /// Sends the message. Also succeeds if the part to remove is missing, or if the part to add already exists.
    pub(super) fn change(self, pod: &Netlink, message: Message) -> io::Result<()> {
        // The kernel returns these errors if the part to remove is missing. The kernel may have removed the part
        // together with its interface, or a container may have removed it.
        const MISSING: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];
        match pod.change(message) {
            Err(error) if self == Self::Remove && error.raw_os_error().is_some_and(|code| MISSING.contains(&code)) => {
                Ok(())
            }
            Err(error) if self != Self::Remove && error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    /// Returns a function that converts an error of the kernel to the error of this operation on `object`.
    pub(super) fn failed(self, object: impl Display) -> impl FnOnce(io::Error) -> NetworkError {
        let text = format!("{} {object}", if self == Self::Remove { "remove" } else { "add" });
        move |source| NetworkError::Kernel(text, source)
    }
}

/// Adds or removes an address of the interface `index`. `cidr` is the address with its prefix length.
pub fn address(pod: &Netlink, op: Op, index: i32, cidr: &str) -> Result<(), NetworkError> {
    let (address, prefix) = parse_cidr(cidr)?;
    let bytes = octets(address);
    let family = family(address);
    // NODAD: the CNI plugin that assigned the address is responsible for its uniqueness. NOPREFIXROUTE: routes are
    // requested explicitly, and some networks have no route to their own subnet.
    let flags = libc::IFA_F_NOPREFIXROUTE | if address.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
    let scope = if address.is_loopback() { libc::RT_SCOPE_HOST } else { libc::RT_SCOPE_UNIVERSE };
    // struct ifaddrmsg
    let mut fixed = [family, prefix, 0, scope, 0, 0, 0, 0];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let mut message = op
        .message((libc::RTM_NEWADDR, libc::NLM_F_REPLACE), libc::RTM_DELADDR, &fixed)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes)
        .number(libc::IFA_FLAGS, flags);
    if let IpAddr::V4(v4) = address
        && prefix < 31
    {
        let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        message = message.attribute(libc::IFA_BROADCAST, &(u32::from(v4) | host).to_be_bytes());
    }
    op.change(pod, message).map_err(op.failed(format_args!("address {cidr}")))
}

/// Adds or removes a permanent neighbour of the interface `index`.
pub fn neighbour(pod: &Netlink, op: Op, neighbour: &Neighbour, index: i32) -> Result<(), NetworkError> {
    let address = parse_ip(&neighbour.address)?;
    // struct ndmsg
    let mut fixed = [0u8; 12];
    fixed[0] = family(address);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    let message = op
        .message((libc::RTM_NEWNEIGH, libc::NLM_F_REPLACE), libc::RTM_DELNEIGH, &fixed)
        .attribute(libc::NDA_DST, &octets(address))
        .attribute(libc::NDA_LLADDR, &parse_mac(&neighbour.mac)?);
    op.change(pod, message).map_err(op.failed(format_args!("neighbour {}", neighbour.address)))
}

pub(super) fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(super) fn parse_ip(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Malformed(text.to_owned(), "IP address"))
}

/// Parses an IP address. Returns `None` for an empty string.
pub(super) fn optional_ip(text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() { Ok(None) } else { parse_ip(text).map(Some) }
}

pub(super) fn parse_cidr(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let malformed = || NetworkError::Malformed(text.to_owned(), "address with prefix length, such as 10.0.0.1/24");
    let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
    let address = parse_ip(address)?;
    let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix <= longest { Ok((address, prefix)) } else { Err(malformed()) }
}

/// Parses a prefix. Returns `None` for an empty string, and for a prefix of length 0 such as 0.0.0.0/0.
pub(super) fn optional_cidr(text: &str) -> Result<Option<(IpAddr, u8)>, NetworkError> {
    if text.is_empty() { Ok(None) } else { Ok(Some(parse_cidr(text)?).filter(|(_, prefix)| *prefix > 0)) }
}

/// Converts a number for a one-byte field of a netlink message.
pub(super) fn byte(number: u32, what: &'static str) -> Result<u8, NetworkError> {
    u8::try_from(number).map_err(|_| NetworkError::Malformed(number.to_string(), what))
}

/// Parses a MAC address: six bytes in hexadecimal, separated by colons.
pub fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes.ok().filter(|mac| mac.len() == 6).ok_or_else(|| NetworkError::Malformed(text.to_owned(), "MAC address"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parsers_reject_malformed_addresses() {
        assert_eq!(parse_cidr("10.1.2.3/24").unwrap(), ("10.1.2.3".parse().unwrap(), 24));
        assert!(parse_cidr("10.1.2.3/33").is_err());
        assert!(parse_cidr("fd00::1/64").is_ok());
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        assert!(parse_mac("02:00").is_err());
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text: String) {
            let _ = parse_cidr(&text);
            let _ = parse_mac(&text);
        }
    }
}
