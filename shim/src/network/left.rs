//! What of a pod's network the guest does not get, for the log: nobody is to look for it in vain.

use std::collections::BTreeSet;
use std::io;

use husk_netlink::{Message, Netlink, attributes, number};

/// linux/fib_rules.h and linux/rtnetlink.h: the rules that every namespace has are for the tables local, main and default.
const OWN_TABLES: [u32; 4] = [0, 253, 254, 255];
const FRA_TABLE: u16 = 15;
/// The metric of the route that stands for none (net/ipv6/route.c, `ip6_null_entry`).
const NO_ROUTE: u32 = u32::MAX;

/// What there is in the current namespace beside unicast routes by one way in the main table, each thing once.
///
/// # Errors
/// What the kernel says.
pub fn out(netlink: &Netlink) -> io::Result<BTreeSet<String>> {
    let mut left = BTreeSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // struct rtmsg, struct fib_rule_hdr
        let mut fixed = [0; 12];
        fixed[0] = family as u8;
        netlink.dump(Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &fixed), |kind, body| {
            left.extend((kind == libc::RTM_NEWROUTE).then(|| route(body)).flatten());
        })?;
        netlink.dump(Message::new(libc::RTM_GETRULE, libc::NLM_F_DUMP, &fixed), |kind, body| {
            left.extend((kind == libc::RTM_NEWRULE).then(|| rule(body)).flatten());
        })?;
    }
    Ok(left)
}

fn route(body: &[u8]) -> Option<String> {
    let [_, _, _, _, table, _, _, kind, ..] = *body.first_chunk::<12>()?;
    let (mut table, mut metric, mut several) = (u32::from(table), 0, false);
    for (attribute, value) in attributes(body.get(12..)?) {
        match attribute {
            libc::RTA_TABLE => table = number(value)?,
            libc::RTA_PRIORITY => metric = number(value)?,
            libc::RTA_MULTIPATH => several = true,
            _ => {}
        }
    }
    let name = match kind {
        libc::RTN_BLACKHOLE => "blackhole",
        libc::RTN_UNREACHABLE => "unreachable",
        libc::RTN_PROHIBIT => "prohibit",
        libc::RTN_THROW => "throw",
        libc::RTN_UNICAST if !OWN_TABLES.contains(&table) => return Some(format!("the routes of table {table}")),
        libc::RTN_UNICAST if several => return Some("routes over several next hops".to_owned()),
        _ => return None,
    };
    (metric != NO_ROUTE).then(|| format!("{name} routes"))
}

fn rule(body: &[u8]) -> Option<String> {
    let mut table = u32::from(*body.first_chunk::<12>()?.get(4)?);
    for (attribute, value) in attributes(body.get(12..)?) {
        if attribute == FRA_TABLE {
            table = number(value)?;
        }
    }
    (!OWN_TABLES.contains(&table)).then(|| format!("rules that lead to table {table}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(table: u8, kind: u8, attributes: &[(u16, u32)]) -> Vec<u8> {
        let mut bytes = vec![libc::AF_INET as u8, 0, 0, 0, table, 0, 0, kind, 0, 0, 0, 0];
        for (kind, value) in attributes {
            bytes.extend(8u16.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn what_is_not_carried_over_is_named() {
        let of = |table, kind, attributes: &[_]| route(&message(table, kind, attributes));
        assert_eq!(of(254, libc::RTN_UNICAST, &[(libc::RTA_PRIORITY, 5)]), None);
        assert_eq!(of(255, libc::RTN_LOCAL, &[]), None);
        assert_eq!(of(252, libc::RTN_UNICAST, &[(libc::RTA_TABLE, 1000)]).unwrap(), "the routes of table 1000");
        assert_eq!(of(254, libc::RTN_BLACKHOLE, &[]).unwrap(), "blackhole routes");
        assert_eq!(of(254, libc::RTN_UNREACHABLE, &[(libc::RTA_PRIORITY, NO_ROUTE)]), None);
        assert!(of(254, libc::RTN_UNICAST, &[(libc::RTA_MULTIPATH, 0)]).unwrap().contains("next hops"));
        assert_eq!(rule(&message(254, 1, &[])), None);
        assert_eq!(rule(&message(0, 1, &[(FRA_TABLE, 100)])).unwrap(), "rules that lead to table 100");
    }

    proptest! {
        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            let _ = (route(&bytes), rule(&bytes));
        }
    }
}
