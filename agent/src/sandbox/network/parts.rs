//! The parts of an interface's configuration, each of them one request to the kernel.

use std::fmt::Display;
use std::io;
use std::net::IpAddr;

use husk_netlink::{Message, Netlink};
use husk_proto::agent::Neighbour;

use super::NetworkError;

/// What is done with a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// It is there afterwards, in place of what was where it belongs.
    Add,
    /// It is there afterwards, behind what is where it belongs too.
    Append,
    /// It is not there afterwards.
    Remove,
}

impl Op {
    /// A message that adds, with these flags, or removes.
    pub(super) fn message(self, (add, flags): (u16, i32), remove: u16, fixed: &[u8]) -> Message {
        match self {
            Self::Add | Self::Append => Message::new(add, libc::NLM_F_CREATE | flags, fixed),
            Self::Remove => Message::new(remove, 0, fixed),
        }
    }

    /// Has the kernel do it.
    pub(super) fn change(self, pod: &Netlink, message: Message) -> io::Result<()> {
        // With its interface, or by the pod's own hand.
        const GONE: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];
        match pod.change(message) {
            Err(error) if self == Self::Remove && error.raw_os_error().is_some_and(|code| GONE.contains(&code)) => {
                Ok(())
            }
            Err(error) if self != Self::Remove && error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    /// The error for what the kernel refused.
    pub(super) fn failed(self, what: impl Display) -> impl FnOnce(io::Error) -> NetworkError {
        let text = format!("{} {what}", if self == Self::Remove { "remove" } else { "add" });
        move |source| NetworkError::Kernel(text, source)
    }
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

/// A neighbour at the interface `index`.
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

/// An address, or none where there is no text.
pub(super) fn optional_ip(text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() { Ok(None) } else { parse_ip(text).map(Some) }
}

pub(super) fn parse_cidr(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let malformed = || NetworkError::Malformed(text.to_owned(), "address with prefix length");
    let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
    let address = parse_ip(address)?;
    let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix <= longest { Ok((address, prefix)) } else { Err(malformed()) }
}

/// A prefix, or none where there is no text or it is that of all addresses.
pub(super) fn optional_cidr(text: &str) -> Result<Option<(IpAddr, u8)>, NetworkError> {
    if text.is_empty() { Ok(None) } else { Ok(Some(parse_cidr(text)?).filter(|(_, prefix)| *prefix > 0)) }
}

/// A number that has but a byte in the kernel's message.
pub(super) fn byte(number: u32, what: &'static str) -> Result<u8, NetworkError> {
    u8::try_from(number).map_err(|_| NetworkError::Malformed(number.to_string(), what))
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
