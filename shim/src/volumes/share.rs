//! The share is the directory that virtio-fs serves to the guest.
//!
//! Two directories show the same tmpfs: `share` and `guest`. The shim creates directories and mounts in `share`.
//! `guest` is a read-only slave of `share`, and every mount in `share` propagates to `guest`. virtio-fs serves `guest`.
//!
//! The tmpfs is read-only for the guest. Therefore, the guest can neither fill the tmpfs nor create a symlink at a
//! future mount point. The guest can still write to a rootfs or a volume, because each is a separate mount.
//!
//! The shim prepares mounts in a third directory, the staging directory `stage`, which the guest cannot see.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::volumes::staging_dir::StagingDir;
use crate::volumes::{mount_api, shared_mounts};

/// A sandbox's share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Directory in which the shim creates directories and mounts. [`crate::volumes::teardown()`] takes this path as
    /// `share`.
    pub host: PathBuf,
    /// Directory that the VMM serves to the guest.
    pub guest: PathBuf,
}

/// Error from mounting the share.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {}", path.display())]
pub struct ShareError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Share {
    /// Mounts the share in the existing directory `dir`. The caller must not be in the host's mount namespace.
    ///
    /// # Errors
    /// [`ShareError`]. After an error, nothing stays mounted.
    pub fn mount(dir: &Path) -> Result<Self, ShareError> {
        let share = Self { host: dir.join("share"), guest: dir.join("guest") };
        share.mount_all().inspect_err(|_| share.unmount())?;
        Ok(share)
    }

    fn stage(&self) -> PathBuf {
        StagingDir::for_share(&self.host).dir().to_owned()
    }

    fn mount_all(&self) -> Result<(), ShareError> {
        let fail = |step, path: &Path| {
            let path = path.to_path_buf();
            move |source: nix::Error| ShareError { step, path, source: source.into() }
        };
        let stage = self.stage();
        for path in [&self.host, &self.guest, &stage] {
            match std::fs::create_dir(path) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(ShareError { step: "create", path: path.clone(), source });
                }
                _ => {}
            }
        }
        let (host, guest) = (self.host.as_path(), self.guest.as_path());
        let none = None::<&Path>;
        // 4 MiB are enough, because these file systems contain only directories and empty files.
        for (path, options) in [(host, "mode=0711,size=4m"), (&stage, "mode=0700,size=4m")] {
            mount(Some("husk"), path, Some("tmpfs"), mount_api::SHARED_FLAGS, Some(options))
                .map_err(fail("mount a tmpfs at", path))?;
        }
        // With private propagation, mounts and unmounts in the staging directory have no effect elsewhere.
        mount(none, stage.as_path(), none, MsFlags::MS_PRIVATE, none)
            .map_err(fail("set private propagation of", &stage))?;
        mount(none, host, none, MsFlags::MS_SHARED, none).map_err(fail("set shared propagation of", host))?;
        StagingDir::for_share(host).create().map_err(|source| ShareError {
            step: "create directories in",
            path: stage,
            source,
        })?;
        let volumes = host.join(shared_mounts::VOLUMES);
        std::fs::create_dir(&volumes).map_err(|source| ShareError { step: "create", path: volumes, source })?;
        mount(Some(host), guest, none, MsFlags::MS_BIND, none).map_err(fail("bind the share to", guest))?;
        mount(none, guest, none, MsFlags::MS_SLAVE, none).map_err(fail("set slave propagation of", guest))?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | mount_api::SHARED_FLAGS;
        mount(none, guest, none, read_only, none).map_err(fail("set the read-only flag of", guest))
    }

    /// Unmounts the share and the staging directory with all submounts, and removes the directories. May be called
    /// repeatedly.
    pub fn unmount(&self) {
        for path in [&self.guest, &self.host, &self.stage()] {
            // A lazy unmount (MNT_DETACH) includes all submounts. Ignore an error, because there may be nothing to
            // unmount.
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = std::fs::remove_dir(path);
        }
    }
}
