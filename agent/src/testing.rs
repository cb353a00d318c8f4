//! The agent's parsing and checks of requests, for the fuzz targets. The functions of this module change only the
//! directories and sockets that their callers pass.

use std::io;
use std::path::{Path, PathBuf};

use husk_base::error::chain;
use husk_netlink::Netlink;
use husk_proto::agent::{CreateOptions, SetupRequest, UpdateMirrorRequest, UpdateNetworkRequest, VolumeDirectory};
use husk_proto::containerd::api::CreateTaskRequest;
use libcontainer::oci_spec::runtime::{LinuxResources, Process, Spec};
use protobuf::Message;

use crate::cgroup::{self, Cgroup};
use crate::id_mappings::IdMappings;
use crate::sandbox::mirror::Mirrors;
use crate::sandbox::network::{self, NetworkConfig};
use crate::sandbox::{Sandbox, setup, volume};
use crate::shared_volumes;
use crate::task::{check_id, spec};

/// A sandbox that has accepted a Setup request, but has created no namespaces.
pub struct PreparedSandbox(Sandbox);

impl PreparedSandbox {
    /// Checks a Setup request.
    ///
    /// # Errors
    /// Fails if the node's policy or the pod's policy is invalid.
    pub fn new(request: &SetupRequest) -> Result<Self, String> {
        let sandbox = Sandbox::default();
        sandbox.policy.accept(&request.node_policy, &request.pod_policy).map_err(|error| chain(&error))?;
        sandbox.prepare_with(IdMappings::from_setup(request), |_| Ok(())).map_err(|error| chain(&error))?;
        for mount in &request.mounts {
            let _ = setup::options(&mount.options);
        }
        Ok(Self(sandbox))
    }

    /// Checks a Create request. Returns the specification, adapted to the guest.
    ///
    /// # Errors
    /// Fails if the agent rejects the request.
    pub fn create(&self, request: &CreateTaskRequest) -> Result<Spec, String> {
        check_id(&request.id).map_err(|error| chain(&error))?;
        let options = CreateOptions::parse_from_bytes(&request.options.value).map_err(|error| chain(&error))?;
        let mut spec: Spec = serde_json::from_slice(&options.spec).map_err(|error| chain(&error))?;
        self.0.policy.check_container(&spec, request, &options.rootfs).map_err(|error| chain(&error))?;
        let cgroup = Cgroup::below(Path::new(cgroup::MOUNT), &request.id);
        spec::adapt(&mut spec, &options.rootfs, &cgroup, &self.0, |_| Ok(PathBuf::from("/proc/1/ns/pid")))
            .map_err(|error| chain(&error))?;
        let _ = shared_volumes::of_spec(&spec);
        Ok(spec)
    }

    /// Checks the process of an Exec request. `process` is this process as JSON. `own` is the process of the
    /// container's specification.
    ///
    /// # Errors
    /// Fails if the agent refuses the request.
    pub fn exec(&self, own: &Process, process: &[u8]) -> Result<(), String> {
        let mut process: Process = serde_json::from_slice(process).map_err(|error| chain(&error))?;
        spec::adapt_process(&mut process);
        self.0.policy.check_exec("c", own, &process).map_err(|error| chain(&error))
    }
}

/// Parses the resources of an Update request, and adapts them to the guest. Returns `None` if the agent rejects them.
pub fn update(resources: &[u8]) -> Option<LinuxResources> {
    let mut resources = serde_json::from_slice::<LinuxResources>(resources).ok()?;
    spec::adapt_resources(&mut resources, &Cgroup::below(Path::new(cgroup::MOUNT), "c")).ok()?;
    Some(resources)
}

/// Adds the interfaces, routes, neighbours and rules of a pod through `netlink`.
///
/// # Errors
/// Fails if the request is malformed, or if a netlink request fails.
pub fn add_network(request: UpdateNetworkRequest, netlink: &Netlink) -> Result<(), String> {
    let UpdateNetworkRequest { interfaces, routes, neighbours, rules, .. } = request;
    let config = NetworkConfig { interfaces, routes, neighbours, rules };
    network::add_all(&config, netlink).map_err(|error| chain(&error))
}

/// Applies updates to the mirrored volumes below `root`. Then removes the mirrored volumes of `container`.
pub fn mirror(root: &Path, updates: &[UpdateMirrorRequest], container: &str) {
    let mirrors = Mirrors::at(root.into());
    for update in updates {
        let _ = mirrors.apply(update);
    }
    mirrors.remove(container);
}

/// Opens a path in the volume at `root`, and creates missing components as directories.
pub fn open_subpath(root: &Path, directories: &[VolumeDirectory]) {
    let _ = volume::open_subpath(root, directories);
}

/// Returns the path of a sysctl's file in /proc/sys.
///
/// # Errors
/// Fails if the name is invalid.
pub fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    setup::sysctl_path(name)
}
