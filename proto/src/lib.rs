//! Protocols between shim, VMM and guest agent: vsock ports, stream headers, boot marks, guest paths, annotations and
//! ttrpc services.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

pub mod annotations;
pub mod boot_mark;
pub mod host_socket;
pub mod metrics;
pub mod mmio_slots;
pub mod network;
pub mod port_forwarding;
pub mod ports;
pub mod stream;
pub mod sysctls;
pub mod unified;
pub mod volume;

pub use containerd_shim_protos as containerd;

/// Messages of `husk.agent.v1`.
#[allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// Messages of the Kubernetes CRI: the subset of a pod's configuration that a sandbox needs.
#[allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri_sandbox.rs"));
}

/// Asynchronous client and server of the `husk.agent.v1.Sandbox` service.
#[allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// Version of the protocol between shim and agent: the messages of this crate, the guest's paths, and what both sides
/// do with them. A change that an older shim or agent would misunderstand increases the version. 0 means that the other
/// side has no version yet.
pub const AGENT_PROTOCOL: u32 = 2;

/// The kernel parameter of a guest that becomes a template. Its agent mounts the share only in Setup, because each guest
/// that is made from the template has its own share.
pub const TEMPLATE_PARAMETER: &str = "husk.template=1";

/// Type URL of [`agent::CreateOptions`] in the options of a create request.
pub const CREATE_OPTIONS_TYPE_URL: &str = "husk.agent.v1.CreateOptions";

/// Prefix of an audit message. If the agent refuses a request, it logs a message with this prefix. The shim logs such a
/// line as a warning.
pub const AUDIT_PREFIX: &str = "audit: ";

/// Guest mount point of the share, which the host serves over virtio-fs.
pub const GUEST_SHARE: &str = "/run/husk/share";

/// Directory in [`GUEST_SHARE`] that holds the pod's volumes. Its name cannot collide with the name of a container's
/// directory, because no container id begins with a dot.
pub const SHARED_VOLUMES: &str = ".volumes";

/// Tag of the virtio-fs device that serves the share.
pub const SHARE_TAG: &str = "husk";

/// Path prefix. A path in the specification's `linux.namespaces[].path` that begins with this prefix stands for a
/// namespace of the sandbox. The namespace type follows the prefix, as in `/run/husk/ns/uts`.
///
/// A path with this prefix replaces the host's path, which has no meaning in the guest. If the specification has a path
/// for a namespace type, the container joins the sandbox's namespace of this type.
pub const GUEST_NAMESPACES: &str = "/run/husk/ns";

/// Path prefix that stands for a container's PID namespace. The container id follows.
pub const GUEST_PID_NAMESPACES: &str = "/run/husk/pids";

/// Guest mount point of the sandbox's shared memory. If the shim requests it, the agent mounts a tmpfs there during
/// `Setup`. The containers of a Kubernetes pod share this tmpfs at `/dev/shm`.
pub const GUEST_SHM: &str = "/run/husk/shm";

/// Directory in which the guest mounts memory volumes (tmpfs, hugetlbfs), by volume name.
pub const GUEST_VOLUMES: &str = "/run/husk/volumes";

/// Directory in which the guest bind-mounts directories of volumes (`subPath`). See [`volume`].
pub const GUEST_SUBPATHS: &str = "/run/husk/subpaths";

/// `fs_type` of a volume request whose volume is already in [`SHARED_VOLUMES`].
pub const SHARED_FS_TYPE: &str = "shared";

/// Directory of the guest's copies of mirrored volumes. The name of a copy is `<container>/<mount>`.
pub const GUEST_MIRRORS: &str = "/run/husk/mirrors";
