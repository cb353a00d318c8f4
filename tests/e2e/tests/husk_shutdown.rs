//! The orderly end of a pod: what SIGTERM to the VMM or to the shim does to containers and to data on block devices.

use std::fs;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, pods};
use husk_e2e::disk::{Disk, TERM_WRITER_PROGRAM, run_on_node};
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

#[test]
fn file_system_that_a_container_has_mounted_is_written_and_unmounted() {
    pods("shutdown-mounted", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 48);
        disk.format();
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = pods.run(config);
        // The file is not synced, and nothing unmounts the file system before the container's end.
        let script = "trap 'echo saved > /data/file; exit 3' TERM; mkdir /data && mount -t ext4 /dev/xvda /data && \
                      echo ready; while :; do sleep 1; done";
        let mut config = pod.sh(script);
        config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "mrw" }]);
        config["linux"]["security_context"]["privileged"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("ready");
        node::send_signal(pod.pid(), Signal::SIGTERM);
        assert_eq!(container.wait_within(LIMIT).0, 3);
        let gone = node::eventually(LIMIT, || vm::vmm_pids_of(&pod.id).is_empty().then_some(()));
        assert!(gone.is_some(), "the VMM still runs");
        // A file system that was unmounted needs no recovery, and e2fsck changes nothing.
        run_on_node(&["e2fsck", "-n", &disk.device]);
        let state = run_on_node(&["sh", "-c", &format!("dumpe2fs -h {} 2> /dev/null", disk.device)]);
        assert!(!state.contains("needs_recovery"), "{state}");
        let point = pods.dir().join("mounted");
        let mounted = disk.mount(&point, "ro");
        assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "saved\n");
        drop(mounted);
        pod.stop();
    });
}
