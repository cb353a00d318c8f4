//! Name resolution in a pod (host name, /etc/hosts, the cluster's name server), and UDP host ports.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::pods;
use husk_e2e::dns::Dns;
use husk_e2e::{PYTHON, node};
use serde_json::json;

/// The node's address on the CNI bridge.
const BRIDGE: &str = "10.88.0.1";

/// Resolves its arguments with the C library, and prints the addresses.
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
fn pod_resolves_search_domains_hosts_entries_and_its_own_name() {
    need_image(PYTHON);
    pods("cri-names", |pods| {
        // CNI creates the bridge when the first pod starts. Therefore this pod starts before the DNS server, which
        // listens on the bridge's address.
        let server = pods.pod();
        let serving = server.start(&server.sh("nc -ll -p 80 -e echo the service"));
        let addresses = server.addresses();
        let bridge: IpAddr = BRIDGE.parse().unwrap();
        let names = addresses.iter().map(|ip| ("web.team.svc.cluster.test".to_owned(), *ip));
        let external = ("www.example.test".to_owned(), "192.0.2.7".parse().unwrap());
        let _dns = Dns::serve(bridge, names.chain([external]).collect());
        let mut config = pods.config();
        config["hostname"] = json!("client");
        config["dns_config"] = json!({
            "servers": [BRIDGE],
            "searches": ["team.svc.cluster.test", "svc.cluster.test", "cluster.test"],
            "options": ["ndots:5", "timeout:20"],
        });
        let pod = pods.run(config);
        // As the kubelet does, the test writes one /etc/hosts for all containers of the pod.
        let address = pod.addresses()[0];
        let hosts = pods.dir().join("etc-hosts");
        fs::write(&hosts, format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n{address}\tclient\n192.0.2.1\tgiven.alias\n"))
            .unwrap();
        let mut config = pod.python(RESOLVE);
        let wanted = ["web", "web.team", "www.example.test", "client", "given.alias", "nobody"];
        config["command"].as_array_mut().unwrap().extend(wanted.map(Into::into));
        config["mounts"] = json!([{ "host_path": hosts.to_string_lossy(), "container_path": "/etc/hosts" }]);
        let resolver = pod.start(&config);
        assert_eq!(resolver.wait().0, 0, "{}", resolver.log());
        let log = resolver.log();
        let found = |name: &str| {
            let line = log.lines().find_map(|line| line.split_once(&format!(" F {name} "))).map(|(_, found)| found);
            line.unwrap_or_else(|| panic!("{name} is not in the log:\n{log}")).to_owned()
        };
        let mut expected: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        expected.sort();
        // Short and partial names resolve through the search list.
        assert_eq!((found("web"), found("web.team")), (expected.join(" "), expected.join(" ")));
        assert_eq!(found("www.example.test"), "192.0.2.7");
        assert_eq!((found("client"), found("given.alias")), (address.to_string(), "192.0.2.1".into()));
        assert_eq!(found("nobody"), "none True");
        // Another container of the pod reaches the service by name. Its busybox image has a different resolver than the
        // Python image.
        let client = pod.sleeper();
        assert_eq!(client.sh("hostname; cat /etc/hostname"), "client\nclient");
        let script = "nslookup -type=a web.team.svc.cluster.test | awk '/^Address/ {found = $2} END {print found}'";
        let address = client.sh(script);
        assert!(expected.contains(&address), "the name resolves to {address}, expected one of {expected:?}");
        assert_eq!(client.sh(&format!("nc -w 20 {address} 80 < /dev/null")), "the service");
        // Without the kubelet's /etc/hosts, localhost still resolves.
        assert_eq!(client.sh("ping -c 1 -W 20 localhost > /dev/null && echo there"), "there");
        serving.stop(0);
    });
}

/// Sends each datagram back to its sender, with a prefix.
const ECHO: &str = r#"
import socket
served = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
served.bind(("0.0.0.0", 5353))
print("up", flush=True)
while True:
    message, peer = served.recvfrom(65536)
    served.sendto(b"pod: " + message, peer)
"#;

/// Sends a datagram to the node's port, and prints the answer.
const QUERY: &str = r#"
import socket
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(20)
client.connect(("10.88.0.1", 18053))
client.send(b"two")
print("answered", client.recv(100).decode())
"#;

#[test]
fn udp_host_port_reaches_the_pod_until_it_stops() {
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
        // Another pod reaches the node's port as well.
        let other = pods.pod();
        let querier = other.start(&other.python(QUERY));
        assert_eq!(querier.wait().0, 0, "{}", querier.log());
        assert!(querier.log().contains("answered pod: two"), "{}", querier.log());
        pod.stop();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let gone = node::eventually(Duration::from_secs(20), || ask(b"three").is_err().then_some(()));
        assert!(gone.is_some(), "the host port still answers after the pod has stopped");
    });
}
