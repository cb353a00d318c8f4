//! Starts the process that makes a template.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use husk_config::template::{ARGV0, Class, STORE};

use crate::chain;
use crate::launcher::{Launcher, ProgramOptions};

/// Starts the process, which goes on if the shim ends. Returns at once. Errors are logged.
pub fn start_builder(launcher: Launcher, class: Class) {
    tokio::spawn(async move {
        if let Err(error) = build(&launcher, &class).await {
            tracing::warn!(error, "failed to make a template; pods of this size boot until one is made");
        }
    });
}

async fn build(launcher: &Launcher, class: &Class) -> Result<(), String> {
    let null = File::options().read(true).write(true).open("/dev/null").map_err(|error| error.to_string())?;
    let options = ProgramOptions {
        // The launcher runs the same program as this process, even if the file was replaced.
        path: Path::new("/proc/self/exe"),
        arg0: Some(ARGV0),
        args: &[serde_json::to_string(class).map_err(|error| error.to_string())?],
        env: None,
        cwd: Some(Path::new("/")),
        fds: &[null.as_fd(), null.as_fd(), null.as_fd()],
        cgroup: None,
        kill_on_drop: false,
    };
    let program = launcher.start_program(&options).await.map_err(|error| chain(&error))?;
    let status = program.wait().await.map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{status}; the reason is in {STORE}/log")) }
}
