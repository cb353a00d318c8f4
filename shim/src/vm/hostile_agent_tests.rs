//! Tests of the shim's calls and events with agents that violate the protocol.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_proto::agent::{Event, Exit, SetupRequest, SetupResponse, SyncRequest, SyncResponse};
use husk_proto::containerd::api::ExecProcessRequest;
use husk_proto::containerd::shim::shim::{StatsRequest, StatsResponse};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use ttrpc::proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader, Response};

use super::*;
use crate::vm::agent_stream::{MAX_EVENT, MAX_UNHANDLED};

/// The agent's side of the connection.
struct HostileAgent(UnixStream);

impl HostileAgent {
    /// Starts a thread that runs `script` as the agent. Returns the shim's client of this agent, and the thread.
    fn start<T: Send + 'static>(
        script: impl FnOnce(Self) -> T + Send + 'static,
    ) -> (Agent, std::thread::JoinHandle<T>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours).unwrap();
        (agent, std::thread::spawn(move || script(Self(theirs))))
    }

    /// Reads the next request, and returns its stream id.
    fn request(&mut self) -> u32 {
        let mut header = [0; 10];
        self.0.read_exact(&mut header).unwrap();
        let header = MessageHeader::from(header);
        assert_eq!(header.type_, MESSAGE_TYPE_REQUEST);
        self.0.read_exact(&mut vec![0; header.length as usize]).unwrap();
        header.stream_id
    }

    fn send(&mut self, kind: u8, stream_id: u32, length: u32, body: &[u8]) -> std::io::Result<()> {
        let header = MessageHeader { length, stream_id, type_: kind, flags: 0 };
        self.0.write_all(&[&Vec::from(header)[..], body].concat())
    }

    fn answer(&mut self, stream_id: u32, message: &impl Message) {
        let payload = message.write_to_bytes().unwrap();
        let response = Response { payload, ..Default::default() }.write_to_bytes().unwrap();
        self.send(MESSAGE_TYPE_RESPONSE, stream_id, response.len() as u32, &response).unwrap();
    }
}

fn exit_event(container: &str) -> Vec<u8> {
    let mut event = Event::new();
    event.set_exit(Exit { container_id: container.to_owned(), ..Default::default() });
    event.write_to_bytes().unwrap()
}

async fn sync(agent: &Agent) -> ttrpc::Result<SyncResponse> {
    agent.sandbox.sync(within(Duration::from_secs(5)), &SyncRequest::new()).await
}

#[tokio::test]
async fn agent_that_sends_events_without_end_has_to_wait_for_the_shim() {
    let (agent, script) = HostileAgent::start(|mut agent| {
        let events = agent.request();
        let body = exit_event(&"x".repeat(1000));
        agent.0.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        // If the shim does not stop reading, the agent sends 100 MB.
        (0..100_000).take_while(|_| agent.send(MESSAGE_TYPE_DATA, events, body.len() as u32, &body).is_ok()).count()
    });
    let mut events = agent.events().await.unwrap();
    let sent = tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
    assert!(sent < 5000, "the agent sent {sent} events before the shim handled one; the limit is 5000");
    // When the shim handles events, it reads further events until the agent closes the connection.
    let mut handled = 0;
    while let Ok(Some(_)) = events.recv().await {
        handled += 1;
    }
    assert!(
        handled > MAX_UNHANDLED && handled <= sent + 1,
        "the shim received {handled} events, but the agent sent {sent}, and more than {MAX_UNHANDLED} must arrive"
    );
}

#[tokio::test]
async fn call_ends_after_its_timeout_while_events_arrive() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let events = agent.request();
        let body = exit_event("c");
        let frame = [&Vec::from(MessageHeader::new_data(events, body.len() as u32))[..], &body].concat();
        let frames = frame.repeat(10_000);
        let mut writer = agent.0.try_clone().unwrap();
        std::thread::spawn(move || (0..100).try_for_each(|_| writer.write_all(&frames)));
        agent.request();
        agent
    });
    let mut events = agent.events().await.unwrap();
    let mut count = 0u32;
    while count < 100_000 {
        events.recv().await.unwrap().unwrap();
        count += 1;
    }
    // The agent does not answer the call. The call's timeout must end the call, although events arrive all the time.
    let request = SyncRequest::new();
    let call = agent.sandbox.sync(within(Duration::from_millis(200)), &request);
    let (result, ()) = tokio::join!(call, async {
        for _ in 0..200_000 {
            if !matches!(events.recv().await, Ok(Some(_))) {
                break;
            }
        }
    });
    assert!(result.is_err());
}

#[tokio::test]
async fn event_that_is_too_long_ends_the_connection() {
    let (agent, script) = HostileAgent::start(|mut agent| {
        let events = agent.request();
        let _ = agent.send(MESSAGE_TYPE_DATA, events, MAX_EVENT + 1, &vec![0; MAX_EVENT as usize + 1]);
        agent
    });
    let mut events = agent.events().await.unwrap();
    assert!(events.recv().await.is_err());
    assert!(sync(&agent).await.is_err());
    drop(script);
}

#[tokio::test]
async fn messages_with_wrong_ids_and_types_do_not_answer_a_call() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let call = agent.request();
        for stream_id in [0, call + 1, call + 2, u32::MAX] {
            for kind in [0, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, 4, 255] {
                agent.send(kind, stream_id, 3, b"abc").unwrap();
            }
        }
        agent.answer(call, &SyncResponse::new());
        agent
    });
    assert!(sync(&agent).await.is_ok());
}

#[tokio::test]
async fn garbage_ends_calls_with_an_error() {
    let garbage: Vec<Vec<u8>> = vec![
        vec![0; 100],
        vec![0xff; 100_000],
        b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        // A header without a body. The header announces a body of 4 MiB and one byte.
        [&(4u32 << 20 | 1).to_be_bytes()[..], &[0, 0, 0, 1, 2, 0]].concat(),
    ];
    for bytes in garbage {
        let (agent, _script) = HostileAgent::start(move |mut agent| {
            agent.request();
            let _ = agent.0.write_all(&bytes);
        });
        assert!(sync(&agent).await.is_err());
    }
}

#[tokio::test]
async fn malformed_answer_fails_only_the_call_that_it_answers() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let first = agent.request();
        agent.send(MESSAGE_TYPE_RESPONSE, first, 50, &[0xff; 50]).unwrap();
        let second = agent.request();
        agent.answer(second, &SyncResponse::new());
        agent
    });
    assert!(sync(&agent).await.is_err());
    assert!(sync(&agent).await.is_ok());
}

#[tokio::test]
async fn agent_that_closes_the_connection_ends_all_calls() {
    let (agent, _script) = HostileAgent::start(|mut agent| [agent.request(), agent.request()]);
    let (first, second) = tokio::join!(sync(&agent), sync(&agent));
    assert!(first.is_err() && second.is_err());
    assert!(sync(&agent).await.is_err());
}

#[tokio::test]
async fn agent_of_another_release_is_refused_and_named() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let setup = agent.request();
        // An agent without versions does not set the field.
        agent.answer(setup, &SetupResponse::new());
        agent
    });
    let error = agent.setup(&SetupRequest::new(), Duration::from_secs(5)).await.unwrap_err();
    assert!(crate::chain(&error).starts_with("the guest's agent has version 0 of its protocol"), "{error}");
}

#[tokio::test]
async fn huge_texts_of_the_agent_are_shortened() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let setup = agent.request();
        let kernel_release = "\x1b[2J".repeat(1 << 19);
        let protocol_version = AGENT_PROTOCOL;
        agent.answer(setup, &SetupResponse { kernel_release, protocol_version, ..Default::default() });
        let call = agent.request();
        let status = ttrpc::get_status(ttrpc::Code::INTERNAL, "x\n\x1b".repeat(1 << 20));
        let response = Response { status: Some(status).into(), ..Default::default() }.write_to_bytes().unwrap();
        agent.send(MESSAGE_TYPE_RESPONSE, call, response.len() as u32, &response).unwrap();
        agent
    });
    let release = agent.setup(&SetupRequest::new(), Duration::from_secs(5)).await.unwrap();
    assert!(
        release.len() <= 3 * 256 && !release.contains('\x1b'),
        "the kernel release has {} bytes (the limit is 768), or contains an escape character",
        release.len()
    );
    let error = sync(&agent).await.unwrap_err();
    let text = crate::chain(&error);
    assert!(
        text.len() < 20_000 && !text.contains('\x1b'),
        "the error has {} bytes (the limit is 20000), or contains an escape character",
        text.len()
    );
}

#[tokio::test]
async fn huge_statistics_are_received_but_not_passed_on() {
    let (agent, _script) = HostileAgent::start(|mut agent| {
        let call = agent.request();
        let type_url = husk_proto::metrics::TYPE_URL.to_owned();
        let stats = protobuf::well_known_types::any::Any { type_url, value: vec![7; 3 << 20], ..Default::default() };
        agent.answer(call, &StatsResponse { stats: Some(stats).into(), ..Default::default() });
        agent
    });
    let answer = agent.task.stats(within(Duration::from_secs(5)), &StatsRequest::new()).await.unwrap();
    assert!(crate::service::checked_stats(answer).is_err());
}

#[test]
fn events_with_invalid_ids_are_rejected() {
    for (container, exec) in [("", ""), ("a/b", ""), ("c", "../e"), (&"c".repeat(256), ""), ("c\n", "")] {
        let mut event = Event::new();
        event.set_exit(Exit { container_id: container.into(), exec_id: exec.into(), ..Default::default() });
        assert_eq!(check(event), None, "an event for container {container:?} and exec {exec:?} was accepted");
    }
}

/// Returns a request that the buffers of a socket cannot hold.
fn large_request() -> ExecProcessRequest {
    let spec = Any { value: vec![7; 3 << 20], ..Default::default() };
    ExecProcessRequest { spec: Some(spec).into(), ..Default::default() }
}

#[tokio::test]
async fn request_that_ends_half_written_does_not_end_the_connection() {
    let (resume, paused) = std::sync::mpsc::channel::<()>();
    let (agent, script) = HostileAgent::start(move |mut agent| {
        paused.recv().unwrap();
        agent.request();
        agent.request();
        let id = agent.request();
        agent.answer(id, &SyncResponse::new());
    });
    let large = large_request();
    // One caller's deadline expires, and another caller goes away.
    let error = agent.task.exec(within(Duration::from_millis(50)), &large).await.unwrap_err();
    assert!(is_timeout(&error), "{error}");
    let dropped = agent.task.exec(within(timeouts::SLOW), &large);
    assert!(tokio::time::timeout(Duration::from_millis(50), dropped).await.is_err());
    resume.send(()).unwrap();
    sync(&agent).await.unwrap();
    tokio::task::spawn_blocking(|| script.join().unwrap()).await.unwrap();
}
