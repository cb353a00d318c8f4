//! x86-64: memory layout, CPU state at the kernel's entry point, and tables for the kernel.

pub mod boot_params;
pub mod cpuid;
pub mod device_tree;
pub mod kaslr;
pub mod layout;
pub mod regs;
