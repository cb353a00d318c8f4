//! seccomp filters of the VMM's threads (seccomp(2)). Each kind of thread has a filter that allows only the system
//! calls in its table. Each entry of a table contains the reason why the thread needs the call.

mod rule;
mod tables;
mod violation;

pub use self::rule::{Condition, Rule, allow, allow_if, is, lacks};
pub use self::tables::rules;
pub use self::violation::ViolationError;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, apply_filter};
use syscalls::Sysno;

use super::kind::Kind;
use crate::config::SeccompMode;
use crate::last_words;

/// The mode of this process, which [`prepare`] sets when the process enters the jail. The mode is missing only
/// in unit tests, which run without a jail. Without a mode, [`load`] loads no filter.
static MODE: OnceLock<SeccompMode> = OnceLock::new();

/// Error from loading a filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The table could not be compiled.
    #[error("failed to compile the seccomp filter")]
    Compile(#[from] BackendError),
    /// The kernel refused the filter.
    #[error("failed to load the seccomp filter: the kernel needs CONFIG_SECCOMP_FILTER")]
    Load(#[from] seccompiler::Error),
}

/// Sets the mode of the filters that [`load`] loads, and installs the handler that reports violations.
pub fn prepare(mode: SeccompMode) -> Result<(), ViolationError> {
    // The cell is empty, because the process enters the jail only once.
    let _ = MODE.set(mode);
    violation::handle()
}

/// Loads the filter for this thread. Threads that this thread starts later inherit the filter.
pub fn load(kind: Kind) -> Result<(), FilterError> {
    let Some(&mode) = MODE.get() else { return Ok(()) };
    last_words::remember_thread();
    apply(rules(kind), mode)
}

/// Loads a filter that allows only the calls in `rules`, and a filter that makes clone3 fail with ENOSYS. Threads that
/// this thread starts later inherit both filters. For a call that is not in `rules`, the kernel sends SIGSYS or logs
/// the call, as `mode` says.
pub fn apply<'a>(rules: impl Iterator<Item = &'a Rule>, mode: SeccompMode) -> Result<(), FilterError> {
    apply_filter(&refuse_clone3()?)?;
    Ok(apply_filter(&compile(rules, mode)?)?)
}

/// Compiles a filter. If no rule allows a call, the kernel sends SIGSYS instead of executing the call. In mode
/// [`SeccompMode::Log`], the kernel logs the call and executes the call.
fn compile<'a>(rules: impl Iterator<Item = &'a Rule>, mode: SeccompMode) -> Result<BpfProgram, BackendError> {
    let other = match mode {
        SeccompMode::Enforce => SeccompAction::Trap,
        SeccompMode::Log => SeccompAction::Log,
    };
    let mut calls: BTreeMap<i64, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        calls.entry(rule.call.id().into()).or_default().push(rule);
    }
    let compiled = calls.into_iter().map(|(call, rules)| Ok((call, compile_call(&rules)?)));
    let calls = compiled.collect::<Result<BTreeMap<_, _>, BackendError>>()?;
    SeccompFilter::new(calls, other, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Compiles the rules of one call. If the result is empty, seccompiler allows the call with any arguments. Therefore,
/// the result is empty if one of the rules has no conditions.
fn compile_call(rules: &[&Rule]) -> Result<Vec<SeccompRule>, BackendError> {
    if rules.iter().any(|rule| rule.when.is_empty()) {
        return Ok(Vec::new());
    }
    let compiled = rules.iter().map(|rule| rule.compile()).collect::<Result<Vec<_>, _>>()?;
    Ok(compiled.into_iter().flatten().collect())
}

/// Compiles a filter that makes clone3 fail with ENOSYS. glibc then calls clone. A filter can check the flags of clone,
/// but not the flags of clone3, because the flags of clone3 are in memory.
fn refuse_clone3() -> Result<BpfProgram, BackendError> {
    let calls = BTreeMap::from([(i64::from(Sysno::clone3.id()), Vec::new())]);
    let refuse = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    SeccompFilter::new(calls, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::rule::{allow, allow_if, is};
    use super::*;

    #[test]
    fn rule_without_conditions_allows_the_call_whatever_the_other_rules_say() {
        const ALWAYS: Rule = allow(Sysno::fcntl, "a");
        const SOMETIMES: Rule = allow_if(Sysno::fcntl, &[is(1, 1)], "b");
        for rules in [[&ALWAYS, &SOMETIMES], [&SOMETIMES, &ALWAYS]] {
            assert!(compile_call(&rules).unwrap().is_empty());
        }
        assert_eq!(compile_call(&[&SOMETIMES, &SOMETIMES]).unwrap().len(), 2);
    }
}
