//! Port-forwarding by CRI's PortForward, as kubectl uses it: many connections at once over one of SPDY.

use std::thread;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::spdy::{Connection, Forward};
use husk_e2e::cri::{Pod, call, pods};
use husk_e2e::{RUNC, node, runtime};
use serde_json::json;

/// At once.
const MANY: u32 = 50;

/// Servers on one localhost each: 8001 and 8002 send back what comes as it comes, 8003 answers a line.
const SERVERS: &str = "
import asyncio
async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def answer(reader, writer):
    line = await reader.readline()
    await asyncio.sleep(0.1)
    writer.write(b'heard ' + line)
    writer.close()
async def serve():
    for host, port, what in ('127.0.0.1', 8001, echo), ('::1', 8002, echo), ('127.0.0.1', 8003, answer):
        await asyncio.start_server(what, host, port, backlog=128)
    print('up', flush=True)
    await asyncio.Event().wait()
asyncio.run(serve())";

#[track_caller]
fn forward(pod: &Pod) -> Forward {
    let answer = call("PortForward", &json!({ "pod_sandbox_id": pod.id, "port": [] }));
    Forward::connect(answer["url"].as_str().unwrap())
}

#[track_caller]
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// Ends a connection by halves: the server answers after that. It is not told, and has a second's time: so containerd's
/// forwarding does it (`portForward` in sandbox_portforward_linux.go), whatever the runtime.
#[track_caller]
fn half_close(connection: &Connection) {
    connection.send(b"this\n");
    connection.finish();
    assert_eq!(text(connection.read_to_end()), "heard this\n", "{}", node::log_tail(20));
    assert_eq!(connection.error(), "");
}

#[test]
fn fifty_connections_at_once_lead_to_localhost() {
    need_image(husk_e2e::PYTHON);
    pods("cri-forward-many", |pods| {
        let pod = pods.pod();
        let server = pod.start(&pod.python(SERVERS));
        server.wait_for("up");
        // Both families are tried: what listens on either localhost is reached.
        for port in [8001, 8002] {
            let forward = forward(&pod);
            let connections: Vec<Connection> = (0..MANY).map(|number| forward.open(port, number)).collect();
            let hello = |number: usize| format!("hello from {number}");
            // All are there before the first is at its end, and none has what is another's.
            for (number, connection) in connections.iter().enumerate() {
                connection.send(hello(number).as_bytes());
            }
            for (number, connection) in connections.iter().enumerate() {
                assert_eq!(text(connection.read(hello(number).len())), hello(number), "{port}");
            }
            // One to a port where nobody listens ends at once, by itself. Under Husk it is made before the guest is asked, and
            // reset then: of that Kubernetes' server tells its log, and not the client (portForward in httpstream.go).
            let refused = forward.open(8099, MANY);
            let error = refused.error();
            assert!(error.contains("8099") || runtime() != RUNC, "{error:?}");
            assert!(refused.read_to_end().is_empty());
            for (number, connection) in connections.iter().enumerate() {
                connection.send(b"again");
                assert_eq!(text(connection.read(5)), "again", "{port}: {number}");
                connection.finish();
            }
            for connection in &connections {
                assert!(connection.read_to_end().is_empty());
                assert_eq!(connection.error(), "");
            }
        }
        // Those who have said all they have to say are still answered.
        let forward = forward(&pod);
        for number in 0..2 {
            half_close(&forward.open(8003, number));
        }
        server.stop(0);
    });
}

#[test]
fn large_data_goes_both_ways() {
    need_image(husk_e2e::PYTHON);
    pods("cri-forward-large", |pods| {
        let pod = pods.pod();
        let server = pod.start(&pod.python(SERVERS));
        server.wait_for("up");
        let forward = forward(&pod);
        let data: Vec<u8> = (0..2_000_000u32).map(|number| (number >> 3) as u8 ^ number as u8).collect();
        for (number, port) in [8001, 8002].into_iter().enumerate() {
            let connection = forward.open(port, number.try_into().unwrap());
            let sending = connection.sending();
            let received = thread::scope(|scope| {
                scope.spawn(|| sending.send(&data));
                connection.read(data.len())
            });
            assert!(received == data, "{port}: other bytes came back");
            connection.finish();
            assert!(connection.read_to_end().is_empty());
            assert_eq!(connection.error(), "");
        }
        server.stop(0);
    });
}
