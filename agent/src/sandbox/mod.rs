//! The sandbox: the pod's own namespaces, network and settings in the guest.

mod apparmor;
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
pub mod users;
pub mod volume;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mirror::Mirrors;
use users::IdMappings;

/// The pod's network namespace.
pub const NET: &str = "/run/husk/ns/net";
/// The pod's IPC namespace.
pub const IPC: &str = "/run/husk/ns/ipc";
/// The pod's UTS namespace.
pub const UTS: &str = "/run/husk/ns/uts";
/// The pod's user namespace, if it has one.
pub const USER: &str = "/run/husk/ns/user";
/// The pod's shared process namespace, if a container asked for it.
const PID: &str = "/run/husk/ns/pid";

#[derive(Default)]
struct State {
    prepared: bool,
    pid_shared: bool,
    id_mappings: Option<IdMappings>,
}

/// What the sandbox has so far.
#[derive(Default)]
pub struct Sandbox {
    state: Mutex<State>,
    /// The copies of volumes.
    pub mirrors: Mirrors,
}

impl Sandbox {
    /// Makes the namespaces, once; with `id_mappings` they are a user namespace's, and replace those that were made before
    /// anybody knew.
    pub fn prepare(&self, id_mappings: Option<IdMappings>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.prepared || (id_mappings.is_some() && state.id_mappings.is_none()) {
            match namespaces::make(id_mappings.as_ref()) {
                Ok(()) => (state.prepared, state.id_mappings) = (true, id_mappings),
                Err(error) => tracing::error!("{}", crate::log::chain(&error)),
            }
        }
    }

    /// The users of the pod's user namespace, if it has one.
    pub fn id_mappings(&self) -> Option<IdMappings> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).id_mappings.clone()
    }

    /// The shared process namespace, made when the first container asks.
    pub fn shared_pid(&self) -> std::io::Result<PathBuf> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.pid_shared {
            let id_mappings = state.id_mappings.as_ref().map(|_| Path::new(USER));
            namespaces::make_shared_pid(Path::new(PID), id_mappings)?;
            state.pid_shared = true;
        }
        Ok(PathBuf::from(PID))
    }
}
