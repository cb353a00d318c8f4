//! Constants for routes and routing rules that libc lacks, from linux/fib_rules.h and linux/rtnetlink.h.

/// Destination prefix.
pub const FRA_DST: u16 = 1;
/// Source prefix.
pub const FRA_SRC: u16 = 2;
/// Incoming interface.
pub const FRA_IIFNAME: u16 = 3;
/// Priority of the rule to jump to (FR_ACT_GOTO).
pub const FRA_GOTO: u16 = 4;
/// Priority of the rule.
pub const FRA_PRIORITY: u16 = 6;
/// Packet mark (fwmark).
pub const FRA_FWMARK: u16 = 10;
/// Routing realms.
pub const FRA_FLOW: u16 = 11;
/// Interface group. The rule ignores routes through interfaces of this group.
pub const FRA_SUPPRESS_IFGROUP: u16 = 13;
/// Prefix length. The rule ignores routes with this prefix length or a shorter one.
pub const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
/// Routing table to look up.
pub const FRA_TABLE: u16 = 15;
/// Mask for [`FRA_FWMARK`]: the rule compares only these bits of the mark.
pub const FRA_FWMASK: u16 = 16;
/// Outgoing interface. Matches packets of sockets that are bound to this interface.
pub const FRA_OIFNAME: u16 = 17;
/// Padding for alignment.
pub const FRA_PAD: u16 = 18;
/// The rule looks up the table of a VRF (l3mdev).
pub const FRA_L3MDEV: u16 = 19;
/// Range of user ids. Matches packets of sockets that these users own.
pub const FRA_UID_RANGE: u16 = 20;
/// Originator of the rule, `RTPROT_…`.
pub const FRA_PROTOCOL: u16 = 21;
/// IP protocol number.
pub const FRA_IP_PROTO: u16 = 22;
/// Source port range.
pub const FRA_SPORT_RANGE: u16 = 23;
/// Destination port range.
pub const FRA_DPORT_RANGE: u16 = 24;
/// Rule flag: the rule applies to packets that do not match its selectors.
pub const FIB_RULE_INVERT: u32 = 2;

/// Route metric: MTU.
pub const RTAX_MTU: u16 = 2;
/// Route metric: advertised TCP maximum segment size.
pub const RTAX_ADVMSS: u16 = 8;
/// Next hop flag: the kernel treats the gateway as on-link even if no route covers the gateway.
pub const RTNH_F_ONLINK: u8 = 4;
