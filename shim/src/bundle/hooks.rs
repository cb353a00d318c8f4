//! A specification's OCI hooks: the host's are run by the shim and taken out, the guest's stay.

use super::translate::{TranslateError, present, unsupported};
use serde_json::{Map, Value};

/// Leaves in `hooks` what the guest runs (`startContainer`, whose program is in the container's image).
pub fn keep_guests(hooks: &mut Map<String, Value>) -> Result<(), TranslateError> {
    if present(hooks, "createContainer") {
        // Its program is the host's, and its place the container's namespaces: there is no place with both.
        let message =
            "its program is the host's and would have to run in the guest; use createRuntime or startContainer";
        return Err(unsupported("hooks.createContainer", message));
    }
    hooks.retain(|kind, _| kind == "startContainer");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_the_guest_runs_stays() {
        let hook = |name: &str| json!([{ "path": name }]);
        let keep = |mut value: Value| keep_guests(value.as_object_mut().unwrap()).map(|()| value);
        let all = json!({
            "createRuntime": hook("/b"), "prestart": hook("/a"), "startContainer": hook("/c"), "poststop": hook("/d"),
            "createContainer": []
        });
        assert_eq!(keep(all).unwrap(), json!({ "startContainer": hook("/c") }));
        let error = keep(json!({ "createContainer": hook("/x") })).unwrap_err().to_string();
        assert!(error.starts_with("hooks.createContainer: "), "{error}");
    }
}
