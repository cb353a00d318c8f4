//! Confines the shim after it has started the launcher and, if the specification is known, the VMM.
//!
//! The shim stays powerful: it is root, and can mount file systems and configure networks. The confinement takes away
//! what the shim never needs. docs/security.md says what remains, and why.

pub mod capabilities;
mod mounts;
pub mod seccomp;

use std::io;
use std::os::fd::OwnedFd;

use husk_vmm::config::SeccompMode;
use husk_vmm::jail::UNJAILED;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::host_view;

pub use mounts::MountError;

/// A failure to confine the shim.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// A mount cannot be made read-only.
    #[error(transparent)]
    Mounts(#[from] MountError),
    /// The capabilities cannot be reduced.
    #[error("failed to reduce the shim's capabilities")]
    Capabilities(#[source] io::Error),
    /// The fd limit cannot be lowered.
    #[error("failed to lower the shim's fd limit (RLIMIT_NOFILE)")]
    Fds(#[source] Errno),
    /// `prctl(PR_SET_NO_NEW_PRIVS)` failed.
    #[error("failed to set no_new_privs for the shim")]
    NoNewPrivileges(#[source] io::Error),
    /// The thread in the host's mount namespace cannot be confined.
    #[error("failed to confine the thread in the host's mount namespace")]
    HostView(#[source] io::Error),
    /// The system calls cannot be filtered.
    #[error("failed to filter the shim's system calls")]
    Seccomp(#[from] seccomp::LoadError),
}

/// Maximum number of open fds. The shim has a few fds for each container, each exec and each forwarded connection.
const MAX_FDS: u64 = 16_384;

/// Confines this process, which must have its own mount namespace, and no threads except this one and the first thread
/// of the host view. Threads that start later inherit the confinement. Does nothing in a build without a jail, which
/// only benchmarks use. Returns the read end of a pipe, to which the process writes a line for each system call that
/// its filter refuses.
///
/// # Errors
/// [`ConfinementError`]. After an error, the process may be confined only in part.
pub fn enter(mode: SeccompMode) -> Result<Option<OwnedFd>, ConfinementError> {
    if UNJAILED {
        host_view::of_process().confine(|| ()).map_err(ConfinementError::HostView)?;
        return Ok(None);
    }
    lower_fd_limit().map_err(ConfinementError::Fds)?;
    mounts::protect()?;
    reduce_privileges()?;
    let refused_calls = seccomp::load(mode)?;
    let confined = host_view::of_process().confine(move || {
        reduce_privileges()?;
        Ok::<_, ConfinementError>(seccomp::load_for_host_view(mode)?)
    });
    confined.map_err(ConfinementError::HostView)?.transpose()?;
    Ok(Some(refused_calls))
}

/// Reduces the capabilities of this thread, and sets no_new_privs.
fn reduce_privileges() -> Result<(), ConfinementError> {
    capabilities::reduce().map_err(ConfinementError::Capabilities)?;
    prctl::set_no_new_privs().map_err(|errno| ConfinementError::NoNewPrivileges(errno.into()))
}

/// Lowers the fd limit, which the shim has inherited from containerd, to [`MAX_FDS`]. containerd often has no limit.
/// The launcher, which starts hooks and loggers, was started before. Therefore these programs do not inherit the lower
/// limit. The VMM sets its own limit.
fn lower_fd_limit() -> Result<(), Errno> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = hard.min(MAX_FDS);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit)
}
