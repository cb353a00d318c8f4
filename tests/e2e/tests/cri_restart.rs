//! Restarts containerd, as an upgrade does, while pods run.
//!
//! Runs: containerd 2

use husk_e2e::cri::{pods, restart};

#[test]
fn pods_survive_a_restart_of_containerd() {
    pods("cri-restart", restart::check_pods_survive);
}
