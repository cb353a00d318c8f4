//! Making a container ready: its mounts on the host, its specification for the guest.

use crate::oci::annotations::POD_UID;
use crate::oci::{Bundle, Disk, TranslateError, disks, translate};
use crate::resources::cgroup;
use crate::volumes::bind::Flags;
use crate::volumes::error::VolumeError;
use crate::volumes::plan::{InGuest, PlanContext};
use crate::volumes::rootfs::{CopyContext, RootMount, RootfsError};
use crate::volumes::stage::{StagingDir, SyncError};
use crate::volumes::teardown::teardown;
use crate::volumes::{bind, plan, rootfs};
use serde_json::Value;
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

/// What containerd asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The container.
    pub id: &'a str,
    /// The sandbox's [`crate::volumes::Share::host`].
    pub share: &'a Path,
    /// The mounts that make the root file system; none where the bundle has it.
    pub rootfs: &'a [RootMount],
    /// The other containers by the pids that stand for them on the host.
    pub pids: &'a HashMap<u32, String>,
}

/// A container that the guest can create.
#[derive(Debug)]
pub struct Prepared {
    /// `config.json` for the guest.
    pub spec: Vec<u8>,
    /// The root file system's directory in the guest.
    pub rootfs: String,
    /// What the guest cannot honour and was left out, for the log.
    pub notes: Vec<String>,
    /// Whether a volume is to show what the host mounts in it later ([`crate::volumes::sync_mounts`]).
    pub needs_propagation: bool,
    /// Its AppArmor profile, which the guest is to know before.
    pub profile: String,
    /// Volumes that the guest gets copies of or makes, before it creates the container.
    pub volumes: InGuest,
    /// Block devices of the host that the guest gets, before it creates the container; the specification has the host's
    /// numbers until [`crate::oci::replace_disk_numbers`].
    pub disks: Vec<Disk>,
}

/// Why a container cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The id cannot be a directory's name.
    #[error("{0:?} cannot be a container's id")]
    Id(String),
    /// The specification needs the host.
    #[error(transparent)]
    Translate(#[from] TranslateError),
    /// The root file system cannot be mounted.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A volume cannot be given to the guest.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Host-only file systems cannot be told from others.
    #[error(transparent)]
    HostOnly(#[from] SyncError),
    /// A directory in the share cannot be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Makes the container's mounts in the share, and its specification for the guest.
///
/// # Errors
/// [`PrepareError`]; nothing of this container stays then.
pub fn prepare(bundle: &Bundle, request: &Request<'_>) -> Result<Prepared, PrepareError> {
    let Request { id, share, .. } = *request;
    // containerd's own rule is stricter; this is what keeps the path inside the share.
    if id.is_empty() || id.starts_with('.') || id.contains('/') || id.contains('\0') {
        return Err(PrepareError::Id(id.into()));
    }
    // What needs no mount first: a specification that cannot be has cost nothing then.
    let mut raw = bundle.raw.clone();
    let (mut notes, mut volumes) = (Vec::new(), InGuest::default());
    translate::spec(&mut raw, id, request.pids, &mut notes)?;
    if !cgroup::is_unified() {
        translate::own_cgroup_namespace(&mut raw);
    }
    let create = |path: PathBuf| fs::create_dir(&path).map_err(|source| PrepareError::Create { path, source });
    create(share.join(id))?; // a container of this id that is still there is not ours to take down
    let made = (|| {
        create(share.join(id).join("rootfs"))?;
        create(bind::markers_dir(share, id))?;
        mount(bundle, request, &mut raw, &mut notes, &mut volumes)
    })();
    if let Err(error) = made {
        // The error that led here is the one to be seen.
        let _ = teardown(share, id);
        return Err(error);
    }
    let profile = bundle.spec.process.apparmor_profile.clone().unwrap_or_default();
    let (spec, disks) = (raw.to_string().into_bytes(), disks::of(&raw));
    let needs_propagation = bundle.spec.mounts.iter().any(|mount| mount.is_bind() && Flags::of(mount).slave);
    let rootfs = translate::guest_rootfs(id);
    Ok(Prepared { spec, rootfs, notes, needs_propagation, profile, volumes, disks })
}

fn mount(
    bundle: &Bundle,
    request: &Request<'_>,
    raw: &mut Value,
    notes: &mut Vec<String>,
    guest: &mut InGuest,
) -> Result<(), PrepareError> {
    let Request { id, share, rootfs, .. } = *request;
    let target = share.join(id).join("rootfs");
    let stage = StagingDir::for_share(share);
    let host_only = stage.host_only(share)?;
    // The name of a volume begins with a number and a dot.
    let context = CopyContext { stage: &stage, host_only: &host_only, name: &format!("rootfs.{id}") };
    if rootfs.is_empty() {
        let path = bundle.dir.join(&bundle.spec.root.path);
        let bind = RootMount {
            kind: "bind".into(),
            source: path.to_string_lossy().into_owned(),
            options: vec!["rbind".into()],
            ..RootMount::default()
        };
        notes.extend(rootfs::mount_all(&[bind], &target, context)?);
    } else {
        notes.extend(rootfs::mount_all(rootfs, &target, context)?);
    }
    let context = PlanContext {
        bundle: &bundle.dir,
        share,
        host_only: &host_only,
        container: id,
        kubernetes: bundle.spec.annotations.is_cri(),
        pod: bundle.spec.annotations.cri(POD_UID).unwrap_or_default(),
    };
    for (index, mount) in bundle.spec.mounts.iter().enumerate() {
        if let Some(source) = plan::prepare_mount(mount, index, &context, notes, guest)?
            && let Some(mount) = raw.get_mut("mounts").and_then(|mounts| mounts.get_mut(index))
            && let Some(mount) = mount.as_object_mut()
        {
            mount.insert("source".into(), source.into());
        }
    }
    Ok(())
}
