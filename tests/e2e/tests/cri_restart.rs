//! Restarts containerd, as an upgrade does, while pods run.
//!
//! Runs: containerd 2

use husk_e2e::cri::{handler, is_containerd_2, pods, restart};

#[test]
fn pods_survive_a_restart_of_containerd() {
    // With containerd 2.x, Husk's shim can also be the sandbox controller of a pod.
    let handlers =
        if is_containerd_2() && handler() == "husk" { vec!["husk", "husk-sandbox"] } else { vec![handler()] };
    pods("cri-restart", |pods| restart::check_pods_survive(pods, &handlers));
}
