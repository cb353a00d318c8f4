//! Opens the streams to the guest for the stdio of a process that is created.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::Shim;
use crate::error::ServiceError;
use crate::stdio::{Relay, Stdio, Streams};

/// Maximum number of processes whose streams are open before the agent has taken them.
///
/// Each process has at most three streams. The agent rejects a stream if 256 streams already wait for their requests
/// (`MAX_PENDING` in `agent/src/io/streams.rs`). Moreover, the agent starts a helper for each process, and many helpers
/// at once would need much of the guest's memory.
const MAX_PROCESSES: usize = 32;
/// Timeout for a turn: until fewer than [`MAX_PROCESSES`] processes are being created. An agent that hangs must not
/// make requests wait without limit.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// The turns in which processes get their streams. If more processes start at once, they wait in order.
pub(crate) struct StreamTurns(Semaphore);

impl Default for StreamTurns {
    fn default() -> Self {
        Self(Semaphore::new(MAX_PROCESSES))
    }
}

/// The stdio of a process that is being created.
pub(crate) struct ConnectedStdio<'a> {
    /// Copies between the streams and the stdio.
    pub relay: Relay,
    /// The tokens for the request to the agent.
    pub tokens: StreamTokens,
    /// The process's turn. Drop this value when the agent has answered the request.
    pub turn: SemaphorePermit<'a>,
}

/// The tokens of a process's streams. If the process does not need a stream, the stream's token is empty.
#[derive(Debug, Default)]
pub(crate) struct StreamTokens {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

impl Shim {
    /// Opens the streams for a process's stdio, and starts a relay between the streams and the stdio. The request to
    /// the agent must contain the tokens. If many processes are being created, first waits for a turn.
    ///
    /// # Errors
    /// If the process gets no turn within [`TURN_TIMEOUT`], or if a stream cannot be opened.
    pub(crate) async fn connect_stdio(&self, stdio: Stdio) -> Result<ConnectedStdio<'_>, ServiceError> {
        let turn = tokio::time::timeout(TURN_TIMEOUT, self.stream_turns.0.acquire()).await;
        let Ok(Ok(turn)) = turn else {
            let text = format!(
                "the guest did not create {MAX_PROCESSES} other processes within {} s; try again later",
                TURN_TIMEOUT.as_secs()
            );
            return Err(ServiceError::failed(text));
        };
        let needed = stdio.needed_streams();
        let open = async |wanted: bool| match wanted {
            true => self.sandbox.open_stream().await.map(Some),
            false => Ok(None),
        };
        let failed = |error: &dyn std::error::Error| ServiceError::failed(crate::chain(error));
        let mut tokens = StreamTokens::default();
        let streams = if needed.terminal {
            let (token, stream) = self.sandbox.open_stream().await.map_err(|e| failed(&e))?;
            tokens.stdout = token.to_string();
            if needed.stdin {
                tokens.stdin.clone_from(&tokens.stdout);
            }
            Streams::Terminal(stream)
        } else {
            let (stdin, stdout, stderr) = tokio::join!(open(needed.stdin), open(needed.stdout), open(needed.stderr));
            let mut take = |name: fn(&mut StreamTokens) -> &mut String, opened: Result<Option<_>, _>| match opened {
                Ok(Some((token, stream))) => {
                    *name(&mut tokens) = u64::to_string(&token);
                    Ok(Some(stream))
                }
                Ok(None) => Ok(None),
                Err(error) => Err(failed(&error)),
            };
            Streams::Pipes {
                stdin: take(|t| &mut t.stdin, stdin)?,
                stdout: take(|t| &mut t.stdout, stdout)?,
                stderr: take(|t| &mut t.stderr, stderr)?,
            }
        };
        let relay = stdio.start(streams).map_err(|e| failed(&e))?;
        Ok(ConnectedStdio { relay, tokens, turn })
    }
}
