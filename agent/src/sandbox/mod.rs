//! The sandbox: the pod's own namespaces, network and settings in the guest.

mod apply;
pub mod forward;
mod hotplug;
pub mod link;
pub mod mirror;
pub mod namespaces;
mod netlink;
mod network;
pub mod service;
mod slots;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The pod's network namespace.
pub const NET: &str = "/run/husk/ns/net";
/// The pod's IPC namespace.
pub const IPC: &str = "/run/husk/ns/ipc";
/// The pod's UTS namespace.
pub const UTS: &str = "/run/husk/ns/uts";
/// The pod's shared process namespace, if a container asked for it.
const PID: &str = "/run/husk/ns/pid";

#[derive(Default)]
struct State {
    prepared: bool,
    pid_shared: bool,
}

/// What the sandbox has so far.
#[derive(Default)]
pub struct Sandbox {
    state: Mutex<State>,
}

impl Sandbox {
    /// Makes the namespaces, once.
    pub fn prepare(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.prepared {
            match namespaces::make() {
                Ok(()) => state.prepared = true,
                Err(error) => tracing::error!("{}", crate::log::chain(&error)),
            }
        }
    }

    /// The shared process namespace, made when the first container asks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn shared_pid(&self) -> std::io::Result<PathBuf> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.pid_shared {
            namespaces::make_shared_pid(Path::new(PID))?;
            state.pid_shared = true;
        }
        Ok(PathBuf::from(PID))
    }
}
