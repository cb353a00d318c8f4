//! The helper: the re-executed, single-threaded agent that starts one process of a container and exits.
//!
//! The helper is a separate process for two reasons. First, it changes its namespaces, working directory, resource
//! limits and dumpable flag, which are attributes of a whole process. Second, code between fork and exec must not wait
//! for locks that another thread holds.
//!
//! Fds 0 to 2 of the helper become the standard streams of the new process. Request and response are files in a
//! private directory.

mod create;
pub mod devices;
mod error_log;
mod exec;
mod executor;
pub mod pod_init;
pub mod protocol;
mod terminal;
mod tmpfs;

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
/// First argument of PID 1 of a pod's shared PID namespace. The paths of the pod's other namespaces follow.
pub const POD_INIT: &str = "pod-init";
/// First argument of a process that holds its namespaces open until the agent kills it.
pub const HOLDER: &str = "hold-namespaces";

/// First argument of a process that exits at once.
pub const TRIAL: &str = "trial";

/// Runs the helper in the role `role`: [`CREATE`], [`EXEC`], [`POD_INIT`], [`HOLDER`] or [`TRIAL`].
pub fn main(role: &OsStr, mut args: impl Iterator<Item = OsString>) -> ExitCode {
    if role == POD_INIT {
        return pod_init::run(args);
    }
    if role == HOLDER {
        return reap_forever();
    }
    if role == TRIAL {
        return ExitCode::SUCCESS;
    }
    let (Some(request), Some(response_file)) = (args.next().map(PathBuf::from), args.next().map(PathBuf::from)) else {
        return ExitCode::FAILURE;
    };
    let error_log_path = response_file.with_extension("log");
    std::panic::set_hook(Box::new(|info| error_log::record(&format!("panic: {info}"))));
    let result = error_log::open(&error_log_path)
        .map_err(|error| format!("failed to open the helper's error log {}: {error}", error_log_path.display()))
        .and_then(|()| {
            Request::read(&request)
                .map_err(|error| format!("failed to read the helper's request {}: {error}", request.display()))
        })
        .and_then(|request| match request {
            Request::Create(request) => create::run(&request),
            Request::Exec(request) => exec::run(request),
        });
    let _ = std::fs::remove_file(&error_log_path);
    let response = match result {
        Ok(pid) => Response { pid, error: None },
        Err(error) => Response { pid: 0, error: Some(error) },
    };
    match response.write(&response_file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Reaps children until the process is killed.
fn reap_forever() -> ExitCode {
    loop {
        if wait(-1, 0).is_err() {
            nix::unistd::pause();
        }
    }
}
