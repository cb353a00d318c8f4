//! Network of a pod: addresses, port mappings and DNS.

use std::io::Read;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use husk_e2e::PYTHON;
use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, PodContainer};
use husk_e2e::dns::Dns;
use serde_json::json;

/// Connects to `address` and returns the text that the server sends.
#[track_caller]
fn read_from(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.trim_end().to_owned()
}

/// Starts a container that serves `hello` on TCP port 8080.
fn start_server(pod: &Pod) -> PodContainer {
    let script = "nc -ll -p 8080 -e echo hello & until netstat -ltn | grep -q :8080; do sleep 0.1; done; echo up; wait";
    let server = pod.start(&pod.sh(script));
    server.wait_for("up");
    server
}

#[test]
fn network() {
    pods("conf-network", |pods| {
        let mut config = pods.config();
        config["port_mappings"] = json!([
            { "protocol": "TCP", "container_port": 8080, "host_port": 18081 },
            { "protocol": "UDP", "container_port": 8080, "host_port": 18081 },
        ]);
        let mut with_dns = pods.config();
        with_dns["dns_config"] =
            json!({ "servers": ["10.88.0.1"], "searches": ["svc.test"], "options": ["timeout:20"] });
        let (one, two) = (pods.run(config), pods.run(with_dns));
        start_server(&one);
        let client = two.sleeper();
        group("Networking", |group| {
            group.check("the node reaches the pod", || {
                for ip in one.addresses() {
                    assert_eq!(read_from((ip, 8080).into()), "hello", "wrong answer from the server at {ip}");
                }
            });
            group.check("a pod reaches another pod", || {
                for ip in one.addresses() {
                    assert_eq!(
                        client.sh(&format!("nc -w 20 {ip} 8080 < /dev/null")),
                        "hello",
                        "wrong answer from the server at {ip}"
                    );
                }
            });
            group.check("a TCP host port leads to the pod", || {
                assert_eq!(read_from("10.88.0.1:18081".parse().unwrap()), "hello");
            });
            group.check("a UDP host port leads to the pod", || {
                need_image(PYTHON);
                let udp = one.start(&one.python(
                    "import socket\nserved = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                     served.bind(('0.0.0.0', 8080))\nprint('up', flush=True)\n\
                     while True: served.sendto(b'by UDP', served.recvfrom(99)[1])",
                ));
                udp.wait_for("up");
                let socket = UdpSocket::bind("10.88.0.1:0").unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                socket.connect("10.88.0.1:18081").unwrap();
                socket.send(b"asking").unwrap();
                let mut answer = [0; 64];
                let length = socket.recv(&mut answer).unwrap();
                assert_eq!(&answer[..length], b"by UDP");
                udp.remove();
            });
            group.check("names are resolved by the pod's DNS server", || {
                let names = one.addresses().into_iter().map(|ip| ("web.svc.test".to_owned(), ip)).collect();
                let _dns = Dns::serve("10.88.0.1".parse().unwrap(), names);
                assert_eq!(client.sh("nc -w 20 $(nslookup -type=a web.svc.test | awk '/^Addr/ {a = $2} END {print a}') 8080 < /dev/null"), "hello");
                need_image(PYTHON);
                let config = two.python("import socket; print(socket.create_connection(('web', 8080)).recv(99).decode())");
                let python = two.start(&config);
                assert_eq!(python.wait().0, 0, "{}", python.log());
                assert!(python.log().contains("hello"));
                python.remove();
            });
            group.check("each pod has its own addresses", || assert_ne!(one.addresses(), two.addresses()));
        });
    });
}
