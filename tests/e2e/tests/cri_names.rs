//! A pod's names: its own, those of /etc/hosts, those of the cluster's name server; and the node's ports that lead to it
//! by UDP.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::pods;
use husk_e2e::dns::Dns;
use husk_e2e::{PYTHON, node};
use serde_json::json;

/// The node's address on CNI's bridge.
const BRIDGE: &str = "10.88.0.1";

/// Resolves the names given, by the C library, and says what came.
const RESOLVE: &str = r#"
import socket, sys
for name in sys.argv[1:]:
    try:
        found = sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)})
    except socket.gaierror as error:
        found = ["none", str(error.errno == socket.EAI_NONAME)]
    print(name, *found, flush=True)
"#;

#[test]
fn names_are_resolved_in_a_pod() {
    need_image(PYTHON);
    pods("cri-names", |pods| {
        // The bridge comes with the first pod.
        let server = pods.pod();
        let serving = server.start(&server.sh("nc -ll -p 80 -e echo the service"));
        let addresses = server.addresses();
        let bridge: IpAddr = BRIDGE.parse().unwrap();
        let names = addresses.iter().map(|ip| ("web.team.svc.cluster.test".to_owned(), *ip));
        let outside = ("www.example.test".to_owned(), "192.0.2.7".parse().unwrap());
        let _dns = Dns::serve(bridge, names.chain([outside]).collect());
        let mut config = pods.config();
        config["hostname"] = json!("client");
        config["dns_config"] = json!({
            "servers": [BRIDGE],
            "searches": ["team.svc.cluster.test", "svc.cluster.test", "cluster.test"],
            "options": ["ndots:5", "timeout:20"],
        });
        let pod = pods.run(config);
        // As the kubelet writes it, for all containers of the pod.
        let own = pod.addresses()[0];
        let hosts = pods.dir().join("etc-hosts");
        fs::write(&hosts, format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n{own}\tclient\n192.0.2.1\tgiven.alias\n"))
            .unwrap();
        let mut config = pod.python(RESOLVE);
        let wanted = ["web", "web.team", "www.example.test", "client", "given.alias", "nobody"];
        config["command"].as_array_mut().unwrap().extend(wanted.map(Into::into));
        config["mounts"] = json!([{ "host_path": hosts.to_string_lossy(), "container_path": "/etc/hosts" }]);
        let asking = pod.start(&config);
        assert_eq!(asking.wait().0, 0, "{}", asking.log());
        let log = asking.log();
        let found = |name: &str| {
            let line = log.lines().find_map(|line| line.split_once(&format!(" F {name} "))).map(|(_, found)| found);
            line.unwrap_or_else(|| panic!("{name} is not in the log:\n{log}")).to_owned()
        };
        let mut expected: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        expected.sort();
        // By the search list, in part and in whole.
        assert_eq!((found("web"), found("web.team")), (expected.join(" "), expected.join(" ")));
        assert_eq!(found("www.example.test"), "192.0.2.7");
        assert_eq!((found("client"), found("given.alias")), (own.to_string(), "192.0.2.1".into()));
        assert_eq!(found("nobody"), "none True");
        // And what a name stands for is reached, in another container of the pod by another resolver.
        let client = pod.sleeper();
        assert_eq!(client.sh("hostname; cat /etc/hostname"), "client\nclient");
        let script = "nslookup -type=a web.team.svc.cluster.test | awk '/^Address/ {found = $2} END {print found}'";
        let address = client.sh(script);
        assert!(expected.contains(&address), "{address}");
        assert_eq!(client.sh(&format!("nc -w 20 {address} 80 < /dev/null")), "the service");
        // Without a file of the kubelet's: localhost is known all the same.
        assert_eq!(client.sh("ping -c 1 -W 20 localhost > /dev/null && echo there"), "there");
        serving.stop(0);
    });
}

/// Sends every message back to where it came from, with what it is called.
const ECHO: &str = r#"
import socket
served = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
served.bind(("0.0.0.0", 5353))
print("up", flush=True)
while True:
    message, peer = served.recvfrom(65536)
    served.sendto(b"pod: " + message, peer)
"#;

/// Asks at the node's port.
const ASK: &str = r#"
import socket
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(20)
asking.connect(("10.88.0.1", 18053))
asking.send(b"two")
print("answered", asking.recv(100).decode())
"#;

#[test]
fn a_port_of_the_node_leads_to_the_pod_by_udp() {
    need_image(PYTHON);
    pods("cri-hostport-udp", |pods| {
        let mut config = pods.config();
        config["port_mappings"] = json!([
            { "protocol": "UDP", "container_port": 5353, "host_port": 18053 },
            { "protocol": "TCP", "container_port": 8080, "host_port": 18053 },
        ]);
        let pod = pods.run(config);
        let serving = pod.start(&pod.python(ECHO));
        serving.wait_for("up");
        let socket = UdpSocket::bind((BRIDGE, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.connect((BRIDGE, 18053)).unwrap();
        let mut answer = [0; 2048];
        let mut ask = |text: &[u8]| {
            socket.send(text)?;
            socket.recv(&mut answer).map(|length| answer[..length].to_vec())
        };
        assert_eq!(ask(b"one").unwrap(), b"pod: one");
        let long = vec![b'x'; 1400];
        assert_eq!(ask(&long).unwrap(), [b"pod: ".as_slice(), &long].concat());
        // From another pod as well, to the node's port.
        let other = pods.pod();
        let asking = other.start(&other.python(ASK));
        assert_eq!(asking.wait().0, 0, "{}", asking.log());
        assert!(asking.log().contains("answered pod: two"), "{}", asking.log());
        pod.stop();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let gone = node::eventually(Duration::from_secs(20), || ask(b"three").is_err().then_some(()));
        assert!(gone.is_some(), "the port still leads somewhere");
    });
}
