//! Changes of a running pod's network: addresses, routes, neighbours and interfaces are added and removed.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, PodContainer, pods};
use husk_e2e::{PYTHON, case, node};
use serde_json::json;

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `ip` in the pod's network namespace on the node.
#[track_caller]
fn ip(pod: &Pod, arguments: &str) {
    let netns = format!("--net={}", pod.netns().display());
    let mut all = vec![netns.as_str(), "ip"];
    all.extend(arguments.split(' '));
    run("nsenter", &all);
}

/// Waits until a command in the container succeeds, and `holds` accepts its output. `ip` prints an error if an interface
/// disappears between two of its system calls.
#[track_caller]
fn wait_until(container: &PodContainer, command: &str, holds: impl Fn(&str) -> bool) {
    let mut last = String::new();
    let held = node::eventually(Duration::from_secs(30), || {
        let done = container.exec(&["sh", "-c", command]);
        last = done.out.trim_end().to_owned();
        (done.code == 0 && done.err.is_empty() && holds(&last)).then_some(())
    });
    assert!(held.is_some(), "{command} still prints\n{last}\n{}", node::log_tail(20));
}

/// Prints the offloads of eth0 (linux/ethtool.h: ETHTOOL_GRXCSUM, GTXCSUM, GSG, GTSO).
const PRINT_OFFLOADS: &str = r#"
import array, fcntl, socket, struct
for name, command in (("rx", 0x14), ("tx", 0x16), ("sg", 0x18), ("tso", 0x1e)):
    value = array.array("B", struct.pack("II", command, 0))
    fcntl.ioctl(socket.socket(), 0x8946, struct.pack("16sP", b"eth0", value.buffer_info()[0]))
    print(name, struct.unpack("II", value.tobytes())[1])
"#;

#[test]
fn checksum_and_segmentation_offloads_are_enabled() {
    need_image(PYTHON);
    pods("cri-offloads", |pods| {
        let pod = pods.pod();
        let container = pod.start(&pod.python(PRINT_OFFLOADS));
        assert_eq!(container.wait().0, 0, "{}", container.log());
        for line in ["rx 1", "tx 1", "sg 1", "tso 1"] {
            assert!(container.log().contains(line), "{}", container.log());
        }
    });
}

/// Prints the MTU of an IPv4 and of an IPv6 route (linux/in.h: IP_MTU; linux/in6.h: IPV6_MTU).
const PRINT_ROUTE_MTUS: &str = r#"
import socket
def fits(family, address, level, option):
    asking = socket.socket(family, socket.SOCK_DGRAM)
    asking.connect((address, 9))
    return asking.getsockopt(level, option)
four = fits(socket.AF_INET, "10.78.0.1", socket.IPPROTO_IP, 14)
print(four, fits(socket.AF_INET6, "fd00:78::1", socket.IPPROTO_IPV6, 24))
"#;

#[test]
fn guest_follows_address_route_and_neighbour_changes() {
    need_image(PYTHON);
    pods("cri-follow", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000");
        config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN"] });
        let container = pod.start(&config);
        container.wait_for("up");
        // An address that the container adds itself stays when the network changes on the node.
        container.sh("ip addr add 10.97.0.1/32 dev lo");
        let routes = container.sh("ip route; ip -6 route");
        ip(&pod, "addr add 10.99.1.5/24 dev eth0");
        ip(&pod, "route add 10.77.0.0/16 dev eth0 metric 77");
        wait_until(&container, "ip addr show eth0", |text| text.contains("10.99.1.5/24"));
        wait_until(&container, "ip route", |text| text.contains("10.77.0.0/16") && text.contains("metric 77"));
        // Route attributes of both address families, and permanent neighbours, reach the guest.
        ip(&pod, "route add 10.78.0.0/16 dev eth0 metric 5 mtu 1300");
        ip(&pod, "-6 route add fd00:78::/64 dev eth0 metric 6 mtu 1320");
        ip(&pod, "neigh add 10.99.1.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
        wait_until(&container, "ip route; ip -6 route", |text| {
            let has = |route: &str, metric: &str| text.lines().any(|l| l.starts_with(route) && l.contains(metric));
            has("10.78.0.0/16 dev eth0", "metric 5") && has("fd00:78::/64 dev eth0", "metric 6")
        });
        let asking = pod.start(&pod.python(PRINT_ROUTE_MTUS));
        assert_eq!(asking.wait().0, 0, "{}", asking.log());
        assert!(asking.log().contains("1300 1320"), "{}", asking.log());
        wait_until(&container, "ip neigh", |text| {
            text.contains("10.99.1.9 dev eth0 lladdr 02:00:00:00:00:09") && text.contains("PERMANENT")
        });
        ip(&pod, "neigh del 10.99.1.9 dev eth0");
        ip(&pod, "-6 route del fd00:78::/64 dev eth0 metric 6");
        ip(&pod, "route del 10.78.0.0/16 dev eth0 metric 5");
        ip(&pod, "route del 10.77.0.0/16 dev eth0 metric 77");
        ip(&pod, "addr del 10.99.1.5/24 dev eth0");
        wait_until(&container, "ip addr show eth0; ip route", |text| {
            !text.contains("10.99.1.") && !text.contains("10.77.") && !text.contains("10.78.")
        });

        assert_eq!(container.sh("ip route; ip -6 route"), routes);

        // Adds a second interface, as if a further network were attached to the running pod.
        run("ip", &["link", "add", "huskveth", "type", "veth", "peer", "name", "second"]);
        let netns = pod.netns();
        run("ip", &["link", "set", "second", "netns", netns.file_name().unwrap().to_str().unwrap()]);
        run("ip", &["addr", "add", "10.98.0.1/24", "dev", "huskveth"]);
        run("ip", &["link", "set", "huskveth", "up"]);
        ip(&pod, "addr add 10.98.0.2/24 dev second");
        ip(&pod, "link set second up");
        wait_until(&container, "ip addr", |text| text.contains("10.98.0.2/24"));
        let address: SocketAddr = "10.98.0.2:8080".parse().unwrap();
        let mut text = String::new();
        TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text.trim_end(), "hello");

        run("ip", &["link", "del", "huskveth"]);
        wait_until(&container, "ip addr", |text| !text.contains("10.98.0.2"));
        assert!(container.sh("ip addr show lo").contains("10.97.0.1/32"));
    });
}

#[test]
fn guest_follows_recreated_interfaces_and_changed_macs() {
    pods("cri-again", |pods| {
        let pod = pods.pod();
        let container = pod.start(&pod.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000"));
        container.wait_for("up");
        let netns = pod.netns().file_name().unwrap().to_string_lossy().into_owned();
        let add_interface = || {
            let peer = "address 02:00:00:00:98:02 netns";
            let pair = format!("link add huskveth type veth peer name second {peer} {netns}");
            run("ip", &pair.split(' ').collect::<Vec<_>>());
            run("ip", &["addr", "add", "10.98.0.1/24", "dev", "huskveth"]);
            run("ip", &["link", "set", "huskveth", "up"]);
            ip(&pod, "addr add 10.98.0.2/24 dev second");
            ip(&pod, "link set second up");
        };
        let mac = "cat /sys/class/net/second/address 2> /dev/null || true";
        let assert_reachable = || {
            wait_until(&container, "ip addr", |text| text.contains("10.98.0.2/24"));
            let address: SocketAddr = "10.98.0.2:8080".parse().unwrap();
            // Until the guest has the new interface, the node's network stack answers. It refuses the connection,
            // because it has no listener.
            let ask = || -> std::io::Result<String> {
                let mut text = String::new();
                TcpStream::connect_timeout(&address, Duration::from_secs(5))?.read_to_string(&mut text)?;
                Ok(text)
            };
            let mut last = None;
            let answer = node::eventually(Duration::from_secs(30), || ask().map_err(|error| last = Some(error)).ok());
            let answer = answer.as_deref().map(str::trim_end);
            assert_eq!(answer, Some("hello"), "the last error of {address} is {last:?}\n{}", node::log_tail(20));
        };
        add_interface();
        assert_reachable();
        run("ip", &["link", "del", "huskveth"]);
        wait_until(&container, "ip addr", |text| !text.contains("10.98.0.2"));
        // The next interface has the same name and the same MAC address.
        add_interface();
        assert_reachable();
        // The interface is removed and recreated before the shim notices the removal.
        run("ip", &["link", "del", "huskveth"]);
        add_interface();
        wait_until(&container, mac, |text| text == "02:00:00:00:98:02");
        assert_reachable();
        // The interface gets another MAC address. The node does not learn about this change. Therefore the test
        // flushes the neighbour entries of the peer.
        ip(&pod, "link set second address 02:00:00:00:98:03");
        run("ip", &["neigh", "flush", "dev", "huskveth"]);
        wait_until(&container, mac, |text| text == "02:00:00:00:98:03");
        assert_reachable();
        run("ip", &["link", "del", "huskveth"]);
        // The removed interface leaves no device in the guest and no tap in the network namespace.
        wait_until(&container, "ls /sys/class/net", |text| text.lines().eq(["eth0", "lo"]));
        let netns = format!("--net={}", pod.netns().display());
        let links = Command::new("nsenter").args([&netns, "ip", "-o", "link"]).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&links.stdout).lines().count(),
            3,
            "expected lo, eth0 and the tap of eth0: {links:?}"
        );
        // One after the other, the test adds and removes more interfaces than there are slots.
        for _ in 0..4 {
            add_interface();
            wait_until(&container, "ip addr", |text| text.contains("10.98.0.2/24"));
            run("ip", &["link", "del", "huskveth"]);
            wait_until(&container, "ip addr", |text| !text.contains("10.98.0.2"));
        }
        add_interface();
        assert_reachable();
        run("ip", &["link", "del", "huskveth"]);
        assert!(container.sh("ip route").contains("default"), "eth0 has lost its default route");
    });
}

#[test]
fn guest_has_a_network_that_is_configured_between_create_and_start() {
    case("ctr-cni", |case| {
        let seen = case.sh("ip addr show eth0").flags(&["--cni"]).output();
        assert!(seen.out().contains("inet 10.88."), "{}", seen.describe());
        seen.expect_clean();
    });
}
