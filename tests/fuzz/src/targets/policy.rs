//! Fuzzes the parser and the exec rule of agent policies. Pods' annotations and Setup requests contain policies.

use husk_policy::{Exec, Policies, Policy};

/// Runs one input.
pub fn run(text: &[u8]) {
    let Ok(policy) = Policy::from_json(text) else { return };
    let json = policy.to_json();
    let alone = Policies::from_json(&json, b"").expect("parse the policy again");
    assert_eq!(alone.node, policy);
    // A policy allows each command that it lists. A second policy can still forbid the command.
    let commands = policy.exec.list().unwrap_or_default();
    for arguments in commands.iter().map(|command| command.arguments()) {
        let exec = Exec { container: "c", arguments, ..Exec::default() };
        alone.check_exec(&exec).expect("allow a listed command");
        let both = Policies::from_json(&json, br#"{"exec": []}"#).expect("parse both policies");
        both.check_exec(&exec).expect_err("the other policy forbids all commands");
    }
}
