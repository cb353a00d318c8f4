//! Husk's embedded virtual machine monitor: boots a Linux guest through KVM with a handful of virtio devices.
//!
//! The library runs in a child process of the shim ([`child::main`]); the shim starts it with [`client::spawn`] and
//! drives it over a control socket ([`control`]). [`boot`] is the boot recipe, from top to bottom.

pub mod arch;
pub mod boot;
pub mod bus;
pub mod child;
pub mod client;
pub mod config;
pub mod control;
pub mod event_loop;
pub mod memory;
pub mod probe;
pub mod serial;
mod timing;
pub mod vcpu;
pub mod virtio;
pub mod vm;
pub mod vmgenid;

// The agent and the VMM must agree on boot marks and slots, and neither wants the other's dependencies: these files are
// the protocol crate's, compiled here as well.
#[path = "../../proto/src/boot.rs"]
pub mod boot_mark;
#[path = "../../proto/src/slots.rs"]
pub mod slot_map;
