//! The VM of a sandbox: its state, and the clients of the VMM process and of the agent in the guest.

pub mod agent;
pub mod console;
pub mod state;
mod thread_id;
pub mod vhost;
pub mod vmm;

pub use state::{State, StateCell};
