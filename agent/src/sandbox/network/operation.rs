//! Adds and removes parts of the network configuration, with one netlink request each.

use std::fmt::Display;
use std::io;

use husk_netlink::{Message, Netlink};

use super::NetworkError;

/// Operation on a part of the network configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Adds the part and replaces an existing part with the same key.
    Add,
    /// Adds the part after existing parts with the same key.
    Append,
    /// Removes the part.
    Remove,
}

impl Operation {
    /// Returns the netlink message of this operation. `flags` apply only to [`Operation::Add`] and
    /// [`Operation::Append`].
    pub(super) fn message(self, (add, flags): (u16, i32), remove: u16, fixed: &[u8]) -> Message {
        match self {
            Self::Add | Self::Append => Message::new(add, libc::NLM_F_CREATE | flags, fixed),
            Self::Remove => Message::new(remove, 0, fixed),
        }
    }

    /// Sends the message. Also succeeds if the part to remove is missing, or if the part to add already exists.
    pub(super) fn change(self, pod: &Netlink, message: Message) -> io::Result<()> {
        // The kernel returns these errors if the part to remove is missing. The kernel may have removed the part
        // together with its interface, or a container may have removed it.
        const MISSING: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];
        match pod.change(message) {
            Err(error) if self == Self::Remove && error.raw_os_error().is_some_and(|code| MISSING.contains(&code)) => {
                Ok(())
            }
            Err(error) if self != Self::Remove && error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    /// Returns a function that converts an error of the kernel to the error of this operation on `object`.
    pub(super) fn failed(self, object: impl Display) -> impl FnOnce(io::Error) -> NetworkError {
        let text = format!("{} {object}", if self == Self::Remove { "remove" } else { "add" });
        move |source| NetworkError::Kernel(text, source)
    }
}
