//! Prepares a container: creates its mounts on the host, and its specification for the guest.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use husk_proto::annotations::POD_UID;
use husk_vmm::config::{HOST_ROOTFS, ROOTFS};
use serde_json::Value;

use crate::host_view::HostView;
use crate::oci::{Bundle, Disk, TranslateError, disks, translate};
use crate::resources::cgroup;
use crate::volumes::error::VolumeError;
use crate::volumes::plan::{GuestVolumes, PlanContext};
use crate::volumes::rootfs::{RootMount, RootfsError};
use crate::volumes::source::Flags;
use crate::volumes::staging_dir::{CopyContext, StagingDir};
use crate::volumes::teardown::teardown;
use crate::volumes::{plan, rootfs, shared_mounts};

/// Input of [`prepare`].
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Container id.
    pub id: &'a str,
    /// Path of the sandbox's share on the host ([`crate::volumes::Share::host`]).
    pub share: &'a Path,
    /// Mounts of the rootfs. If the list is empty, the bundle contains the rootfs.
    pub rootfs: &'a [RootMount],
    /// Resolves the host's paths.
    pub host: &'a HostView,
    /// The node's sockets to which containers may connect (`host_sockets` of the configuration).
    pub host_sockets: &'a [String],
    /// Ids of the pod's containers that have their own PID on the host, by PID.
    pub pids: &'a HashMap<u32, String>,
}

/// Result of [`prepare`].
#[derive(Debug)]
pub struct Prepared {
    /// `config.json` for the guest.
    pub spec: Value,
    /// Path of the rootfs in the guest.
    pub rootfs: String,
    /// Notes for the log about settings and mounts of the specification that the container does not get.
    pub notes: Vec<String>,
    /// Whether a volume must receive the mounts that the host makes later ([`crate::volumes::propagate`]).
    pub needs_propagation: bool,
    /// AppArmor profile. The guest must load the profile before the agent creates the container.
    pub profile: String,
    /// Volumes that the agent must set up before the agent creates the container.
    pub volumes: GuestVolumes,
    /// Block devices on the host. The shim must attach these devices to the VM before the agent creates the container.
    /// `spec` contains the host's device numbers, which [`crate::oci::replace_disk_numbers`] replaces.
    pub disks: Vec<Disk>,
}

/// Why preparing a container failed.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The id is not valid as the name of a directory.
    #[error("invalid container id {0:?}: it must not be empty, begin with a dot, or contain a slash or NUL")]
    Id(String),
    /// The specification cannot be translated for the guest.
    #[error(transparent)]
    Translate(#[from] TranslateError),
    /// The rootfs cannot be mounted.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A volume cannot be made available to the guest.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The host-only file systems cannot be determined.
    #[error("failed to determine the host-only file systems, which must not be in the share {}", share.display())]
    HostOnly {
        /// Path of the sandbox's share.
        share: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory in the share cannot be created.
    #[error("failed to create the directory {} in the share", path.display())]
    Create {
        /// Path of the directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Creates the container's mounts in the share, and the container's specification for the guest.
///
/// # Errors
/// [`PrepareError`]. Before returning an error, removes the mounts that this call has made.
pub fn prepare(bundle: &Bundle, request: &Request<'_>) -> Result<Prepared, PrepareError> {
    let Request { id, share, .. } = *request;
    // The id becomes a directory name in the share.
    if id.is_empty() || id.starts_with('.') || id.contains('/') || id.contains('\0') {
        return Err(PrepareError::Id(id.into()));
    }
    // Translate the specification before the first mount. Therefore, an invalid specification needs no cleanup.
    let mut raw = bundle.raw.clone();
    let (mut notes, mut volumes) = (Vec::new(), GuestVolumes::default());
    // Programs of the host can change a directory that the specification names, but not what the snapshotter mounts.
    let root = if request.rootfs.is_empty() { HOST_ROOTFS } else { ROOTFS };
    let rootfs = translate::guest_rootfs(id, root);
    translate::spec(&mut raw, (id, &rootfs), request.pids, &mut notes)?;
    if !cgroup::is_cgroup_v2() {
        translate::add_cgroup_namespace(&mut raw);
    }
    let create = |path: PathBuf| fs::create_dir(&path).map_err(|source| PrepareError::Create { path, source });
    // If the directory exists, another container with this id uses the directory. In this case, return before the
    // cleanup below, because the cleanup would remove the other container's mounts.
    create(share.join(id))?;
    let mounted = (|| {
        create(share.join(id).join(root))?;
        create(shared_mounts::markers_dir(share, id))?;
        mount(bundle, request, root, &mut raw, &mut notes, &mut volumes)
    })();
    if let Err(error) = mounted {
        // Ignore an error of the teardown, because the caller gets the error that caused the teardown.
        let _ = teardown(share, id);
        return Err(error);
    }
    let profile = bundle.spec.process.apparmor_profile.clone().unwrap_or_default();
    let disks = disks::find(&raw);
    let needs_propagation = bundle.spec.mounts.iter().any(|mount| mount.is_bind() && Flags::of(mount).slave);
    Ok(Prepared { spec: raw, rootfs, notes, needs_propagation, profile, volumes, disks })
}

fn mount(
    bundle: &Bundle,
    request: &Request<'_>,
    root: &str,
    raw: &mut Value,
    notes: &mut Vec<String>,
    guest: &mut GuestVolumes,
) -> Result<(), PrepareError> {
    let Request { id, share, rootfs, host, host_sockets, .. } = *request;
    let target = share.join(id).join(root);
    let stage = StagingDir::for_share(share);
    let host_only =
        stage.host_only(share).map_err(|source| PrepareError::HostOnly { share: share.to_owned(), source })?;
    let context = CopyContext { host_only: &host_only, host };
    if rootfs.is_empty() {
        let path = bundle.dir.join(&bundle.spec.root.path);
        let bind = RootMount {
            kind: "bind".into(),
            source: path.to_string_lossy().into_owned(),
            options: vec!["rbind".into()],
            ..RootMount::default()
        };
        notes.extend(rootfs::mount_all(&[bind], &target, &stage, context)?);
    } else {
        notes.extend(rootfs::mount_all(rootfs, &target, &stage, context)?);
    }
    let context = PlanContext {
        bundle: &bundle.dir,
        share,
        host_only: &host_only,
        host,
        host_sockets,
        container: id,
        kubernetes: bundle.spec.annotations.is_cri(),
        pod: bundle.spec.annotations.cri(POD_UID).unwrap_or_default(),
    };
    for index in plan::order(&bundle.spec.mounts) {
        if let Some(mount) = bundle.spec.mounts.get(index)
            && let Some(source) = plan::prepare_mount(mount, index, &context, notes, guest)?
            && let Some(mount) = raw.get_mut("mounts").and_then(|mounts| mounts.get_mut(index))
            && let Some(mount) = mount.as_object_mut()
        {
            mount.insert("source".into(), source.into());
        }
    }
    Ok(())
}
