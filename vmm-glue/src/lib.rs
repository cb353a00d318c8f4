//! Husk's embedded virtual machine monitor: boots a Linux guest through KVM with a handful of virtio devices.
//!
//! The library runs in a child process of the shim ([`child`]); the shim drives it through a [`client::Vmm`].

pub mod config;
pub mod control;
pub mod virtio;
