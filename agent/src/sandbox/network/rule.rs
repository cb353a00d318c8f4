//! Converts a routing policy rule of the pod to a netlink request.

use husk_netlink::fib::{
    FIB_RULE_INVERT, FRA_DPORT_RANGE, FRA_DST, FRA_FWMARK, FRA_FWMASK, FRA_GOTO, FRA_IIFNAME, FRA_IP_PROTO,
    FRA_OIFNAME, FRA_PRIORITY, FRA_PROTOCOL, FRA_SPORT_RANGE, FRA_SRC, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE,
};
use husk_netlink::{Message, Netlink};
use husk_proto::agent::rule::Action;
use husk_proto::agent::{PortRange, Rule};

use super::NetworkError;
use super::address::{family, octets};
use super::operation::Operation;
use super::parse::{parse_byte, parse_optional_cidr};

/// Key of a rule: family and priority. Rules with the same key keep the order in which they are added.
pub type Key = (bool, u32);

/// Returns the key of a rule.
pub fn key(rule: &Rule) -> Key {
    (rule.ipv6, rule.priority)
}

/// Returns the number of attributes that a rule sets. The kernel removes the first rule that matches all attributes of
/// the request (net/core/fib_rules.c, `rule_find`). A request with few attributes also matches a rule that has these
/// attributes and others. Therefore the rule with the most attributes must be removed first.
pub fn selector_count(rule: &Rule) -> usize {
    let texts = [&rule.source, &rule.destination, &rule.input_interface, &rule.output_interface];
    let numbers = [rule.mark, rule.mask, rule.tos, rule.ip_protocol, rule.table, rule.protocol];
    let ports = [&rule.source_ports, &rule.destination_ports];
    texts.iter().filter(|text| !text.is_empty()).count()
        + numbers.iter().filter(|&&number| number != 0).count()
        + ports.iter().filter(|ports| ports.is_some()).count()
        + usize::from(rule.suppress_prefix_length.is_some())
}

/// Adds or removes a rule.
pub fn change(pod: &Netlink, op: Operation, rule: &Rule) -> Result<(), NetworkError> {
    let object = format_args!("rule {} for table {}", rule.priority, rule.table).to_string();
    op.change(pod, message(op, rule)?).map_err(op.failed(object))
}

fn message(op: Operation, rule: &Rule) -> Result<Message, NetworkError> {
    let malformed = |text: String, what| Err(NetworkError::Malformed(text, what));
    let action = match rule.action.enum_value() {
        // For table 0, the kernel would choose an unused table itself.
        Ok(Action::LOOKUP) if rule.table == 0 => return malformed("0".to_owned(), "table of a rule"),
        Ok(Action::LOOKUP) => 1,
        Ok(Action::GOTO) => 2,
        Ok(Action::NOP) => 3,
        Ok(Action::BLACKHOLE) => 6,
        Ok(Action::UNREACHABLE) => 7,
        Ok(Action::PROHIBIT) => 8,
        Err(other) => return malformed(other.to_string(), "action of a rule"),
    };
    let rule_family = if rule.ipv6 { husk_netlink::IPV6 } else { husk_netlink::IPV4 };
    let (source, destination) = (parse_optional_cidr(&rule.source)?, parse_optional_cidr(&rule.destination)?);
    for (prefix, text) in [(source, &rule.source), (destination, &rule.destination)] {
        if prefix.is_some_and(|(address, _)| family(address) != rule_family) {
            return malformed(text.clone(), "prefix for this rule's family");
        }
    }
    let flags = if rule.invert { FIB_RULE_INVERT } else { 0 };
    let length = |prefix: Option<(_, u8)>| prefix.map_or(0, |(_, length)| length);
    let tos = parse_byte(rule.tos, "type of service")?;
    // struct fib_rule_hdr. Its table field has one byte; the FRA_TABLE attribute holds larger table ids.
    let mut fixed = [rule_family, length(destination), length(source), tos, 0, 0, 0, action, 0, 0, 0, 0];
    fixed[8..].copy_from_slice(&flags.to_ne_bytes());
    // NLM_F_EXCL prevents duplicates. An appended rule must not have this flag, because the kernel (`rule_exists`) also
    // rejects some rules that are not duplicates. It rejects a new rule if an existing rule with the same key has all
    // attributes of the new rule and additional attributes.
    let flags = if op == Operation::Append { 0 } else { libc::NLM_F_EXCL };
    let mut message = op
        .message((libc::RTM_NEWRULE, flags), libc::RTM_DELRULE, &fixed)
        .number(FRA_PRIORITY, rule.priority)
        .number(FRA_TABLE, rule.table);
    for (kind, prefix) in [(FRA_SRC, source), (FRA_DST, destination)] {
        if let Some((address, _)) = prefix {
            message = message.attribute(kind, &octets(address));
        }
    }
    for (kind, name) in [(FRA_IIFNAME, &rule.input_interface), (FRA_OIFNAME, &rule.output_interface)] {
        if name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0']) {
            return malformed(name.clone(), "interface name");
        }
        if !name.is_empty() {
            message = message.text(kind, name);
        }
    }
    if rule.mark != 0 || rule.mask != 0 {
        message = message.number(FRA_FWMARK, rule.mark).number(FRA_FWMASK, rule.mask);
    }
    if action == 2 {
        message = message.number(FRA_GOTO, rule.target);
    }
    if let Some(length) = rule.suppress_prefix_length {
        message = message.number(FRA_SUPPRESS_PREFIXLEN, length);
    }
    for (kind, number) in [(FRA_PROTOCOL, rule.protocol), (FRA_IP_PROTO, rule.ip_protocol)] {
        if number != 0 {
            message = message.attribute(kind, &[parse_byte(number, "protocol")?]);
        }
    }
    for (kind, range) in [(FRA_SPORT_RANGE, &rule.source_ports), (FRA_DPORT_RANGE, &rule.destination_ports)] {
        if let Some(range) = range.as_ref() {
            message = message.attribute(kind, &ports(range)?);
        }
    }
    Ok(message)
}

/// Converts a port range to struct fib_rule_port_range.
fn ports(range: &PortRange) -> Result<Vec<u8>, NetworkError> {
    let malformed = || NetworkError::Malformed(format!("{}-{}", range.first, range.last), "port range");
    let port = |number: u32| u16::try_from(number).map_err(|_| malformed());
    let (first, last) = (port(range.first)?, port(range.last)?);
    if first == 0 || first > last {
        return Err(malformed());
    }
    Ok([first.to_ne_bytes(), last.to_ne_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use husk_netlink::attributes;
    use proptest::prelude::*;

    use super::*;

    fn list(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        attributes(&bytes[16 + 12..]).map(|(kind, value)| (kind, value.to_vec())).collect()
    }

    #[test]
    fn message_contains_all_attributes() {
        let rule = Rule {
            priority: 100,
            source: "10.1.2.3/32".into(),
            input_interface: "eth0".into(),
            mark: 1,
            mask: 0xff,
            invert: true,
            table: 1000,
            destination_ports: Some(PortRange { first: 80, last: 90, ..Default::default() }).into(),
            suppress_prefix_length: Some(0),
            protocol: 3,
            ..Default::default()
        };
        let bytes = message(Operation::Add, &rule).unwrap().finish().unwrap();
        assert_eq!(bytes[16..28], [2, 0, 32, 0, 0, 0, 0, 1, FIB_RULE_INVERT as u8, 0, 0, 0]);
        let expected = [
            (FRA_PRIORITY, 100u32.to_ne_bytes().to_vec()),
            (FRA_TABLE, 1000u32.to_ne_bytes().to_vec()),
            (FRA_SRC, vec![10, 1, 2, 3]),
            (FRA_IIFNAME, b"eth0\0".to_vec()),
            (FRA_FWMARK, 1u32.to_ne_bytes().to_vec()),
            (FRA_FWMASK, 0xffu32.to_ne_bytes().to_vec()),
            (FRA_SUPPRESS_PREFIXLEN, vec![0; 4]),
            (FRA_PROTOCOL, vec![3]),
            (FRA_DPORT_RANGE, vec![80, 0, 90, 0]),
        ];
        assert_eq!(list(&bytes), expected);
        assert!(selector_count(&rule) > selector_count(&Rule { source: String::new(), ..rule.clone() }));
        assert!(selector_count(&rule) > selector_count(&Rule { suppress_prefix_length: None, ..rule.clone() }));
    }

    #[test]
    fn malformed_rules_are_rejected() {
        let table = Rule { table: 5, ..Default::default() };
        let range = |first, last| Some(PortRange { first, last, ..Default::default() }).into();
        for rule in [
            Rule::default(),
            Rule { source: "fd00::/8".into(), ..table.clone() },
            Rule { destination: "10.0.0.0/8".into(), ipv6: true, ..table.clone() },
            Rule { input_interface: "a/b".into(), ..table.clone() },
            Rule { output_interface: "an interface's name".into(), ..table.clone() },
            Rule { source_ports: range(0, 1), ..table.clone() },
            Rule { source_ports: range(2, 1), ..table.clone() },
            Rule { source_ports: range(1, 65_536), ..table.clone() },
            Rule { ip_protocol: 256, ..table.clone() },
            Rule { tos: 256, ..table.clone() },
            Rule { action: protobuf::EnumOrUnknown::from_i32(77), ..table.clone() },
        ] {
            assert!(matches!(message(Operation::Add, &rule), Err(NetworkError::Malformed(..))), "{rule}");
        }
        assert!(message(Operation::Remove, &table).is_ok());
    }

    proptest! {
        #[test]
        fn message_never_panics(texts: [String; 3], numbers: [u32; 5]) {
            let [source, input_interface, output_interface] = texts;
            let rule = Rule {
                source, input_interface, output_interface, table: numbers[0], tos: numbers[1], ip_protocol: numbers[2],
                source_ports: Some(PortRange { first: numbers[3], last: numbers[4], ..Default::default() }).into(),
                ..Default::default()
            };
            let _ = message(Operation::Add, &rule);
        }
    }
}
