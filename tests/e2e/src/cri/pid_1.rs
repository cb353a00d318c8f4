//! Checks PID 1 of a PID namespace that the containers of a pod share.

use serde_json::{Value, json};

use super::Pod;

/// Starts a container with `config` in the pod's PID namespace, and checks what this container can reach through PID 1.
/// PID 1 has an empty root directory, no capability, and the container's other namespaces.
#[track_caller]
pub fn check(pod: &Pod, mut config: Value) {
    let context = &mut config["linux"]["security_context"];
    context["namespace_options"]["pid"] = json!("POD");
    // containerd's default AppArmor profile would deny access to PID 1 anyway.
    context["apparmor"] = json!({ "profile_type": "Unconfined" });
    let container = pod.start(&config);
    let script = "cd /proc/1 && for i in root root/.. cwd; do ls -A $i/; done
        for i in net ipc uts; do [ $(readlink ns/$i) = $(readlink /proc/self/ns/$i) ] || echo other $i; done
        [ $(readlink ns/mnt) = $(readlink /proc/self/ns/mnt) ] && echo same mnt
        grep -E '^(Uid|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):' status | tr -s '\\t\\n' '  '";
    let none = "0000000000000000";
    let expected = format!(
        "Uid: 0 0 0 0 CapInh: {none} CapPrm: {none} CapEff: {none} CapBnd: {none} CapAmb: {none} NoNewPrivs: 1"
    );
    assert_eq!(container.sh(script).trim(), expected);
}
