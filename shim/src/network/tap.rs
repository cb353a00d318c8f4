//! A tap beside an interface, and traffic control that redirects every frame from one to the other.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use husk_netlink::{Message, Netlink, link_header, nest};

use super::read::Link;
use super::{NetworkError, Tap, Wish, kernel};

/// linux/pkt_sched.h: the parent of an ingress queueing discipline, and its handle.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_0000;
/// linux/pkt_cls.h
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_FLOWER_ACT: u16 = 3;
const TCA_FLOWER_KEY_ETH_SRC: u16 = 6;
const TCA_FLOWER_KEY_ETH_SRC_MASK: u16 = 7;
/// linux/tc_act/tc_gact.h
const TCA_GACT_PARMS: u16 = 2;
/// linux/tc_act/tc_mirred.h
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
/// linux/if_link.h: the value for an interface that makes no IPv6 address for itself.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Priorities of filters: the lowest number is asked first.
const FIRST: u16 = 1;
const SECOND: u16 = 2;

/// Makes the tap of `link`, in the current network namespace.
pub fn beside(netlink: &Netlink, link: &Link, wish: Wish) -> Result<Tap, NetworkError> {
    let name = format!("husk{}", link.index);
    let open = |_| open(&name, wish.pairs > 1);
    let fds = (0..wish.pairs.max(1)).map(open).collect::<io::Result<Vec<_>>>();
    let fds = fds.map_err(kernel(format!("make the tap of {}", link.name)))?;
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
    let to_guest = || {
        ingress(netlink, link.index)?;
        redirect(netlink, link.index, index)
    };
    let from_guest = || {
        ingress(netlink, index)?;
        let vhost = wish.vhost.then(vhost).flatten().filter(|_| guard(netlink, index, link.index, link.mac));
        if vhost.is_none() {
            redirect(netlink, index, link.index)?;
        }
        Ok(vhost)
    };
    let connect = || {
        to_guest().map_err(kernel(format!("redirect the frames of {}", link.name)))?;
        from_guest().map_err(kernel(format!("redirect frames to {}", link.name)))
    };
    let vhost = connect().inspect_err(|_| {
        // The tap goes with its descriptors, what leads to it does not; and the first error is the one to be told.
        let _ = disconnect(netlink, link.index, index);
    })?;
    Ok(Tap { fds, vhost, link: link.index, index, mac: link.mac, mtu: link.mtu })
}

/// Removes a tap, whoever has it open, and the redirection to it from an interface that may be there still.
pub fn disconnect(netlink: &Netlink, link: i32, tap: i32) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        // Whatever was to be removed went with its interface.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    };
    gone(netlink.change(Message::new(libc::RTM_DELLINK, 0, &link_header(tap, 0, 0))))?;
    gone(netlink.change(Message::new(libc::RTM_DELTFILTER, 0, &tcmsg(link, 0, INGRESS, info(FIRST)))))
}

/// `/dev/vhost-net` for the VMM to open, where the host has it.
fn vhost() -> Option<OwnedFd> {
    let vhost = File::options().read(true).custom_flags(libc::O_PATH).open("/dev/vhost-net").map(OwnedFd::from);
    vhost.inspect_err(|error| tracing::debug!(%error, "no /dev/vhost-net: the VMM carries frames")).ok()
}

/// Opens a tap as the VMM wants it; it is gone with its last descriptor.
fn open(name: &str, one_of_several: bool) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less: the name ends with a zero.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let several = if one_of_several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as libc::c_short;
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

/// `tc qdisc add dev FROM ingress`
fn ingress(netlink: &Netlink, from: i32) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWQDISC, create, &tcmsg(from, INGRESS, TC_H_INGRESS, 0));
    match netlink.change(message.text(libc::TCA_KIND, "ingress")) {
        // Whoever made one meant it for filters as well.
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// `tc filter add dev FROM ingress prio 1 matchall action mirred egress redirect dev TO`
fn redirect(netlink: &Netlink, from: i32, to: i32) -> io::Result<()> {
    filter(netlink, from, FIRST, "matchall", &nest(&[(TCA_MATCHALL_ACT, &mirred(to))]))
}

/// Of the frames that come from `from`, those from `mac` go to `to` and all others nowhere; whether the kernel can:
/// `cls_flower` and `act_gact` may be missing. Whatever was done of it, a [`redirect`] counts before it.
///
/// `tc filter add dev FROM ingress prio 2 matchall action drop`, `tc filter add dev FROM ingress prio 1 flower src_mac MAC
/// action mirred egress redirect dev TO`
fn guard(netlink: &Netlink, from: i32, to: i32, mac: [u8; 6]) -> bool {
    // struct tc_gact: index, capab, action, refcnt, bindcnt
    let gact = [0, 0, TC_ACT_SHOT, 0, 0].map(u32::to_ne_bytes).concat();
    let drop = action(c"gact", &nest(&[(TCA_GACT_PARMS, &gact)]));
    let own = nest(&[
        (TCA_FLOWER_KEY_ETH_SRC, &mac),
        (TCA_FLOWER_KEY_ETH_SRC_MASK, &[0xff; 6]),
        (TCA_FLOWER_ACT, &mirred(to)),
    ]);
    filter(netlink, from, SECOND, "matchall", &nest(&[(TCA_MATCHALL_ACT, &drop)]))
        .and_then(|()| filter(netlink, from, FIRST, "flower", &own))
        .inspect_err(|error| tracing::info!(%error, "frames cannot be filtered by the host: the VMM carries them"))
        .is_ok()
}

/// `action mirred egress redirect dev TO`
fn mirred(to: i32) -> Vec<u8> {
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
    let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.unsigned_abs()].map(u32::to_ne_bytes).concat();
    action(c"mirred", &nest(&[(TCA_MIRRED_PARMS, &mirred)]))
}

/// A list of one action.
fn action(kind: &CStr, options: &[u8]) -> Vec<u8> {
    let action = nest(&[(TCA_ACT_KIND, kind.to_bytes_with_nul()), (TCA_ACT_OPTIONS, options)]);
    // Actions are a list whose attributes' kinds are positions, from 1.
    nest(&[(1, &action)])
}

fn filter(netlink: &Netlink, from: i32, priority: u16, kind: &str, options: &[u8]) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWTFILTER, create, &tcmsg(from, 0, INGRESS, info(priority)));
    netlink.change(message.text(libc::TCA_KIND, kind).attribute(libc::TCA_OPTIONS, options))
}

/// A filter's priority in the upper half, the protocol in network order in the lower.
fn info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
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
