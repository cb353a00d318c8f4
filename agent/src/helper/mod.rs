//! The helper: the re-executed, single-threaded agent that starts one process of a container and exits.
//!
//! It is a separate process for two reasons. First, namespaces, working directory, resource limits and the dumpable
//! flag are attributes of a whole process. Second, code between fork and exec must not wait for locks that another
//! thread holds.
//!
//! Fds 0 to 2 of the helper become the standard streams of the new process. Request and response are files in a
//! private directory.

mod create;
pub mod devices;
mod exec;
mod executor;
pub mod protocol;
mod terminal;
mod tmpfs;
mod trail;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use husk_base::sys::process::wait;

use protocol::{Request, Response};

/// `argv[0]` with which the agent re-executes itself as a helper.
pub const ARGV0: &str = "husk-helper";
/// First argument of the helper that creates a container.
pub const CREATE: &str = "create";
/// First argument of the helper that starts an exec.
pub const EXEC: &str = "exec";
/// First argument of PID 1 of a pod's shared PID namespace. Processes that hold namespaces open have the same argument.
pub const REAPER: &str = "pod-init";

/// Runs the helper in the role `role`: [`CREATE`], [`EXEC`] or [`REAPER`].
pub fn main(role: &OsStr, mut args: impl Iterator<Item = OsString>) -> ExitCode {
    if role == REAPER {
        return pod_init();
    }
    let (Some(request), Some(response_file)) = (args.next().map(PathBuf::from), args.next().map(PathBuf::from)) else {
        return ExitCode::FAILURE;
    };
    let trail = response_file.with_extension("log");
    std::panic::set_hook(Box::new(|info| trail::record(&format!("panic: {info}"))));
    let result = trail::open(&trail)
        .and_then(|()| Request::read(&request))
        .map_err(|error| format!("failed to open the helper's error trail or read its request: {error}"))
        .and_then(|request| match request {
            Request::Create(request) => create::run(&request),
            Request::Exec(request) => exec::run(request),
        });
    let _ = std::fs::remove_file(&trail);
    let response = match result {
        Ok(pid) => Response { pid, error: None },
        Err(error) => Response { pid: 0, error: Some(error) },
    };
    match response.write(&response_file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Runs PID 1 of a PID namespace that several containers share. The only task of this PID 1 is to reap orphans.
fn pod_init() -> ExitCode {
    loop {
        if wait(-1, 0).is_err() {
            nix::unistd::pause();
        }
    }
}
