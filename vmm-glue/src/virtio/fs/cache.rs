//! What the guest may cache: how long names and attributes stay valid, and which requests a file needs.
//!
//! The rules depend on who changes the files of a mount ([`MountKind`]). The shim says this in the mount's name. The
//! guest can change neither of the two names that lead to a mount, because the share itself is read-only.

use std::time::Duration;

use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::{Attr, OpenOptions};

use crate::config::{MountKind, MountProperties, mount_properties};

/// How long the guest caches the share's own directories, in which the shim makes mounts.
const SHARE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the guest caches what only the guest changes. Linux limits the time to a value of this magnitude.
const UNLIMITED: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The regular files of an emptyDir stay cached for this multiple of the time for volumes.
const EMPTY_DIR_FACTOR: u32 = 10;

/// Flag of an answer to OPEN and CREATE: nobody outside the guest's kernel uses the file. The kernel serves its locks,
/// and does not wait for RELEASE (guest/kernel/patches).
pub const FOPEN_PRIVATE: u32 = 1 << 31;

/// Where a node of the share is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// The share's own files.
    #[default]
    Share,
    /// A directory of the share in which the shim makes mounts.
    MountPoints,
    /// A mount.
    Mount(MountProperties),
}

impl Area {
    /// Returns the area of a child of the share's root directory.
    pub fn below_root() -> Self {
        Self::MountPoints
    }

    /// Returns the area of a directory's child. `is_mount` says whether the child is a directory on another mount.
    pub fn child(self, name: &[u8], is_mount: bool) -> Self {
        match self {
            Self::Share => Self::Share,
            Self::MountPoints => str::from_utf8(name).ok().and_then(mount_properties).map_or(Self::Share, Self::Mount),
            // Nothing is known about mounts that the host has made within a volume.
            Self::Mount(_) if is_mount => Self::Mount(MountProperties { kind: MountKind::Volume, local: false }),
            Self::Mount(_) => self,
        }
    }

    fn properties(self) -> Option<MountProperties> {
        match self {
            Self::Mount(properties) => Some(properties),
            _ => None,
        }
    }

    /// Returns the options of an open file, in addition to those of virtiofsd.
    pub fn open_options(self) -> OpenOptions {
        let Some(properties) = self.properties() else { return OpenOptions::empty() };
        // With NOFLUSH, the guest sends FLUSH only for the locks that the VMM has. A local file system does nothing
        // else when a file is closed.
        let mut options = OpenOptions::empty();
        options.set(OpenOptions::NOFLUSH, properties.local);
        if properties.is_private() {
            // SAFETY: the type is an integer, for which every value is valid. Its methods do not rely on known bits.
            options |= unsafe { OpenOptions::from_bits_unchecked(FOPEN_PRIVATE) };
        }
        options
    }

    /// Returns whether the answer to a WRITE has the attributes of the file. Other file systems would perhaps have to
    /// ask their server.
    pub fn has_cheap_attributes(self) -> bool {
        self.properties().is_some_and(|properties| properties.local)
    }
}

/// The time for which the guest caches names and attributes.
#[derive(Debug, Clone, Copy)]
pub struct Cache {
    /// The time for volumes that others can change.
    volume: Duration,
}

impl Cache {
    /// Creates the rules. `volume_ms` is the time for volumes that others can change.
    pub fn new(volume_ms: u32) -> Self {
        Self { volume: Duration::from_millis(volume_ms.into()) }
    }

    /// Returns how long the guest caches the attributes of a node.
    pub fn attributes(&self, area: Area, mode: u32) -> Duration {
        match area {
            Area::Share | Area::MountPoints => SHARE_TIMEOUT,
            Area::Mount(MountProperties { kind, .. }) => match kind {
                MountKind::Rootfs => UNLIMITED,
                MountKind::EmptyDir if mode & libc::S_IFMT == libc::S_IFREG => self.volume * EMPTY_DIR_FACTOR,
                MountKind::EmptyDir | MountKind::HostRootfs | MountKind::Volume => self.volume,
            },
        }
    }

    /// Sets how long the guest caches an entry. `parent` and `area` are the areas of the directory and of the node.
    pub fn set_timeouts(&self, parent: Area, area: Area, entry: &mut Entry) {
        entry.attr_timeout = self.attributes(area, entry.attr.mode);
        // The shim makes and removes mounts at names of the share.
        let is_name_of_share = !matches!(parent, Area::Mount(_));
        entry.entry_timeout = if is_name_of_share { SHARE_TIMEOUT } else { entry.attr_timeout };
    }

    /// Returns the entry of a name that a directory does not have, if the guest may cache that.
    pub fn missing(&self, parent: Area) -> Option<Entry> {
        let entry_timeout = match parent.properties()?.kind {
            MountKind::Rootfs => UNLIMITED,
            // The kubelet makes directories for subPaths. The agent finds them, because mkdir(2) looks them up.
            MountKind::EmptyDir => self.volume,
            MountKind::HostRootfs | MountKind::Volume => return None,
        };
        (!entry_timeout.is_zero()).then(|| Entry {
            inode: 0,
            generation: 0,
            attr: Attr::default(),
            attr_timeout: Duration::ZERO,
            entry_timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(name: &str) -> Area {
        Area::below_root().child(name.as_bytes(), true)
    }

    /// Returns the timeouts of a name and of attributes, in ms.
    fn timeouts(parent: Area, area: Area, mode: u32) -> (u128, u128) {
        let attr = Attr { mode, ..Attr::default() };
        let (attr_timeout, entry_timeout) = (Duration::ZERO, Duration::ZERO);
        let mut entry = Entry { inode: 2, generation: 0, attr, attr_timeout, entry_timeout };
        Cache::new(400).set_timeouts(parent, area, &mut entry);
        (entry.entry_timeout.as_millis(), entry.attr_timeout.as_millis())
    }

    #[test]
    fn timeouts_depend_on_who_changes_the_files() {
        let (file, directory, link) = (libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK);
        let unlimited = UNLIMITED.as_millis();
        let within = |name: &str, mode| timeouts(area(name), area(name).child(b"x", false), mode);
        assert_eq!(within("rootfs", directory), (unlimited, unlimited));
        assert_eq!(within("rootfs", file), (unlimited, unlimited));
        assert_eq!(within("host-rootfs", file), (400, 400));
        assert_eq!(within("0.f-1-2-3-local", file), (400, 400));
        assert_eq!(within("0.f-1-2-3-local-private", file), (4000, 4000));
        assert_eq!(within("0.f-1-2-3-local-private", directory), (400, 400));
        assert_eq!(within("0.f-1-2-3-local-private", link), (400, 400));
        // The names of mounts.
        assert_eq!(timeouts(Area::MountPoints, area("rootfs"), directory), (1000, unlimited));
        assert_eq!(timeouts(Area::MountPoints, area("0.f-1-2-3"), file), (1000, 400));
        assert_eq!(timeouts(Area::Share, Area::MountPoints, directory), (1000, 1000));
        // A mount of the host within another mount.
        for name in ["rootfs", "0.f-1-2-3-private"] {
            let nested = area(name).child(b"x", true);
            assert_eq!(timeouts(nested, nested.child(b"y", false), file), (400, 400));
        }
    }

    #[test]
    fn missing_names_of_private_mounts_are_cached() {
        let missing = |area, ms| Cache::new(ms).missing(area).map(|entry| (entry.inode, entry.entry_timeout));
        assert_eq!(missing(area("rootfs"), 0), Some((0, UNLIMITED)));
        assert_eq!(missing(area("0.f-1-2-3-private"), 400), Some((0, Duration::from_millis(400))));
        assert_eq!(missing(area("0.f-1-2-3-private"), 0), None);
        for area in [area("0.f-1-2-3-local"), area("host-rootfs"), Area::MountPoints, Area::Share] {
            assert_eq!(missing(area, 400), None);
        }
    }

    #[test]
    fn open_options_depend_on_the_mount() {
        let options = |name| {
            let bits = area(name).open_options().bits();
            (bits & FOPEN_PRIVATE != 0, bits & OpenOptions::NOFLUSH.bits() != 0)
        };
        assert_eq!(options("rootfs"), (true, true));
        assert_eq!(options("host-rootfs"), (true, true));
        assert_eq!(options("0.f-1-2-3-private"), (true, false));
        assert_eq!(options("0.f-1-2-3-local-private"), (true, true));
        assert_eq!(options("0.f-1-2-3-local"), (false, true));
        assert_eq!(options("0.f-1-2-3"), (false, false));
        assert_eq!(options("other"), (false, false));
    }
}
