//! Landlock rules of the VMM process (landlock(7)). Like the root directory, the rules confine the process's access to
//! files to the share. The rules also restrict what a root directory cannot restrict: TCP, device ioctls, abstract UNIX
//! sockets and signals.
//!
//! The rules allow what a virtio-fs server needs beneath the share, and no access to other files. The rules also apply
//! to mounts that appear beneath the share later: the kernel looks for rules in all directories from a file up to the
//! root directory, across mount points. If a file is opened again through `/proc/self/fd`, the kernel checks the file's
//! own path, not the path of the link. Therefore, `/proc/self/fd` needs no rule.
//!
//! Once the rules are set, the kernel refuses each call that changes the tree of mounts: mount, umount2, move_mount and
//! pivot_root (security/landlock/fs.c, the hooks `sb_mount` to `sb_pivotroot`). The kernel does not ask landlock about
//! fsopen, fsmount, open_tree and mount_setattr. These calls fail because no thread has CAP_SYS_ADMIN.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use husk_base::sys;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};

/// The newest landlock ABI whose restrictions the jail uses. The crate `landlock` omits restrictions that the kernel
/// lacks.
const NEWEST: ABI = ABI::V10;
/// The oldest ABI version that the jail uses. With version 1, no file in the share could move to another directory.
const OLDEST: u32 = 2;
/// The restrictions that the jail reports as missing if the kernel lacks them. Each entry has the first ABI version
/// with the restriction. The jail also uses the restrictions of newer versions, but does not report their absence.
const RESTRICTIONS: [(u32, &str); 5] = [
    (OLDEST, "access to files"),
    (3, "truncation of files"),
    (4, "TCP"),
    (5, "ioctls of devices"),
    (6, "abstract UNIX sockets and signals"),
];

/// The support for landlock in this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// The kernel was built without landlock.
    NotBuilt,
    /// Landlock is not among the enabled security modules.
    NotEnabled,
    /// Landlock is enabled and has this ABI version.
    Abi(u32),
}

/// Error from restricting the process.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The configuration requires landlock, but the kernel cannot restrict access to files.
    #[error(
        "failed to confine the VMM: require_landlock is true, but {0}, so landlock cannot restrict access to \
         files; {remedy}, or set require_landlock = false",
        remedy = .0.remedy()
    )]
    Required(Landlock),
    /// The share could not be opened.
    #[error("failed to open the share for the landlock rules of the VMM")]
    Share(#[source] io::Error),
    /// The kernel refused the rules.
    #[error("failed to set the landlock rules of the VMM")]
    Rules(#[from] RulesetError),
    /// The kernel accepted the rules, but does not enforce them.
    #[error("failed to set the landlock rules of the VMM: the kernel does not enforce them")]
    NotEnforced,
}

impl Landlock {
    /// Returns the support for landlock in the running kernel.
    pub fn of_kernel() -> Self {
        match sys::landlock::abi() {
            Ok(version) => Self::Abi(version),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Self::NotEnabled,
            Err(_) => Self::NotBuilt,
        }
    }

    /// Returns whether the jail can use landlock on this kernel.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Abi(OLDEST..))
    }

    /// Returns a string that names the restrictions that this kernel lacks, or `None` if no restriction is missing.
    pub fn missing(self) -> Option<String> {
        let version = match self {
            Self::Abi(version @ OLDEST..) => version,
            _ => 0,
        };
        let missing: Vec<_> =
            RESTRICTIONS.iter().filter(|(first, _)| *first > version).map(|(_, restriction)| *restriction).collect();
        (!missing.is_empty()).then(|| format!("{self}, so landlock does not restrict {}", missing.join(", ")))
    }

    /// Returns what the user can do to get all restrictions.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::NotBuilt => "use Linux 6.12 or later with CONFIG_SECURITY_LANDLOCK",
            Self::NotEnabled => "add landlock to the security modules of the node's kernel parameter lsm=",
            Self::Abi(_) => "use Linux 6.12 or later",
        }
    }
}

impl fmt::Display for Landlock {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => write!(out, "this kernel was built without landlock"),
            Self::NotEnabled => write!(out, "landlock is not enabled on this kernel"),
            Self::Abi(version) => write!(out, "this kernel has landlock ABI {version}"),
        }
    }
}

/// Restricts this thread, and all threads that it starts later, to the directory `share`. Without a share, these
/// threads can open no file. If the kernel lacks restrictions, returns a string that names these restrictions.
///
/// # Errors
/// [`LandlockError`]. If `required` is true, a kernel that cannot restrict access to files is an error.
pub fn restrict(share: Option<&Path>, required: bool) -> Result<Option<String>, LandlockError> {
    let landlock = Landlock::of_kernel();
    if !landlock.is_usable() {
        return if required { Err(LandlockError::Required(landlock)) } else { Ok(landlock.missing()) };
    }
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        // A guest can cause denials, for example in a volume that the host has unmounted. These denials must not fill
        // the node's audit log.
        .log_same_exec(false)?;
    let rules = match share {
        Some(share) => {
            let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(share);
            rules.add_rule(PathBeneath::new(directory.map_err(LandlockError::Share)?, file_server()))?
        }
        None => rules,
    };
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        return Err(LandlockError::NotEnforced);
    }
    Ok(landlock.missing())
}

/// Returns the rights of the virtio-fs server beneath the share. The server may not execute files, make ioctls on
/// devices or connect to UNIX sockets.
fn file_server() -> BitFlags<AccessFs> {
    AccessFs::from_all(NEWEST) & !(AccessFs::Execute | AccessFs::IoctlDev | AccessFs::ResolveUnix)
}

#[cfg(test)]
#[path = "landlock_tests.rs"]
mod tests;
