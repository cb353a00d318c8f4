//! Fuzzes an agent policy, as a pod's annotation and the Setup request contain it.

use husk_policy::{Exec, Policies, Policy};

/// Runs one input.
pub fn run(text: &[u8]) {
    let Ok(policy) = Policy::from_json(text) else { return };
    let json = policy.to_json();
    let alone = Policies::from_json(&json, b"").expect("parse the policy again");
    assert_eq!(alone.node, policy);
    // Each listed command is allowed, unless another rule forbids it.
    let commands = policy.exec.list().unwrap_or_default();
    for arguments in commands.iter().map(|command| command.arguments()) {
        let exec = Exec { container: "c", arguments, ..Exec::default() };
        alone.check_exec(&exec).expect("allow a listed command");
        let both = Policies::from_json(&json, br#"{"exec": []}"#).expect("parse both policies");
        both.check_exec(&exec).expect_err("the other policy forbids all commands");
    }
}
