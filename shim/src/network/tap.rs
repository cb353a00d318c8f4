//! Creates the tap of an interface, and the traffic control filters that redirect frames between interface and tap.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use husk_base::sys::interface;
use husk_netlink::{Message, Netlink, link_header, nest};

use super::read::Link;
use super::{NetworkError, Tap, TapOptions, kernel_error};

/// linux/pkt_sched.h: the parent and the handle of an ingress qdisc.
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
/// linux/if_link.h: the mode of an interface that does not generate a link-local IPv6 address.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Priorities of filters. The kernel tries the filter with the lowest number first.
const FIRST_PRIORITY: u16 = 1;
const SECOND_PRIORITY: u16 = 2;

/// Creates the tap of `link` in the current network namespace.
pub fn create(netlink: &Netlink, link: &Link, options: TapOptions) -> Result<Tap, NetworkError> {
    let name = format!("husk{}", link.index);
    let open = |_| open(&name, options.queue_pairs > 1);
    let fds = (0..options.queue_pairs.max(1)).map(open).collect::<io::Result<Vec<_>>>();
    let fds = fds.map_err(kernel_error(format!("create the tap of {}", link.name)))?;
    let index = index(&name).map_err(kernel_error(format!("find the index of the tap of {}", link.name)))?;
    // The host does not use the tap itself. Therefore, the tap does not need a link-local address, and must not send
    // IPv6 messages of its own.
    let addr_gen_mode = nest(&[(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])]);
    let addr_gen_mode = nest(&[(libc::AF_INET6 as u16, &addr_gen_mode)]);
    let header = link_header(index, 0, 0);
    // A kernel without IPv6 rejects this request, but does not need it.
    let _ = netlink.change(Message::new(libc::RTM_NEWLINK, 0, &header).attribute(libc::IFLA_AF_SPEC, &addr_gen_mode));
    let up = libc::IFF_UP as u32;
    let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, up, up));
    let message = message.number(libc::IFLA_MTU, link.mtu.into());
    netlink.change(message).map_err(kernel_error(format!("bring up the tap of {}", link.name)))?;
    let to_guest = || {
        ingress(netlink, link.index)?;
        redirect(netlink, link.index, index)
    };
    let from_guest = || {
        ingress(netlink, index)?;
        let vhost =
            options.vhost.then(vhost).flatten().filter(|_| redirect_from_mac(netlink, index, link.index, link.mac));
        if vhost.is_none() {
            redirect(netlink, index, link.index)?;
        }
        Ok(vhost)
    };
    let connect = || {
        to_guest().map_err(kernel_error(format!("redirect frames from {}", link.name)))?;
        from_guest().map_err(kernel_error(format!("redirect frames to {}", link.name)))
    };
    let vhost = connect().inspect_err(|_| {
        // The tap disappears with its fds, but the redirection to the tap does not. Ignore an error of the removal,
        // because the caller gets the first error.
        let _ = remove(netlink, link.index, index);
    })?;
    let Link { index: link, mac, mtu, .. } = *link;
    Ok(Tap { fds, vhost, link, index, mac, mtu, rate_limits: options.rate_limits })
}

/// Removes a tap, even if another process has an open fd of the tap. Also removes the redirection from its interface to
/// the tap, if the redirection still exists.
pub fn remove(netlink: &Netlink, link: i32, tap: i32) -> io::Result<()> {
    let ignore_missing = |result: io::Result<()>| match result {
        // The tap or the filter has already disappeared with its interface.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    };
    ignore_missing(netlink.change(Message::new(libc::RTM_DELLINK, 0, &link_header(tap, 0, 0))))?;
    ignore_missing(netlink.change(Message::new(
        libc::RTM_DELTFILTER,
        0,
        &tcmsg(link, 0, INGRESS, tcm_info(FIRST_PRIORITY)),
    )))
}

/// Opens `/dev/vhost-net` as an `O_PATH` fd, through which the VMM opens the device later. Returns `None` if the host
/// does not have the device.
fn vhost() -> Option<OwnedFd> {
    let vhost = File::options().read(true).custom_flags(libc::O_PATH).open("/dev/vhost-net").map(OwnedFd::from);
    vhost.inspect_err(|error| tracing::debug!(%error, "failed to open /dev/vhost-net; the VMM forwards frames")).ok()
}

/// Opens a tap with the flags that the VMM needs. The tap disappears when its last fd is closed.
fn open(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let multi_queue_flag = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue_flag;
    interface::set_tap(&tun, name, flags)?;
    Ok(tun.into())
}

fn index(name: &str) -> io::Result<i32> {
    i32::try_from(nix::net::if_::if_nametoindex(name)?).map_err(io::Error::other)
}

/// `tc qdisc add dev FROM ingress`
fn ingress(netlink: &Netlink, from: i32) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWQDISC, create, &tcmsg(from, INGRESS, TC_H_INGRESS, 0));
    match netlink.change(message.text(libc::TCA_KIND, "ingress")) {
        // An ingress qdisc that another program has made also accepts filters.
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// `tc filter add dev FROM ingress prio 1 matchall action mirred egress redirect dev TO`
fn redirect(netlink: &Netlink, from: i32, to: i32) -> io::Result<()> {
    filter(netlink, from, FIRST_PRIORITY, "matchall", &nest(&[(TCA_MATCHALL_ACT, &mirred(to))]))
}

/// Sets up MAC anti-spoofing. Redirects frames with the source MAC `mac` from `from` to `to`, and drops all other
/// frames.
///
/// Returns false on failure, for example if the kernel lacks `cls_flower` or `act_gact`. After a failure, the filter of
/// [`redirect`] takes precedence over a drop filter that was already added.
///
/// `tc filter add dev FROM ingress prio 2 matchall action drop`,
/// `tc filter add dev FROM ingress prio 1 flower src_mac MAC action mirred egress redirect dev TO`
fn redirect_from_mac(netlink: &Netlink, from: i32, to: i32, mac: [u8; 6]) -> bool {
    // struct tc_gact: index, capab, action, refcnt, bindcnt
    let gact = [0, 0, TC_ACT_SHOT, 0, 0].map(u32::to_ne_bytes).concat();
    let drop = action(c"gact", &nest(&[(TCA_GACT_PARMS, &gact)]));
    let mac_filter = nest(&[
        (TCA_FLOWER_KEY_ETH_SRC, &mac),
        (TCA_FLOWER_KEY_ETH_SRC_MASK, &[0xff; 6]),
        (TCA_FLOWER_ACT, &mirred(to)),
    ]);
    filter(netlink, from, SECOND_PRIORITY, "matchall", &nest(&[(TCA_MATCHALL_ACT, &drop)]))
        .and_then(|()| filter(netlink, from, FIRST_PRIORITY, "flower", &mac_filter))
        .inspect_err(
            |error| tracing::info!(%error, "failed to set up MAC anti-spoofing on the host; the VMM forwards frames"),
        )
        .is_ok()
}

/// `action mirred egress redirect dev TO`
fn mirred(to: i32) -> Vec<u8> {
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
    let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.unsigned_abs()].map(u32::to_ne_bytes).concat();
    action(c"mirred", &nest(&[(TCA_MIRRED_PARMS, &mirred)]))
}

/// Encodes a list that contains one action.
fn action(kind: &CStr, options: &[u8]) -> Vec<u8> {
    let action = nest(&[(TCA_ACT_KIND, kind.to_bytes_with_nul()), (TCA_ACT_OPTIONS, options)]);
    // In a list of actions, the type of each attribute is the position of the action. The first position is 1.
    nest(&[(1, &action)])
}

fn filter(netlink: &Netlink, from: i32, priority: u16, kind: &str, options: &[u8]) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWTFILTER, create, &tcmsg(from, 0, INGRESS, tcm_info(priority)));
    netlink.change(message.text(libc::TCA_KIND, kind).attribute(libc::TCA_OPTIONS, options))
}

/// Encodes `tcm_info`: the filter's priority in the upper half, the protocol in network byte order in the lower half.
fn tcm_info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// Encodes `struct tcmsg`.
fn tcmsg(index: i32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}
