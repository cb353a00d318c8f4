//! Parses routing policy rules, which select a routing table.

use husk_netlink::fib::{
    FIB_RULE_INVERT, FRA_DPORT_RANGE, FRA_DST, FRA_FLOW, FRA_FWMARK, FRA_FWMASK, FRA_GOTO, FRA_IIFNAME, FRA_IP_PROTO,
    FRA_L3MDEV, FRA_OIFNAME, FRA_PAD, FRA_PRIORITY, FRA_PROTOCOL, FRA_SPORT_RANGE, FRA_SRC, FRA_SUPPRESS_IFGROUP,
    FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_UID_RANGE,
};
use husk_netlink::{attributes, number};
use husk_proto::agent::rule::Action;
use husk_proto::agent::{PortRange, Rule};

use super::{Entry, ip};

/// Priority and table of each rule that the kernel creates in a new namespace (net/ipv4/fib_rules.c,
/// net/ipv6/fib6_rules.c).
const DEFAULT_RULES: [(u32, u8); 3] =
    [(0, libc::RT_TABLE_LOCAL), (0x7ffe, libc::RT_TABLE_MAIN), (0x7fff, libc::RT_TABLE_DEFAULT)];

/// Parses the body of a rule message. Returns `None` if the message is malformed.
pub fn parse(body: &[u8]) -> Option<Entry<Rule>> {
    // struct fib_rule_hdr
    let [family, to, from, tos, table, _, _, action, flags @ ..] = *body.first_chunk::<12>()?;
    let action = match action {
        1 => Action::LOOKUP,
        2 => Action::GOTO,
        3 => Action::NOP,
        6 => Action::BLACKHOLE,
        7 => Action::UNREACHABLE,
        8 => Action::PROHIBIT,
        _ => return Some(Entry::Unsupported("rules with an unknown action".to_owned())),
    };
    let mut rule = Rule {
        ipv6: i32::from(family) == libc::AF_INET6,
        action: action.into(),
        table: table.into(),
        tos: tos.into(),
        invert: u32::from_ne_bytes(flags) & FIB_RULE_INVERT != 0,
        ..Default::default()
    };
    for (attribute, value) in attributes(body.get(12..)?) {
        match attribute {
            FRA_DST => rule.destination = format!("{}/{to}", ip(family, value)?),
            FRA_SRC => rule.source = format!("{}/{from}", ip(family, value)?),
            FRA_IIFNAME => rule.input_interface = text(value)?,
            FRA_OIFNAME => rule.output_interface = text(value)?,
            FRA_GOTO => rule.target = number(value)?,
            FRA_PRIORITY => rule.priority = number(value)?,
            FRA_FWMARK => rule.mark = number(value)?,
            FRA_FWMASK => rule.mask = number(value)?,
            FRA_TABLE => rule.table = number(value)?,
            // The kernel sends -1 if no prefix length is set.
            FRA_SUPPRESS_PREFIXLEN => {
                rule.suppress_prefix_length = Some(number(value)?).filter(|&length| length != u32::MAX);
            }
            FRA_PROTOCOL => rule.protocol = u32::from(*value.first()?),
            FRA_IP_PROTO => rule.ip_protocol = u32::from(*value.first()?),
            FRA_SPORT_RANGE => rule.source_ports = Some(ports(value)?).into(),
            FRA_DPORT_RANGE => rule.destination_ports = Some(ports(value)?).into(),
            FRA_PAD => {}
            // Omit a rule with any other attribute, because the rule would have a different meaning without this
            // attribute.
            FRA_L3MDEV => return unsupported("with l3mdev (VRF)"),
            FRA_UID_RANGE => return unsupported("with a UID range"),
            FRA_FLOW => return unsupported("with realms"),
            FRA_SUPPRESS_IFGROUP => return unsupported("with suppress_ifgroup"),
            _ => return unsupported(&format!("with attribute {attribute}")),
        }
    }
    Some(if is_default_rule(&rule) { Entry::Implicit } else { Entry::Supported(rule) })
}

fn unsupported(what: &str) -> Option<Entry<Rule>> {
    Some(Entry::Unsupported(format!("rules {what}")))
}

fn is_default_rule(rule: &Rule) -> bool {
    DEFAULT_RULES.into_iter().any(|(priority, table)| {
        let (ipv6, protocol, table) = (rule.ipv6, rule.protocol, table.into());
        *rule == Rule { ipv6, protocol, priority, table, ..Default::default() }
    })
}

fn text(value: &[u8]) -> Option<String> {
    let text = value.split(|&byte| byte == 0).next()?;
    Some(std::str::from_utf8(text).ok()?.to_owned())
}

/// Parses `struct fib_rule_port_range`.
fn ports(value: &[u8]) -> Option<PortRange> {
    let [a, b, c, d] = *value.first_chunk::<4>()?;
    let (first, last) = (u16::from_ne_bytes([a, b]).into(), u16::from_ne_bytes([c, d]).into());
    Some(PortRange { first, last, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use husk_netlink::nest;
    use proptest::prelude::*;

    use super::*;

    /// Parses a rule message that contains `list` and the attributes that the kernel adds to every rule.
    fn parse_rule(
        family: i32,
        lengths: [u8; 2],
        table: u8,
        action: u8,
        flags: u32,
        list: &[(u16, &[u8])],
    ) -> Option<Entry<Rule>> {
        let none = u32::MAX.to_ne_bytes();
        let always = nest(&[
            (FRA_TABLE, &u32::from(table).to_ne_bytes()),
            (FRA_SUPPRESS_PREFIXLEN, &none),
            (FRA_PROTOCOL, &[3]),
        ]);
        let fixed = [family as u8, lengths[0], lengths[1], 0, table, 0, 0, action];
        parse(&[&fixed[..], &flags.to_ne_bytes(), &always, &nest(list)].concat())
    }

    #[track_caller]
    fn supported(parsed: Option<Entry<Rule>>) -> Rule {
        match parsed {
            Some(Entry::Supported(rule)) => rule,
            other => panic!("{other:?}"),
        }
    }

    const V4: i32 = libc::AF_INET;

    #[test]
    fn kernel_default_rules_are_skipped() {
        let plain =
            |priority: u32, table| parse_rule(V4, [0, 0], table, 1, 0, &[(FRA_PRIORITY, &priority.to_ne_bytes())]);
        // The kernel sends no priority attribute for its first rule, which has priority 0.
        assert_eq!(parse_rule(V4, [0, 0], libc::RT_TABLE_LOCAL, 1, 0, &[]), Some(Entry::Implicit));
        assert_eq!(plain(32766, libc::RT_TABLE_MAIN), Some(Entry::Implicit));
        assert_eq!(plain(32767, libc::RT_TABLE_DEFAULT), Some(Entry::Implicit));
        assert_eq!(supported(plain(100, libc::RT_TABLE_MAIN)).priority, 100);
        let from = [(FRA_PRIORITY, &32766u32.to_ne_bytes()[..]), (FRA_SRC, &[10, 0, 0, 0])];
        assert_eq!(supported(parse_rule(V4, [0, 8], libc::RT_TABLE_MAIN, 1, 0, &from)).source, "10.0.0.0/8");
    }

    #[test]
    fn every_supported_attribute_is_parsed() {
        let (priority, mark, mask) = (100u32.to_ne_bytes(), 5u32.to_ne_bytes(), 0xffu32.to_ne_bytes());
        let (table, suppress) = (1000u32.to_ne_bytes(), 0u32.to_ne_bytes());
        let range = [80u16.to_ne_bytes(), 90u16.to_ne_bytes()].concat();
        let list = [
            (FRA_PRIORITY, &priority[..]),
            (FRA_DST, &[10, 1, 0, 0]),
            (FRA_SRC, &[10, 2, 3, 0]),
            (FRA_IIFNAME, b"eth0\0"),
            (FRA_OIFNAME, b"net1\0"),
            (FRA_FWMARK, &mark),
            (FRA_FWMASK, &mask),
            (FRA_TABLE, &table),
            (FRA_SUPPRESS_PREFIXLEN, &suppress),
            (FRA_IP_PROTO, &[6]),
            (FRA_DPORT_RANGE, &range),
        ];
        let expected = Rule {
            priority: 100,
            destination: "10.1.0.0/16".into(),
            source: "10.2.3.0/24".into(),
            input_interface: "eth0".into(),
            output_interface: "net1".into(),
            mark: 5,
            mask: 0xff,
            table: 1000,
            suppress_prefix_length: Some(0),
            ip_protocol: 6,
            destination_ports: Some(PortRange { first: 80, last: 90, ..Default::default() }).into(),
            invert: true,
            protocol: 3,
            ..Default::default()
        };
        assert_eq!(supported(parse_rule(V4, [16, 24], 252, 1, FIB_RULE_INVERT, &list)), expected);
    }

    #[test]
    fn every_supported_action_is_parsed() {
        let action = |action| supported(parse_rule(libc::AF_INET6, [0, 0], 0, action, 0, &[])).action.enum_value();
        assert_eq!(
            [3, 6, 7, 8].map(action),
            [Action::NOP, Action::BLACKHOLE, Action::UNREACHABLE, Action::PROHIBIT].map(Ok)
        );
        let goto = supported(parse_rule(V4, [0, 0], 0, 2, 0, &[(FRA_GOTO, &500u32.to_ne_bytes())]));
        assert_eq!((goto.action.enum_value(), goto.target), (Ok(Action::GOTO), 500));
    }

    #[test]
    fn unsupported_rules_are_described() {
        for attribute in [FRA_L3MDEV, FRA_UID_RANGE, FRA_FLOW, FRA_SUPPRESS_IFGROUP, 25, 99] {
            let parsed = parse_rule(V4, [0, 0], 100, 1, 0, &[(attribute, &[0; 8])]);
            assert!(matches!(&parsed, Some(Entry::Unsupported(what)) if what.starts_with("rules")), "{parsed:?}");
        }
        assert!(matches!(parse_rule(V4, [0, 0], 100, 4, 0, &[]), Some(Entry::Unsupported(_))));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes: Vec<u8>) {
            parse(&bytes);
        }
    }
}
