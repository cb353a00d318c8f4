//! Brings up the loopback interface of the current network namespace.

use std::io;

use husk_base::sys::interface;

/// Brings up `lo`.
pub fn bring_up() -> io::Result<()> {
    interface::set_flags("lo", libc::IFF_UP | libc::IFF_RUNNING)
}
