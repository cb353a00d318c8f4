//! CRI conformance: each check tests one behaviour. The modules are the groups of the CRI validation suite.
//!
//! The suite supports any runtime handler. `cargo xtask conformance` generates docs/conformance.md from the results.
//!
//! Runs: by name only: use `cargo xtask conformance`, which compares Husk with runc

mod apparmor;
mod containers;
mod mounts;
mod network;
mod resources;
mod sandboxes;
mod security;
mod streams;

use husk_e2e::cri::{Pod, PodContainer};
use serde_json::Value;

/// Starts a sleeping container in `pod`. `change` modifies the container's configuration.
#[track_caller]
fn sleeper(pod: &Pod, change: impl FnOnce(&mut Value)) -> PodContainer {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    change(&mut config);
    pod.start(&config)
}

/// Runs a shell script in a new container, removes the container, and returns the script's output.
#[track_caller]
fn run_once(pod: &Pod, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut config = pod.sh(script);
    change(&mut config);
    let container = pod.start(&config);
    container.wait();
    let log = container.log();
    container.remove();
    let text: Vec<&str> = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default()).collect();
    text.join("\n")
}

/// Returns the security context of a configuration.
fn security_context(config: &mut Value) -> &mut Value {
    &mut config["linux"]["security_context"]
}
