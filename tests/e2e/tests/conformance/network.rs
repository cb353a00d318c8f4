//! A pod's network.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::{Pod, PodContainer};
use serde_json::json;

#[track_caller]
fn greeting(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.trim_end().to_owned()
}

fn server(pod: &Pod) -> PodContainer {
    let script = "nc -ll -p 8080 -e echo hello & until netstat -ltn | grep -q :8080; do sleep 0.1; done; echo up; wait";
    let server = pod.start(&pod.sh(script));
    server.wait_for("up");
    server
}

#[test]
fn network() {
    pods("conf-network", |pods| {
        let mut config = pods.config();
        config["port_mappings"] = json!([{ "protocol": "TCP", "container_port": 8080, "host_port": 18081 }]);
        let (one, two) = (pods.run(config), pods.pod());
        server(&one);
        let client = two.sleeper();
        group("Networking", |group| {
            group.has("the node reaches the pod", || {
                for ip in one.addresses() {
                    assert_eq!(greeting((ip, 8080).into()), "hello", "{ip}");
                }
            });
            group.has("a pod reaches the other", || {
                for ip in one.addresses() {
                    assert_eq!(client.sh(&format!("nc -w 20 {ip} 8080 < /dev/null")), "hello", "{ip}");
                }
            });
            group.has("a port of the node leads to the pod", || {
                assert_eq!(greeting("10.88.0.1:18081".parse().unwrap()), "hello");
            });
            group.has("pods have addresses of their own", || assert_ne!(one.addresses(), two.addresses()));
        });
    });
}
