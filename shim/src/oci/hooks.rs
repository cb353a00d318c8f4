//! OCI hooks of a specification: the shim runs the host's hooks, so only the guest's stay in the specification.

use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, present, unsupported};

/// Keeps only the hooks that the guest runs: `startContainer`, whose program is in the container's image.
pub fn keep_guest_hooks(hooks: &mut Map<String, Value>) -> Result<(), TranslateError> {
    if present(hooks, "createContainer") {
        // Its program is on the host, but it has to run in the container's namespaces: no place has both.
        let message =
            "its program is on the host, but would have to run in the guest; use createRuntime or startContainer";
        return Err(unsupported("hooks.createContainer", message));
    }
    hooks.retain(|kind, _| kind == "startContainer");
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keep_guest_hooks_keeps_start_container_hooks_only() {
        let hook = |name: &str| json!([{ "path": name }]);
        let keep = |mut value: Value| keep_guest_hooks(value.as_object_mut().unwrap()).map(|()| value);
        let all = json!({
            "createRuntime": hook("/b"), "prestart": hook("/a"), "startContainer": hook("/c"), "poststop": hook("/d"),
            "createContainer": []
        });
        assert_eq!(keep(all).unwrap(), json!({ "startContainer": hook("/c") }));
        let error = keep(json!({ "createContainer": hook("/x") })).unwrap_err().to_string();
        assert!(error.starts_with("hooks.createContainer: "), "{error}");
    }
}
