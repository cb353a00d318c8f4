//! Client of the agent.
//!
//! The agent is not trusted. Therefore, each call except [`Agent::events`] has a timeout.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use husk_proto::AGENT_PROTOCOL;
use husk_proto::agent::{Event, EventsRequest, SetupRequest, UpdateNetworkRequest, event};
use husk_proto::agent_ttrpc::SandboxClient;
use husk_proto::containerd::api::ConnectRequest;
use husk_proto::containerd::shim_async::{Client, TaskClient};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::error::ServiceError;
use crate::ids::is_name;
use crate::text::bounded;
use crate::vm::agent_stream::{AgentStream, UnhandledEvents};
use crate::vm::host_socket::{self, HostSocketRequest};

/// The text of ttrpc's error if the agent does not answer before the timeout (ttrpc 0.10, asynchronous/client.rs).
const CLIENT_TIMEOUT: &str = "Request deadline elapsed";
/// Number of queries without an answer after which the agent counts as silent.
const MAX_MISSED: u32 = 2;
/// Maximum length of an error text from the agent, in bytes.
const MAX_ERROR: usize = 4096;

/// Clients of the agent's ttrpc services. All clients share one connection.
#[derive(Clone)]
pub struct Agent {
    /// containerd's Task service. All paths in its messages are paths in the guest.
    pub task: TaskClient,
    /// Husk's Sandbox service.
    pub sandbox: SandboxClient,
    unhandled: Arc<UnhandledEvents>,
    silence: Arc<Silence>,
}

/// Why the agent did not set up the guest.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The agent refused the request, or did not answer.
    #[error(transparent)]
    Agent(ttrpc::Error),
    /// The agent has a different version of the protocol.
    #[error(
        "the guest's agent has version {0} of its protocol, and the shim has version {AGENT_PROTOCOL}: install the \
         shim and the initrd from the same release"
    )]
    Protocol(u32),
}

/// Whether the agent answers queries.
#[derive(Default)]
struct Silence {
    /// Number of queries since the agent's last answer to a query.
    missed: AtomicU32,
}

/// The agent's events.
pub struct Events {
    stream: ttrpc::r#async::ClientStreamReceiver<Event>,
    unhandled: Arc<UnhandledEvents>,
}

impl Events {
    /// Receives the next event, which then no longer counts as unhandled. Returns `None` if the agent has closed the
    /// stream.
    ///
    /// # Errors
    /// If the connection or the stream fails.
    pub async fn recv(&mut self) -> ttrpc::Result<Option<Event>> {
        let event = self.stream.recv().await;
        self.unhandled.handled();
        event
    }
}

/// A validated event from the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A process exited.
    Exit {
        /// Id of the container.
        container: String,
        /// Id of the exec, or empty for the container's init process.
        exec: String,
        /// Exit status, 0 to 255.
        status: u32,
        /// Time of the exit.
        at: SystemTime,
        /// Whether the guest's OOM killer killed a process of the container.
        oom: bool,
    },
    /// The guest's OOM killer killed a process of the container.
    Oom {
        /// Id of the container.
        container: String,
    },
    /// A process of a container connects to a socket of the node.
    HostSocket(HostSocketRequest),
}

/// Timeouts of calls to the agent. The timeouts are long, because the agent can be slow on a loaded node.
pub mod timeouts {
    use std::time::Duration;

    /// Timeout of queries. containerd asks for the statistics of one container after another. Therefore, a guest that
    /// hangs must not delay these queries.
    pub const QUERY: Duration = Duration::from_secs(1);
    /// Timeout of calls that the agent can answer at once.
    pub const QUICK: Duration = Duration::from_secs(10);
    /// Timeout of calls that create, start or delete a container or an exec.
    pub const SLOW: Duration = Duration::from_secs(60);
}

/// Minimum timeout of a call. ttrpc would take a timeout of 0 for none.
const MIN_LIMIT: Duration = Duration::from_millis(1);

/// Returns a ttrpc context with the timeout `limit`. If `limit` is zero, because the time of a request is used up, the
/// call still has a timeout.
pub fn within(limit: Duration) -> Context {
    ttrpc::context::with_duration(limit.max(MIN_LIMIT))
}

impl Agent {
    /// Creates clients that send their calls over `stream`.
    ///
    /// # Errors
    /// If the stream cannot be registered with the async runtime.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        let unhandled = Arc::<UnhandledEvents>::default();
        let stream = AgentStream::new(tokio::net::UnixStream::from_std(stream)?, Arc::clone(&unhandled));
        let client = Client::new(Socket::new(stream));
        let (task, sandbox) = (TaskClient::new(client.clone()), SandboxClient::new(client));
        Ok(Self { task, sandbox, unhandled, silence: Arc::default() })
    }

    /// Closes the connection to the agent. All calls that wait for an answer then fail.
    pub fn close(&self) {
        self.unhandled.close();
    }

    /// Makes a query with the timeout [`timeouts::QUERY`]. `call` gets the context with this timeout.
    ///
    /// If the agent has not answered [`MAX_MISSED`] queries, further queries fail at once until the agent answers.
    ///
    /// # Errors
    /// If the agent reports an error or does not answer.
    pub async fn query<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        call: impl FnOnce(Context) -> F,
    ) -> ttrpc::Result<T> {
        if self.silence.missed.load(Ordering::Relaxed) >= MAX_MISSED {
            let text = "the agent has not answered earlier queries".to_owned();
            return Err(ttrpc::error::get_rpc_status(ttrpc::Code::DEADLINE_EXCEEDED, text));
        }
        let result = call(within(timeouts::QUERY)).await;
        match &result {
            Err(error) if is_timeout(error) => {
                if self.silence.missed.fetch_add(1, Ordering::Relaxed) + 1 == MAX_MISSED {
                    self.wait_for_answer();
                }
            }
            _ => self.silence.missed.store(0, Ordering::Relaxed),
        }
        result
    }

    /// Spawns a task that makes a call without a timeout. When the agent answers this call, it is no longer silent.
    fn wait_for_answer(&self) {
        tracing::warn!("the agent does not answer queries");
        let agent = self.clone();
        tokio::spawn(async move {
            // The call ends at the latest when the VM ends, because the connection then ends. An error is an answer,
            // too.
            let answer = agent.task.connect(Context::default(), &ConnectRequest::default()).await;
            agent.silence.missed.store(0, Ordering::Relaxed);
            tracing::info!(error = answer.is_err(), "the agent answers queries again, or its connection has ended");
        });
    }

    /// Sends `request`, with which the agent sets up the guest. Returns the guest kernel's release.
    ///
    /// # Errors
    /// If the agent reports an error, has a different version of the protocol, or does not answer within `limit`.
    pub async fn setup(&self, request: &SetupRequest, limit: Duration) -> Result<String, SetupError> {
        let response = self.sandbox.setup(within(limit), request).await.map_err(SetupError::Agent)?;
        if response.protocol_version != AGENT_PROTOCOL {
            return Err(SetupError::Protocol(response.protocol_version));
        }
        Ok(bounded(&response.kernel_release, 256))
    }

    /// Sends the configuration of the pod's network, in as many messages as it needs. `limit` applies to each message.
    ///
    /// # Errors
    /// If the agent reports an error or does not answer.
    pub async fn update_network(&self, config: &UpdateNetworkRequest, limit: Duration) -> ttrpc::Result<()> {
        for part in husk_proto::network::parts(config) {
            self.sandbox.update_network(within(limit), &part).await?;
        }
        Ok(())
    }

    /// Subscribes to the agent's future events.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn events(&self) -> ttrpc::Result<Events> {
        let stream = self.sandbox.events(Context::default(), &EventsRequest::new()).await?;
        Ok(Events { stream, unhandled: Arc::clone(&self.unhandled) })
    }
}

/// Validates an event. Returns `None` if the kind of the event is unknown, or if an id is invalid.
///
/// The guest's clock is not trusted. If the exit time in the event is not within the last 60 seconds, the report
/// contains the host's current time.
pub fn check(event: Event) -> Option<Report> {
    match event.kind? {
        event::Kind::Exit(exit) => {
            if !is_name(&exit.container_id) || !(exit.exec_id.is_empty() || is_name(&exit.exec_id)) {
                return None;
            }
            let now = SystemTime::now();
            let reported =
                u64::try_from(exit.exited_at_ns).ok().map(|ns| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns));
            let plausible =
                |at: &SystemTime| *at <= now && now.duration_since(*at).is_ok_and(|d| d < Duration::from_secs(60));
            Some(Report::Exit {
                container: exit.container_id,
                exec: exit.exec_id,
                status: exit.status.min(255),
                at: reported.filter(plausible).unwrap_or(now),
                oom: exit.oom,
            })
        }
        event::Kind::Oom(oom) => is_name(&oom.container_id).then_some(Report::Oom { container: oom.container_id }),
        event::Kind::HostSocket(request) => host_socket::check(request).map(Report::HostSocket),
        _ => None,
    }
}

/// Converts `error`, which a call to the agent returned, to an error of the service. `what` is the name of the call.
///
/// Shortens the agent's error text if the text is too long, and replaces control characters in the text.
pub fn error(what: &str, error: ttrpc::Error) -> ServiceError {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let text = bounded(&status.message, MAX_ERROR);
            let code = status.code.enum_value().unwrap_or(ttrpc::Code::UNKNOWN);
            let text = if code == ttrpc::Code::DEADLINE_EXCEEDED {
                format!("the agent's {what} call failed: {text}")
            } else {
                text
            };
            ServiceError::Agent { code, text }
        }
        other => ServiceError::Agent {
            code: if is_timeout(&other) { ttrpc::Code::DEADLINE_EXCEEDED } else { ttrpc::Code::UNAVAILABLE },
            text: format!("the agent's {what} call failed: {other}"),
        },
    }
}

/// Returns whether the agent has not answered a call before the call's timeout.
pub fn is_timeout(error: &ttrpc::Error) -> bool {
    match error {
        // The timeout expired in the agent.
        ttrpc::Error::RpcStatus(status) => status.code() == ttrpc::Code::DEADLINE_EXCEEDED,
        // The timeout expired in the client.
        ttrpc::Error::Others(text) => text == CLIENT_TIMEOUT,
        _ => false,
    }
}

/// Returns whether the agent reports that the guest could not be made this pod's guest, although it was made from a
/// template.
pub fn is_template_error(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::DATA_LOSS)
}

/// Returns whether `error` is that of the connection to the agent, and not an answer or a timeout. Without this
/// connection, the shim kills the VM.
pub fn is_connection_error(error: &ttrpc::Error) -> bool {
    !matches!(error, ttrpc::Error::RpcStatus(_)) && !is_timeout(error)
}

#[cfg(test)]
#[path = "hostile_agent_tests.rs"]
mod hostile_agent_tests;

#[cfg(test)]
mod tests {
    use husk_proto::agent::Exit;

    use super::*;

    fn exit(status: u32, at: i64) -> Event {
        let mut event = Event::new();
        event.set_exit(Exit { container_id: "c".into(), status, exited_at_ns: at, ..Default::default() });
        event
    }

    #[test]
    fn every_call_has_a_deadline() {
        // ttrpc waits without a limit if the timeout of a call is 0.
        for limit in [Duration::ZERO, Duration::from_nanos(1)] {
            assert!(within(limit).timeout_nano > 0, "{limit:?}");
        }
        assert_eq!(within(Duration::from_secs(1)).timeout_nano, 1_000_000_000);
    }

    #[test]
    fn check_corrects_exit_status_and_time() {
        for at in [i64::MIN, -1, 0, i64::MAX] {
            let Some(Report::Exit { status, at, .. }) = check(exit(u32::MAX, at)) else {
                panic!("check does not return an exit report")
            };
            assert_eq!(status, 255);
            assert!(at.elapsed().unwrap() < Duration::from_secs(5));
        }
        assert_eq!(check(Event::new()), None);
    }

    #[test]
    fn error_shortens_the_text_and_replaces_control_characters() {
        let long = ttrpc::error::get_rpc_status(ttrpc::Code::NOT_FOUND, "ä\x1b".repeat(10_000));
        let ServiceError::Agent { code, text } = error("create", long) else {
            panic!("error does not return an error of the agent")
        };
        assert!(text.len() <= MAX_ERROR * 3 && !text.contains('\x1b'));
        assert_eq!(code, ttrpc::Code::NOT_FOUND);
    }
}
