//! Adds and removes the addresses and neighbours of interfaces.

use std::net::IpAddr;

use husk_netlink::Netlink;
use husk_proto::agent::Neighbour;

use super::NetworkError;
use super::operation::Operation;
use super::parse::{parse_cidr, parse_ip, parse_mac};

/// Adds or removes an address of the interface `index`. `cidr` is the address with its prefix length.
pub fn change(pod: &Netlink, op: Operation, index: i32, cidr: &str) -> Result<(), NetworkError> {
    let (address, prefix) = parse_cidr(cidr)?;
    let bytes = octets(address);
    let family = family(address);
    // NODAD is set because the CNI plugin that assigned the address is responsible for its uniqueness. NOPREFIXROUTE is
    // set because the request contains all routes, and some networks have no route to their own subnet.
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
pub fn change_neighbour(pod: &Netlink, op: Operation, neighbour: &Neighbour, index: i32) -> Result<(), NetworkError> {
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
    if address.is_ipv4() { husk_netlink::IPV4 } else { husk_netlink::IPV6 }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
