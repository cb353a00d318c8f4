//! The action `start`: binds the sandbox's socket, forks the shim's daemon, and replies to containerd. The daemon boots
//! the VM. `start` replies without waiting for the VM.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::address::{Address, Listen, ListenError};
use crate::cli::Args;
use crate::cli::bootstrap;
use crate::cli::bootstrap::{Env, MAX_INPUT, Params};
use crate::daemon;
use crate::events::Destination;
use crate::oci::{Bundle, BundleError};
use crate::sandbox::state_dir::{ProcessId, StateDir};

/// A failure to start the shim.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The bundle's `config.json` cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The sandbox's socket cannot be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The working directory, which is the bundle, cannot be determined.
    #[error("failed to determine the working directory")]
    WorkingDirectory(#[source] std::io::Error),
    /// Stdin cannot be read.
    #[error("failed to read the bootstrap parameters from stdin")]
    Input(#[source] std::io::Error),
    /// The address file cannot be written.
    #[error("failed to write the address file {path}")]
    AddressFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The shim's daemon cannot be forked.
    #[error("failed to fork the shim's daemon")]
    Fork(#[source] nix::Error),
    /// The reply cannot be written.
    #[error("failed to write the reply to stdout")]
    Reply(#[source] std::io::Error),
    /// The container belongs to a sandbox that has no running shim.
    #[error("sandbox {0} has no running shim")]
    NoSandbox(String),
}

/// Starts the sandbox's shim if the sandbox has no running shim. Writes the shim's address to stdout.
///
/// # Errors
/// [`StartError`]. Before returning `NoSandbox`, `AddressFile`, `Fork` or `Reply`, removes the socket if this call has
/// bound it.
pub fn start(args: &Args, started_ns: u64) -> Result<(), StartError> {
    let dir = std::env::current_dir().map_err(StartError::WorkingDirectory)?;
    let mut input = Vec::new();
    std::io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input).map_err(StartError::Input)?;
    let params = Params::new(&input, args, &Env::read()).with_bundle(&dir);
    // With `sandboxer = "shim"`, the bundle has no config.json. Instead, the CreateSandbox request contains the pod's
    // configuration.
    let bundle = match Bundle::read(&dir) {
        Err(BundleError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound && bootstrap::is_sandbox_controller_bundle(&dir) =>
        {
            None
        }
        other => Some(other?),
    };
    let group = bundle.as_ref().map_or(Ok(args.id.as_str()), |bundle| bundle.spec.group(&args.id))?.to_owned();
    let address = Address::new(params.socket_dir.as_deref(), &params.address, &args.namespace, &group);
    let listener = match address.listen()? {
        Listen::InUse => None,
        Listen::Bound(listener) => Some(listener),
    };
    // A container that belongs to another container's sandbox must not start the shim, because the VM's size comes from
    // the sandbox container's bundle.
    if listener.is_some() && group != args.id {
        address.remove();
        return Err(StartError::NoSandbox(group));
    }
    publish(&dir, &address, listener.is_some())?;
    let reply_format = params.reply_format;
    let Some(listener) = listener else { return write_reply(&address, reply_format) };
    let destination = Destination::new(params.ttrpc_address, params.address, params.publish_binary);
    adjust_oom_score();
    // SAFETY: this process has a single thread. Therefore, the child is not limited to async-signal-safe functions.
    match unsafe { nix::unistd::fork() } {
        Ok(nix::unistd::ForkResult::Parent { child }) => {
            let state = StateDir::new(&args.namespace, &group);
            write_reply(&address, reply_format).inspect_err(|_| abandon(child, &state, &address, &dir))
        }
        Ok(nix::unistd::ForkResult::Child) => {
            let args = daemon::DaemonArgs {
                namespace: args.namespace.clone(),
                sandbox: group,
                dir,
                bundle,
                destination,
                debug: params.debug,
                address,
                listener,
                started_ns,
            };
            // The child process must end here, because only the parent may return to the caller.
            std::process::exit(daemon::run(args));
        }
        Err(error) => {
            address.remove();
            Err(StartError::Fork(error))
        }
    }
}

/// Ends the daemon, and removes what it has made. Also removes the `address` file of the bundle. A containerd that gets
/// no reply does not know the daemon. Waits at most 5 s for the daemon, because a thread of it can wait in the kernel.
fn abandon(daemon: Pid, state: &StateDir, address: &Address, bundle: &Path) {
    if let Some(process) = ProcessId::read(daemon.as_raw().cast_unsigned()) {
        process.kill_and_wait();
    }
    let _ = waitpid(daemon, Some(WaitPidFlag::WNOHANG));
    state.clean_up();
    address.remove();
    let _ = std::fs::remove_file(bundle.join("address"));
}

fn write_reply(address: &Address, reply_format: bootstrap::ReplyFormat) -> Result<(), StartError> {
    let mut out = std::io::stdout().lock();
    out.write_all(&bootstrap::reply(&address.uri(), reply_format)).and_then(|()| out.flush()).map_err(StartError::Reply)
}

/// Writes the bundle's `address` file. If the write fails, removes the socket, but only if this process has bound the
/// socket (`bound`).
fn publish(bundle: &Path, address: &Address, bound: bool) -> Result<(), StartError> {
    let written = write_address(bundle, address);
    if written.is_err() && bound {
        address.remove();
    }
    written
}

/// Writes the bundle's `address` file atomically. After a restart, containerd reads these files to find its shims.
fn write_address(bundle: &Path, address: &Address) -> Result<(), StartError> {
    let (path, temporary) = (bundle.join("address"), bundle.join(".address"));
    std::fs::write(&temporary, address.uri())
        .and_then(|()| std::fs::rename(&temporary, &path))
        .inspect_err(|_| drop(std::fs::remove_file(&temporary)))
        .map_err(|source| StartError::AddressFile { path, source })
}

/// Sets the shim's `oom_score_adj` to containerd's value plus one, as containerd's own shims do.
///
/// With the higher value, the kernel's OOM killer kills the shim rather than containerd.
fn adjust_oom_score() {
    let parent = nix::unistd::getppid();
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"));
    if let Some(score) = score.ok().and_then(|text| text.trim().parse::<i32>().ok()) {
        let _ = std::fs::write("/proc/self/oom_score_adj", (score + 1).min(1000).to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abandon_ends_the_daemon_and_removes_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(dir.path().to_str(), "c", "n", "g");
        let Listen::Bound(_listener) = address.listen().unwrap() else { panic!("the new socket is already in use") };
        let daemon = Pid::from_raw(std::process::Command::new("sleep").arg("60").spawn().unwrap().id().cast_signed());
        let bundle = dir.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        write_address(&bundle, &address).unwrap();
        abandon(daemon, &StateDir::new("husk-test-abandon", "none"), &address, &bundle);
        assert!(!address.path().exists() && !bundle.join("address").exists());
        assert!(nix::sys::signal::kill(daemon, None).is_err(), "the daemon still runs");
    }

    #[test]
    fn failed_publish_removes_a_socket_that_this_process_has_bound() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(dir.path().to_str(), "c", "n", "g");
        let Listen::Bound(_listener) = address.listen().unwrap() else { panic!("the new socket is already in use") };
        let no_bundle = dir.path().join("none");
        let failed = |bound| matches!(publish(&no_bundle, &address, bound), Err(StartError::AddressFile { .. }));
        assert!(failed(false) && address.path().exists(), "the socket of another shim was removed");
        assert!(failed(true) && !address.path().exists(), "the socket was not removed");
    }
}
