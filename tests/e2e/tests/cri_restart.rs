//! containerd is restarted, as for an upgrade, with pods that run.
//!
//! Runs: containerd 2

use husk_e2e::cri::{pods, restart};

#[test]
fn pods_go_on_while_containerd_is_restarted() {
    pods("cri-restart", restart::is_survived);
}
