//! OCI hooks of a specification. The guest runs `startContainer` hooks. The shim rejects `createContainer` hooks, and
//! runs all other hooks on the host.

use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, present, unsupported};

/// Keeps only `startContainer` hooks, whose programs are in the container's rootfs. Rejects `createContainer` hooks.
pub fn keep_guest_hooks(hooks: &mut Map<String, Value>) -> Result<(), TranslateError> {
    if present(hooks, "createContainer") {
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
    fn keep_guest_hooks_keeps_only_start_container_hooks() {
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
