//! Pods with a user namespace (`hostUsers: false`). The requests are like those of the kubelet.

use serde_json::{Value, json};

use super::pod::{Pod, Pods};

/// First host id of the pod's id mapping.
pub const HOST_ID_BASE: u32 = 65536 * 5;

/// Returns user namespace options that map one range of users and groups to the host ids that start at `base`.
pub fn options(base: u32) -> Value {
    let ids = json!([{ "host_id": base, "container_id": 0, "length": 65536 }]);
    json!({ "mode": "POD", "uids": ids, "gids": ids })
}

/// Adds the user namespace to a pod's or a container's configuration.
pub fn with_user_namespace(mut config: Value) -> Value {
    config["linux"]["security_context"]["namespace_options"]["userns_options"] = options(HOST_ID_BASE);
    config
}

/// Runs a pod with a user namespace.
pub fn pod(pods: &Pods) -> Pod {
    pods.run(with_user_namespace(pods.config()))
}

/// Returns a container's configuration for a pod with a user namespace.
pub fn sh(pod: &Pod, script: &str) -> Value {
    with_user_namespace(pod.sh(script))
}

/// Script that sleeps until SIGTERM.
pub const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// Tests that the pod's root is mapped to another host user, in containers and execs.
#[track_caller]
pub fn check_root_is_mapped(pods: &Pods) {
    let pod = pod(pods);
    let first = pod.start(&sh(&pod, &format!("cat /proc/self/uid_map; {SLEEP}")));
    first.wait_for("65536");
    let map = format!("0 {HOST_ID_BASE} 65536");
    let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        words(first.sh("cat /proc/self/uid_map /proc/self/gid_map")),
        format!("{map} {map}"),
        "an exec has wrong id maps"
    );
    assert!(words(first.log()).contains(&map), "{}", first.log());
    // The pod's root owns the image's files, and has root's permissions on these files. File systems, devices and host
    // name are the same as in a pod without a user namespace.
    let seen = first.sh("id -u; id -g; stat -c %u:%g / /bin /bin/busybox /etc/passwd | sort -u
         touch /new && chown 7:8 /new && stat -c %u:%g /new && rm /new
         mkdir -p /a/b && chmod 700 /a && stat -c %u:%g /a/b
         echo x > /dev/null; stat -f -c %T /proc /sys /dev/shm
         touch /dev/shm/x && stat -c %u:%g /dev/shm/x; rm /dev/shm/x; hostname");
    let name = pod.config["hostname"].as_str().unwrap();
    assert_eq!(seen, format!("0\n0\n0:0\n7:8\n0:0\nproc\nsysfs\ntmpfs\n0:0\n{name}"));
    // The pod's containers share the user, network and IPC namespaces and the shared memory.
    let second = pod.start(&sh(&pod, SLEEP));
    let shared = "for kind in user net ipc; do readlink /proc/self/ns/$kind; done; stat -c %a /dev/shm";
    let of_first = first.sh(&format!("{shared}; echo seen > /dev/shm/y"));
    assert!(of_first.ends_with("\n1777"), "{of_first}");
    assert_eq!(second.sh(&format!("{shared}; cat /dev/shm/y")), format!("{of_first}\nseen"));
    // Users other than root are also mapped.
    let mut config = sh(&pod, "id -u; id -G; echo out; sleep 100000");
    config["linux"]["security_context"]["run_as_user"] = json!({ "value": 1234 });
    config["linux"]["security_context"]["run_as_group"] = json!({ "value": 1001 });
    config["linux"]["security_context"]["supplemental_groups"] = json!([1002]);
    config["working_dir"] = json!("/made/by/runtime");
    let user = pod.start(&config);
    user.wait_for("out");
    assert_eq!(user.sh("id -u; id -G; pwd; stat -c %u:%g /made/by"), "1234\n1001 1002\n/made/by/runtime\n0:0");
    second.stop(0);
    second.remove();
    assert_eq!(first.sh("echo still"), "still");
}
