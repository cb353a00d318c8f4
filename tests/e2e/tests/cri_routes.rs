//! The guest has the same routes, rules and routing tables as the pod's network namespace. The tests run the node's
//! `ip` command both in the guest and in the pod's network namespace.

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

/// Arguments of `ip` that together list all rules and all routes outside the local table. The output is numeric (`-N`),
/// because `ip` reads names from files, which differ between the node and the image.
const VIEWS: [&str; 9] = [
    "-N rule",
    "-N -6 rule",
    "-N route show table main",
    "-N route show table 7",
    "-N route show table 100",
    "-N route show table 1000",
    "-N -6 route show table 100",
    "-N -6 route show table 101",
    "-N -6 route show table 1000",
];

/// Returns the configuration of a ptp plugin with one subnet of each address family. The gateway addresses are on the
/// veth's peer on the node.
fn veth(subnets: [&str; 2]) -> Value {
    let ranges = subnets.map(|subnet| json!([{ "subnet": subnet }]));
    let ipam = json!({ "type": "host-local", "ranges": ranges, "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] });
    json!({ "type": "ptp", "ipMasq": false, "ipam": ipam })
}

/// Runs `ip` in the pod's network namespace on the node.
#[track_caller]
fn on_node(pod: &Pod, arguments: &str) -> String {
    let netns = format!("--net={}", pod.netns().display());
    let output = Command::new("nsenter").args([netns.as_str(), "ip"]).args(arguments.split(' ')).output().unwrap();
    // An empty table is not a failure, although `ip` reports an error for it.
    let none = String::from_utf8_lossy(&output.stderr).contains("FIB table does not exist");
    assert!(output.status.success() || none, "ip {arguments} failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Starts a container that has a listener, and the node's `/usr` at `/node`.
fn start_listener(pod: &Pod) -> PodContainer {
    let mut config = pod.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000");
    config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN"] });
    config["mounts"] = json!([{ "host_path": "/usr", "container_path": "/node", "readonly": true }]);
    let container = pod.start(&config);
    container.wait_for("up");
    container
}

/// The command that runs the node's `ip` in the guest.
const IP: &str =
    "/node/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /node/lib/x86_64-linux-gnu /node/bin/ip";

/// Runs the node's `ip` in the guest.
fn in_guest(container: &PodContainer, arguments: &str) -> String {
    container.sh(&format!("{IP} {arguments} 2>&1 || true"))
}

/// Returns a script that prints all [`VIEWS`]. The arguments of each view come before its output.
fn show_all(ip: &str) -> String {
    VIEWS.map(|view| format!("echo 'ip {view}'; {ip} {view} 2>&1")).join("; ") + "; true"
}

/// Returns the lines that `ip` has printed. Removes the protocols of routes, and the error messages for empty tables.
fn normalized_lines(text: &str) -> Vec<String> {
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

/// Waits until the guest has the same rules and routes as the pod's network namespace.
#[track_caller]
fn wait_until_equal(pod: &Pod, container: &PodContainer) {
    let netns = format!("--net={}", pod.netns().display());
    let output = Command::new("nsenter").args([netns.as_str(), "sh", "-c", &show_all("ip")]).output().unwrap();
    let wanted = normalized_lines(&String::from_utf8_lossy(&output.stdout));
    assert!(
        output.status.success() && !wanted.iter().any(|line| line.contains("rror")),
        "failed to list the rules and routes on the node: {wanted:#?}"
    );
    let script = show_all(IP);
    let mut last = Vec::new();
    let held = node::eventually(Duration::from_secs(30), || {
        last = normalized_lines(&container.sh(&script));
        (last == wanted).then_some(())
    });
    assert!(held.is_some(), "the guest has {last:#?}\nexpected {wanted:#?}\n{}", node::log_tail(20));
}

#[track_caller]
fn assert_answers(address: IpAddr) {
    let mut text = String::new();
    let stream = TcpStream::connect_timeout(&SocketAddr::from((address, 8080)), Duration::from_secs(20));
    stream.unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text.trim_end(), "hello");
}

#[test]
fn guest_has_the_source_based_routes_of_the_sbr_plugin() {
    let plugins = json!([veth(["10.93.0.0/24", "fd00:93::/64"]), { "type": "sbr" }]);
    network("cri-sbr", plugins, |pods| {
        let pod = pods.pod();
        let container = start_listener(&pod);
        let rules = in_guest(&container, "rule");
        assert!(rules.contains("from 10.93.0.") && rules.contains("lookup 100"), "{rules}");
        wait_until_equal(&pod, &container);
        for address in pod.addresses() {
            assert_answers(address);
        }
        // Packets from the pod's address use the plugin's table.
        assert!(in_guest(&container, "route get 10.93.0.1 from 10.93.0.2").contains("table 100"));
    });
}

/// A CNI plugin that runs its script in the pod's network namespace and returns `prevResult`. The `sed` command works
/// only because CNI sorts the keys of the configuration.
const PLUGIN: &str = r#"#!/bin/sh
config=$(cat)
[ "$CNI_COMMAND" = ADD ] || exit 0
nsenter --net="$CNI_NETNS" sh -e "$0.script" >&2 || exit 1
printf '%s' "$config" | sed 's/^.*"prevResult":\(.*\),"type":"[^"]*"}$/\1/'
"#;

/// Runs `body` with a CNI network whose plugin runs the script in each pod's network namespace.
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

/// Adds addresses that make the gateways reachable, and then all kinds of routes and rules.
const ALL_KINDS: &str = "
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
fn guest_mirrors_all_kinds_of_routes_and_rules() {
    network_by_script("cri-routes", ALL_KINDS, |pods| {
        let pod = pods.pod();
        let container = start_listener(&pod);
        wait_until_equal(&pod, &container);
        let main6 = in_guest(&container, "-6 route");
        assert!(main6.contains("default via fd00:94::1"), "{main6}");
        let (rules, routes) = (in_guest(&container, "rule"), in_guest(&container, "route"));
        assert!(rules.contains("303:\tfrom all iif notyet [detached] nop"), "{rules}");
        assert!(routes.contains("blackhole 10.72.0.0/16") && routes.contains("weight 5"), "{routes}");

        // When the node's rules change, a rule that the container has added stays.
        in_guest(&container, "rule add pref 250 from 10.250.0.0/16 lookup 250");
        let containers_rule = "from 10.250.0.0/16 lookup 250";
        for change in [
            // These commands remove, add and replace routes and rules of each kind.
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
        wait_until_equal(&pod, &container);
        in_guest(&container, "rule add pref 250 from 10.250.0.0/16 lookup 250");
        // Three rules have the same priority. Their order matters, because the rule in the middle matches all packets,
        // and each of the other two rules matches only some packets.
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
        assert!(in_guest(&container, "rule").contains(containers_rule));

        // Removes all routes and rules.
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
        wait_until(&container, "rule", |text| text.lines().count() == 4 && text.contains(containers_rule));
        in_guest(&container, "rule del pref 250");
        wait_until_equal(&pod, &container);
    });
}

/// Configures two more interfaces, which have peers on the node. Each interface has its own MTU, addresses and routes.
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
fn first_container_sees_all_interfaces_at_its_start() {
    network_by_script("cri-several", INTERFACES, |pods| {
        let pod = pods.pod();
        for number in 1..=2 {
            for arguments in [
                format!("link set huskfar{number} mtu {} up", 1300 + 7650 * (number - 1)),
                format!("addr add 10.97.{number}.1/24 dev huskfar{number}"),
                format!("addr add fd00:97:{number}::1/64 dev huskfar{number} nodad"),
            ] {
                assert!(
                    Command::new("ip").args(arguments.split(' ')).status().unwrap().success(),
                    "ip {arguments} failed"
                );
            }
        }
        // The first container sees the complete network without waiting.
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
            assert!(first.log().contains(wanted), "{wanted:?} is not in the log:\n{}", first.log());
        }
        let container = start_listener(&pod);
        wait_until_equal(&pod, &container);
        let neighbours = in_guest(&container, "neigh");
        assert!(neighbours.contains("10.97.1.9 dev net1 lladdr 02:00:00:00:97:99 PERMANENT"), "{neighbours}");
        // The route with the lower metric wins.
        assert!(in_guest(&container, "route get 10.98.1.1").contains("via 10.97.2.1 dev net2"));
        pod.addresses().into_iter().for_each(assert_answers);
        for address in ["10.97.1.2", "10.97.2.2", "fd00:97:1::2", "fd00:97:2::2"] {
            assert_answers(address.parse().unwrap());
        }
        // A packet with the size of the interface's MTU gets an answer.
        assert_eq!(container.sh("ping -c 1 -w 20 -s 8922 10.97.2.1 | grep -c '8930 bytes'"), "1");
    });
}

#[test]
fn route_stays_after_the_route_to_its_gateway_is_removed() {
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
        let container = start_listener(&pod);
        let routes = in_guest(&container, "route") + &in_guest(&container, "-6 route");
        assert!(routes.contains("10.84.0.0/16 via 10.85.0.1 dev eth0"), "{routes}");
        assert!(routes.contains("fd00:84::/64 via fd00:85::1 dev eth0"), "{routes}");
        pod.addresses().into_iter().for_each(assert_answers);
    });
}

#[track_caller]
fn wait_until(container: &PodContainer, view: &str, holds: impl Fn(&str) -> bool) {
    let mut last = String::new();
    let held = node::eventually(Duration::from_secs(30), || {
        last = in_guest(container, view);
        holds(&last).then_some(())
    });
    assert!(held.is_some(), "`ip {view}` still prints\n{last}\n{}", node::log_tail(20));
}

#[test]
fn two_interfaces_in_one_subnet_have_a_route_each() {
    pods("cri-twice", |pods| {
        let pod = pods.pod();
        let container = start_listener(&pod);
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
        wait_until_equal(&pod, &container);
        let routes = in_guest(&container, "route");
        assert!(routes.contains("10.95.0.0/24 dev net1") && routes.contains("10.95.0.0/24 dev net2"), "{routes}");
        // Removing an interface removes its routes and next hops.
        assert!(Command::new("ip").args(["link", "del", "huskveth1"]).status().unwrap().success());
        wait_until_equal(&pod, &container);
        assert!(Command::new("ip").args(["link", "del", "huskveth2"]).status().unwrap().success());
        wait_until_equal(&pod, &container);
    });
}
