//! Saves a paused VM, and reads what was saved. [`crate::boot`] builds a VM from it.

pub mod format;
pub mod host;
pub mod memory;
pub mod platform;
pub mod prefault;
pub mod state;
pub mod touched;
pub mod vcpu;
