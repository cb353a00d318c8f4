//! A tap beside an interface, and traffic control that redirects every frame from one to the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_netlink::{Message, Netlink, link_header, nest};

use super::read::Link;
use super::{NetworkError, Tap, kernel};

/// linux/pkt_sched.h: the parent of an ingress queueing discipline, and its handle.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_0000;
/// linux/pkt_cls.h
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
/// linux/tc_act/tc_mirred.h
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
/// linux/if_link.h: the value for an interface that makes no IPv6 address for itself.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Makes the tap of `link`, in the current network namespace.
pub fn beside(netlink: &Netlink, link: &Link) -> Result<Tap, NetworkError> {
    let name = format!("husk{}", link.index);
    let fd = open(&name).map_err(kernel(format!("make the tap of {}", link.name)))?;
    let index = index(&name).map_err(kernel("find the tap"))?;
    // Nobody on the host listens there: no address, and none of IPv6's own talk.
    let quiet = nest(&[(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])]);
    let quiet = nest(&[(libc::AF_INET6 as u16, &quiet)]);
    let header = link_header(index, 0, 0);
    // A kernel without IPv6 refuses, and has nothing to be kept quiet.
    let _ = netlink.change(Message::new(libc::RTM_NEWLINK, 0, &header).attribute(libc::IFLA_AF_SPEC, &quiet));
    let up = libc::IFF_UP as u32;
    let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, up, up));
    let message = message.number(libc::IFLA_MTU, link.mtu.into());
    netlink.change(message).map_err(kernel(format!("bring the tap of {} up", link.name)))?;
    redirect(netlink, link.index, index).map_err(kernel(format!("redirect the frames of {}", link.name)))?;
    redirect(netlink, index, link.index).map_err(kernel(format!("redirect frames to {}", link.name)))?;
    Ok(Tap { fd, link: link.index, index, mac: link.mac, mtu: link.mtu })
}

/// Opens a tap as the VMM wants it; it is gone with its last descriptor.
fn open(name: &str) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less: the name ends with a zero.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request lives through the call, which reads name and flags from it and writes them back.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(tun.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn index(name: &str) -> io::Result<i32> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the name is a NUL-terminated string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => i32::try_from(index).map_err(io::Error::other),
    }
}

/// `tc qdisc add dev FROM ingress; tc filter add dev FROM ingress matchall action mirred egress redirect dev TO`
fn redirect(netlink: &Netlink, from: i32, to: i32) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWQDISC, create, &tcmsg(from, INGRESS, TC_H_INGRESS, 0));
    match netlink.change(message.text(libc::TCA_KIND, "ingress")) {
        // Whoever made one meant it for filters as well.
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
    let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.unsigned_abs()].map(u32::to_ne_bytes).concat();
    let options = nest(&[(TCA_MIRRED_PARMS, &mirred)]);
    let action = nest(&[(TCA_ACT_KIND, b"mirred\0"), (TCA_ACT_OPTIONS, &options)]);
    // Actions are a list whose attributes' kinds are positions, from 1.
    let actions = nest(&[(1, &action)]);
    // Priority 1 in the upper half, the protocol in network order in the lower.
    let info = 1 << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    let message = Message::new(libc::RTM_NEWTFILTER, create, &tcmsg(from, 0, INGRESS, info))
        .text(libc::TCA_KIND, "matchall")
        .attribute(libc::TCA_OPTIONS, &nest(&[(TCA_MATCHALL_ACT, &actions)]));
    netlink.change(message)
}

/// `struct tcmsg`.
fn tcmsg(index: i32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}
