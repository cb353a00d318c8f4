//! OCI hooks, run on the host by the shim: the network of `nerdctl` comes by one of them.

use std::collections::HashMap;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::spec::Hook;

/// Longest a hook without a time-out of its own may take.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// Most of a failed hook's output that is repeated.
const MAX_OUTPUT: u64 = 4096;

/// The container's state, as the OCI runtime specification gives it to hooks.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// Version of the specification.
    pub oci_version: &'a str,
    /// The container.
    pub id: &'a str,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'a str,
    /// A process whose namespaces are the sandbox's on the host: the VMM.
    #[serde(skip_serializing_if = "is_zero")]
    pub pid: u32,
    /// The bundle's directory.
    pub bundle: &'a str,
    /// The specification's annotations.
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: &'a HashMap<String, String>,
}

fn is_zero(pid: &u32) -> bool {
    *pid == 0
}

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("error running {kind} hook #{index} ({path})")]
    Run {
        /// `createRuntime`, …
        kind: &'static str,
        /// Position, from 0.
        index: usize,
        /// The program.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended badly.
    #[error("error running {kind} hook #{index} ({path}): {status}, stdout: {stdout}, stderr: {stderr}")]
    Status {
        /// `createRuntime`, …
        kind: &'static str,
        /// Position, from 0.
        index: usize,
        /// The program.
        path: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed.
        stdout: String,
        /// What it complained of.
        stderr: String,
    },
    /// It took too long.
    #[error("{kind} hook #{index} ({path}) timed out after {} s", after.as_secs())]
    Timeout {
        /// `createRuntime`, …
        kind: &'static str,
        /// Position, from 0.
        index: usize,
        /// The program.
        path: String,
        /// Its limit.
        after: Duration,
    },
    /// The state cannot be written as JSON.
    #[error("encoding the container's state")]
    Encode(#[source] serde_json::Error),
}

/// Runs hooks one after the other; the first failure ends it.
///
/// # Errors
/// [`HookError`] of the hook that failed.
pub async fn run(kind: &'static str, hooks: &[Hook], state: &State<'_>) -> Result<(), HookError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(state).map_err(HookError::Encode)?;
    for (index, hook) in hooks.iter().enumerate() {
        let after = hook.timeout.filter(|t| *t > 0).map_or(DEFAULT_TIMEOUT, Duration::from_secs);
        let path = hook.path.display().to_string();
        match tokio::time::timeout(after, run_one(hook, &state)).await {
            Err(_) => return Err(HookError::Timeout { kind, index, path, after }),
            Ok(Err(source)) => return Err(HookError::Run { kind, index, path, source }),
            Ok(Ok((status, _, _))) if status.success() => {}
            Ok(Ok((status, stdout, stderr))) => {
                return Err(HookError::Status { kind, index, path, status, stdout, stderr });
            }
        }
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &[u8]) -> std::io::Result<(std::process::ExitStatus, String, String)> {
    if !hook.path.is_absolute() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    let mut command = tokio::process::Command::new(&hook.path);
    if let Some((name, args)) = hook.args.split_first() {
        command.arg0(name).args(args);
    }
    command.env_clear().envs(hook.env.iter().filter_map(|pair| pair.split_once('=')));
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A hook need not read its state.
            let _ = stdin.write_all(state).await;
        }
    };
    let ((), stdout, stderr, status) = tokio::join!(feed, collect(stdout), collect(stderr), child.wait());
    Ok((status?, stdout, stderr))
}

/// The beginning of a hook's output; the rest is read and dropped, so that it does not block.
async fn collect(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> String {
    let mut text = Vec::new();
    if let Some(mut stream) = stream {
        let _ = (&mut stream).take(MAX_OUTPUT).read_to_end(&mut text).await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["PATH=/usr/bin:/bin".into()],
            timeout: Some(5),
        }
    }

    fn state(annotations: &HashMap<String, String>) -> State<'_> {
        State { oci_version: "1.0.2", id: "c", status: "creating", pid: 7, bundle: "/b", annotations }
    }

    #[tokio::test]
    async fn state_arrives_and_failures_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("state");
        let none = HashMap::new();
        run("createRuntime", &[hook(&format!("cat > {}", out.display()))], &state(&none)).await.unwrap();
        let seen: serde_json::Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
        assert_eq!(
            seen,
            serde_json::json!({"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 7, "bundle": "/b"})
        );
        let error = run("poststart", &[hook("echo no >&2; exit 3")], &state(&none)).await.unwrap_err();
        assert!(error.to_string().contains("stderr: no"), "{error}");
    }

    #[tokio::test]
    async fn time_out() {
        let mut slow = hook("exec sleep 30");
        slow.timeout = Some(1);
        let none = HashMap::new();
        assert!(matches!(run("prestart", &[slow], &state(&none)).await, Err(HookError::Timeout { .. })));
    }
}
