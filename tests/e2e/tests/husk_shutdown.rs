//! The orderly end of a pod: what SIGTERM to the VMM or to the shim does to containers and to data on block devices.

use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, pods};
use husk_e2e::disk::{Disk, TERM_WRITER_PROGRAM};
use husk_e2e::{PYTHON, node, vm};
use nix::sys::signal::Signal;
use serde_json::json;

/// The limit of the pod's end on the test node.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a pod, sends `signal` to the process that `process` names, and checks the pod's end.
fn check_end(name: &str, signal: Signal, process: fn(&Pod) -> i32) {
    need_image(PYTHON);
    pods(name, |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 4);
        let pod = pods.pod();
        let mut config = pod.python(TERM_WRITER_PROGRAM);
        config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "rwm" }]);
        let writer = pod.start(&config);
        let stubborn = pod.start(&pod.sh("trap '' TERM; echo ready; while :; do sleep 1; done"));
        writer.wait_for("ready");
        stubborn.wait_for("ready");
        node::send_signal(process(&pod), signal);
        assert_eq!(writer.wait_within(LIMIT).0, 7);
        assert_eq!(stubborn.wait_within(LIMIT).0, 137);
        let gone = node::eventually(LIMIT, || {
            (vm::shim_pids_of(&pod.id).is_empty() && vm::vmm_pids_of(&pod.id).is_empty()).then_some(())
        });
        assert!(gone.is_some(), "the shim or the VMM still runs");
        assert_eq!(disk.read_written(), "changed");
        assert!(writer.log().contains("stopped"), "{}", writer.log());
        pod.stop();
    });
}

#[test]
fn sigterm_to_the_vmm_ends_the_pod_in_order() {
    check_end("shutdown-vmm", Signal::SIGTERM, Pod::pid);
}

#[test]
fn sigint_to_the_shim_ends_the_pod_in_order() {
    check_end("shutdown-shim", Signal::SIGINT, |pod| vm::shim_pids_of(&pod.id)[0]);
}
