//! What shim, VMM and guest agent share on the wire: ports, the stream header, boot marks and the agent's services.

pub mod boot;
pub mod forward;
pub mod metrics;
pub mod ports;
pub mod slots;
pub mod stream;
pub mod volume;

pub use containerd_shim_protos as containerd;

/// Messages of `husk.agent.v1`.
#[allow(missing_docs, warnings, clippy::all, clippy::unwrap_used, clippy::expect_used)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// A pod's configuration by the Kubernetes CRI, as far as a sandbox needs it.
#[allow(missing_docs, warnings, clippy::all, clippy::unwrap_used, clippy::expect_used)]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri_sandbox.rs"));
}

/// The `husk.agent.v1.Sandbox` service, asynchronous client and server.
#[allow(missing_docs, warnings, clippy::all, clippy::unwrap_used, clippy::expect_used)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// Type URL under which [`agent::CreateOptions`] travels in a create request.
pub const CREATE_OPTIONS_URL: &str = "husk.agent.v1.CreateOptions";

/// Where the guest mounts the directory that the host shares over virtio-fs.
pub const GUEST_SHARE: &str = "/run/husk/share";

/// The directory of [`GUEST_SHARE`] that has the pod's volumes; no container's id begins with a dot.
pub const SHARED_VOLUMES: &str = ".volumes";

/// Tag of the virtio-fs device that carries the shared directory.
pub const SHARE_TAG: &str = "husk";

/// What stands for a namespace of the sandbox in a specification's namespace paths, followed by the namespace's type
/// (`/run/husk/ns/uts`): the host's path means nothing in the guest, only that there was one does.
pub const GUEST_NS: &str = "/run/husk/ns";

/// A path below this stands for the process namespace of the container of that name.
pub const GUEST_PIDS: &str = "/run/husk/pids";

/// The sandbox's shared memory: a tmpfs that the guest mounts at `Setup` when the shim asks for it, and that the
/// containers of a Kubernetes pod share at `/dev/shm`.
pub const GUEST_SHM: &str = "/run/husk/shm";

/// Where the guest mounts volumes of its own (in memory, of huge pages), by their names.
pub const GUEST_VOLUMES: &str = "/run/husk/volumes";

/// Where the guest binds parts of volumes; see [`volume`].
pub const GUEST_SUBPATHS: &str = "/run/husk/subpaths";

/// The file system of a volume that is in [`SHARED_VOLUMES`] already.
pub const SHARED: &str = "shared";

/// Where the guest keeps its copies of mirrored volumes, `<container>/<mount>`.
pub const GUEST_MIRRORS: &str = "/run/husk/mirrors";
