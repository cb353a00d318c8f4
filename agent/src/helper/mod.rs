//! The re-executed, single-threaded helper: starts one process of a container and ends.
//!
//! It is a process of its own because what it does (namespaces, working directory, resource limits, dumpable flag)
//! changes a whole process, and because what runs between fork and exec must not meet another thread's locks.
//! Descriptors 0 to 2 are already the new process's own; the request and the answer are files in a private directory.

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

use protocol::{Request, Response};

/// Name under which the agent runs itself as a helper.
pub const ARGV0: &str = "husk-helper";
/// First argument of the helper that creates a container.
pub const CREATE: &str = "create";
/// First argument of the helper that starts a further process in a container.
pub const EXEC: &str = "exec";
/// First argument of the process that holds a pod's shared process namespace.
pub const REAPER: &str = "pod-init";

/// Runs the helper `role`.
pub fn main(role: &OsStr, mut args: impl Iterator<Item = OsString>) -> ExitCode {
    if role == REAPER {
        return pod_init();
    }
    let (Some(request), Some(response)) = (args.next().map(PathBuf::from), args.next().map(PathBuf::from)) else {
        return ExitCode::FAILURE;
    };
    let trail = response.with_extension("log");
    std::panic::set_hook(Box::new(|info| trail::record(&format!("panic: {info}"))));
    let result = trail::open(&trail)
        .and_then(|()| Request::read(&request))
        .map_err(|error| format!("cannot read the request: {error}"))
        .and_then(|request| match request {
            Request::Create(request) => create::run(&request),
            Request::Exec(request) => exec::run(request),
        });
    let _ = std::fs::remove_file(&trail);
    let answer = match result {
        Ok(pid) => Response { pid, error: None },
        Err(error) => Response { pid: 0, error: Some(error) },
    };
    match answer.write(&response) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// PID 1 of a process namespace that several containers share: it only collects the orphans.
fn pod_init() -> ExitCode {
    loop {
        // SAFETY: neither call takes a pointer that must be valid: a null status is allowed.
        unsafe {
            if libc::waitpid(-1, std::ptr::null_mut(), 0) < 0 {
                libc::pause();
            }
        }
    }
}
