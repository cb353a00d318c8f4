//! Converts a route of the pod to a netlink request.

use std::io;
use std::net::IpAddr;

use husk_netlink::fib::{RTAX_ADVMSS, RTAX_MTU, RTNH_F_ONLINK};
use husk_netlink::{MAX_VALUE, Message, Netlink, nest};
use husk_proto::agent::Route;
use husk_proto::agent::route::Kind;

use super::NetworkError;
use super::address::{family, octets};
use super::operation::Operation;
use super::parse::{parse_byte, parse_optional_cidr, parse_optional_ip};

/// Key of a route: family, table, destination, type of service and metric. Routes with the same key form an ordered
/// list (NLM_F_APPEND).
pub type Key<'a> = (bool, u32, &'a str, u32, u32);

/// Returns the key of a route.
pub fn key(route: &Route) -> Key<'_> {
    (route.ipv6, table(route), &route.destination, route.tos, route.metric)
}

/// Returns the names of a route's interfaces.
pub fn interfaces(route: &Route) -> impl Iterator<Item = &str> {
    let single = Some(route.interface.as_str()).filter(|name| !name.is_empty());
    single.into_iter().chain(route.next_hops.iter().map(|hop| hop.interface.as_str()))
}

/// Whether the route has a gateway. A route with a gateway needs another route that leads to the gateway.
pub fn has_gateway(route: &Route) -> bool {
    !route.gateway.is_empty() || route.next_hops.iter().any(|hop| !hop.gateway.is_empty())
}

fn table(route: &Route) -> u32 {
    if route.table == 0 { libc::RT_TABLE_MAIN.into() } else { route.table }
}

/// Adds or removes a route. `index` returns the guest's index of the interface with the given name.
pub fn change(
    pod: &Netlink,
    op: Operation,
    route: &Route,
    index: impl Fn(&str) -> Result<i32, NetworkError>,
) -> Result<(), NetworkError> {
    let parsed = ParsedRoute::parse(op, route, index)?;
    let unreachable = |error: &io::Error| {
        matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) && op != Operation::Remove
    };
    let done = match op.change(pod, parsed.message(op, false)) {
        // When the kernel adds a route, it checks that another route leads to the gateway. The kernel never repeats
        // the check. On the host, the other route may have been removed since then, or a rule may select the other
        // route's table. Therefore retry with RTNH_F_ONLINK, which skips the check.
        Err(error) if unreachable(&error) && has_gateway(route) => op.change(pod, parsed.message(op, true)),
        done => done,
    };
    done.map_err(op.failed(format_args!("route to {:?} via {:?}", route.destination, route.gateway)))
}

/// Next hop of a route.
struct Hop {
    index: i32,
    gateway: Option<IpAddr>,
    onlink: bool,
    weight: u8,
}

/// Route with parsed addresses.
struct ParsedRoute<'a> {
    route: &'a Route,
    family: u8,
    kind: Kind,
    tos: u8,
    destination: Option<(IpAddr, u8)>,
    source: Option<IpAddr>,
    hops: Vec<Hop>,
}

impl<'a> ParsedRoute<'a> {
    fn parse(
        op: Operation,
        route: &'a Route,
        index: impl Fn(&str) -> Result<i32, NetworkError>,
    ) -> Result<Self, NetworkError> {
        let malformed = |text: String, what| Err(NetworkError::Malformed(text, what));
        let Ok(kind) = route.kind.enum_value() else { return malformed(format!("{:?}", route.kind), "route type") };
        let (destination, source) = (parse_optional_cidr(&route.destination)?, parse_optional_ip(&route.source)?);
        // The gateway does not determine the family, because a default route may have a gateway of the other family.
        let family = match destination.map(|(address, _)| address).or(source) {
            Some(address) => family(address),
            None if route.ipv6 => husk_netlink::IPV6,
            None => husk_netlink::IPV4,
        };
        if source.is_some_and(|source| self::family(source) != family) {
            return malformed(route.source.clone(), "source address for this route's family");
        }
        let mut hops = Vec::new();
        if !route.interface.is_empty() || (route.next_hops.is_empty() && matches!(kind, Kind::UNICAST | Kind::LOCAL)) {
            let (index, gateway) = (index(&route.interface)?, parse_optional_ip(&route.gateway)?);
            hops.push(Hop { index, gateway, onlink: route.onlink, weight: 0 });
        }
        for hop in &route.next_hops {
            let Some(weight) = hop.weight.max(1).checked_sub(1).and_then(|weight| u8::try_from(weight).ok()) else {
                return malformed(hop.weight.to_string(), "weight of a next hop");
            };
            let index = match index(&hop.interface) {
                // The kernel removed this next hop with its interface.
                Err(NetworkError::NoInterface(_)) if op == Operation::Remove => continue,
                index => index?,
            };
            hops.push(Hop { index, gateway: parse_optional_ip(&hop.gateway)?, onlink: hop.onlink, weight });
        }
        let parsed =
            Self { route, family, kind, tos: parse_byte(route.tos, "type of service")?, destination, source, hops };
        if parsed.multipath(false).len() > MAX_VALUE {
            return malformed(route.next_hops.len().to_string(), "number of next hops");
        }
        Ok(parsed)
    }

    /// Returns the netlink message. If `onlink` is true, all next hops with a gateway get RTNH_F_ONLINK.
    fn message(&self, op: Operation, onlink: bool) -> Message {
        let route = self.route;
        let v4 = self.family == husk_netlink::IPV4;
        let direct = self.kind == Kind::UNICAST && self.hops.iter().all(|hop| hop.gateway.is_none());
        let scope = match route.scope {
            0 if v4 && direct => libc::RT_SCOPE_LINK,
            scope => u8::try_from(scope).unwrap_or(libc::RT_SCOPE_UNIVERSE),
        };
        let kind = match self.kind {
            Kind::UNICAST => libc::RTN_UNICAST,
            Kind::LOCAL => libc::RTN_LOCAL,
            Kind::BLACKHOLE => libc::RTN_BLACKHOLE,
            Kind::UNREACHABLE => libc::RTN_UNREACHABLE,
            Kind::PROHIBIT => libc::RTN_PROHIBIT,
            Kind::THROW => libc::RTN_THROW,
        };
        let several = !route.next_hops.is_empty();
        let flags = match &self.hops[..] {
            [hop] if !several => u32::from(hop.flags(onlink)),
            _ => 0,
        };
        let (prefix, tos) = (self.destination.map_or(0, |(_, prefix)| prefix), if v4 { self.tos } else { 0 });
        // struct rtmsg. Its table field has one byte; the RTA_TABLE attribute holds larger table ids.
        let mut fixed =
            [self.family, prefix, 0, tos, libc::RT_TABLE_UNSPEC, libc::RTPROT_BOOT, scope, kind, 0, 0, 0, 0];
        fixed[8..].copy_from_slice(&flags.to_ne_bytes());
        let order = if op == Operation::Append { libc::NLM_F_APPEND } else { libc::NLM_F_REPLACE };
        let mut message =
            op.message((libc::RTM_NEWROUTE, order), libc::RTM_DELROUTE, &fixed).number(libc::RTA_TABLE, table(route));
        if let Some((address, _)) = self.destination {
            message = message.attribute(libc::RTA_DST, &octets(address));
        }
        match &self.hops[..] {
            [hop] if !several => {
                message = message.number(libc::RTA_OIF, hop.index.unsigned_abs());
                if let Some((kind, value)) = hop.gateway(self.family) {
                    message = message.attribute(kind, &value);
                }
            }
            [] => {}
            _ => message = message.attribute(libc::RTA_MULTIPATH, &self.multipath(onlink)),
        }
        if let Some(address) = self.source {
            message = message.attribute(libc::RTA_PREFSRC, &octets(address));
        }
        if route.metric > 0 {
            message = message.number(libc::RTA_PRIORITY, route.metric);
        }
        let metrics = [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)];
        let metrics = metrics.into_iter().filter(|(_, value)| *value > 0);
        let metrics: Vec<u8> = metrics.flat_map(|(kind, value)| nest(&[(kind, &value.to_ne_bytes())])).collect();
        if !metrics.is_empty() {
            message = message.attribute(libc::RTA_METRICS, &metrics);
        }
        message
    }

    /// Returns the value of RTA_MULTIPATH: a struct rtnexthop with attributes for each next hop.
    fn multipath(&self, onlink: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for hop in &self.hops {
            let gateway = hop.gateway(self.family).map(|(kind, value)| nest(&[(kind, &value)])).unwrap_or_default();
            // The sum is at most 32.
            bytes.extend(u16::try_from(8 + gateway.len()).unwrap_or(u16::MAX).to_ne_bytes());
            bytes.extend([hop.flags(onlink), hop.weight]);
            bytes.extend(hop.index.to_ne_bytes());
            bytes.extend(gateway);
        }
        bytes
    }
}

impl Hop {
    fn flags(&self, onlink: bool) -> u8 {
        if self.onlink || (onlink && self.gateway.is_some()) { RTNH_F_ONLINK } else { 0 }
    }

    /// Returns the type and the value of the gateway's attribute in a route of `family`.
    fn gateway(&self, family: u8) -> Option<(u16, Vec<u8>)> {
        let address = self.gateway?;
        let gateway_family = self::family(address);
        // A gateway of the other family (an IPv4 route via an IPv6 next hop) needs RTA_VIA with struct rtvia.
        Some(match gateway_family == family {
            true => (libc::RTA_GATEWAY, octets(address)),
            false => (libc::RTA_VIA, [&u16::from(gateway_family).to_ne_bytes()[..], &octets(address)].concat()),
        })
    }
}

#[cfg(test)]
mod tests {
    use husk_netlink::attributes;
    use husk_proto::agent::NextHop;
    use proptest::prelude::*;

    use super::*;

    fn index(name: &str) -> Result<i32, NetworkError> {
        match name {
            "lo" => Ok(1),
            "eth0" => Ok(2),
            name => Err(NetworkError::NoInterface(name.to_owned())),
        }
    }

    fn message(op: Operation, route: &Route) -> Vec<u8> {
        ParsedRoute::parse(op, route, index).unwrap().message(op, false).finish().unwrap()
    }

    fn list(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        attributes(&bytes[16 + 12..]).map(|(kind, value)| (kind, value.to_vec())).collect()
    }

    #[test]
    fn message_with_one_next_hop_uses_rta_oif_and_rta_gateway() {
        let route = Route {
            destination: "10.9.0.0/16".into(),
            gateway: "10.0.0.1".into(),
            interface: "eth0".into(),
            table: 1000,
            tos: 0x10,
            onlink: true,
            ..Default::default()
        };
        let bytes = message(Operation::Add, &route);
        assert_eq!(bytes[16..28], [2, 16, 0, 0x10, 0, libc::RTPROT_BOOT, 0, libc::RTN_UNICAST, 4, 0, 0, 0]);
        let expected = [
            (libc::RTA_TABLE, 1000u32.to_ne_bytes().to_vec()),
            (libc::RTA_DST, vec![10, 9, 0, 0]),
            (libc::RTA_OIF, 2u32.to_ne_bytes().to_vec()),
            (libc::RTA_GATEWAY, vec![10, 0, 0, 1]),
        ];
        assert_eq!(list(&bytes), expected);
        let direct = Route { interface: "eth0".into(), ..Default::default() };
        assert_eq!(message(Operation::Add, &direct)[22], libc::RT_SCOPE_LINK);
        assert_eq!(list(&message(Operation::Add, &direct))[0].1, 254u32.to_ne_bytes());
    }

    #[test]
    fn default_route_with_a_gateway_of_the_other_family_uses_rta_via() {
        let gateway = "fe80::1".to_owned();
        let route = Route { gateway, interface: "eth0".into(), ..Default::default() };
        let bytes = message(Operation::Add, &route);
        assert_eq!(bytes[16], husk_netlink::IPV4);
        assert_eq!(list(&bytes)[2].0, libc::RTA_VIA);
    }

    #[test]
    fn message_with_several_next_hops_uses_rta_multipath() {
        let hop = |gateway: &str, weight, onlink| {
            let (gateway, interface) = (gateway.to_owned(), "eth0".to_owned());
            NextHop { gateway, interface, weight, onlink, ..Default::default() }
        };
        let hops = vec![hop("10.0.0.1", 2, false), hop("fe80::2", 256, true)];
        let route = Route { next_hops: hops, ..Default::default() };
        let bytes = message(Operation::Append, &route);
        assert_eq!(bytes[22], libc::RT_SCOPE_UNIVERSE);
        let attributes = list(&bytes);
        assert_eq!(attributes.len(), 2);
        let (kind, hops) = &attributes[1];
        assert_eq!(*kind, libc::RTA_MULTIPATH);
        assert_eq!(hops[..16], [16, 0, 0, 1, 2, 0, 0, 0, 8, 0, libc::RTA_GATEWAY as u8, 0, 10, 0, 0, 1]);
        assert_eq!(hops[16..24], [32, 0, RTNH_F_ONLINK, 255, 2, 0, 0, 0]);
        let many = Route { next_hops: vec![hop("10.0.0.1", 1, false); 4096], ..Default::default() };
        assert!(matches!(ParsedRoute::parse(Operation::Add, &many, index), Err(NetworkError::Malformed(..))));
        let heavy = Route { next_hops: vec![hop("10.0.0.1", 257, false)], ..Default::default() };
        assert!(matches!(ParsedRoute::parse(Operation::Add, &heavy, index), Err(NetworkError::Malformed(..))));
    }

    #[test]
    fn blackhole_route_has_no_next_hop() {
        let route =
            Route { destination: "fd00::/8".into(), kind: Kind::BLACKHOLE.into(), metric: 7, ..Default::default() };
        let bytes = message(Operation::Remove, &route);
        assert_eq!((bytes[16], bytes[23]), (husk_netlink::IPV6, libc::RTN_BLACKHOLE));
        let kinds: Vec<_> = list(&bytes).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [libc::RTA_TABLE, libc::RTA_DST, libc::RTA_PRIORITY]);
    }

    #[test]
    fn malformed_routes_are_rejected() {
        let eth0 = Route { interface: "eth0".into(), ..Default::default() };
        for route in [
            Route { tos: 256, ..eth0.clone() },
            Route { source: "fd00::1".into(), destination: "10.0.0.0/8".into(), ..eth0.clone() },
            Route { kind: protobuf::EnumOrUnknown::from_i32(77), ..eth0.clone() },
            Route { destination: "10.0.0.0/40".into(), ..eth0.clone() },
        ] {
            assert!(
                matches!(ParsedRoute::parse(Operation::Add, &route, index), Err(NetworkError::Malformed(..))),
                "{route}"
            );
        }
        assert!(matches!(
            ParsedRoute::parse(Operation::Add, &Route::default(), index),
            Err(NetworkError::NoInterface(_))
        ));
    }

    proptest! {
        #[test]
        fn message_never_panics(texts: [String; 3], prefix: u8, numbers: [u32; 4]) {
            let [gateway, source, name] = texts;
            let hop = NextHop { gateway: gateway.clone(), interface: "eth0".into(), weight: numbers[0], ..Default::default() };
            let route = Route {
                destination: format!("10.0.0.0/{prefix}"), gateway, source, interface: name, tos: numbers[1],
                scope: numbers[2], next_hops: vec![hop], table: numbers[3], ..Default::default()
            };
            if let Ok(parsed) = ParsedRoute::parse(Operation::Add, &route, |_| Ok(2)) {
                let _ = parsed.message(Operation::Add, true).finish();
            }
        }
    }
}
