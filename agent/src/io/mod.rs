//! Standard streams: the table of vsock streams, the pipes or the terminal of a process, and the relays between streams
//! and processes.

pub mod console;
pub mod relay;
pub mod stdio;
pub mod streams;
