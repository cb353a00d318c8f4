//! User namespaces with `sandboxer = "shim"`, handler features in CRI's Status, and recursive read-only mounts.
//!
//! Requires: containerd 2

use std::fs;

use husk_e2e::cri::userns::check_root_is_mapped;
use husk_e2e::cri::{call, pods_with_handler};
use husk_e2e::disk::run_on_node;
use serde_json::json;

#[test]
fn shim_sandboxer_supports_user_namespaces() {
    pods_with_handler("userns-sandbox", "husk-sandbox", check_root_is_mapped);
}

#[test]
fn status_reports_user_namespaces_and_recursive_read_only_mounts() {
    let status = call("Status", &json!({}));
    let handlers = status["runtime_handlers"].as_array().cloned().unwrap_or_default();
    let handler = handlers.iter().find(|handler| handler["name"] == "husk-userns");
    let features = &handler.unwrap_or_else(|| panic!("no handler husk-userns in {status}"))["features"];
    assert_eq!(features["user_namespaces"], true, "{status}");
    assert_eq!(features["recursive_read_only_mounts"], true, "{status}");
    pods_with_handler("userns-handler", "husk-userns", check_root_is_mapped);
}

#[test]
fn recursive_read_only_mount_covers_submounts() {
    pods_with_handler("recursive", "husk-userns", |pods| {
        let volume = pods.dir().join("volume");
        let submount = volume.join("a/below");
        fs::create_dir_all(&submount).unwrap();
        fs::write(volume.join("file"), "of the volume\n").unwrap();
        run_on_node(&["mount", "-t", "tmpfs", "tmpfs", &submount.to_string_lossy()]);
        fs::write(submount.join("file"), "mounted below\n").unwrap();
        fs::create_dir(submount.join("dir")).unwrap();
        run_on_node(&["mount", "-t", "tmpfs", "tmpfs", &submount.join("dir").to_string_lossy()]);
        let pod = pods.pod();
        let config = |read_only: bool| {
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["mounts"] = json!([{
                "host_path": volume.to_string_lossy(), "container_path": "/data", "readonly": read_only,
                "recursive_read_only": read_only,
            }]);
            config
        };
        let recursive = pod.start(&config(true));
        assert_eq!(recursive.sh("cat /data/file /data/a/below/file"), "of the volume\nmounted below");
        let scripts = [
            "touch /data/x",
            "echo x > /data/a/below/file",
            "touch /data/a/below/x",
            "mkdir /data/a/below/dir/x",
            "rm /data/a/below/file",
            "chmod 777 /data/a/below",
        ];
        let all = scripts.map(|script| format!("({script}) && echo allowed: '{script}'")).join("\n");
        let denied = recursive.exec(&["sh", "-c", &all]);
        assert!(denied.out.is_empty() && denied.err.matches("ead-only").count() == scripts.len(), "{denied:?}");
        // Another container of the pod can write to the same volume and its submounts.
        let writing = pod.start(&config(false));
        writing.sh("echo new > /data/a/below/new; echo new > /data/a/below/dir/new");
        assert_eq!(recursive.sh("cat /data/a/below/new /data/a/below/dir/new"), "new\nnew");
        pod.stop();
        for point in [submount.join("dir"), submount] {
            run_on_node(&["umount", &point.to_string_lossy()]);
        }
    });
}
