//! `husk-lying-agent`: PID 1 of a hostile guest. Speaks the agent's protocols over vsock, and lies.
//!
//! The suite `husk_hostile` boots this program in place of the agent. The kernel parameter `lie=NAME` selects what the
//! program does. The kernel passes the parameter to PID 1 as an environment variable.
//!
//! | lie | what the program does |
//! | --- | --- |
//! | `silent` | answers no request |
//! | `garbage` | answers the first request with bytes that are no message |
//! | `connect` | connects to ports of the host, and answers the first request with an error that has the result |
//! | `version` | answers the first request with another version of the protocol |
//! | `error` | answers the first request with an error text of 3 MiB that contains escape sequences |
//! | `flood` | claims that each request succeeded, but does nothing; sends events, logs, output and statistics without end |

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use husk_base::sync::lock;
use husk_base::sys::{io_port, vsock};
use husk_proto::AGENT_PROTOCOL;
use husk_proto::agent::{Event, Exit, Oom, SetupResponse};
use husk_proto::boot_mark::{self, BootMark};
use husk_proto::containerd::shim::shim::StatsResponse;
use husk_proto::ports;
use husk_proto::stream::HEADER_LEN;
use nix::sys::socket::SockFlag;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
    Request, Response, Status,
};

/// Length of long texts and of statistics, in bytes. ttrpc's limit for a message is 4 MiB.
const LONG: usize = 3 << 20;
/// Pause after each group of events. The events still exceed the rate at which the shim reads.
const EVENT_PAUSE: Duration = Duration::from_millis(1);
/// CID of the host.
const HOST: u32 = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    Silent,
    Garbage,
    Connect,
    Version,
    Error,
    Flood,
}

impl Lie {
    fn parse(name: &str) -> Self {
        match name {
            "silent" => Self::Silent,
            "garbage" => Self::Garbage,
            "connect" => Self::Connect,
            "version" => Self::Version,
            "error" => Self::Error,
            _ => Self::Flood,
        }
    }
}

fn main() {
    let lie = Lie::parse(&std::env::var("lie").unwrap_or_default());
    assert_eq!(std::process::id(), 1, "husk-lying-agent must be PID 1 of a guest; it cannot be started by hand");
    mark(BootMark::AgentStarted);
    let listen = |port| vsock::listen(port, SockFlag::empty()).expect("listen on vsock");
    let (agent, stream) = (listen(ports::AGENT), listen(ports::STREAM));
    let (log, forward) = (listen(ports::LOG), listen(ports::PORT_FORWARDING));
    serve(stream, move |connection| output(connection, lie));
    serve(log, move |connection| log_lines(connection, lie));
    serve(forward, move |connection| output(connection, lie));
    serve(agent, move |connection| api(connection, lie));
    mark(BootMark::AgentReady);
    // PID 1 must not end, because the kernel would panic.
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Tells the VMM which boot step the guest has reached.
fn mark(mark: BootMark) {
    io_port::set_permission(boot_mark::PORT, true).expect("get access to the port of the boot marks");
    // SAFETY: this thread has just gained access to the port. `out` changes neither memory nor stack nor flags.
    unsafe {
        let port = boot_mark::PORT;
        std::arch::asm!("out dx, al", in("dx") port, in("al") mark as u8, options(nomem, nostack, preserves_flags));
    }
}

/// Starts a thread that accepts connections, and a thread for each connection.
fn serve(listener: OwnedFd, run: impl Fn(File) -> io::Result<()> + Copy + Send + 'static) {
    thread::spawn(move || {
        while let Ok((connection, _)) = vsock::accept(listener.as_fd(), SockFlag::empty()) {
            thread::spawn(move || run(connection.into()));
        }
    });
}

/// Serves the API: reads requests and answers them with lies.
fn api(mut connection: File, lie: Lie) -> io::Result<()> {
    let writer = Arc::new(Mutex::new(connection.try_clone()?));
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        connection.read_exact(&mut header)?;
        let header = MessageHeader::from(header);
        let mut body = vec![0; header.length as usize];
        connection.read_exact(&mut body)?;
        if header.type_ != MESSAGE_TYPE_REQUEST {
            continue;
        }
        let request = Request::parse_from_bytes(&body).map_err(io::Error::other)?;
        let call = header.stream_id;
        match (lie, request.method.as_str()) {
            (Lie::Silent, _) => {}
            (Lie::Garbage, _) => lock(&writer).write_all(&[0xff; 1 << 20])?,
            (Lie::Connect, _) => fail(&writer, call, &connections())?,
            (Lie::Error, _) => fail(&writer, call, &"\x1b[31m\n\0lie\u{202e}".repeat(LONG / 12))?,
            (Lie::Flood, "Events") => {
                let writer = Arc::clone(&writer);
                thread::spawn(move || events(&writer, call));
            }
            (Lie::Flood | Lie::Version, "Setup") => {
                let protocol_version = if lie == Lie::Version { AGENT_PROTOCOL + 1 } else { AGENT_PROTOCOL };
                let setup = SetupResponse { protocol_version, ..Default::default() };
                answer(&writer, call, &setup.write_to_bytes().map_err(io::Error::other)?)?;
            }
            (Lie::Flood, "Stats") => answer(&writer, call, &statistics())?,
            (Lie::Flood | Lie::Version, _) => {
                // Sends answers that belong to no call, and a message of an unknown type. A message of an unknown type
                // that belongs to a call would end the connection.
                for (kind, stream) in
                    [(MESSAGE_TYPE_RESPONSE, call + 2), (MESSAGE_TYPE_RESPONSE, u32::MAX), (255, call + 4)]
                {
                    send(&writer, kind, stream, b"abc")?;
                }
                answer(&writer, call, &[])?;
            }
        }
    }
}

fn send(writer: &Mutex<File>, kind: u8, stream_id: u32, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let header = Vec::from(MessageHeader { length, stream_id, type_: kind, flags: 0 });
    lock(writer).write_all(&[&header, body].concat())
}

/// Answers a call with a payload.
fn answer(writer: &Mutex<File>, call: u32, payload: &[u8]) -> io::Result<()> {
    respond(writer, call, &Response { payload: payload.to_vec(), ..Default::default() })
}

/// Answers a call with an error.
fn fail(writer: &Mutex<File>, call: u32, text: &str) -> io::Result<()> {
    let status = Status { code: Code::UNKNOWN.into(), message: text.to_owned(), ..Default::default() };
    respond(writer, call, &Response { status: MessageField::some(status), ..Default::default() })
}

fn respond(writer: &Mutex<File>, call: u32, response: &Response) -> io::Result<()> {
    send(writer, MESSAGE_TYPE_RESPONSE, call, &response.write_to_bytes().map_err(io::Error::other)?)
}

/// Sends events without end: events of containers that do not exist, invalid ids, and bytes that are no event.
fn events(writer: &Mutex<File>, call: u32) -> io::Result<()> {
    let (mut exit, mut oom, mut invalid) = (Event::new(), Event::new(), Event::new());
    exit.set_exit(Exit { container_id: "no-such-container".to_owned(), status: u32::MAX, ..Default::default() });
    oom.set_oom(Oom { container_id: "no-such-container".to_owned(), ..Default::default() });
    invalid.set_exit(Exit { container_id: "../\x1b[31m\n".repeat(100), exited_at_ns: i64::MIN, ..Default::default() });
    let events = [exit, oom, invalid].map(|event| event.write_to_bytes().unwrap_or_default());
    loop {
        for event in &events {
            send(writer, MESSAGE_TYPE_DATA, call, event)?;
        }
        send(writer, MESSAGE_TYPE_DATA, call, &[])?;
        // Without a pause, this thread would take the lock of the writer again before another thread gets it.
        thread::sleep(EVENT_PAUSE);
    }
}

/// Returns statistics of megabytes, with a wrong type.
fn statistics() -> Vec<u8> {
    let stats = Any { type_url: "lie".repeat(1000), value: vec![0x7f; LONG], ..Default::default() };
    StatsResponse { stats: MessageField::some(stats), ..Default::default() }.write_to_bytes().unwrap_or_default()
}

/// Reads the header of a stream, and then sends output without end. Most of the output has no newline.
fn output(mut connection: File, lie: Lie) -> io::Result<()> {
    connection.read_exact(&mut [0; HEADER_LEN])?;
    let mut text = vec![b'x'; 1 << 20];
    text.push(b'\n');
    if lie != Lie::Flood {
        return Ok(());
    }
    loop {
        connection.write_all(&text)?;
    }
}

/// Sends log lines without end.
fn log_lines(mut connection: File, lie: Lie) -> io::Result<()> {
    let mut text = "audit: \x1b[31m a lie\r\n\0\n".repeat(1000).into_bytes();
    text.extend([b'y'; 100_000]);
    if lie != Lie::Flood {
        return Ok(());
    }
    loop {
        connection.write_all(&text)?;
    }
}

/// Connects to ports of the host and of other CIDs. Returns a text that says which connections succeeded.
fn connections() -> String {
    let wanted = (1..=1100).map(|port| (HOST, port));
    let others = [0, 1, 4, u32::MAX - 1].map(|cid| (cid, ports::AGENT));
    let extremes = [u32::MAX - 1, 1 << 31].map(|port| (HOST, port));
    let succeeded: Vec<_> =
        wanted.chain(others).chain(extremes).filter(|&(c, p)| vsock::connect(c, p).is_ok()).collect();
    format!("{} connections succeeded: {succeeded:?}", succeeded.len())
}
