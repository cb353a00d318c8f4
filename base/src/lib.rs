//! What agent, shim, VMM and tools share: error chains, locks, the log subscriber, entropy and system calls.
//!
//! Every function here makes sense without the rest of Husk. The agent links this crate, so it stays small: its only
//! dependencies are libc, nix and tracing.

#![deny(clippy::indexing_slicing)]

pub mod entropy;
pub mod error;
pub mod log;
pub mod sync;
pub mod sys;
