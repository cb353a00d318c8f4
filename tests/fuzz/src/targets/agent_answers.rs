//! Fuzzes the bytes that an agent sends to the shim on the ttrpc connection, while the shim's calls wait for answers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_proto::AGENT_PROTOCOL;
use husk_proto::agent::{Event, Exit, Oom, SetupRequest, SetupResponse};
use husk_proto::containerd::api::{PidsRequest, StatsRequest};
use husk_shim::error::ServiceError;
use husk_shim::vm::agent::{Agent, SetupError, check, error, within};
use protobuf::Message;
use ttrpc::proto::{Response, Status};

use crate::input::input;
use crate::runtime::block_on;

/// Timeout of the calls. The target closes the connection, so that each call ends before this timeout.
const TIMEOUT: Duration = Duration::from_secs(20);
const MAX_FRAMES: usize = 24;

#[derive(arbitrary::Arbitrary, Debug)]
enum Payload {
    Raw(Vec<u8>),
    /// A response with the given payload.
    Response(Vec<u8>),
    Error {
        code: i32,
        text: String,
    },
    Setup {
        kernel: String,
        agent: String,
    },
    Exit {
        container: String,
        exec: String,
        status: u32,
        at: i64,
        oom: bool,
    },
    Oom(String),
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Frame {
    /// ttrpc stream id. A ttrpc client uses odd ids.
    stream: u8,
    kind: u8,
    flags: u8,
    payload: Payload,
    /// Difference between the encoded length and the correct length.
    len: i8,
}

impl Frame {
    fn encode(&self) -> Vec<u8> {
        let message: Box<dyn Fn() -> protobuf::Result<Vec<u8>>> = match &self.payload {
            Payload::Raw(bytes) => Box::new(|| Ok(bytes.clone())),
            Payload::Response(payload) => {
                Box::new(|| Response { payload: payload.clone(), ..Default::default() }.write_to_bytes())
            }
            Payload::Error { code, text } => Box::new(|| {
                let mut status = Status { message: text.clone(), ..Default::default() };
                status.code = protobuf::EnumOrUnknown::from_i32(*code);
                Response { status: Some(status).into(), ..Default::default() }.write_to_bytes()
            }),
            Payload::Setup { kernel, agent } => Box::new(|| {
                let setup = SetupResponse {
                    kernel_release: kernel.clone(),
                    agent_version: agent.clone(),
                    protocol_version: AGENT_PROTOCOL,
                    ..Default::default()
                };
                Response { payload: setup.write_to_bytes()?, ..Default::default() }.write_to_bytes()
            }),
            Payload::Exit { container, exec, status, at, oom } => Box::new(|| {
                let mut event = Event::new();
                event.set_exit(Exit {
                    container_id: container.clone(),
                    exec_id: exec.clone(),
                    status: *status,
                    exited_at_ns: *at,
                    oom: *oom,
                    ..Default::default()
                });
                event.write_to_bytes()
            }),
            Payload::Oom(container) => Box::new(|| {
                let mut event = Event::new();
                event.set_oom(Oom { container_id: container.clone(), ..Default::default() });
                event.write_to_bytes()
            }),
        };
        let payload = message().expect("encode a message");
        let mut frame = (payload.len() as u32).wrapping_add_signed(self.len.into()).to_be_bytes().to_vec();
        frame.extend(u32::from(self.stream % 12).to_be_bytes());
        frame.extend([self.kind % 5, self.flags]);
        frame.extend(payload);
        frame
    }
}

fn check_error(failure: ttrpc::Error) {
    let ServiceError::Agent { text, .. } = error("setup", failure) else {
        panic!("the error of a call is not an error of the agent")
    };
    assert!(text.len() < 16 << 10, "the error text has {} bytes, but must have fewer than 16 KiB", text.len());
    assert!(!text.contains('\x1b'), "the error text contains an escape character, which is not allowed");
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(frames) = input::<Vec<Frame>>(bytes) else { return };
    let bytes: Vec<u8> = frames.iter().take(MAX_FRAMES).flat_map(Frame::encode).collect();
    block_on(async {
        let (ours, mut theirs) = UnixStream::pair().expect("create a socket pair");
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).expect("set non-blocking mode");
        }
        let agent = Agent::new(ours).expect("create the agent's ttrpc client");
        let setup = SetupRequest::new();
        let answer = async {
            // Wait until ttrpc has sent the calls below, because ttrpc drops answers to calls that it has not sent.
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            let _ = theirs.write(&bytes);
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
            let _ = theirs.read(&mut [0; 4096]);
            drop(theirs);
        };
        let events = async {
            let Ok(mut events) = agent.events().await else { return };
            while let Ok(Some(event)) = events.recv().await {
                drop(check(event));
            }
        };
        let (pids, stats) = (PidsRequest::new(), StatsRequest::new());
        let (setup, pids, stats, (), ()) = tokio::join!(
            agent.setup(&setup, TIMEOUT),
            agent.task.pids(within(TIMEOUT), &pids),
            agent.task.stats(within(TIMEOUT), &stats),
            events,
            answer
        );
        match setup {
            Ok(kernel) => assert!(
                kernel.len() <= 3 * 256,
                "the kernel's release has {} bytes, but at most 768 are allowed",
                kernel.len()
            ),
            Err(SetupError::Agent(failure)) => check_error(failure),
            Err(SetupError::Protocol(_)) => {}
        }
        let _ = pids.map_err(check_error);
        let _ = stats.map_err(check_error);
    });
}
