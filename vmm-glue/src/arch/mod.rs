//! What is particular to x86-64: where things lie in guest memory, processor state at entry, tables for the kernel.

pub mod boot_params;
pub mod cpuid;
pub mod device_tree;
pub mod layout;
pub mod regs;
