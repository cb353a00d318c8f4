//! Runs OCI hooks on the host. For example, nerdctl sets up a container's network in a hook.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use husk_base::sys::fd::set_nonblocking;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::launcher::{LaunchError, Launcher, ProgramOptions};
use crate::oci::Hook;
use crate::oci::annotations::Annotations;

/// Timeout of a hook if the specification sets no timeout or the timeout 0.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// Maximum number of bytes that the shim keeps from each output stream of a hook (stdout and stderr).
const MAX_OUTPUT: u64 = 4096;

/// The container's state, which hooks receive on stdin, as the OCI runtime specification requires.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// OCI version of the container's specification.
    pub oci_version: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'a str,
    /// The PID that the shim reports to containerd for the container. The process with this PID is in the pod's network
    /// namespace. The PID is 0 for a container that has stopped.
    #[serde(skip_serializing_if = "is_zero")]
    pub pid: u32,
    /// The bundle directory.
    pub bundle: &'a str,
    /// The specification's annotations.
    #[serde(skip_serializing_if = "Annotations::is_empty")]
    pub annotations: &'a Annotations,
}

fn is_zero(pid: &u32) -> bool {
    *pid == 0
}

/// A failure to run hooks.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The hook cannot be run.
    #[error("error running {kind} hook #{index} ({path})")]
    Run {
        /// The kind of hook, such as `createRuntime`.
        kind: &'static str,
        /// The hook's index in the list, from 0.
        index: usize,
        /// The program.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The hook ended with an error status.
    #[error("error running {kind} hook #{index} ({path}): {status}, stdout: {stdout}, stderr: {stderr}")]
    Status {
        /// The kind of hook, such as `createRuntime`.
        kind: &'static str,
        /// The hook's index in the list, from 0.
        index: usize,
        /// The program.
        path: String,
        /// The exit status.
        status: std::process::ExitStatus,
        /// The beginning of the hook's stdout.
        stdout: String,
        /// The beginning of the hook's stderr.
        stderr: String,
    },
    /// The hook exceeded its timeout.
    #[error("{kind} hook #{index} ({path}) timed out after {} s", timeout.as_secs())]
    Timeout {
        /// The kind of hook, such as `createRuntime`.
        kind: &'static str,
        /// The hook's index in the list, from 0.
        index: usize,
        /// The program.
        path: String,
        /// The timeout.
        timeout: Duration,
    },
    /// The state cannot be encoded as JSON.
    #[error("failed to encode the container's state")]
    Encode(#[source] serde_json::Error),
}

/// Runs hooks one after the other and stops at the first failure.
pub async fn run(launcher: &Launcher, kind: &'static str, hooks: &[Hook], state: &State<'_>) -> Result<(), HookError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let input = serde_json::to_vec(state).map_err(HookError::Encode)?;
    // After the container's end, containerd may have removed the bundle.
    let bundle = Some(Path::new(state.bundle)).filter(|bundle| bundle.is_dir());
    for (index, hook) in hooks.iter().enumerate() {
        let timeout = hook.timeout.filter(|t| *t > 0).map_or(DEFAULT_TIMEOUT, Duration::from_secs);
        let path = hook.path.display().to_string();
        match tokio::time::timeout(timeout, run_one(launcher, hook, bundle, &input)).await {
            Err(_) => return Err(HookError::Timeout { kind, index, path, timeout }),
            Ok(Err(source)) => return Err(HookError::Run { kind, index, path, source }),
            Ok(Ok((status, _, _))) if status.success() => {}
            Ok(Ok((status, stdout, stderr))) => {
                return Err(HookError::Status { kind, index, path, status, stdout, stderr });
            }
        }
    }
    Ok(())
}

async fn run_one(
    launcher: &Launcher,
    hook: &Hook,
    bundle: Option<&Path>,
    state: &[u8],
) -> std::io::Result<(std::process::ExitStatus, String, String)> {
    if !hook.path.is_absolute() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    let (arg0, args) = hook.args.split_first().map_or((None, &[][..]), |(name, args)| (Some(name.as_str()), args));
    let (stdin, input) = std::io::pipe()?;
    let (output, stdout) = std::io::pipe()?;
    let (errors, stderr) = std::io::pipe()?;
    set_nonblocking(&input)?;
    set_nonblocking(&output)?;
    set_nonblocking(&errors)?;
    let options = ProgramOptions {
        path: &hook.path,
        arg0,
        args,
        // As under runc, a hook without an environment inherits the runtime's environment, and a hook runs in the
        // container's bundle.
        env: (!hook.env.is_empty()).then(|| hook.env.iter().filter_map(|pair| pair.split_once('=')).collect()),
        cwd: bundle,
        fds: &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        cgroup: None,
        kill_on_drop: true,
    };
    let program = launcher.start_program(&options).await.map_err(|error| match error {
        LaunchError::Execute(source) => source,
        other => std::io::Error::other(other),
    })?;
    drop((stdin, stdout, stderr));
    let mut input = pipe::Sender::from_owned_fd(input.into())?;
    let (output, errors) =
        (pipe::Receiver::from_owned_fd(output.into())?, pipe::Receiver::from_owned_fd(errors.into())?);
    let feed = async move {
        // Ignore an error, because a hook may end without reading the container's state.
        let _ = input.write_all(state).await;
    };
    let ((), stdout, stderr, status) = tokio::join!(feed, collect(output), collect(errors), program.wait());
    Ok((status?, stdout, stderr))
}

/// Returns the beginning of a hook's output. Reads and drops all further output, so that the hook does not block.
async fn collect(mut stream: pipe::Receiver) -> String {
    let mut text = Vec::new();
    let _ = (&mut stream).take(MAX_OUTPUT).read_to_end(&mut text).await;
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::of_tests;

    fn hook(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["PATH=/usr/bin:/bin".into()],
            timeout: Some(5),
        }
    }

    fn state(annotations: &Annotations) -> State<'_> {
        State { oci_version: "1.0.2", id: "c", status: "creating", pid: 7, bundle: "/b", annotations }
    }

    #[tokio::test]
    async fn run_passes_the_state_and_reports_stderr_on_failure() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("state");
        let none = Annotations::default();
        run(of_tests(), "createRuntime", &[hook(&format!("cat > {}", out.display()))], &state(&none)).await.unwrap();
        let seen: serde_json::Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
        assert_eq!(
            seen,
            serde_json::json!({"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 7, "bundle": "/b"})
        );
        let error = run(of_tests(), "poststart", &[hook("echo no >&2; exit 3")], &state(&none)).await.unwrap_err();
        assert!(error.to_string().contains("stderr: no"), "{error}");
    }

    #[tokio::test]
    async fn hook_runs_in_the_bundle_and_inherits_the_environment_if_it_has_none() {
        let bundle = tempfile::tempdir().unwrap();
        let none = Annotations::default();
        let state = State { bundle: bundle.path().to_str().unwrap(), ..state(&none) };
        let mut bare = hook("echo $PATH > inherited");
        bare.env.clear();
        run(of_tests(), "prestart", &[hook("echo $PATH > own"), bare], &state).await.unwrap();
        let read = |name| std::fs::read_to_string(bundle.path().join(name)).unwrap();
        assert_eq!(read("own"), "/usr/bin:/bin\n");
        assert_eq!(read("inherited").trim(), std::env::var("PATH").unwrap());
    }

    #[tokio::test]
    async fn run_ends_a_hook_after_its_timeout() {
        let mut slow = hook("exec sleep 30");
        slow.timeout = Some(1);
        let none = Annotations::default();
        assert!(matches!(run(of_tests(), "prestart", &[slow], &state(&none)).await, Err(HookError::Timeout { .. })));
    }
}
