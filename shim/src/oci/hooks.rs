//! OCI hooks of a specification. The shim runs the host's hooks. Only the guest's hooks stay in the specification.

use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, present, unsupported};

/// Keeps only the hooks that the guest runs. These are the `startContainer` hooks, because their programs are in the
/// container's image.
pub fn keep_guest_hooks(hooks: &mut Map<String, Value>) -> Result<(), TranslateError> {
    if present(hooks, "createContainer") {
        // The hook's program is on the host, but it must run in the container's namespaces, which are in the guest.
        let message =
            "the hook's program is on the host, but must run in the guest; use createRuntime or startContainer";
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
