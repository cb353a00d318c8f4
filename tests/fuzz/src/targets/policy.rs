//! Fuzzes the parser of agent policies and the check of the rule `exec`. The input is a policy in JSON.

use husk_policy::{Exec, Policies, Policy};

/// Runs one input.
pub fn run(text: &[u8]) {
    let Ok(policy) = Policy::from_json(text) else { return };
    let json = policy.to_json();
    let alone = Policies::from_json(&json, b"").expect("parse the policy again");
    assert_eq!(alone.node, policy);
    // The policy must allow each command in its list. A second policy with an empty list must forbid all commands.
    let commands = policy.exec.list().unwrap_or_default();
    for arguments in commands.iter().map(|command| command.arguments()) {
        let exec = Exec { container: "c", arguments, ..Exec::default() };
        alone.check_exec(&exec).expect("allow a listed command");
        let both = Policies::from_json(&json, br#"{"exec": []}"#).expect("parse both policies");
        both.check_exec(&exec).expect_err("refuse a command that the second policy does not list");
    }
}
