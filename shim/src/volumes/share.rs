//! The directory a sandbox shares with its guest: what the host makes in it, the guest may not change.
//!
//! Two directories, one tmpfs: the host creates directories and mounts in `share`; `guest` is a read-only copy that
//! every mount made in `share` propagates to, and the root of the guest's virtio-fs. So the guest writes into root file
//! systems and volumes, but it can neither fill the tmpfs nor put a link where the host is about to mount something.
//! What is to be in the share is made ready in a third directory, `stage`, which the guest has no view of.

use crate::volumes::bind;
use crate::volumes::stage::StagingDir;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::{
    io,
    path::{Path, PathBuf},
};

/// A sandbox's share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Where the host makes directories and mounts; `Request::share` and what [`crate::volumes::teardown()`] takes.
    pub host: PathBuf,
    /// What the VMM shares with the guest.
    pub guest: PathBuf,
}

/// Why there is no share.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {}", path.display())]
pub struct ShareError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Share {
    /// Mounts the share in `dir`, which exists. The caller is in a mount namespace of its own.
    ///
    /// # Errors
    /// [`ShareError`]; nothing stays mounted.
    pub fn mount(dir: &Path) -> Result<Self, ShareError> {
        let share = Self { host: dir.join("share"), guest: dir.join("guest") };
        share.make().inspect_err(|_| share.unmount())?;
        Ok(share)
    }

    fn stage(&self) -> PathBuf {
        StagingDir::for_share(&self.host).dir().to_owned()
    }

    fn make(&self) -> Result<(), ShareError> {
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
        // Directories and empty files to mount on are all they ever hold.
        for (path, options) in [(host, "mode=0711,size=4m"), (&stage, "mode=0700,size=4m")] {
            mount(Some("husk"), path, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options))
                .map_err(fail("mount a tmpfs at", path))?;
        }
        // Mounts can be moved from here, and what is unmounted here stays mounted elsewhere.
        mount(none, stage.as_path(), none, MsFlags::MS_PRIVATE, none).map_err(fail("make private", &stage))?;
        mount(none, host, none, MsFlags::MS_SHARED, none).map_err(fail("share", host))?;
        StagingDir::for_share(host).create().map_err(|source| ShareError {
            step: "create directories in",
            path: stage,
            source,
        })?;
        let volumes = host.join(bind::VOLUMES);
        std::fs::create_dir(&volumes).map_err(|source| ShareError { step: "create", path: volumes, source })?;
        mount(Some(host), guest, none, MsFlags::MS_BIND, none).map_err(fail("bind", guest))?;
        mount(none, guest, none, MsFlags::MS_SLAVE, none).map_err(fail("make a slave of", guest))?;
        let read_only =
            MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(none, guest, none, read_only, none).map_err(fail("make read-only", guest))
    }

    /// Unmounts the share with whatever is still mounted in it and removes its directories; any number of times.
    pub fn unmount(&self) {
        for path in [&self.guest, &self.host, &self.stage()] {
            // Detached, it goes with everything below it; there may be nothing to unmount.
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = std::fs::remove_dir(path);
        }
    }
}
