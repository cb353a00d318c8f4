//! Restarts containerd, as an upgrade does, while pods run.
//!
//! Runs: containerd 2

use husk_e2e::cri::{call, handler, pods, restart};
use serde_json::json;

#[test]
fn pods_survive_a_restart_of_containerd() {
    // With containerd 2.x, the shim can be a pod's sandbox controller too.
    let version = call("Version", &json!({}))["runtime_version"].clone();
    let is_v2 = version.as_str().unwrap().trim_start_matches('v').starts_with("2.");
    let handlers = if is_v2 && handler() == "husk" { vec!["husk", "husk-sandbox"] } else { vec![handler()] };
    pods("cri-restart", |pods| restart::is_survived(pods, &handlers));
}
