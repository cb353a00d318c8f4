//! Reads fields from a specification's JSON. Defines [`TranslateError`].

use serde_json::{Map, Value};

/// Why a specification cannot be translated for the guest.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// The JSON cannot be parsed.
    #[error("failed to parse the {what}")]
    Parse {
        /// What was parsed, such as `resources of the update request`.
        what: &'static str,
        /// Position and cause.
        #[source]
        source: serde_json::Error,
    },
    /// A field has the wrong type.
    #[error("invalid JSON: {0} has the wrong type")]
    Type(&'static str),
    /// The specification asks for something that a VM cannot provide.
    #[error("{field}: {message}")]
    Unsupported {
        /// Field of the specification.
        field: String,
        /// Reason why the field is not supported, and a remedy, if any.
        message: String,
    },
}

/// Returns the error for a field that is not supported.
pub fn unsupported(field: impl Into<String>, message: impl Into<String>) -> TranslateError {
    TranslateError::Unsupported { field: field.into(), message: message.into() }
}

/// Returns whether a field exists and is not empty.
pub fn present(map: &Map<String, Value>, key: &str) -> bool {
    map.get(key).is_some_and(|value| match value {
        Value::Null => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    })
}

/// Returns a field that must be an object, or `None` if the field is absent.
pub fn object<'a>(
    map: &'a mut Map<String, Value>,
    key: &'static str,
) -> Result<Option<&'a mut Map<String, Value>>, TranslateError> {
    match map.get_mut(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(TranslateError::Type(key)),
    }
}

/// Returns a field that must be an array. Returns an empty array if the field is absent.
pub fn array<'a>(map: &'a Map<String, Value>, key: &str, name: &'static str) -> Result<&'a [Value], TranslateError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(values)) => Ok(values),
        Some(_) => Err(TranslateError::Type(name)),
    }
}
