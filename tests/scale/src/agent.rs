//! The stand-in for the guest's agent: claims that each request succeeded, and that a killed container has exited.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::SystemTime;

use husk_base::sync::lock;
use husk_proto::AGENT_PROTOCOL;
use husk_proto::agent::{
    AdjustClockResponse, Event, Exit, SetHugePagesRequest, SetHugePagesResponse, SetOnlineVcpusRequest,
    SetOnlineVcpusResponse, SetupResponse,
};
use husk_proto::containerd::api::{CreateTaskRequest, DeleteRequest, KillRequest, StartRequest, StatsResponse};
use husk_proto::stream::{HEADER_LEN, Header};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
    Request, Response, Status,
};

/// The streams of the pod's containers.
#[derive(Default)]
pub struct Guest {
    /// Streams whose headers have not been read.
    new: Mutex<Vec<UnixStream>>,
    /// Streams by token.
    named: Mutex<HashMap<String, UnixStream>>,
}

impl Guest {
    /// Keeps a new stream.
    pub fn add_stream(&self, stream: UnixStream) {
        lock(&self.new).push(stream);
    }

    /// Closes the streams with these tokens. The shim has sent the header of a stream before it uses the token.
    fn close(&self, tokens: &[String]) {
        let new = std::mem::take(&mut *lock(&self.new));
        let mut named = lock(&self.named);
        for mut stream in new {
            let mut header = [0; HEADER_LEN];
            if stream.read_exact(&mut header).is_ok()
                && let Ok(header) = Header::decode(header)
            {
                named.insert(header.token.to_string(), stream);
            }
        }
        tokens.iter().for_each(|token| drop(named.remove(token)));
    }
}

/// The agent's state.
#[derive(Default)]
struct Agent {
    /// The stream of the call `Events`.
    events: Option<u32>,
    /// The tokens of each container's streams.
    tokens: HashMap<String, Vec<String>>,
    /// The containers that run.
    running: HashSet<String>,
}

/// What follows the answer to a request.
enum Reply {
    /// The answer's payload.
    Answer(Vec<u8>),
    /// The payload, and then the exit of a container with a status.
    AnswerAndExit(Vec<u8>, String, u32),
    /// No answer, because the call streams messages.
    Stream,
}

/// Serves the agent's API on a connection until the shim closes it.
pub fn serve(mut connection: UnixStream, guest: &Guest) -> io::Result<()> {
    let mut agent = Agent::default();
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        connection.read_exact(&mut header)?;
        let MessageHeader { length, stream_id, type_, .. } = MessageHeader::from(header);
        let mut body = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        connection.read_exact(&mut body)?;
        if type_ != MESSAGE_TYPE_REQUEST {
            continue;
        }
        let request = Request::parse_from_bytes(&body)?;
        match agent.handle(&request, stream_id, guest) {
            Ok(Reply::Answer(payload)) => respond(&mut connection, stream_id, payload)?,
            Ok(Reply::AnswerAndExit(payload, container_id, status)) => {
                respond(&mut connection, stream_id, payload)?;
                let mut event = Event::new();
                event.set_exit(Exit { container_id, status, ..Default::default() });
                if let Some(events) = agent.events {
                    send(&mut connection, MESSAGE_TYPE_DATA, events, &event.write_to_bytes()?)?;
                }
            }
            Ok(Reply::Stream) => {}
            Err(error) => {
                let status = Status { code: Code::UNKNOWN.into(), message: error.to_string(), ..Default::default() };
                let response = Response { status: MessageField::some(status), ..Default::default() };
                send(&mut connection, MESSAGE_TYPE_RESPONSE, stream_id, &response.write_to_bytes()?)?;
            }
        }
    }
}

fn respond(connection: &mut UnixStream, call: u32, payload: Vec<u8>) -> io::Result<()> {
    let response = Response { payload, ..Default::default() };
    send(connection, MESSAGE_TYPE_RESPONSE, call, &response.write_to_bytes()?)
}

fn send(connection: &mut UnixStream, kind: u8, stream_id: u32, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let header = Vec::from(MessageHeader { length, stream_id, type_: kind, flags: 0 });
    connection.write_all(&[&header, body].concat())
}

impl Agent {
    fn handle(&mut self, request: &Request, call: u32, guest: &Guest) -> io::Result<Reply> {
        let payload = request.payload.as_slice();
        let answer = match request.method.as_str() {
            "Setup" => SetupResponse { protocol_version: AGENT_PROTOCOL, ..Default::default() }.write_to_bytes()?,
            "Events" => {
                self.events = Some(call);
                return Ok(Reply::Stream);
            }
            "Create" => {
                let CreateTaskRequest { id, stdin, stdout, stderr, .. } = CreateTaskRequest::parse_from_bytes(payload)?;
                self.tokens.insert(id, vec![stdin, stdout, stderr]);
                Vec::new()
            }
            "Start" => {
                self.running.insert(StartRequest::parse_from_bytes(payload)?.id);
                Vec::new()
            }
            "Kill" => {
                let KillRequest { id, signal, .. } = KillRequest::parse_from_bytes(payload)?;
                if self.running.remove(&id) {
                    guest.close(&self.tokens.remove(&id).unwrap_or_default());
                    return Ok(Reply::AnswerAndExit(Vec::new(), id, 128 + signal));
                }
                Vec::new()
            }
            "Delete" => {
                let DeleteRequest { id, .. } = DeleteRequest::parse_from_bytes(payload)?;
                guest.close(&self.tokens.remove(&id).unwrap_or_default());
                Vec::new()
            }
            "Exec" => return Err(io::Error::other("the stand-in for the agent cannot run commands")),
            "Stats" => {
                let stats = Any { type_url: husk_proto::metrics::TYPE_URL.to_owned(), ..Default::default() };
                StatsResponse { stats: MessageField::some(stats), ..Default::default() }.write_to_bytes()?
            }
            "SetOnlineVcpus" => {
                let online = SetOnlineVcpusRequest::parse_from_bytes(payload)?.count;
                SetOnlineVcpusResponse { online, ..Default::default() }.write_to_bytes()?
            }
            "SetHugePages" => {
                let count = SetHugePagesRequest::parse_from_bytes(payload)?.count;
                SetHugePagesResponse { count, ..Default::default() }.write_to_bytes()?
            }
            "AdjustClock" => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let clock_ns = i64::try_from(now.as_nanos()).unwrap_or_default();
                AdjustClockResponse { clock_ns, ..Default::default() }.write_to_bytes()?
            }
            _ => Vec::new(),
        };
        Ok(Reply::Answer(answer))
    }
}
