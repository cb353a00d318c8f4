//! A pod's network as CNI configured it, tested from the pod, from the node and from another pod.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::stream::Stream;
use husk_e2e::cri::{Pod, PodContainer, call, pods};
use husk_e2e::{PYTHON, node};
use serde_json::json;

/// Runs a command in the pod's network namespace on the node.
#[track_caller]
fn in_netns(pod: &Pod, command: &[&str]) -> String {
    let mut nsenter = Command::new("nsenter");
    nsenter.arg(format!("--net={}", pod.netns().display())).args(command);
    let output = nsenter.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Connects to a server and returns its greeting.
#[track_caller]
fn greeting(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20))
        .unwrap_or_else(|error| panic!("failed to connect to {address}: {error}"));
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.trim_end().to_owned()
}

/// Starts a container with four servers: a greeter and an echo server on all addresses, a web server on each loopback
/// address.
fn server(pod: &Pod, word: &str) -> PodContainer {
    let script = format!(
        "echo {word}-page > /srv/index.html
         nc -ll -p 8080 -e echo {word} & nc -ll -p 8083 -e cat &
         httpd -f -p 127.0.0.1:8081 -h /srv & httpd -f -p '[::1]:8082' -h /srv &
         until [ $(netstat -ltn | grep -c ':808[0123]') = 4 ]; do sleep 0.1; done; echo up; wait"
    );
    let container = pod.start(&pod.sh(&script));
    container.wait_for("up");
    container
}

#[test]
fn pods_reach_the_node_and_each_other() {
    pods("cri-net", |pods| {
        let (one, two) = (pods.pod(), pods.pod());
        let (a, b) = (server(&one, "one"), server(&two, "two"));
        let addresses = (one.addresses(), two.addresses());
        assert_eq!(addresses.0.len(), 2, "expected an IPv4 and an IPv6 address: {:?}", addresses.0);
        // The guest has the addresses, MTU and MAC of the network namespace that CNI configured.
        for (what, command) in [
            (
                "addresses",
                "ip -o addr show dev eth0 scope global | sed 's/^[0-9]*: //; s/ brd [0-9.]*//' | awk '{print $3}' | sort",
            ),
            ("MTU and MAC", "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address"),
        ] {
            let outside = if what == "addresses" {
                in_netns(&one, &["sh", "-c", command])
            } else {
                let link = in_netns(&one, &["ip", "-o", "link", "show", "dev", "eth0"]);
                let after =
                    |word: &str| link.split(&format!("{word} ")).nth(1).unwrap().split(' ').next().unwrap().to_owned();
                format!("{}\n{}", after("mtu"), after("link/ether"))
            };
            assert_eq!(
                a.sh(command),
                outside.trim_end(),
                "the {what} of the guest differ from those of the network namespace"
            );
        }
        assert_eq!(a.sh("ip route | sed 's/ *$//' | grep -c default"), "1");
        // The node reaches the pod, with both address families.
        for ip in &addresses.0 {
            assert_eq!(greeting((*ip, 8080).into()), "one", "wrong greeting from {ip}");
        }
        // One pod reaches the other pod.
        let list = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let dial = |ips: &str| format!("for ip in {ips}; do nc -w 20 $ip 8080 < /dev/null; done");
        assert_eq!(b.sh(&dial(&list(&addresses.0))), "one\none");
        // The pod reaches the node at the bridge's addresses.
        for listen in ["10.88.0.1:0", "[fd00:88::1]:0"] {
            let listener = TcpListener::bind(listen).unwrap();
            let address = listener.local_addr().unwrap();
            let expected = addresses.0.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).copied().unwrap();
            let accept = thread::spawn(move || {
                let (mut stream, peer) = listener.accept().unwrap();
                stream.write_all(b"the node\n").unwrap();
                peer.ip()
            });
            let answer = a.sh(&format!("nc -w 20 {} {} < /dev/null", address.ip(), address.port()));
            assert_eq!(answer, "the node", "wrong answer from the node's server at {address}");
            assert_eq!(accept.join().unwrap(), expected, "the node sees a wrong client address");
        }
        // A pod reaches itself at its addresses and at the loopback addresses.
        assert_eq!(a.sh(&dial(&format!("{} 127.0.0.1 ::1", list(&addresses.0)))), "one\none\none\none");
        // The client sends and receives more data than any buffer on the way holds.
        let script = "head -c 8000000 /dev/zero | nc -w 20 HOST 8083 | wc -c";
        for ip in &addresses.1 {
            assert_eq!(a.sh(&script.replace("HOST", &ip.to_string())), "8000000", "{ip} did not echo all bytes");
        }
    });
}

/// Connects from the pod's network namespace on the node, as containerd's port forwarding does.
fn dial(pod: &Pod, address: SocketAddr) -> std::io::Result<TcpStream> {
    let netns = fs::File::open(pod.netns()).unwrap();
    let dialled = thread::spawn(move || {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        TcpStream::connect_timeout(&address, Duration::from_secs(20))
    });
    dialled.join().unwrap()
}

/// An echo server that sends a connection's data back after the client has half-closed the connection.
const ECHO: &str = "import _thread, socket
def echo(peer):
    peer.sendall(b''.join(iter(lambda: peer.recv(65536), b'')))
    peer.close()
listener = socket.create_server(('::1', 8084), family=socket.AF_INET6, backlog=128)
print('up', flush=True)
while True:
    _thread.start_new_thread(echo, listener.accept()[:1])";

#[test]
fn port_forward_reaches_loopback_servers_and_resets_connections_to_closed_ports() {
    pods("cri-forward", |pods| {
        let pod = pods.pod();
        let container = server(&pod, "here");
        // Many connections at the same time need the Python server, because busybox's server has a backlog of one.
        need_image(PYTHON);
        let echo = pod.start(&pod.python(ECHO));
        echo.wait_for("up");
        let localhost = |ip: &str, port: u16| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port);
        // The test first connects as kubectl does, through containerd's streaming server, to servers on both loopback
        // addresses.
        for port in [8081, 8082] {
            let answer = call("PortForward", &json!({ "pod_sandbox_id": pod.id, "port": [port] }));
            let mut stream = Stream::connect(&format!("{}?port={port}", answer["url"].as_str().unwrap()));
            stream.send(0, b"GET / HTTP/1.0\r\n\r\n");
            stream.wait_for(0, "here-page");
        }
        // Then the test connects directly, with both address families. Many connections are half-closed at once.
        let mut connections: Vec<_> = (0..50).map(|_| dial(&pod, localhost("::1", 8084)).unwrap()).collect();
        for (number, connection) in connections.iter_mut().enumerate() {
            connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            connection.write_all(format!("connection {number}").as_bytes()).unwrap();
            connection.shutdown(Shutdown::Write).unwrap();
        }
        for (number, mut connection) in connections.into_iter().enumerate() {
            let mut text = String::new();
            connection.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("connection {number}"));
        }
        let mut text = String::new();
        dial(&pod, localhost("127.0.0.1", 8080)).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text.trim_end(), "here");
        // Without a listener, the connection is refused, or reset at once.
        let gone = dial(&pod, localhost("127.0.0.1", 8099)).and_then(|mut stream| stream.read(&mut [0]));
        let kind = gone.map_err(|error| error.kind());
        assert!(
            matches!(kind, Err(std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::ConnectionReset)),
            "a connection to a closed port must be refused or reset: {kind:?}"
        );
        echo.stop(0);
        container.stop(0);
    });
}

#[test]
fn tcp_host_port_reaches_the_pod_until_it_stops() {
    pods("cri-hostport", |pods| {
        let mut config = pods.config();
        config["port_mappings"] = json!([{ "protocol": "TCP", "container_port": 8080, "host_port": 18080 }]);
        let pod = pods.run(config);
        server(&pod, "mapped");
        // The test connects to the bridge's address, because a connection to localhost would need the node's sysctl
        // `route_localnet`.
        assert_eq!(greeting("10.88.0.1:18080".parse().unwrap()), "mapped");
        pod.stop();
        let gone = node::eventually(Duration::from_secs(10), || {
            TcpStream::connect_timeout(&"10.88.0.1:18080".parse().unwrap(), Duration::from_secs(2)).err()
        });
        assert!(gone.is_some(), "the host port still accepts connections after the pod has stopped");
    });
}
