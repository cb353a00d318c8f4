//! The agent policy: its rules, their parsing, and the decision whether a request is allowed.
//!
//! The shim reads policies from the node's configuration and from a pod's annotation. The agent checks each request
//! against these policies. This crate does no I/O. `docs/policy.md` describes the rules for users.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

mod check;
mod list;
mod value;

pub use check::{Container, Exec, Origin, Policies, Refusal, Rule};
pub use list::{AtMost, MAX_ENTRIES};
pub use value::{Capability, Command, ContainerPath, Digest, InvalidEntry};

use serde::{Deserialize, Serialize};

/// Maximum length of a policy in JSON, in bytes.
pub const MAX_JSON: usize = 64 * 1024;

/// Rules that decide which requests for a pod and its containers the agent allows. The default allows everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Commands that may be executed in running containers.
    pub exec: AtMost<Command>,
    /// Whether a container may have an input to which a client can attach.
    pub attach: bool,
    /// Whether connections may be forwarded.
    pub port_forward: bool,
    /// Whether a container may be privileged.
    pub privileged: bool,
    /// Digests of the allowed images.
    pub images: AtMost<Digest>,
    /// Capabilities that containers and execs may have.
    pub capabilities: AtMost<Capability>,
    /// Paths in a container at or below which volumes may be mounted.
    pub mounts: AtMost<ContainerPath>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            exec: AtMost::Any,
            attach: true,
            port_forward: true,
            privileged: true,
            images: AtMost::Any,
            capabilities: AtMost::Any,
            mounts: AtMost::Any,
        }
    }
}

/// Reason why parsing a policy failed.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// The text is too long.
    #[error("the policy has {0} bytes: at most {MAX_JSON} are allowed")]
    Length(usize),
    /// The text is not a policy in JSON.
    #[error("failed to parse the policy")]
    Json(#[source] serde_json::Error),
}

impl Policy {
    /// Parses a policy in JSON.
    ///
    /// # Errors
    /// Fails if the text is too long, is not JSON, contains an unknown rule, repeats a rule, or has an invalid value.
    pub fn from_json(text: &[u8]) -> Result<Self, ParseError> {
        if text.len() > MAX_JSON {
            return Err(ParseError::Length(text.len()));
        }
        serde_json::from_slice(text).map_err(ParseError::Json)
    }

    /// Returns the policy in JSON. Returns an empty text for the policy that allows everything.
    pub fn to_json(&self) -> Vec<u8> {
        if *self == Self::default() {
            return Vec::new();
        }
        // Serializing strings, booleans and lists should never fail. If serializing fails, an invalid text is safe,
        // because the agent allows nothing after it has received an invalid policy.
        serde_json::to_vec(self).unwrap_or_else(|_| b"invalid".to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = Policy::from_json(text.as_bytes()).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    }

    #[test]
    fn empty_policy_allows_everything() {
        assert_eq!(Policy::from_json(b"{}").unwrap(), Policy::default());
        assert_eq!(Policy::default().to_json(), b"");
    }

    #[test]
    fn from_json_rejects_unknown_and_repeated_rules() {
        assert!(error(r#"{"exce": []}"#).contains("unknown field `exce`, expected one of `exec`, `attach`"));
        assert!(error(r#"{"exec": [], "exec": "any"}"#).contains("duplicate field `exec`"));
        assert!(error("[]x").contains("failed to parse the policy"));
        assert!(error(&" ".repeat(MAX_JSON + 1)).starts_with("the policy has 65537 bytes"));
    }

    #[test]
    fn from_json_rejects_invalid_values() {
        for (text, expected) in [
            (r#"{"exec": "none"}"#, r#"expected "any" or a list"#),
            (r#"{"exec": false}"#, r#"expected "any" or a list"#),
            (r#"{"exec": ["ls"]}"#, "expected a sequence"),
            (r#"{"exec": [[]]}"#, "invalid command []: it has no program"),
            (r#"{"attach": "no"}"#, "expected a boolean"),
            (r#"{"images": ["busybox:latest"]}"#, r#"invalid digest "busybox:latest""#),
            (r#"{"capabilities": ["CAP_ALL"]}"#, r#"unknown capability "CAP_ALL""#),
            (r#"{"mounts": ["data"]}"#, r#"invalid path "data""#),
        ] {
            let error = error(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn json_and_toml_have_the_same_form() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let toml = format!(
            "exec = [[\"cat\", \"/run/ready\"]]\nattach = false\nport_forward = false\nprivileged = false\n\
             images = [\"{digest}\"]\ncapabilities = [\"net_raw\"]\nmounts = [\"/data\"]\n"
        );
        let policy: Policy = toml::from_str(&toml).unwrap();
        assert_eq!(policy.capabilities, AtMost::List(vec![Capability::try_from("CAP_NET_RAW".to_owned()).unwrap()]));
        assert_eq!(Policy::from_json(&policy.to_json()).unwrap(), policy);
        assert!(!policy.attach && !policy.port_forward && !policy.privileged);
        assert_eq!(toml::from_str::<Policy>("exec = \"any\"\nmounts = \"any\"").unwrap(), Policy::default());
    }
}
