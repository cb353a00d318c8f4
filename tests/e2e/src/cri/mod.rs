//! A client of the Kubernetes Container Runtime Interface (CRI). Requests and responses are JSON, mapped to protobuf
//! with the .proto file.

pub mod annotations;
pub mod cni;
pub mod grpc;
pub mod kubelet;
pub mod manifest;
pub mod pod;
pub mod restart;
pub mod spdy;
pub mod stats;
pub mod stream;
pub mod userns;

use std::sync::OnceLock;
use std::time::Duration;

use protobuf::descriptor::FileDescriptorSet;
use protobuf::reflect::{FileDescriptor, MessageDescriptor, MethodDescriptor};
use protobuf::{Message, MessageDyn};
use serde_json::Value;

pub use grpc::Status;
pub use pod::{Pod, PodContainer, Pods, pods, pods_with_handler};

/// containerd's socket, which also serves the CRI.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
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

/// Returns the CRI's file descriptor, which the build script has compiled.
fn protocol() -> &'static FileDescriptor {
    static PROTOCOL: OnceLock<FileDescriptor> = OnceLock::new();
    PROTOCOL.get_or_init(|| {
        let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/cri.pb"));
        let set = FileDescriptorSet::parse_from_bytes(bytes).unwrap();
        let files = FileDescriptor::new_dynamic_fds(set.file, &[]).unwrap();
        files.into_iter().find(|file| file.services().next().is_some()).unwrap()
    })
}

/// Calls a method of the runtime service.
pub fn try_call(method: &str, request: &Value) -> Result<Value, Status> {
    try_call_within(TIMEOUT, "RuntimeService", method, request)
}

/// Calls a method of the runtime service. Panics if it fails.
#[track_caller]
pub fn call(method: &str, request: &Value) -> Value {
    try_call(method, request).unwrap_or_else(|status| {
        panic!("{method} {request}\nfailed: {status}\n--- end of containerd's log\n{}", crate::node::log_tail(40))
    })
}

/// Calls a method of the runtime service. Panics if it succeeds; returns the error message in lower case.
#[track_caller]
pub fn expect_error(method: &str, request: &Value) -> String {
    match try_call(method, request) {
        Ok(answer) => panic!("{method} {request} succeeded: {answer}"),
        Err(status) => status.message.to_lowercase(),
    }
}

/// Calls a streaming method of the runtime service. The iterator ends if no message arrives within the timeout.
pub fn call_streaming(method: &str) -> impl Iterator<Item = Value> + use<> {
    let answer = descriptor("RuntimeService", method).output_type();
    let answers = grpc::stream(SOCKET, &format!("/runtime.v1.RuntimeService/{method}"), Vec::new());
    std::iter::from_fn(move || Some(to_json(&answer, &answers.recv_timeout(TIMEOUT).ok()?)))
}

fn descriptor(service: &str, method: &str) -> MethodDescriptor {
    let found = protocol().services().find(|s| s.proto().name() == service).unwrap();
    let called = found.methods().find(|m| m.proto().name() == method);
    called.unwrap_or_else(|| panic!("the CRI has no {service}.{method}"))
}

fn to_json(message: &MessageDescriptor, bytes: &[u8]) -> Value {
    let options = protobuf_json_mapping::PrintOptions {
        proto_field_name: true,
        always_output_default_values: true,
        ..Default::default()
    };
    let message = message.parse_from_bytes(bytes).unwrap();
    let text = protobuf_json_mapping::print_to_string_with_options(&*message, &options).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Calls a method of any CRI service, with a timeout.
pub fn try_call_within(limit: Duration, service: &str, method: &str, request: &Value) -> Result<Value, Status> {
    let called = descriptor(service, method);
    let request: Box<dyn MessageDyn> =
        protobuf_json_mapping::parse_dyn_from_str(&called.input_type(), &request.to_string())
            .unwrap_or_else(|error| panic!("{method} {request}: {error}"));
    let path = format!("/runtime.v1.{service}/{method}");
    let answer = grpc::unary(SOCKET, &path, request.write_to_bytes_dyn().unwrap(), limit)?;
    Ok(to_json(&called.output_type(), &answer))
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
    use serde_json::json;

    use super::*;

    #[test]
    fn bytes_decodes_base64() {
        assert_eq!(bytes(&json!("aGVsbG8K")), b"hello\n");
        assert_eq!(bytes(&json!("aGVsbG8=")), b"hello");
        assert_eq!(bytes(&json!("")), b"");
    }

    #[test]
    fn protocol_has_the_runtime_service() {
        let service = protocol().services().find(|s| s.proto().name() == "RuntimeService").unwrap();
        assert!(service.methods().any(|m| m.proto().name() == "RunPodSandbox"));
    }
}
