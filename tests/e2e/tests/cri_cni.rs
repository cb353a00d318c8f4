//! CNI networks other than a bridge (ptp, macvlan): the guest has the addresses and routes that the plugin configured.

use std::process::Command;

use husk_e2e::cri::cni::network;
use serde_json::json;

#[test]
fn ptp_network_routes_its_own_subnet_through_the_gateway() {
    let ipam =
        json!({ "type": "host-local", "ranges": [[{ "subnet": "10.91.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] });
    let plugin = json!({ "type": "ptp", "mtu": 1400, "ipMasq": false, "ipam": ipam });
    network("cri-ptp", json!([plugin]), |pods| {
        let (one, two) = (pods.pod(), pods.pod());
        let (a, b) = (one.sleeper(), two.start(&two.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000")));
        b.wait_for("up");
        assert!(a.sh("ip link show eth0").contains("mtu 1400"), "{}", a.sh("ip link show eth0"));
        let routes = a.sh("ip route");
        // Only the gateway is on the link. All other traffic goes through the gateway, even traffic to the pod's own
        // subnet.
        assert!(routes.contains("default via 10.91.0.1") && routes.contains("10.91.0.1 dev eth0"), "{routes}");
        let peer = two.addresses()[0];
        assert_eq!(a.sh(&format!("nc {peer} 8080 < /dev/null")), "hello");
    });
}

#[test]
fn pods_of_a_macvlan_network_reach_each_other() {
    let ip = |arguments: &[&str]| {
        assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?} failed")
    };
    ip(&["link", "add", "huskparent", "type", "dummy"]);
    ip(&["link", "set", "huskparent", "up"]);
    let ipam = json!({ "type": "host-local", "ranges": [[{ "subnet": "10.92.0.0/24" }]] });
    let plugin = json!({ "type": "macvlan", "master": "huskparent", "mode": "bridge", "ipam": ipam });
    network("cri-macvlan", json!([plugin]), |pods| {
        let (one, two) = (pods.pod(), pods.pod());
        let (a, b) = (one.sleeper(), two.start(&two.sh("nc -ll -p 8080 -e echo hello & echo up; sleep 100000")));
        b.wait_for("up");
        let peer = two.addresses()[0];
        assert_eq!(a.sh(&format!("nc {peer} 8080 < /dev/null")), "hello");
    });
    ip(&["link", "del", "huskparent"]);
}
