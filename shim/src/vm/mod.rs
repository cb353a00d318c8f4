//! The state of a sandbox's VM, the client of the VMM, and the client of the agent.

pub mod agent;
mod agent_stream;
pub mod console;
pub mod host_socket;
mod outgoing;
pub mod spawn;
pub mod state;
mod thread_id;
mod throttle;
pub mod vhost;
pub mod vmm;

pub use state::{State, StateCell};
