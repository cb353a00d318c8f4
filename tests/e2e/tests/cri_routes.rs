//! Routing by more than one table: what a plugin or somebody else made in the pod's namespace is what the guest has, as the
//! node's own `ip` shows it on both sides.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::cni::network;
use husk_e2e::cri::{Pod, PodContainer, Pods, pods};
use husk_e2e::node;
use serde_json::{Value, json};

/// What `ip` is asked for to see all that there is but what every namespace has for itself.
const VIEWS: [&str; 9] = [
    "rule",
    "-6 rule",
    "route show table main",
    "route show table 7",
    "route show table 100",
    "route show table 1000",
    "-6 route show table 100",
    "-6 route show table 101",
    "-6 route show table 1000",
];

/// Both families, by a veth whose other end has the gateways' addresses.
fn veth(subnets: [&str; 2]) -> Value {
    let ranges = subnets.map(|subnet| json!([{ "subnet": subnet }]));
    let ipam = json!({ "type": "host-local", "ranges": ranges, "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] });
    json!({ "type": "ptp", "ipMasq": false, "ipam": ipam })
}

/// `ip` in the pod's network namespace on the node.
#[track_caller]
fn on_node(pod: &Pod, arguments: &str) -> String {
    let netns = format!("--net={}", pod.netns().display());
    let output = Command::new("nsenter").args([netns.as_str(), "ip"]).args(arguments.split(' ')).output().unwrap();
    // A table that nobody has put anything into.
    let none = String::from_utf8_lossy(&output.stderr).contains("FIB table does not exist");
    assert!(output.status.success() || none, "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A container that has the node's programs, and listens.
fn beside(pod: &Pod) -> PodContainer {
    let mut config = pod.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000");
    config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN"] });
    config["mounts"] = json!([{ "host_path": "/usr", "container_path": "/node", "readonly": true }]);
    let container = pod.start(&config);
    container.wait_for("up");
    container
}

/// The node's `ip` in the guest.
fn in_guest(container: &PodContainer, arguments: &str) -> String {
    let libraries = "/node/lib/x86_64-linux-gnu";
    let ip = format!("{libraries}/ld-linux-x86-64.so.2 --library-path {libraries} /node/bin/ip {arguments}");
    container.sh(&format!("{ip} 2>&1 || true"))
}

/// Without who made a route, and without the order of tables' listing.
fn plain(text: &str) -> Vec<String> {
    let text = text.replace("Error: ipv4: FIB table does not exist.\nDump terminated", "");
    let text = text.replace("Error: ipv6: FIB table does not exist.\nDump terminated", "");
    let lines = text.lines().map(|line| {
        let mut words: Vec<_> = line.split_whitespace().collect();
        if let Some(at) = words.iter().position(|word| *word == "proto") {
            words.drain(at..at + 2);
        }
        words.join(" ")
    });
    lines.filter(|line| !line.is_empty()).collect()
}

/// Waits until the guest has what the namespace has.
#[track_caller]
fn same(pod: &Pod, container: &PodContainer) {
    for view in VIEWS {
        // In numbers: the names of protocols are the image's.
        let view = &format!("-N {view}");
        let wanted = plain(&on_node(pod, view));
        let mut last = Vec::new();
        let held = node::eventually(Duration::from_secs(30), || {
            last = plain(&in_guest(container, view));
            (last == wanted).then_some(())
        });
        assert!(held.is_some(), "{view}: {last:#?}\nand not {wanted:#?}\n{}", node::log_tail(20));
    }
}

#[track_caller]
fn answers(address: IpAddr) {
    let mut text = String::new();
    let stream = TcpStream::connect_timeout(&SocketAddr::from((address, 8080)), Duration::from_secs(20));
    stream.unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text.trim_end(), "hello");
}

#[test]
fn routing_by_source_is_carried_over() {
    let plugins = json!([veth(["10.93.0.0/24", "fd00:93::/64"]), { "type": "sbr" }]);
    network("cri-sbr", plugins, |pods| {
        let pod = pods.pod();
        let container = beside(&pod);
        let rules = in_guest(&container, "rule");
        assert!(rules.contains("from 10.93.0.") && rules.contains("lookup 100"), "{rules}");
        same(&pod, &container);
        for address in pod.addresses() {
            answers(address);
        }
        // By its own address alone there is a way out.
        assert!(in_guest(&container, "route get 10.93.0.1 from 10.93.0.2").contains("table 100"));
    });
}

/// A plugin that runs its script in the pod's namespace, and hands on what it was given: CNI's keys are in alphabetical
/// order.
const PLUGIN: &str = r#"#!/bin/sh
config=$(cat)
[ "$CNI_COMMAND" = ADD ] || exit 0
nsenter --net="$CNI_NETNS" sh -e "$0.script" >&2 || exit 1
printf '%s' "$config" | sed 's/^.*"prevResult":\(.*\),"type":"[^"]*"}$/\1/'
"#;

/// Runs `body` while pods get a network in whose namespace the script has run.
#[track_caller]
fn network_by_script(name: &str, script: &str, body: impl FnOnce(&Pods)) {
    let plugin = "/usr/lib/cni/husk-test";
    fs::write(plugin, PLUGIN).unwrap();
    fs::set_permissions(plugin, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(format!("{plugin}.script"), script).unwrap();
    network(name, json!([veth(["10.94.0.0/24", "fd00:94::/64"]), { "type": "husk-test" }]), body);
    fs::remove_file(plugin).unwrap();
    fs::remove_file(format!("{plugin}.script")).unwrap();
}

/// All that there is of routes and rules, with addresses for their gateways.
const SCRIPT: &str = "
ip addr add 10.94.1.2/24 dev eth0
ip -6 addr add fd00:941::2/64 dev eth0 nodad
ip route add 10.70.0.0/16 nexthop via 10.94.1.1 dev eth0 weight 2 nexthop via 10.94.1.3 dev eth0 weight 5
ip route add 10.71.0.0/16 mtu 1300 advmss 1200 nexthop via 10.200.0.1 dev eth0 onlink nexthop via 10.94.1.3 dev eth0
ip route add blackhole 10.72.0.0/16
ip route add prohibit 10.73.0.0/16 metric 5
ip route add 10.74.0.0/16 tos 0x10 dev eth0
ip route add 10.75.0.0/16 via inet6 fd00:941::1 dev eth0
ip route append 10.76.0.0/16 dev eth0 metric 3
ip route append 10.76.0.0/16 via 10.94.1.1 dev eth0 metric 3
ip route add default via 10.94.1.1 dev eth0 table 1000
ip route add 10.94.1.0/24 dev eth0 table 1000
ip route add throw 10.80.0.0/16 table 1000
ip route add unreachable 10.81.0.0/16 table 1000
ip route add local 10.82.0.0/16 dev lo table 1000
ip route add default via inet6 fe80::1 dev eth0 onlink table 7
ip -6 route add default via fd00:941::1 dev eth0 table 1000
ip -6 route add fd00:70::/64 table 1000 nexthop via fd00:941::1 dev eth0 weight 3 nexthop via fd00:941::3 dev eth0
ip -6 route add blackhole fd00:72::/64 table 1000
ip -6 route add unreachable fd00:73::/64 metric 9 table 1000
ip -6 route add fe80::/64 dev eth0 table 1000
ip rule add from 10.94.1.2 lookup 1000 pref 200
ip rule add pref 300 to 10.70.0.0/16 iif eth0 fwmark 0x1/0xff tos 0x10 lookup 7
ip rule add pref 300 lookup 1000
ip rule add pref 301 not oif eth0 ipproto tcp dport 80-90 sport 1024 blackhole
ip rule add pref 302 from 10.1.0.0/16 goto 310
ip rule add pref 303 iif notyet nop
ip rule add pref 310 lookup main suppress_prefixlength 0
ip rule add pref 311 from 10.2.0.0/16 prohibit
ip rule add pref 312 from 10.3.0.0/16 unreachable
ip -6 rule add from fd00:941::2 lookup 1000 pref 200
ip -6 rule add pref 201 to fd00:72::/64 fwmark 5 lookup 1000
ip -6 rule add pref 202 from fd00:9::/64 blackhole
";

#[test]
fn routes_and_rules_of_all_kinds_are_carried_over_and_followed() {
    network_by_script("cri-routes", SCRIPT, |pods| {
        let pod = pods.pod();
        let container = beside(&pod);
        same(&pod, &container);
        let main6 = in_guest(&container, "-6 route");
        assert!(main6.contains("default via fd00:94::1"), "{main6}");
        let (rules, routes) = (in_guest(&container, "rule"), in_guest(&container, "route"));
        assert!(rules.contains("303:\tfrom all iif notyet [detached] nop"), "{rules}");
        assert!(routes.contains("blackhole 10.72.0.0/16") && routes.contains("weight 5"), "{routes}");

        // What the container adds by itself is its own.
        in_guest(&container, "rule add pref 250 from 10.250.0.0/16 lookup 250");
        let own = "from 10.250.0.0/16 lookup 250";
        for change in [
            // Gone, other ones, and others in their places, of each kind.
            "route del 10.70.0.0/16",
            "route replace 10.71.0.0/16 nexthop via 10.94.1.1 dev eth0 nexthop via 10.94.1.3 dev eth0 weight 7",
            "route replace blackhole 10.74.0.0/16 tos 0x10",
            "route replace 10.72.0.0/16 dev eth0",
            "route del 10.76.0.0/16 dev eth0 metric 3",
            "route del throw 10.80.0.0/16 table 1000",
            "route flush table 7",
            "route add 10.83.0.0/16 via 10.94.1.1 dev eth0 table 100",
            "rule del pref 200",
            "rule del pref 301",
            "rule add pref 300 from 10.9.0.0/16 lookup 100",
            "-6 route replace fd00:70::/64 via fd00:941::3 dev eth0 table 1000",
            "-6 route del blackhole fd00:72::/64 table 1000",
            "-6 route add prohibit fd00:74::/64 table 100",
            "-6 rule del pref 201",
            "-6 rule add pref 203 from fd00:10::/64 lookup 100",
        ] {
            on_node(&pod, change);
        }
        in_guest(&container, "rule del pref 250");
        same(&pod, &container);
        in_guest(&container, "rule add pref 250 from 10.250.0.0/16 lookup 250");
        // A rule of the same priority that asks for less than others, between them and after them.
        on_node(&pod, "rule add pref 400 from 10.5.0.0/16 lookup 100");
        on_node(&pod, "rule add pref 400 lookup 1000");
        on_node(&pod, "rule add pref 400 from 10.6.0.0/16 lookup 1000");
        let lines = ["from 10.5.0.0/16 lookup 100", "from all lookup 1000", "from 10.6.0.0/16 lookup 1000"];
        let order = |text: &str| text.lines().filter_map(|l| l.strip_prefix("400:\t")).map(str::to_owned).collect();
        wait_until(&container, "rule", |text| {
            let now: Vec<String> = order(text);
            now == lines
        });
        for rule in ["pref 400 from 10.5.0.0/16", "pref 400 from 10.6.0.0/16"] {
            on_node(&pod, &format!("rule del {rule}"));
        }
        wait_until(&container, "rule", |text| {
            let now: Vec<String> = order(text);
            now == lines[1..2]
        });
        assert!(in_guest(&container, "rule").contains(own));

        // All of it goes.
        for family in ["", "-6 "] {
            for table in ["7", "100", "1000"] {
                on_node(&pod, &format!("{family}route flush table {table}"));
            }
            for line in on_node(&pod, &format!("{family}rule")).lines() {
                let (priority, _) = line.split_once(':').unwrap();
                if !["0", "250", "32766", "32767"].contains(&priority) {
                    on_node(&pod, &format!("{family}rule del pref {priority}"));
                }
            }
        }
        wait_until(&container, "rule", |text| text.lines().count() == 4 && text.contains(own));
        in_guest(&container, "rule del pref 250");
        same(&pod, &container);
    });
}

/// Two more interfaces, whose other ends are the node's: each with sizes, addresses and routes of its own.
const INTERFACES: &str = "
for number in 1 2; do
    ip link add net$number address 02:00:00:00:97:0$number type veth peer name huskfar$number netns 1
    ip link set net$number mtu $((1300 + 7650 * (number - 1))) up
    ip addr add 10.97.$number.2/24 dev net$number
    ip -6 addr add fd00:97:$number::2/64 dev net$number nodad
    ip route add default via 10.97.$number.1 dev net$number metric $((number * 100)) mtu 1280
    ip route add 10.98.0.0/16 via 10.97.$number.1 dev net$number metric $((30 - number))
    ip -6 route add default via fd00:97:$number::1 dev net$number metric $((2000 + number)) mtu 1290
done
ip neigh add 10.97.1.9 lladdr 02:00:00:00:97:99 dev net1 nud permanent
ip link set eth0 mtu 1400
";

#[test]
fn several_interfaces_are_there_at_the_start() {
    network_by_script("cri-several", INTERFACES, |pods| {
        let pod = pods.pod();
        for number in 1..=2 {
            for arguments in [
                format!("link set huskfar{number} mtu {} up", 1300 + 7650 * (number - 1)),
                format!("addr add 10.97.{number}.1/24 dev huskfar{number}"),
                format!("addr add fd00:97:{number}::1/64 dev huskfar{number} nodad"),
            ] {
                assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "{arguments}");
            }
        }
        // The first thing a container sees: nothing has to come yet.
        let first = pod.start(&pod.sh("cd /sys/class/net; grep . eth0/mtu net1/mtu net2/mtu net*/address; ip -o addr"));
        assert_eq!(first.wait().0, 0, "{}", first.log());
        for wanted in [
            "eth0/mtu:1400",
            "net1/mtu:1300",
            "net2/mtu:8950",
            "net1/address:02:00:00:00:97:01",
            "net2/address:02:00:00:00:97:02",
            "10.97.1.2/24",
            "10.97.2.2/24",
            "fd00:97:1::2/64",
            "fd00:97:2::2/64",
        ] {
            assert!(first.log().contains(wanted), "{wanted}: {}", first.log());
        }
        let container = beside(&pod);
        same(&pod, &container);
        let neighbours = in_guest(&container, "neigh");
        assert!(neighbours.contains("10.97.1.9 dev net1 lladdr 02:00:00:00:97:99 PERMANENT"), "{neighbours}");
        // The lower metric's, and the other one's by its address.
        assert!(in_guest(&container, "route get 10.98.1.1").contains("via 10.97.2.1 dev net2"));
        pod.addresses().into_iter().for_each(answers);
        for address in ["10.97.1.2", "10.97.2.2", "fd00:97:1::2", "fd00:97:2::2"] {
            answers(address.parse().unwrap());
        }
        // A datagram as large as the link, whole.
        assert_eq!(container.sh("ping -c 1 -w 20 -s 8922 10.97.2.1 | grep -c '8930 bytes'"), "1");
    });
}

#[test]
fn a_route_stays_when_the_way_to_its_gateway_is_gone() {
    let script = "
ip route add 10.85.0.1 dev eth0
ip route add 10.84.0.0/16 via 10.85.0.1 dev eth0
ip route del 10.85.0.1
ip -6 route add fd00:85::1 dev eth0
ip -6 route add fd00:84::/64 via fd00:85::1 dev eth0
ip -6 route del fd00:85::1
";
    network_by_script("cri-lost", script, |pods| {
        let pod = pods.pod();
        let container = beside(&pod);
        let routes = in_guest(&container, "route") + &in_guest(&container, "-6 route");
        assert!(routes.contains("10.84.0.0/16 via 10.85.0.1 dev eth0"), "{routes}");
        assert!(routes.contains("fd00:84::/64 via fd00:85::1 dev eth0"), "{routes}");
        pod.addresses().into_iter().for_each(answers);
    });
}

#[track_caller]
fn wait_until(container: &PodContainer, view: &str, holds: impl Fn(&str) -> bool) {
    let mut last = String::new();
    let held = node::eventually(Duration::from_secs(30), || {
        last = in_guest(container, view);
        holds(&last).then_some(())
    });
    assert!(held.is_some(), "{view}: {last}\n{}", node::log_tail(20));
}

#[test]
fn two_interfaces_in_one_subnet_keep_a_route_each() {
    pods("cri-twice", |pods| {
        let pod = pods.pod();
        let container = beside(&pod);
        let netns = pod.netns().file_name().unwrap().to_string_lossy().into_owned();
        for number in 1..=2 {
            let pair = format!("link add huskveth{number} type veth peer name net{number} netns {netns}");
            assert!(Command::new("ip").args(pair.split(' ')).status().unwrap().success());
            assert!(
                Command::new("ip")
                    .args(["link", "set", &format!("huskveth{number}"), "up"])
                    .status()
                    .unwrap()
                    .success()
            );
            on_node(&pod, &format!("link set net{number} up"));
            on_node(&pod, &format!("addr add 10.95.0.{number}/24 dev net{number}"));
            on_node(&pod, &format!("-6 route append fd00:95::/64 dev net{number} table 100 metric 5"));
        }
        on_node(&pod, "route add 10.96.0.0/16 nexthop via 10.95.0.8 dev net1 nexthop via 10.95.0.9 dev net2");
        same(&pod, &container);
        let routes = in_guest(&container, "route");
        assert!(routes.contains("10.95.0.0/24 dev net1") && routes.contains("10.95.0.0/24 dev net2"), "{routes}");
        // With one of them goes what was by it.
        assert!(Command::new("ip").args(["link", "del", "huskveth1"]).status().unwrap().success());
        same(&pod, &container);
        assert!(Command::new("ip").args(["link", "del", "huskveth2"]).status().unwrap().success());
        same(&pod, &container);
    });
}
