//! Networks of other kinds than the node's bridge.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Pods, call, pods};
use crate::node;

/// Before the node's own, by its name.
const FILE: &str = "/etc/cni/net.d/00-test.conflist";

/// Runs `body` while pods get a network by these plugins, one after the other.
///
/// # Panics
/// When containerd does not take the network over, and as [`pods`] does.
#[track_caller]
pub fn network(name: &str, plugins: Value, body: impl FnOnce(&Pods)) {
    let wait = |wanted: &str| {
        let found = node::eventually(Duration::from_secs(20), || loaded().contains(wanted).then_some(()));
        assert!(found.is_some(), "containerd has {:?} and not {wanted}", loaded());
    };
    let config = json!({ "cniVersion": "1.0.0", "name": name, "plugins": plugins });
    // containerd looks again when a file was written to, or is gone.
    fs::write(FILE, config.to_string()).unwrap();
    wait(name);
    pods(name, body);
    fs::remove_file(FILE).unwrap();
    wait("husk");
}

/// The network that containerd has loaded.
fn loaded() -> String {
    let info = call("Status", &json!({ "verbose": true }))["info"]["cniconfig"].clone();
    let config: Value = serde_json::from_str(info.as_str().unwrap_or("{}")).unwrap_or_default();
    let names = config["Networks"].as_array().into_iter().flatten();
    names.map(|network| network["Config"]["Name"].as_str().unwrap_or_default()).collect::<Vec<_>>().join(" ")
}
