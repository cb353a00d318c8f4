//! The agent in the guest, which is not trusted: every answer has a time-out, and what it says is checked.

use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use husk_proto::agent::{Event, EventsRequest, SetupRequest, event};
use husk_proto::agent_ttrpc::SandboxClient;
use husk_proto::containerd::shim_async::{Client, TaskClient};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

/// Longest error text passed on.
const MAX_ERROR: usize = 4096;

/// Clients of the agent's services, over one connection.
#[derive(Clone)]
pub struct Agent {
    /// containerd's Task service, with guest paths.
    pub task: TaskClient,
    /// The sandbox service.
    pub sandbox: SandboxClient,
}

/// Something the agent reported, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A process ended.
    Exit {
        /// Its container.
        container: String,
        /// Its exec id; empty for the first process.
        exec: String,
        /// 0 to 255.
        status: u32,
        /// When.
        at: SystemTime,
        /// The guest's kernel killed for lack of memory.
        oom: bool,
    },
    /// The guest's kernel killed a process of this container for lack of memory.
    Oom {
        /// The container.
        container: String,
    },
}

/// How long calls may take: the agent's work is quick, a node under load is not.
pub mod timeouts {
    use std::time::Duration;

    /// Calls that only look something up or pass it on.
    pub const QUICK: Duration = Duration::from_secs(10);
    /// Creating, starting and deleting.
    pub const SLOW: Duration = Duration::from_secs(60);
}

/// A request's context with a time-out.
pub fn within(limit: Duration) -> Context {
    ttrpc::context::with_duration(limit)
}

impl Agent {
    /// Speaks over a connected stream.
    ///
    /// # Errors
    /// When the stream cannot be watched.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        let client = Client::new(Socket::try_from(stream)?);
        Ok(Self { task: TaskClient::new(client.clone()), sandbox: SandboxClient::new(client) })
    }

    /// Sets the guest up.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn setup(&self, request: &SetupRequest, limit: Duration) -> ttrpc::Result<String> {
        let response = self.sandbox.setup(within(limit), request).await?;
        Ok(short(&response.kernel_release, 256))
    }

    /// Asks for events, from now on.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn events(&self) -> ttrpc::Result<ttrpc::r#async::ClientStreamReceiver<Event>> {
        self.sandbox.events(Context::default(), &EventsRequest::new()).await
    }
}

/// Checks an event. The host's clock counts, except that the guest's may be nearer to the truth by a little.
pub fn check(event: Event) -> Option<Report> {
    match event.kind? {
        event::Kind::Exit(exit) => {
            let now = SystemTime::now();
            let said =
                u64::try_from(exit.exited_at_ns).ok().map(|ns| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns));
            let near =
                |at: &SystemTime| *at <= now && now.duration_since(*at).is_ok_and(|d| d < Duration::from_secs(60));
            Some(Report::Exit {
                container: exit.container_id,
                exec: exit.exec_id,
                status: exit.status.min(255),
                at: said.filter(near).unwrap_or(now),
                oom: exit.oom,
            })
        }
        event::Kind::Oom(oom) => Some(Report::Oom { container: oom.container_id }),
        _ => None,
    }
}

/// An error of the agent's for containerd: bounded, and without control characters.
pub fn error(what: &str, error: ttrpc::Error) -> ttrpc::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let text = short(&status.message, MAX_ERROR);
            let code = status.code.enum_value().unwrap_or(ttrpc::Code::UNKNOWN);
            let text = if code == ttrpc::Code::DEADLINE_EXCEEDED { format!("agent: {what}: {text}") } else { text };
            ttrpc::error::get_rpc_status(code, text)
        }
        other => ttrpc::error::get_rpc_status(ttrpc::Code::UNAVAILABLE, format!("agent: {what}: {other}")),
    }
}

/// At most `limit` bytes of it, cleaned.
fn short(text: &str, limit: usize) -> String {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    super::console::clean(text.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_proto::agent::Exit;

    fn exit(status: u32, at: i64) -> Event {
        let mut event = Event::new();
        event.set_exit(Exit { container_id: "c".into(), status, exited_at_ns: at, ..Default::default() });
        event
    }

    #[test]
    fn nonsense_is_put_right() {
        for at in [i64::MIN, -1, 0, i64::MAX] {
            let Some(Report::Exit { status, at, .. }) = check(exit(u32::MAX, at)) else { panic!("no exit") };
            assert_eq!(status, 255);
            assert!(at.elapsed().unwrap() < Duration::from_secs(5));
        }
        assert_eq!(check(Event::new()), None);
    }

    #[test]
    fn errors_are_bounded() {
        let long = ttrpc::error::get_rpc_status(ttrpc::Code::NOT_FOUND, "ä\x1b".repeat(10_000));
        let ttrpc::Error::RpcStatus(status) = error("create", long) else { panic!("no status") };
        assert!(status.message.len() <= MAX_ERROR * 3 && !status.message.contains('\x1b'));
        assert_eq!(status.code.enum_value(), Ok(ttrpc::Code::NOT_FOUND));
    }
}
