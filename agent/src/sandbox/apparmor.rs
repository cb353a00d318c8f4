//! AppArmor policy of the node's, loaded into the guest's kernel.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

const SECURITYFS: &str = "/sys/kernel/security";
/// Takes a whole policy in one write, and puts it in place of what there is of the same profiles
/// (security/apparmor/apparmorfs.c, `profile_replace`).
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// Why the policy is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel has none of it.
    #[error("mounting {SECURITYFS}")]
    Mount(#[source] nix::Error),
    /// The kernel does not take this one: it may be of a newer kernel's kind.
    #[error("the guest's kernel refuses the policy")]
    Refused(#[source] io::Error),
}

/// Loads a policy; blocks.
pub fn load(policy: &[u8]) -> Result<(), LoadError> {
    if !Path::new(REPLACE).exists() {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("securityfs"), SECURITYFS, Some("securityfs"), flags, None::<&str>).map_err(LoadError::Mount)?;
    }
    let mut file = fs::OpenOptions::new().write(true).open(REPLACE).map_err(LoadError::Refused)?;
    match io::Write::write(&mut file, policy) {
        Ok(written) if written == policy.len() => Ok(()),
        Ok(_) => Err(LoadError::Refused(io::ErrorKind::WriteZero.into())),
        Err(error) => Err(LoadError::Refused(error)),
    }
}
