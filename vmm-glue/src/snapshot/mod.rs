//! Saves a paused VM, and builds a VM from what was saved.

pub mod format;
pub mod memory;
pub mod platform;
pub mod vcpu;
