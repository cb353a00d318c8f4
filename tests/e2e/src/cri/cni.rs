//! Temporary CNI networks, which replace the node's bridge network during a test.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Pods, call, pods};
use crate::node;

/// containerd uses the first file in the order of names. Therefore this file takes precedence over the node's file.
const FILE: &str = "/etc/cni/net.d/00-test.conflist";

/// Runs `body`. The pods of `body` get their network from the CNI plugin chain `plugins`.
///
/// # Panics
/// If containerd does not load the network, or if [`pods`] panics.
#[track_caller]
pub fn network(name: &str, plugins: Value, body: impl FnOnce(&Pods)) {
    let wait = |wanted: &str| {
        let found = node::eventually(Duration::from_secs(20), || loaded().contains(wanted).then_some(()));
        assert!(found.is_some(), "containerd has not loaded the network {wanted}, only {:?}", loaded());
    };
    let config = json!({ "cniVersion": "1.0.0", "name": name, "plugins": plugins });
    // containerd reloads its networks when a file in this directory is written or removed.
    fs::write(FILE, config.to_string()).unwrap();
    wait(name);
    pods(name, body);
    fs::remove_file(FILE).unwrap();
    wait("husk");
}

/// Returns the names of the networks that containerd has loaded.
fn loaded() -> String {
    let info = call("Status", &json!({ "verbose": true }))["info"]["cniconfig"].clone();
    let config: Value = serde_json::from_str(info.as_str().unwrap_or("{}")).unwrap_or_default();
    let names = config["Networks"].as_array().into_iter().flatten();
    names.map(|network| network["Config"]["Name"].as_str().unwrap_or_default()).collect::<Vec<_>>().join(" ")
}
