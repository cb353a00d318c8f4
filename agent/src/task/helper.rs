//! Runs a helper and receives its result: a PID, and the terminal's master if there is a terminal.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use husk_base::error::chain;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::time::timeout;

use super::Tasks;
use crate::helper::protocol::{Request, Response};
use crate::io::console::Console;
use crate::io::relay::Endpoint;
use crate::io::stdio::ChildIo;

/// Timeout for a terminal that a helper has sent before its end.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Parameters of one helper.
pub struct HelperJob<'a> {
    /// [`crate::helper::CREATE`] or [`crate::helper::EXEC`].
    pub role: &'static str,
    pub request: Request,
    /// Path of the request file.
    pub request_file: &'a Path,
    /// Path of the response file.
    pub response_file: &'a Path,
    /// Standard streams of the new process.
    pub io: ChildIo,
    /// Console socket that receives the terminal's master. `None` for a process without a terminal.
    pub console: Option<Console>,
    /// An fd that the helper inherits with the same number. The agent closes it when the helper runs.
    pub inherited: Option<OwnedFd>,
}

impl Tasks {
    /// Runs a helper and waits for its exit. The caller must hold a [`crate::reaper::UnclaimedExitsGuard`].
    ///
    /// # Errors
    /// Returns the reason, in the wording of runc's errors.
    pub async fn run_helper(&self, job: HelperJob<'_>) -> Result<(i32, Option<Endpoint>), String> {
        job.request
            .write(job.request_file)
            .map_err(|error| format!("failed to write the helper's request: {error}"))?;
        if let Some(fd) = &job.inherited {
            // Only the async thread starts processes. Therefore, no other process inherits the fd.
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))
                .map_err(|error| format!("failed to pass a file to the helper: {error}"))?;
        }
        let stdio = |fd: OwnedFd| Stdio::from(fd);
        let child = Command::new("/proc/self/exe")
            .arg0(crate::helper::ARGV0)
            .arg(job.role)
            .arg(job.request_file)
            .arg(job.response_file)
            .env_clear()
            .stdin(stdio(job.io.stdin))
            .stdout(stdio(job.io.stdout))
            .stderr(stdio(job.io.stderr))
            .spawn()
            .map_err(|error| format!("failed to run the helper: {error}"))?;
        drop(job.inherited);
        let pid = child.id().cast_signed();
        self.reaper.forget_earlier_exit(pid);
        let ended = self.reaper.wait(pid);
        let (ended, master) = match job.console {
            None => (ended.await, None),
            Some(console) => {
                let receiving = tokio::spawn(console.receive());
                let ended = ended.await;
                // The helper has exited. If it sent a terminal, the terminal is already in the socket's buffer.
                let limit = if ended.is_some_and(|e| e.status == 0) { CONSOLE_TIMEOUT } else { Duration::ZERO };
                (ended, timeout(limit, receiving).await.ok())
            }
        };
        let response = Response::read(job.response_file);
        let _ = std::fs::remove_file(job.request_file);
        let _ = std::fs::remove_file(job.response_file);
        let response = response.map_err(|error| {
            let status = ended.map_or(0, |ended| ended.status);
            format!("failed to read the helper's response: {error}; the helper exited with status {status}")
        })?;
        if let Some(error) = response.error {
            return Err(error);
        }
        let master = match master {
            None => None,
            Some(received) => Some(
                received
                    .map_err(|error| chain(&error))?
                    .map_err(|error| format!("failed to receive the terminal: {error}"))?,
            ),
        };
        Ok((response.pid, master))
    }
}
