//! Numbers of routes and rules that libc lacks: linux/fib_rules.h and linux/rtnetlink.h.

/// The prefix packets go to.
pub const FRA_DST: u16 = 1;
/// The prefix they come from.
pub const FRA_SRC: u16 = 2;
/// The interface they come by.
pub const FRA_IIFNAME: u16 = 3;
/// The priority to go on with.
pub const FRA_GOTO: u16 = 4;
/// Where the rule stands.
pub const FRA_PRIORITY: u16 = 6;
/// The packets' mark.
pub const FRA_FWMARK: u16 = 10;
/// Realms.
pub const FRA_FLOW: u16 = 11;
/// Routes by interfaces of this group are not taken.
pub const FRA_SUPPRESS_IFGROUP: u16 = 13;
/// Routes with a prefix of this length or a shorter one are not taken.
pub const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
/// The table looked up.
pub const FRA_TABLE: u16 = 15;
/// The bits of the mark that count.
pub const FRA_FWMASK: u16 = 16;
/// The interface packets are bound to.
pub const FRA_OIFNAME: u16 = 17;
/// Nothing.
pub const FRA_PAD: u16 = 18;
/// The table of a VRF.
pub const FRA_L3MDEV: u16 = 19;
/// The users whose packets they are.
pub const FRA_UID_RANGE: u16 = 20;
/// Who made the rule.
pub const FRA_PROTOCOL: u16 = 21;
/// IP's protocol.
pub const FRA_IP_PROTO: u16 = 22;
/// The ports packets come from.
pub const FRA_SPORT_RANGE: u16 = 23;
/// The ports they go to.
pub const FRA_DPORT_RANGE: u16 = 24;
/// A flag of a rule: it is for what it does not describe.
pub const FIB_RULE_INVERT: u32 = 2;

/// A route's metric: the largest packet.
pub const RTAX_MTU: u16 = 2;
/// A route's metric: the largest segment of TCP that is announced.
pub const RTAX_ADVMSS: u16 = 8;
/// A flag of a next hop: its gateway is on the link, whatever the routes say.
pub const RTNH_F_ONLINK: u8 = 4;
