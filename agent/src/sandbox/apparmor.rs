//! Loads the node's AppArmor policy into the guest kernel.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

const SECURITYFS: &str = "/sys/kernel/security";
/// File that takes a complete policy in one write. The kernel replaces loaded profiles that have the same names
/// (security/apparmor/apparmorfs.c, `profile_replace`).
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// Reason why loading the policy failed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Failed to mount securityfs. The guest kernel may not support securityfs.
    #[error("failed to mount securityfs at {SECURITYFS}")]
    Mount(#[source] nix::Error),
    /// Failed to write the policy. The guest kernel rejects a policy in a format that only newer kernels support.
    #[error("failed to write the policy to {REPLACE}: the guest kernel may not support the policy's format")]
    Refused(#[source] io::Error),
}

/// Loads a policy. Blocks the calling thread.
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
