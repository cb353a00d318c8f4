//! Calls methods of containerd's gRPC services, including the CRI's services. Requests and responses are JSON, mapped
//! to protobuf with the .proto files.

mod http2;

use std::sync::OnceLock;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use protobuf::descriptor::FileDescriptorSet;
use protobuf::reflect::{FileDescriptor, MessageDescriptor, MethodDescriptor};
use protobuf::{Message, MessageDyn};
use serde_json::Value;

pub use http2::{Status, disconnect};

/// containerd's socket, which also serves the CRI.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// Returns the protobuf file descriptors of the services, which the build script has compiled.
fn files() -> &'static [FileDescriptor] {
    static FILES: OnceLock<Vec<FileDescriptor>> = OnceLock::new();
    FILES.get_or_init(|| {
        let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/services.pb"));
        let set = FileDescriptorSet::parse_from_bytes(bytes).unwrap();
        FileDescriptor::new_dynamic_fds(set.file, &[]).unwrap()
    })
}

/// Returns a method of a service. `service` is the full name, such as `runtime.v1.RuntimeService`.
fn method(service: &str, method: &str) -> MethodDescriptor {
    let (package, name) = service.rsplit_once('.').unwrap();
    let mut files = files().iter().filter(|file| file.proto().package() == package);
    let found = files.find_map(|file| file.services().find(|service| service.proto().name() == name));
    let methods = found.into_iter().flat_map(|service| service.methods().collect::<Vec<_>>());
    let mut called = methods.filter(|known| known.proto().name() == method);
    called.next().unwrap_or_else(|| panic!("the .proto files have no method {service}.{method}"))
}

/// Calls a method, with a timeout. Most services of containerd need a containerd namespace. The CRI needs none.
///
/// # Errors
/// The status of the failed call.
pub fn call(
    limit: Duration,
    namespace: Option<&str>,
    service: &str,
    name: &str,
    request: &Value,
) -> Result<Value, Status> {
    let called = method(service, name);
    let request: Box<dyn MessageDyn> =
        protobuf_json_mapping::parse_dyn_from_str(&called.input_type(), &request.to_string())
            .unwrap_or_else(|error| panic!("failed to encode the request {request} of {name}: {error}"));
    let path = format!("/{service}/{name}");
    let answer = http2::unary(SOCKET, namespace, &path, request.write_to_bytes_dyn().unwrap(), limit)?;
    Ok(json_of(&called.output_type(), &answer))
}

/// Calls a streaming method with an empty request. The returned iterator ends if no message arrives within `limit`.
pub fn stream_of(limit: Duration, service: &str, name: &str) -> impl Iterator<Item = Value> + use<> {
    let answer = method(service, name).output_type();
    let answers = stream(service, name);
    std::iter::from_fn(move || Some(json_of(&answer, &answers.recv_timeout(limit).ok()?)))
}

/// Calls a streaming method with an empty request, and returns the response messages as bytes.
pub fn stream(service: &str, name: &str) -> Receiver<Vec<u8>> {
    http2::stream(SOCKET, &format!("/{service}/{name}"), Vec::new())
}

fn json_of(message: &MessageDescriptor, bytes: &[u8]) -> Value {
    let options = protobuf_json_mapping::PrintOptions {
        proto_field_name: true,
        always_output_default_values: true,
        ..Default::default()
    };
    let message = message.parse_from_bytes(bytes).unwrap();
    let text = protobuf_json_mapping::print_to_string_with_options(&*message, &options).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn proto_files_describe_all_services_that_the_suites_call() {
        for (service, name) in [
            ("runtime.v1.RuntimeService", "RunPodSandbox"),
            ("runtime.v1.ImageService", "ImageStatus"),
            ("containerd.services.containers.v1.Containers", "List"),
            ("containerd.services.events.v1.Events", "Publish"),
            ("containerd.services.images.v1.Images", "List"),
            ("containerd.services.snapshots.v1.Snapshots", "Prepare"),
            ("containerd.services.tasks.v1.Tasks", "Kill"),
        ] {
            assert_eq!(method(service, name).proto().name(), name);
        }
    }

    #[test]
    fn tasks_are_decoded_with_containerds_field_numbers() {
        // The bytes encode a task with the id "a", the pid 7, the status PAUSED, and field 8. The .proto file does not
        // have field 8.
        let bytes = [0x0a, 9, 0x12, 1, b'a', 0x18, 7, 0x20, 4, 0x40, 1];
        let tasks = json_of(&method("containerd.services.tasks.v1.Tasks", "List").output_type(), &bytes);
        assert_eq!(tasks, json!({ "tasks": [{ "id": "a", "pid": 7, "status": "PAUSED" }] }));
    }
}
