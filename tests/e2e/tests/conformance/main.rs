//! What the CRI promises, behaviour by behaviour, in the groups of its validation suite.
//!
//! Runs against any runtime handler; `cargo xtask conformance` makes docs/conformance.md of it.
//!
//! Runs: by name only: `cargo xtask conformance` runs it, and compares Husk with runc

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

/// A container of `pod` that sleeps, with what `change` makes of its configuration.
#[track_caller]
fn sleeper(pod: &Pod, change: impl FnOnce(&mut Value)) -> PodContainer {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    change(&mut config);
    pod.start(&config)
}

/// What a shell script prints in a container that is made for it; the container is removed afterwards.
#[track_caller]
fn once(pod: &Pod, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut config = pod.sh(script);
    change(&mut config);
    let container = pod.start(&config);
    container.wait();
    let log = container.log();
    container.remove();
    let text: Vec<&str> = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default()).collect();
    text.join("\n")
}

/// The security context of a container's configuration.
fn context(config: &mut Value) -> &mut Value {
    &mut config["linux"]["security_context"]
}
