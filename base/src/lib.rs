//! Code that agent, shim, VMM and tools share: error chains, locks, the log subscriber, entropy and system calls.
//!
//! No function of this crate depends on the rest of Husk. The agent links this crate. Therefore the crate is small and
//! depends only on libc, nix and tracing, and with the feature `async` on tokio.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

#[cfg(feature = "async")]
pub mod async_fd;
pub mod entropy;
pub mod error;
pub mod failpoint;
pub mod log;
pub mod log_limit;
#[cfg(feature = "async")]
pub mod relay;
pub mod sync;
pub mod sys;
