//! The sandbox in the guest: the pod's namespaces, network, volumes and kernel settings.

mod apparmor;
mod clock;
mod hotplug;
pub(crate) mod identity;
mod link_notifications;
pub mod loopback;
pub mod mirror;
pub mod namespaces;
pub(crate) mod network;
pub mod port_forwarding;
pub mod service;
pub(crate) mod setup;
pub mod share;
mod shared_pid;
mod slots;
pub mod volume;

use std::path::Path;
use std::sync::Mutex;

use husk_base::sync::lock;

use crate::id_mappings::IdMappings;
use crate::policy::Guard;
use mirror::Mirrors;
use namespaces::NamespaceError;
use shared_pid::SharedPid;

/// The pod's network namespace.
pub const NET_NAMESPACE: &str = "/run/husk/ns/net";
/// The pod's IPC namespace.
pub const IPC_NAMESPACE: &str = "/run/husk/ns/ipc";
/// The pod's UTS namespace.
pub const UTS_NAMESPACE: &str = "/run/husk/ns/uts";
/// The pod's user namespace, if the pod has one.
pub const USER_NAMESPACE: &str = "/run/husk/ns/user";
/// The pod's shared PID namespace, if a container has requested it.
pub(crate) const PID_NAMESPACE: &str = "/run/husk/ns/pid";

#[derive(Default)]
struct State {
    has_namespaces: bool,
    id_mappings: Option<IdMappings>,
}

/// State of the sandbox.
#[derive(Default)]
pub struct Sandbox {
    state: Mutex<State>,
    shared_pid: SharedPid,
    /// Mirrored volumes.
    pub mirrors: Mirrors,
    /// The agent policies of the node and the pod.
    pub policy: Guard,
}

impl Sandbox {
    /// Creates the pod's namespaces if they do not exist. If `id_mappings` is given, a new user namespace owns these
    /// namespaces. In this case, the new namespaces replace namespaces that an earlier call created without id
    /// mappings.
    ///
    /// # Errors
    /// After an error, the next call retries.
    pub fn prepare(&self, id_mappings: Option<IdMappings>) -> Result<(), NamespaceError> {
        self.prepare_with(id_mappings, namespaces::create)
    }

    pub(crate) fn prepare_with(
        &self,
        id_mappings: Option<IdMappings>,
        create: impl FnOnce(Option<&IdMappings>) -> Result<(), NamespaceError>,
    ) -> Result<(), NamespaceError> {
        let mut state = lock(&self.state);
        if !state.has_namespaces || (id_mappings.is_some() && state.id_mappings.is_none()) {
            create(id_mappings.as_ref())?;
            (state.has_namespaces, state.id_mappings) = (true, id_mappings);
        }
        Ok(())
    }

    /// Returns the id mappings of the pod's user namespace, or `None` if the pod has no user namespace.
    pub fn id_mappings(&self) -> Option<IdMappings> {
        lock(&self.state).id_mappings.clone()
    }

    /// Creates the shared PID namespace at [`PID_NAMESPACE`] if it does not exist.
    ///
    /// # Errors
    /// After an error, the next call retries.
    pub async fn create_shared_pid(&self) -> std::io::Result<()> {
        let user_namespace = self.id_mappings().map(|_| Path::new(USER_NAMESPACE));
        self.shared_pid.create(Path::new(PID_NAMESPACE), user_namespace).await
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::agent::{IdMapping, SetupRequest};

    use super::*;

    #[test]
    fn prepare_retries_after_an_error() {
        let sandbox = Sandbox::default();
        let failure = || NamespaceError::Kernel { action: "create", source: nix::Error::EPERM };
        let result = sandbox.prepare_with(None, |_| Err(failure()));
        assert!(matches!(result, Err(NamespaceError::Kernel { source: nix::Error::EPERM, .. })));
        let mut created = 0;
        for _ in 0..2 {
            let create = |_: Option<&IdMappings>| {
                created += 1;
                Ok(())
            };
            sandbox.prepare_with(None, create).unwrap();
        }
        assert_eq!(created, 1);

        let mut request = SetupRequest::new();
        request.uid_mappings.push(IdMapping { container: 0, host: 65536, size: 1, ..Default::default() });
        let id_mappings = IdMappings::from_setup(&request);
        assert!(sandbox.prepare_with(id_mappings.clone(), |_| Err(failure())).is_err());
        assert_eq!(sandbox.id_mappings(), None);
        sandbox.prepare_with(id_mappings.clone(), |_| Ok(())).unwrap();
        assert_eq!(sandbox.id_mappings(), id_mappings);
    }
}
