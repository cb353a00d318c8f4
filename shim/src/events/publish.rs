//! Publishes events to containerd, through containerd's ttrpc socket or with the command `containerd publish`.

use std::process::Stdio;
use std::time::Duration;

use husk_proto::containerd::api::ForwardRequest;
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::shim_async::{Client, EventsClient};
use protobuf::Message;
use tokio::io::AsyncWriteExt;
use ttrpc::asynchronous::transport::Socket;

use super::Publish;

/// Timeout of one delivery attempt.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A failed delivery attempt.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// containerd passed neither the address of its ttrpc socket nor the path of its binary to the shim.
    #[error("containerd passed neither a ttrpc socket nor the path of its binary")]
    NoDestination,
    /// The connection to containerd's socket failed.
    #[error("failed to connect to containerd's ttrpc socket {path}")]
    Connect {
        /// The socket.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The ttrpc call failed.
    #[error("failed to forward the event to containerd")]
    Forward(#[source] ttrpc::Error),
    /// The binary cannot be run.
    #[error("failed to run {path} publish")]
    Binary {
        /// The binary.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The binary ended with an error status.
    #[error("{path} publish failed: {status}")]
    BinaryStatus {
        /// The binary.
        path: String,
        /// The exit status.
        status: std::process::ExitStatus,
    },
    /// The binary exceeded its timeout.
    #[error("containerd's publish command timed out after {} s", TIMEOUT.as_secs())]
    Timeout,
}

/// The containerd instance that receives the events.
pub struct Destination {
    /// Address of containerd's ttrpc socket. Empty if the address is not known.
    pub ttrpc_address: String,
    /// Address of containerd's gRPC socket, to which `containerd publish` connects.
    pub address: String,
    /// Path of containerd's binary. Empty if the path is not known.
    pub binary: String,
    client: Option<EventsClient>,
}

impl Destination {
    /// Returns a destination that connects at the first event.
    pub fn new(ttrpc_address: String, address: String, binary: String) -> Self {
        Self { ttrpc_address, address, binary, client: None }
    }

    async fn forward(&mut self, event: &Envelope) -> Result<(), PublishError> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let path = self.ttrpc_address.strip_prefix("unix://").unwrap_or(&self.ttrpc_address);
                let stream = tokio::net::UnixStream::connect(path)
                    .await
                    .map_err(|source| PublishError::Connect { path: path.to_owned(), source })?;
                let client = EventsClient::new(Client::new(Socket::from(stream)));
                self.client.insert(client).clone()
            }
        };
        let request = ForwardRequest { envelope: Some(event.clone()).into(), ..Default::default() };
        let result = client.forward(ttrpc::context::with_duration(TIMEOUT), &request).await;
        if result.is_err() {
            // A retry needs a new connection, because containerd may have been restarted.
            self.client = None;
        }
        result.map(drop).map_err(PublishError::Forward)
    }

    async fn run_binary(&self, event: &Envelope) -> Result<(), PublishError> {
        let error = |source| PublishError::Binary { path: self.binary.clone(), source };
        let mut child = tokio::process::Command::new(&self.binary)
            .args(["--address", &self.address, "publish", "--topic", &event.topic, "--namespace", &event.namespace])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(error)?;
        if let Some(mut stdin) = child.stdin.take() {
            let bytes = event.event.write_to_bytes().map_err(std::io::Error::other).map_err(error)?;
            stdin.write_all(&bytes).await.map_err(error)?;
        }
        let status = child.wait().await.map_err(error)?;
        if status.success() { Ok(()) } else { Err(PublishError::BinaryStatus { path: self.binary.clone(), status }) }
    }
}

#[async_trait::async_trait]
impl Publish for Destination {
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
        if !self.ttrpc_address.is_empty() {
            self.forward(event).await
        } else if !self.binary.is_empty() {
            tokio::time::timeout(TIMEOUT, self.run_binary(event)).await.map_err(|_| PublishError::Timeout)?
        } else {
            Err(PublishError::NoDestination)
        }
    }
}
