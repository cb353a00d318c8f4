//! User namespaces with what only containerd 2.x has: a shim that is the sandbox, and what the kubelet is told; and
//! recursive read-only mounts, which the kubelet asks for where it was told.
//!
//! Requires: containerd 2

use std::fs;

use husk_e2e::cri::userns::root_is_mapped;
use husk_e2e::cri::{call, pods_of};
use husk_e2e::disk::on_node;
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

#[test]
fn what_is_mounted_below_a_volume_is_read_only_too() {
    pods_of("recursive", "husk-userns", |pods| {
        let volume = pods.dir().join("volume");
        let below = volume.join("a/below");
        fs::create_dir_all(&below).unwrap();
        fs::write(volume.join("file"), "of the volume\n").unwrap();
        on_node(&["mount", "-t", "tmpfs", "tmpfs", &below.to_string_lossy()]);
        fs::write(below.join("file"), "mounted below\n").unwrap();
        fs::create_dir(below.join("dir")).unwrap();
        on_node(&["mount", "-t", "tmpfs", "tmpfs", &below.join("dir").to_string_lossy()]);
        let pod = pods.pod();
        let with = |read_only: bool| {
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["mounts"] = json!([{
                "host_path": volume.to_string_lossy(), "container_path": "/data", "readonly": read_only,
                "recursive_read_only": read_only,
            }]);
            config
        };
        let recursive = pod.start(&with(true));
        assert_eq!(recursive.sh("cat /data/file /data/a/below/file"), "of the volume\nmounted below");
        for script in [
            "touch /data/x",
            "echo x > /data/a/below/file",
            "touch /data/a/below/x",
            "mkdir /data/a/below/dir/x",
            "rm /data/a/below/file",
            "chmod 777 /data/a/below",
        ] {
            let denied = recursive.exec(&["sh", "-c", script]);
            assert!(denied.code != 0 && denied.err.contains("ead-only"), "{script}: {denied:?}");
        }
        // Another container of the pod has the same volume to write to, all of it.
        let writing = pod.start(&with(false));
        writing.sh("echo new > /data/a/below/new; echo new > /data/a/below/dir/new");
        assert_eq!(recursive.sh("cat /data/a/below/new /data/a/below/dir/new"), "new\nnew");
        pod.stop();
        for point in [below.join("dir"), below] {
            on_node(&["umount", &point.to_string_lossy()]);
        }
    });
}
