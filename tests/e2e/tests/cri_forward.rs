//! Port forwarding through CRI's PortForward, as kubectl uses it: one SPDY connection carries many TCP connections.

use std::thread;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::spdy::{Connection, PortForward};
use husk_e2e::cri::{Pod, call, pods};
use husk_e2e::{RUNC, node, runtime};
use serde_json::json;

/// Number of simultaneous connections.
const CONNECTIONS: u32 = 50;

/// Servers that each listen on one loopback address. The servers on the ports 8001 and 8002 echo. The server on
/// port 8003 reads a line and answers it.
const SERVERS: &str = "
import _thread, socket, time
def echo(peer):
    while data := peer.recv(65536):
        peer.sendall(data)
    peer.close()
def answer(peer):
    line = peer.makefile('rb').readline()
    time.sleep(0.1)
    peer.sendall(b'heard ' + line)
    peer.close()
def serve(listener, handler):
    while True:
        _thread.start_new_thread(handler, listener.accept()[:1])
for host, port, handler in ('127.0.0.1', 8001, echo), ('::1', 8002, echo), ('127.0.0.1', 8003, answer):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    _thread.start_new_thread(serve, (listener, handler))
print('up', flush=True)
time.sleep(100000)";

#[track_caller]
fn forward(pod: &Pod) -> PortForward {
    let answer = call("PortForward", &json!({ "pod_sandbox_id": pod.id, "port": [] }));
    PortForward::connect(answer["url"].as_str().unwrap())
}

#[track_caller]
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// Half-closes a connection before the server answers. With any runtime, containerd does not pass the half-close on.
/// containerd closes the whole connection a second later (`portForward` in sandbox_portforward_linux.go). Therefore the
/// server has to answer within this second.
#[track_caller]
fn half_close(connection: &Connection) {
    connection.send(b"this\n");
    connection.finish();
    assert_eq!(text(connection.read_to_end()), "heard this\n", "{}", node::log_tail(20));
    assert_eq!(connection.error(), "");
}

#[test]
fn port_forward_carries_fifty_connections_and_large_data_to_loopback_servers() {
    need_image(husk_e2e::PYTHON);
    pods("cri-forward-many", |pods| {
        let pod = pods.pod();
        let server = pod.start(&pod.python(SERVERS));
        server.wait_for("up");
        carries_fifty_connections(&pod);
        carries_two_megabytes_in_both_directions(&pod);
        server.stop(0);
    });
}

#[track_caller]
fn carries_fifty_connections(pod: &Pod) {
    // Port forwarding tries both address families. Therefore it reaches servers on 127.0.0.1 and on ::1.
    for port in [8001, 8002] {
        let forward = forward(pod);
        let connections: Vec<Connection> = (0..CONNECTIONS).map(|number| forward.open(port, number)).collect();
        let hello = |number: usize| format!("hello from {number}");
        // All connections are open at the same time, and no connection receives data of another connection.
        for (number, connection) in connections.iter().enumerate() {
            connection.send(hello(number).as_bytes());
        }
        for (number, connection) in connections.iter().enumerate() {
            assert_eq!(
                text(connection.read(hello(number).len())),
                hello(number),
                "the echo of port {port} differs from the data sent"
            );
        }
        // A connection to a port without a listener ends at once, and the other connections stay open. Husk accepts the
        // connection before it connects to the guest, and then resets the connection. Kubernetes' streaming server logs
        // the reset, but does not report it to the client (portForward in httpstream.go).
        let refused = forward.open(8099, CONNECTIONS);
        let error = refused.error();
        assert!(error.contains("8099") || runtime() != RUNC, "{error:?}");
        assert!(refused.read_to_end().is_empty());
        for (number, connection) in connections.iter().enumerate() {
            connection.send(b"again");
            assert_eq!(text(connection.read(5)), "again", "connection {number} to port {port} must echo the data sent");
            connection.finish();
        }
        for connection in &connections {
            assert!(connection.read_to_end().is_empty());
            assert_eq!(connection.error(), "");
        }
    }
    // A half-closed connection still gets the server's answer.
    let forward = forward(pod);
    for number in 0..2 {
        half_close(&forward.open(8003, number));
    }
}

#[track_caller]
fn carries_two_megabytes_in_both_directions(pod: &Pod) {
    let forward = forward(pod);
    let data: Vec<u8> = (0..2_000_000u32).map(|number| (number >> 3) as u8 ^ number as u8).collect();
    for (number, port) in [8001, 8002].into_iter().enumerate() {
        let connection = forward.open(port, number.try_into().unwrap());
        let sender = connection.send_half();
        let received = thread::scope(|scope| {
            scope.spawn(|| sender.send(&data));
            connection.read(data.len())
        });
        assert!(received == data, "the echo of port {port} differs from the data sent");
        connection.finish();
        assert!(connection.read_to_end().is_empty());
        assert_eq!(connection.error(), "");
    }
}
