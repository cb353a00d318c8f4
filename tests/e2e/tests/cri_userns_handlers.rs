//! User namespaces with what only containerd 2.x has: a shim that is the sandbox, and what the kubelet is told.

use husk_e2e::cri::userns::root_is_mapped;
use husk_e2e::cri::{call, pods_of};
use serde_json::json;

#[test]
fn a_shim_that_is_the_sandbox_has_user_namespaces() {
    pods_of("userns-sandbox", "husk-sandbox", root_is_mapped);
}

#[test]
fn the_kubelet_is_told() {
    let status = call("Status", &json!({}));
    let handlers = status["runtime_handlers"].as_array().cloned().unwrap_or_default();
    let handler = handlers.iter().find(|handler| handler["name"] == "husk-userns");
    let features = &handler.unwrap_or_else(|| panic!("{status}"))["features"];
    assert_eq!(features["user_namespaces"], true, "{status}");
    assert_eq!(features["recursive_read_only_mounts"], true, "{status}");
    pods_of("userns-handler", "husk-userns", root_is_mapped);
}
