//! Runs the helper and collects what it leaves: a process id, and the terminal if there is one.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::timeout;

use super::Tasks;
use crate::helper::protocol::{Request, Response};
use crate::io::console::Console;
use crate::io::relay::Endpoint;
use crate::io::stdio::ChildIo;
use crate::log::chain;

/// Where to run a helper.
pub struct Job<'a> {
    /// [`crate::helper::CREATE`] or [`crate::helper::EXEC`].
    pub role: &'static str,
    /// What to do.
    pub request: Request,
    /// File for it.
    pub request_file: &'a Path,
    /// File for the answer.
    pub response_file: &'a Path,
    /// The new process's standard streams.
    pub io: ChildIo,
    /// Where its terminal will arrive.
    pub console: Option<Console>,
}

impl Tasks {
    /// Runs a helper to its end. The caller holds an [`crate::reaper::ExpectGuard`].
    ///
    /// # Errors
    /// The reason in runc's form.
    pub async fn help(&self, job: Job<'_>) -> Result<(i32, Option<Endpoint>), String> {
        job.request.write(job.request_file).map_err(|error| format!("request: {error}"))?;
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
            .map_err(|error| format!("cannot run the helper: {error}"))?;
        let ended = self.reaper.wait(child.id().cast_signed());
        let (ended, master) = match job.console {
            None => (ended.await, None),
            Some(console) => {
                let receiving = tokio::spawn(console.receive());
                let ended = ended.await;
                // Whatever was sent is here already: the helper has ended.
                let patience = Duration::from_secs(if ended.is_some_and(|e| e.status == 0) { 5 } else { 0 });
                (ended, timeout(patience, receiving).await.ok())
            }
        };
        let answer = Response::read(job.response_file);
        let _ = std::fs::remove_file(job.request_file);
        let _ = std::fs::remove_file(job.response_file);
        let answer = answer.map_err(|error| {
            let status = ended.map_or(0, |ended| ended.status);
            format!("the helper ended with status {status} and no answer: {error}")
        })?;
        if let Some(error) = answer.error {
            return Err(error);
        }
        let master = match master {
            None => None,
            Some(received) => {
                Some(received.map_err(|error| chain(&error))?.map_err(|error| format!("terminal: {error}"))?)
            }
        };
        Ok((answer.pid, master))
    }
}
