//! Clients of the VM: of the VMM process and of the agent in the guest.

pub mod agent;
pub mod console;
pub mod vmm;

use std::sync::Arc;

use agent::Agent;

/// State of a sandbox's boot.
#[derive(Clone)]
pub enum Boot {
    /// The guest is booting.
    Booting,
    /// The agent accepts containers.
    Ready(Agent),
    /// The boot failed; the text is the chain of causes.
    Failed(Arc<str>),
}
