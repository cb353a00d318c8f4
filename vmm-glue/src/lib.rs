//! Husk's embedded virtual machine monitor (VMM): boots a Linux guest with KVM and a few virtio devices.
//!
//! The library runs in a child process of the shim ([`process::main`]). The shim starts that process with
//! [`client::spawn`] and controls it over a control socket ([`control`]). [`boot`] lists the steps that build a VM.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

pub mod arch;
pub mod boot;
mod boot_timing;
pub mod bus;
pub mod client;
pub mod config;
pub mod config_check;
pub mod control;
pub mod event_loop;
pub mod guest_memory;
pub mod jail;
pub mod kvm_probe;
mod last_words;
pub mod memory;
pub mod process;
pub mod reporter;
pub mod serial;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
pub mod vm;
pub mod vmgenid;

// The agent and the VMM must agree on boot marks and slots. These files belong to the protocol crate. This crate
// compiles the files, too, so that the VMM does not get the protocol crate's dependencies.
#[path = "../../proto/src/boot_mark.rs"]
pub mod boot_mark;
#[path = "../../proto/src/mmio_slots.rs"]
pub mod mmio_slots;
