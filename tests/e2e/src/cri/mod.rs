//! A client of the Kubernetes Container Runtime Interface (CRI). Requests and responses are JSON.

pub mod annotations;
pub mod cni;
pub mod kubelet;
pub mod manifest;
pub mod pid_1;
pub mod pod;
pub mod restart;
pub mod spdy;
pub mod stats;
pub mod stream;
pub mod userns;

use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use crate::grpc;

pub use crate::grpc::Status;
pub use pod::{Pod, PodContainer, Pods, pods, pods_with_handler};

/// Default timeout of a call.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// Returns the runtime handler under test: `HUSK_E2E_HANDLER` if it is set, otherwise the handler of the runtime under
/// test.
pub fn handler() -> &'static str {
    static HANDLER: OnceLock<String> = OnceLock::new();
    HANDLER.get_or_init(|| {
        let default = if crate::runtime() == crate::RUNC { "runc" } else { "husk" };
        std::env::var("HUSK_E2E_HANDLER").unwrap_or_else(|_| default.to_owned())
    })
}

/// Calls a method of the runtime service.
pub fn try_call(method: &str, request: &Value) -> Result<Value, Status> {
    try_call_within(TIMEOUT, "RuntimeService", method, request)
}

/// Calls a method of the runtime service. Panics if the call fails.
#[track_caller]
pub fn call(method: &str, request: &Value) -> Value {
    try_call(method, request).unwrap_or_else(|status| {
        panic!(
            "{method} {request}\nfailed: {status}\n--- last 40 lines of containerd's log\n{}",
            crate::node::log_tail(40)
        )
    })
}

/// Calls a method of the runtime service. Panics if the call succeeds. Returns the error message in lower case.
#[track_caller]
pub fn expect_error(method: &str, request: &Value) -> String {
    match try_call(method, request) {
        Ok(answer) => panic!("{method} {request} succeeded: {answer}"),
        Err(status) => status.message.to_lowercase(),
    }
}

/// Calls a streaming method of the runtime service. The returned iterator ends if no message arrives within
/// the timeout.
pub fn call_streaming(method: &str) -> impl Iterator<Item = Value> + use<> {
    grpc::stream_of(TIMEOUT, "runtime.v1.RuntimeService", method)
}

/// Calls a method of any CRI service, with a timeout.
pub fn try_call_within(limit: Duration, service: &str, method: &str, request: &Value) -> Result<Value, Status> {
    grpc::call(limit, None, &format!("runtime.v1.{service}"), method, request)
}

/// Returns whether the major version of the node's containerd is 2.
#[track_caller]
pub fn is_containerd_2() -> bool {
    let version = call("Version", &json!({}))["runtime_version"].clone();
    version.as_str().unwrap().trim_start_matches('v').starts_with("2.")
}

/// Reads a 64-bit integer field, which protobuf's JSON mapping encodes as a string.
pub fn number(value: &Value) -> i64 {
    let parsed = value.as_i64().or_else(|| value.as_str()?.parse().ok());
    parsed.unwrap_or_else(|| panic!("{value} is not a number"))
}

/// Decodes a field of type `bytes`, which protobuf's JSON mapping encodes in base64.
pub fn bytes(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for byte in value.as_str().unwrap_or_default().bytes() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => break,
        };
        bits = (bits << 6) | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_decodes_base64() {
        assert_eq!(bytes(&json!("aGVsbG8K")), b"hello\n");
        assert_eq!(bytes(&json!("aGVsbG8=")), b"hello");
        assert_eq!(bytes(&json!("")), b"");
    }
}
