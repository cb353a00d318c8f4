//! The suites' default runtime specification, and helpers to modify it.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::command::run_ctr;

/// Returns the specification that `ctr oci spec` prints. Adds `PATH`, because this specification has no environment.
pub fn default_spec() -> Value {
    static SPEC: OnceLock<Value> = OnceLock::new();
    let spec = SPEC.get_or_init(|| {
        let mut spec: Value = serde_json::from_slice(&run_ctr(&["oci", "spec"]).expect_code(0).stdout).unwrap();
        spec["process"]["env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        spec
    });
    spec.clone()
}

/// Appends to the array `key` of the object at the JSON pointer `parent`. Creates the array if it is missing.
pub fn push(spec: &mut Value, parent: &str, key: &str, item: Value) {
    let parent = spec.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent} in the specification"));
    match parent[key].as_array_mut() {
        Some(array) => array.push(item),
        None => parent[key] = Value::Array(vec![item]),
    }
}

/// Gives the container a cgroup namespace and mounts its cgroup at `/sys/fs/cgroup`.
pub fn mount_cgroup(spec: &mut Value) {
    push(spec, "/linux", "namespaces", json!({ "type": "cgroup" }));
    let options = ["nosuid", "noexec", "nodev", "relatime", "ro"];
    let mount = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options });
    push(spec, "", "mounts", mount);
}

/// Removes the namespace of type `kind`. A specification without this namespace requests the host's namespace.
pub fn remove_namespace(spec: &mut Value, kind: &str) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != kind);
    }
}
