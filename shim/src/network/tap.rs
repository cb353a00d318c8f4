//! Creates an interface's tap, and the tc filters that redirect frames between the interface and the tap.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use husk_base::sys::interface;
use husk_netlink::{Message, Netlink, link_header, nest};

use super::read::Link;
use super::{NetworkError, Tap, TapOptions, kernel_error};
use crate::vm::vhost;

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
/// linux/if_link.h: in mode NONE, an interface does not generate a link-local IPv6 address.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Priorities of tc filters. The kernel tries the filter with the lowest priority number first.
const FIRST_PRIORITY: u16 = 1;
const SECOND_PRIORITY: u16 = 2;

/// Creates the tap of `link` in the current network namespace.
pub fn create(netlink: &Netlink, link: &Link, options: TapOptions) -> Result<Tap, NetworkError> {
    let name = format!("husk{}", link.index);
    let open = |_| open(&name, options.queue_pairs > 1);
    let fds = (0..options.queue_pairs.max(1)).map(open).collect::<io::Result<Vec<_>>>();
    let fds = fds.map_err(kernel_error(format!("create the tap of {}", link.name)))?;
    let index = index(&name).map_err(kernel_error(format!("find the index of the tap of {}", link.name)))?;
    // Disable the tap's link-local address. With such an address, the host's kernel would send IPv6 messages through
    // the tap to the guest.
    let addr_gen_mode = nest(&[(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])]);
    let addr_gen_mode = nest(&[(husk_netlink::IPV6.into(), &addr_gen_mode)]);
    let header = link_header(index, 0, 0);
    // Ignore an error. A kernel without IPv6 rejects this request, but generates no link-local address.
    let _ = netlink.change(Message::new(libc::RTM_NEWLINK, 0, &header).attribute(libc::IFLA_AF_SPEC, &addr_gen_mode));
    let up = libc::IFF_UP as u32;
    let message = Message::new(libc::RTM_NEWLINK, 0, &link_header(index, up, up));
    let message = message.number(libc::IFLA_MTU, link.mtu.into());
    netlink.change(message).map_err(kernel_error(format!("bring up the tap of {}", link.name)))?;
    let to_guest = || {
        ingress(netlink, link.index)?;
        match redirect(netlink, link.index, index) {
            // The filter is that of a pod whose shim was killed. Its tap no longer exists, because otherwise this tap
            // could not have been created under the same name.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                remove_redirect(netlink, link.index)?;
                redirect(netlink, link.index, index)
            }
            result => result,
        }
    };
    let from_guest = || {
        ingress(netlink, index)?;
        let vhost = options.vhost && has_vhost() && redirect_from_mac(netlink, index, link.index, link.mac);
        if !vhost {
            redirect(netlink, index, link.index)?;
        }
        Ok(vhost)
    };
    let connect = || {
        to_guest().map_err(kernel_error(format!("redirect frames from {}", link.name)))?;
        from_guest().map_err(kernel_error(format!("redirect frames to {}", link.name)))
    };
    let vhost = connect().inspect_err(|_| {
        // Closing the fds removes the tap, but not the interface's tc filter. Ignore an error from `remove`, because
        // the caller gets the error from `connect`.
        let _ = remove(netlink, link.index, index);
    })?;
    let Link { index: link, mac, mtu, .. } = *link;
    Ok(Tap { fds, vhost, link, index, mac, mtu, rate_limits: options.rate_limits })
}

/// Removes a tap, and the tc filter that redirects frames from the interface `link` to the tap. Removes the tap even if
/// a process has the tap open.
pub fn remove(netlink: &Netlink, link: i32, tap: i32) -> io::Result<()> {
    let ignore_missing = |result: io::Result<()>| match result {
        // The tap or the tc filter has already been removed.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    };
    ignore_missing(netlink.change(Message::new(libc::RTM_DELLINK, 0, &link_header(tap, 0, 0))))?;
    ignore_missing(remove_redirect(netlink, link))
}

/// Removes the filter that [`redirect`] has made. Fails with EINVAL if the filter with this priority is of another kind,
/// because another program has made it.
fn remove_redirect(netlink: &Netlink, from: i32) -> io::Result<()> {
    let message = Message::new(libc::RTM_DELTFILTER, 0, &tcmsg(from, 0, INGRESS, tcm_info(FIRST_PRIORITY)));
    netlink.change(message.text(libc::TCA_KIND, "matchall"))
}

/// Returns whether the host has vhost-net.
fn has_vhost() -> bool {
    let exists = Path::new(vhost::DEVICE).exists();
    if !exists {
        tracing::debug!("{} does not exist; the VMM forwards the frames", vhost::DEVICE);
    }
    exists
}

/// Creates a tap. If the tap exists, opens another queue of the tap. The kernel removes the tap when its last fd is
/// closed.
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

/// Equivalent to `tc qdisc add dev FROM ingress`.
fn ingress(netlink: &Netlink, from: i32) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWQDISC, create, &tcmsg(from, INGRESS, TC_H_INGRESS, 0));
    match netlink.change(message.text(libc::TCA_KIND, "ingress")) {
        // EEXIST is not a failure. The tc filters can be added to an ingress qdisc that another program created.
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Equivalent to `tc filter add dev FROM ingress prio 1 matchall action mirred egress redirect dev TO`.
fn redirect(netlink: &Netlink, from: i32, to: i32) -> io::Result<()> {
    filter(netlink, from, FIRST_PRIORITY, "matchall", &nest(&[(TCA_MATCHALL_ACT, &mirred(to))]))
}

/// Sets up MAC anti-spoofing for frames that arrive at the interface `from`. Redirects a frame to the interface `to` if
/// the frame's source MAC is `mac`. Drops all other frames.
///
/// Returns false on failure, for example if the kernel lacks `cls_flower` or `act_gact`. After a failure, the drop
/// filter may remain. The caller then calls [`redirect`], whose filter takes precedence over the drop filter.
///
/// Equivalent to these commands:
/// - `tc filter add dev FROM ingress prio 2 matchall action drop`
/// - `tc filter add dev FROM ingress prio 1 flower src_mac MAC action mirred egress redirect dev TO`
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
            |error| tracing::info!(%error, "failed to set up MAC anti-spoofing on the host; not using vhost-net"),
        )
        .is_ok()
}

/// Encodes `action mirred egress redirect dev TO`.
fn mirred(to: i32) -> Vec<u8> {
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
    let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to.unsigned_abs()].map(u32::to_ne_bytes).concat();
    action(c"mirred", &nest(&[(TCA_MIRRED_PARMS, &mirred)]))
}

/// Encodes a list that contains one action.
fn action(kind: &CStr, options: &[u8]) -> Vec<u8> {
    let action = nest(&[(TCA_ACT_KIND, kind.to_bytes_with_nul()), (TCA_ACT_OPTIONS, options)]);
    // In a list of actions, each attribute's type is the action's position. The first position is 1.
    nest(&[(1, &action)])
}

fn filter(netlink: &Netlink, from: i32, priority: u16, kind: &str, options: &[u8]) -> io::Result<()> {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWTFILTER, create, &tcmsg(from, 0, INGRESS, tcm_info(priority)));
    netlink.change(message.text(libc::TCA_KIND, kind).attribute(libc::TCA_OPTIONS, options))
}

/// Encodes `tcm_info`. The upper 16 bits are the filter's priority. The lower 16 bits are the protocol in network byte
/// order.
fn tcm_info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(((libc::ETH_P_ALL & 0xffff) as u16).to_be())
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
