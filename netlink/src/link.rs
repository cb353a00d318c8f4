//! Lists the interfaces of a network namespace (RTM_GETLINK).

use std::io;

use crate::{Message, Netlink, attributes, number};

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index, unique within its network namespace.
    pub index: i32,
    /// Hardware type, `ARPHRD_…`.
    pub hardware: u16,
    /// Flags, `IFF_…`.
    pub flags: u32,
    /// Name, such as `eth0`.
    pub name: String,
    /// Hardware address. Empty if the interface has no hardware address.
    pub mac: Vec<u8>,
    /// MTU in bytes.
    pub mtu: u32,
}

/// Lists all interfaces of the socket's network namespace.
pub fn links(netlink: &Netlink) -> io::Result<Vec<Link>> {
    let request = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &link_header(0, 0, 0));
    let links =
        netlink.dump(request, usize::MAX, |kind, body| (kind == libc::RTM_NEWLINK).then(|| parse(body)).flatten())?;
    Ok(links.unwrap_or_default())
}

/// Encodes a `struct ifinfomsg`, the fixed header of link messages.
pub fn link_header(index: i32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn parse(body: &[u8]) -> Option<Link> {
    let hardware = u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?);
    let index = i32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let flags = u32::from_ne_bytes(body.get(8..12)?.try_into().ok()?);
    let mut link = Link { index, hardware, flags, name: String::new(), mac: Vec::new(), mtu: 1500 };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            libc::IFLA_MTU => link.mtu = number(value)?,
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nest;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socket(AF_NETLINK)")]
    fn links_include_the_loopback_interface() {
        let links = links(&Netlink::open().unwrap()).unwrap();
        let loopback = links.iter().find(|link| link.index == 1).unwrap();
        assert_eq!((loopback.name.as_str(), loopback.hardware), ("lo", libc::ARPHRD_LOOPBACK));
        assert_ne!(loopback.flags & libc::IFF_LOOPBACK as u32, 0);
        assert!(loopback.mtu > 1500);
    }

    #[test]
    fn parse_decodes_a_link_message() {
        let up = libc::IFF_UP as u32;
        let mut body = link_header(2, up, 0).to_vec();
        body[2..4].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        let (mac, mtu) = ([2, 0, 0, 0, 0, 10], 1450u32.to_ne_bytes());
        body.extend(nest(&[(libc::IFLA_IFNAME, b"eth0\0"), (libc::IFLA_ADDRESS, &mac), (libc::IFLA_MTU, &mtu)]));
        let (name, hardware) = ("eth0".to_owned(), libc::ARPHRD_ETHER);
        assert_eq!(parse(&body), Some(Link { index: 2, hardware, flags: up, name, mac: mac.to_vec(), mtu: 1450 }));
    }

    proptest! {
        #[test]
        fn parsing_arbitrary_bytes_never_panics(bytes: Vec<u8>) {
            parse(&bytes);
        }
    }
}
