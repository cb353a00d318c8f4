//! Parses routes from all routing tables.

use std::collections::HashMap;
use std::net::IpAddr;

use husk_netlink::fib::{RTAX_ADVMSS, RTAX_MTU, RTNH_F_ONLINK};
use husk_netlink::{attributes, number};
use husk_proto::agent::route::Kind;
use husk_proto::agent::{NextHop, Route};

use super::{Entry, ip, is_link_local};

/// The attribute that contains the id of a nexthop object (linux/rtnetlink.h).
const RTA_NH_ID: u16 = 30;
/// The metric of IPv6's "no route" entry (net/ipv6/route.c, `ip6_null_entry`).
const NO_ROUTE: u32 = u32::MAX;
const LOCAL_TABLE: u32 = libc::RT_TABLE_LOCAL as u32;
const MAIN_TABLE: u32 = libc::RT_TABLE_MAIN as u32;

/// Parses the body of a route message. `names` contains each interface that the guest gets: the index in the pod's
/// namespace, and the name. Returns `None` if the message is malformed.
pub fn parse(body: &[u8], names: &HashMap<u32, &str>) -> Option<Entry<Route>> {
    // struct rtmsg
    let [family, prefix, source_prefix, tos, table, protocol, scope, kind, flags @ ..] = *body.first_chunk::<12>()?;
    let flags = u32::from_ne_bytes(flags);
    let by_kernel = protocol == libc::RTPROT_KERNEL;
    let kind = match kind {
        libc::RTN_UNICAST => Kind::UNICAST,
        libc::RTN_LOCAL if !by_kernel => Kind::LOCAL,
        libc::RTN_BLACKHOLE => Kind::BLACKHOLE,
        libc::RTN_UNREACHABLE => Kind::UNREACHABLE,
        libc::RTN_PROHIBIT => Kind::PROHIBIT,
        libc::RTN_THROW => Kind::THROW,
        // The kernel itself creates all other routes when interfaces and addresses are configured.
        _ => return Some(Entry::Implicit),
    };
    let mut route = Route {
        scope: scope.into(),
        ipv6: i32::from(family) == libc::AF_INET6,
        onlink: flags & u32::from(RTNH_F_ONLINK) != 0,
        table: table.into(),
        kind: kind.into(),
        tos: tos.into(),
        ..Default::default()
    };
    let (mut hops, mut destination, mut encapsulates, mut has_nexthop_object) = (None, None, false, false);
    for (attribute, value) in attributes(body.get(12..)?) {
        match attribute {
            libc::RTA_TABLE => route.table = number(value)?,
            libc::RTA_DST => destination = Some(ip(family, value)?),
            libc::RTA_GATEWAY => route.gateway = ip(family, value)?.to_string(),
            libc::RTA_VIA => route.gateway = via(value)?.to_string(),
            libc::RTA_PREFSRC => route.source = ip(family, value)?.to_string(),
            libc::RTA_OIF => route.interface = interface_name(number(value)?, names, by_kernel).unwrap_or_default(),
            libc::RTA_MULTIPATH => hops = Some(value),
            libc::RTA_PRIORITY => route.metric = number(value)?,
            libc::RTA_METRICS => {
                for (metric, value) in attributes(value) {
                    match metric {
                        RTAX_MTU => route.mtu = number(value)?,
                        RTAX_ADVMSS => route.advmss = number(value)?,
                        _ => {}
                    }
                }
            }
            libc::RTA_ENCAP => encapsulates = true,
            RTA_NH_ID => has_nexthop_object = true,
            _ => {}
        }
    }
    let is_kernel_table = route.table == LOCAL_TABLE || route.table == MAIN_TABLE;
    let is_generated = |address| is_link_local(address) || address.is_multicast();
    // RTM_F_CLONED marks an exception that the kernel stored for one destination, such as a path MTU.
    let is_implicit = flags & libc::RTM_F_CLONED != 0
        || kind == Kind::UNICAST && route.table == LOCAL_TABLE
        || is_kernel_table && destination.is_some_and(is_generated)
        || !matches!(kind, Kind::UNICAST | Kind::LOCAL) && route.metric == NO_ROUTE;
    if is_implicit {
        return Some(Entry::Implicit);
    }
    if source_prefix > 0 {
        return Some(Entry::Unsupported("routes with a source prefix".to_owned()));
    }
    if let Some(destination) = destination {
        route.destination = format!("{destination}/{prefix}");
    }
    let has_next_hop = matches!(kind, Kind::UNICAST | Kind::LOCAL);
    if !has_next_hop || hops.is_some() {
        // The kernel reports `lo` as the interface of an IPv6 route without a next hop. A request to add such a route
        // needs no interface. In a multipath route, each next hop has its own interface and gateway.
        (route.interface, route.gateway, route.onlink) = Default::default();
    }
    if let Some(bytes) = hops {
        encapsulates |=
            next_hops(&mut route.next_hops, family, bytes, |index| interface_name(index, names, by_kernel))?;
    }
    Some(if encapsulates {
        Entry::Unsupported("routes with encapsulation".to_owned())
    } else if !has_next_hop || !route.interface.is_empty() || !route.next_hops.is_empty() {
        Entry::Supported(route)
    } else if has_nexthop_object {
        // If the sysctl net.ipv4.nexthop_compat_mode is 0, the kernel reports a nexthop object's id without the
        // object's next hops.
        Entry::Unsupported("routes with nexthop objects".to_owned())
    } else {
        // The route uses only interfaces that the guest does not get.
        Entry::Implicit
    })
}

/// Parses `bytes`, the value of RTA_MULTIPATH. Appends to `hops` each next hop whose interface the guest gets. Returns
/// whether a next hop uses encapsulation. Returns `None` if `bytes` is malformed.
fn next_hops(hops: &mut Vec<NextHop>, family: u8, bytes: &[u8], name: impl Fn(u32) -> Option<String>) -> Option<bool> {
    let (mut rest, mut encapsulates) = (bytes, false);
    // struct rtnexthop
    while let Some([low, high, flags, more, index @ ..]) = rest.first_chunk::<8>() {
        let length = usize::from(u16::from_ne_bytes([*low, *high]));
        let (weight, onlink) = (u32::from(*more) + 1, *flags & RTNH_F_ONLINK != 0);
        let mut hop = NextHop { weight, onlink, ..Default::default() };
        for (attribute, value) in attributes(rest.get(8..length)?) {
            match attribute {
                libc::RTA_GATEWAY => hop.gateway = ip(family, value)?.to_string(),
                libc::RTA_VIA => hop.gateway = via(value)?.to_string(),
                libc::RTA_ENCAP => encapsulates = true,
                _ => {}
            }
        }
        if let Some(interface) = name(u32::from_ne_bytes(*index)) {
            hops.push(NextHop { interface, ..hop });
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(encapsulates)
}

/// Parses `struct rtvia`: the address family and the address of a gateway. This family can differ from the route's
/// family.
fn via(value: &[u8]) -> Option<IpAddr> {
    let (family, address) = value.split_at_checked(2)?;
    ip(u8::try_from(u16::from_ne_bytes(family.try_into().ok()?)).ok()?, address)
}

/// Returns the name of the interface with this index, or `None` if the guest does not get the interface.
///
/// If the host's kernel created the route (`by_kernel`), the result for `lo` is `None`. The guest's kernel itself
/// creates the same route in the guest.
fn interface_name(index: u32, names: &HashMap<u32, &str>, by_kernel: bool) -> Option<String> {
    // The loopback interface always has index 1 (LOOPBACK_IFINDEX in include/net/flow.h).
    if index == 1 && !by_kernel {
        return Some("lo".to_owned());
    }
    names.get(&index).map(|&name| name.to_owned())
}

#[cfg(test)]
mod tests {
    use husk_netlink::nest;
    use proptest::prelude::*;

    use super::*;

    fn names() -> HashMap<u32, &'static str> {
        HashMap::from([(2, "eth0"), (3, "net1")])
    }

    fn parse_route(family: i32, table: u8, protocol: u8, kind: u8, list: &[(u16, &[u8])]) -> Option<Entry<Route>> {
        let fixed = [family as u8, 16, 0, 0, table, protocol, 0, kind, 0, 0, 0, 0];
        parse(&[&fixed[..], &nest(list)].concat(), &names())
    }

    #[track_caller]
    fn supported(found: Option<Entry<Route>>) -> Route {
        match found {
            Some(Entry::Supported(route)) => route,
            other => panic!("{other:?}"),
        }
    }

    fn hop(index: u32, weight: u8, flags: u8, list: &[(u16, &[u8])]) -> Vec<u8> {
        let list = nest(list);
        let length = (8 + list.len()) as u16;
        [&length.to_ne_bytes()[..], &[flags, weight - 1], &index.to_ne_bytes(), &list].concat()
    }

    const V4: i32 = libc::AF_INET;

    #[test]
    fn gateway_metric_mtu_and_mss_are_parsed() {
        let (oif, metric) = (2u32.to_ne_bytes(), 50u32.to_ne_bytes());
        let metrics = nest(&[(RTAX_MTU, &1300u32.to_ne_bytes()), (RTAX_ADVMSS, &1200u32.to_ne_bytes())]);
        let list = [
            (libc::RTA_DST, &[10, 9, 0, 0][..]),
            (libc::RTA_GATEWAY, &[10, 0, 0, 1]),
            (libc::RTA_OIF, &oif),
            (libc::RTA_PRIORITY, &metric),
            (libc::RTA_METRICS, &metrics),
        ];
        let route = supported(parse_route(V4, libc::RT_TABLE_MAIN, 3, libc::RTN_UNICAST, &list));
        assert_eq!((route.destination.as_str(), route.gateway.as_str()), ("10.9.0.0/16", "10.0.0.1"));
        assert_eq!((route.interface.as_str(), route.metric, route.mtu, route.advmss), ("eth0", 50, 1300, 1200));
        assert_eq!(parse_route(V4, libc::RT_TABLE_LOCAL, 3, libc::RTN_UNICAST, &list), Some(Entry::Implicit));
        let list = [(libc::RTA_OIF, &9u32.to_ne_bytes()[..])];
        assert_eq!(parse_route(V4, libc::RT_TABLE_MAIN, 3, libc::RTN_UNICAST, &list), Some(Entry::Implicit));
    }

    #[test]
    fn configured_routes_in_all_tables_are_parsed() {
        let (oif, table) = (2u32.to_ne_bytes(), 1000u32.to_ne_bytes());
        let route =
            supported(parse_route(V4, 252, 3, libc::RTN_UNICAST, &[(libc::RTA_TABLE, &table), (libc::RTA_OIF, &oif)]));
        assert_eq!((route.table, route.destination.as_str(), route.interface.as_str()), (1000, "", "eth0"));
        // The kernel itself creates link-local routes in the main table, but not in table 100.
        let link_local: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let list = [(libc::RTA_DST, &link_local[..]), (libc::RTA_OIF, &oif)];
        let found = |table| parse_route(libc::AF_INET6, table, 2, libc::RTN_UNICAST, &list);
        assert_eq!(found(libc::RT_TABLE_MAIN), Some(Entry::Implicit));
        assert_eq!(supported(found(100)).destination, "fe80::/16");
    }

    #[test]
    fn multipath_keeps_only_next_hops_with_known_interfaces() {
        let hops = [
            hop(2, 2, 0, &[(libc::RTA_GATEWAY, &[10, 0, 0, 1])]),
            hop(9, 1, 0, &[(libc::RTA_GATEWAY, &[10, 0, 0, 2])]),
            hop(3, 1, 0, &[(libc::RTA_VIA, &[10, 0, 1, 2, 3, 4])]),
        ];
        let route =
            |hops: &[u8]| parse_route(V4, libc::RT_TABLE_MAIN, 3, libc::RTN_UNICAST, &[(libc::RTA_MULTIPATH, hops)]);
        // The family in RTA_VIA is 10 (AF_INET6), but the address is too short for IPv6.
        assert_eq!(route(&hops.concat()), None);
        let found = supported(route(&hops[..2].concat()));
        let [only] = &found.next_hops[..] else { panic!("{found}") };
        assert_eq!((only.gateway.as_str(), only.interface.as_str(), only.weight), ("10.0.0.1", "eth0", 2));
        let more = [hops[0].clone(), hop(3, 1, RTNH_F_ONLINK, &[(libc::RTA_GATEWAY, &[10, 1, 0, 2])])].concat();
        let found = supported(route(&more));
        assert_eq!(
            found.next_hops.iter().map(|hop| (hop.weight, hop.onlink)).collect::<Vec<_>>(),
            [(2, false), (1, true)]
        );
        assert_eq!(route(&hops[1]), Some(Entry::Implicit));
        assert!(matches!(route(&hop(2, 1, 0, &[(libc::RTA_ENCAP, &[0; 4])])), Some(Entry::Unsupported(_))));
    }

    #[test]
    fn routes_without_next_hop_and_local_routes_are_parsed() {
        let metric = NO_ROUTE.to_ne_bytes();
        let lo = 1u32.to_ne_bytes();
        for (kind, expected) in [
            (libc::RTN_BLACKHOLE, Kind::BLACKHOLE),
            (libc::RTN_UNREACHABLE, Kind::UNREACHABLE),
            (libc::RTN_PROHIBIT, Kind::PROHIBIT),
            (libc::RTN_THROW, Kind::THROW),
        ] {
            let route = supported(parse_route(libc::AF_INET6, libc::RT_TABLE_MAIN, 3, kind, &[(libc::RTA_OIF, &lo)]));
            assert_eq!((route.kind.enum_value(), route.interface.as_str()), (Ok(expected), ""));
            let none = parse_route(libc::AF_INET6, libc::RT_TABLE_MAIN, 2, kind, &[(libc::RTA_PRIORITY, &metric)]);
            assert_eq!(none, Some(Entry::Implicit));
        }
        let local = |protocol| parse_route(V4, 100, protocol, libc::RTN_LOCAL, &[(libc::RTA_OIF, &lo)]);
        assert_eq!(supported(local(3)).interface, "lo");
        assert_eq!(local(libc::RTPROT_KERNEL), Some(Entry::Implicit));
    }

    #[test]
    fn unsupported_routes_are_described() {
        let main = |list: &[(u16, &[u8])]| parse_route(V4, libc::RT_TABLE_MAIN, 3, libc::RTN_UNICAST, list);
        let (oif, id) = (2u32.to_ne_bytes(), 7u32.to_ne_bytes());
        assert!(matches!(main(&[(RTA_NH_ID, &id)]), Some(Entry::Unsupported(what)) if what.contains("nexthop")));
        // If the kernel also reports the object's next hop, the route is supported.
        assert_eq!(supported(main(&[(RTA_NH_ID, &id), (libc::RTA_OIF, &oif)])).interface, "eth0");
        let encapsulated = main(&[(libc::RTA_OIF, &oif), (libc::RTA_ENCAP, &[0; 4])]);
        assert!(matches!(encapsulated, Some(Entry::Unsupported(what)) if what.contains("encapsulation")));
        let fixed = [libc::AF_INET6 as u8, 64, 64, 0, libc::RT_TABLE_MAIN, 3, 0, libc::RTN_UNICAST, 0, 0, 0, 0];
        assert!(matches!(parse(&fixed, &names()), Some(Entry::Unsupported(what)) if what.contains("source")));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes: Vec<u8>, hops: Vec<u8>) {
            parse(&bytes, &names());
            parse_route(V4, libc::RT_TABLE_MAIN, 3, libc::RTN_UNICAST, &[(libc::RTA_MULTIPATH, &hops)]);
        }
    }
}
