//! A rule of a seccomp filter: a system call, conditions on its arguments, and the reason why a thread needs the call.

use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use syscalls::Sysno;

/// Allows a system call.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The system call.
    pub call: Sysno,
    /// Conditions, of which at least one must hold. If the list is empty, the call is allowed with any arguments.
    pub when: &'static [Condition],
    /// Why the thread needs the call.
    pub reason: &'static str,
}

/// A condition on the lower 32 bits of one argument of a system call: `argument & mask == value`.
#[derive(Debug, Clone, Copy)]
pub struct Condition {
    /// Position of the argument, from 0.
    pub argument: u8,
    /// The bits that are compared.
    pub mask: u32,
    /// The required value of these bits.
    pub value: u32,
}

impl Rule {
    /// Returns the rule in the form that the filter compiler takes.
    pub fn compile(&self) -> Result<Vec<SeccompRule>, BackendError> {
        let rule = |condition: &Condition| {
            let Condition { argument, mask, value } = *condition;
            let operator = SeccompCmpOp::MaskedEq(mask.into());
            SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())?])
        };
        self.when.iter().map(rule).collect()
    }
}

/// Allows a system call with any arguments.
pub const fn allow(call: Sysno, reason: &'static str) -> Rule {
    Rule { call, when: &[], reason }
}

/// Allows a system call if one of the conditions holds.
pub const fn allow_if(call: Sysno, when: &'static [Condition], reason: &'static str) -> Rule {
    Rule { call, when, reason }
}

/// Requires that an argument is `value`.
pub const fn is(argument: u8, value: u32) -> Condition {
    Condition { argument, mask: u32::MAX, value }
}

/// Requires that an argument has none of the bits in `bits`.
pub const fn lacks(argument: u8, bits: u32) -> Condition {
    Condition { argument, mask: bits, value: 0 }
}
