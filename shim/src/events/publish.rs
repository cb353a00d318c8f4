//! Publishes events to containerd, through containerd's ttrpc socket or with the command `containerd publish`.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_base::sys::fd::set_nonblocking;
use husk_proto::containerd::api::ForwardRequest;
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::shim_async::{Client, EventsClient};
use protobuf::Message;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Socket;

use super::Publish;
use crate::launcher::{LaunchError, Launcher, ProgramOptions};

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
    /// The launcher cannot start the binary.
    #[error("failed to start {path} publish")]
    Start {
        /// The binary.
        path: String,
        /// The cause.
        #[source]
        source: LaunchError,
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

impl PublishError {
    /// Returns whether a retry is useless: containerd has refused the event, or the shim knows no destination.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::NoDestination | Self::BinaryStatus { .. } => true,
            Self::Forward(ttrpc::Error::RpcStatus(status)) => {
                !matches!(status.code(), Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED)
            }
            _ => false,
        }
    }
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
    launcher: Option<Launcher>,
}

impl Destination {
    /// Returns a destination that connects at the first event.
    pub fn new(ttrpc_address: String, address: String, binary: String) -> Self {
        Self { ttrpc_address, address, binary, client: None, launcher: None }
    }

    /// Returns the paths of containerd's sockets.
    pub fn sockets(&self) -> impl Iterator<Item = PathBuf> {
        let addresses = [&self.ttrpc_address, &self.address].into_iter();
        addresses.map(|address| address.strip_prefix("unix://").unwrap_or(address).into())
    }

    /// Sets the launcher, which starts the binary.
    pub fn set_launcher(&mut self, launcher: Launcher) {
        self.launcher = Some(launcher);
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

    async fn run_binary(&self, launcher: &Launcher, event: &Envelope) -> Result<(), PublishError> {
        let error = |source| PublishError::Binary { path: self.binary.clone(), source };
        let args = ["--address", &self.address, "publish", "--topic", &event.topic, "--namespace", &event.namespace];
        let args = args.map(str::to_owned);
        let null = std::fs::File::options().write(true).open("/dev/null").map_err(error)?;
        let (stdin, input) = std::io::pipe().map_err(error)?;
        set_nonblocking(&input).map_err(error)?;
        let options = ProgramOptions {
            path: Path::new(&self.binary),
            arg0: None,
            args: &args,
            env: None,
            cwd: None,
            fds: &[stdin.as_fd(), null.as_fd(), null.as_fd()],
            cgroup: None,
            kill_on_drop: true,
        };
        let program = launcher.start_program(&options).await;
        let program = program.map_err(|source| PublishError::Start { path: self.binary.clone(), source })?;
        drop(stdin);
        let mut input = pipe::Sender::from_owned_fd(input.into()).map_err(error)?;
        let bytes = event.event.write_to_bytes().map_err(std::io::Error::other).map_err(error)?;
        input.write_all(&bytes).await.map_err(error)?;
        drop(input);
        let status = program.wait().await.map_err(error)?;
        if status.success() { Ok(()) } else { Err(PublishError::BinaryStatus { path: self.binary.clone(), status }) }
    }
}

#[async_trait::async_trait]
impl Publish for Destination {
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
        if !self.ttrpc_address.is_empty() {
            self.forward(event).await
        } else if let (false, Some(launcher)) = (self.binary.is_empty(), &self.launcher) {
            tokio::time::timeout(TIMEOUT, self.run_binary(launcher, event)).await.map_err(|_| PublishError::Timeout)?
        } else {
            Err(PublishError::NoDestination)
        }
    }
}
