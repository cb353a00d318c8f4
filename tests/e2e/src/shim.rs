//! Calls a shim as containerd does, for requests for which `ctr` has no command.

use std::fs;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::shim::shim::UpdateTaskRequest;
use serde_json::Value;

use crate::{KUBERNETES, NAMESPACE};

/// Type URL with which containerd sends JSON-encoded `LinuxResources`.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// The version of the Task service that containerd 1.7 calls. The runc shim of containerd 1.7 implements only this
/// version.
const SERVICE: &str = "containerd.task.v2.Task";

/// Updates the resource limits of a running container.
#[track_caller]
pub fn update(id: &str, resources: &Value) -> Result<(), String> {
    let path = format!("/run/containerd/io.containerd.runtime.v2.task/{NAMESPACE}/{id}/address");
    let address = fs::read_to_string(&path).unwrap_or_else(|error| panic!("failed to read {path}: {error}"));
    let client =
        ttrpc::Client::connect(address.trim()).unwrap_or_else(|error| panic!("failed to connect to the shim: {error}"));
    let any = Any { type_url: RESOURCES.to_owned(), value: serde_json::to_vec(resources).unwrap(), ..Any::default() };
    let request = UpdateTaskRequest { id: id.to_owned(), resources: Some(any).into(), ..UpdateTaskRequest::default() };
    let context = context();
    let call = ttrpc::Request {
        service: SERVICE.to_owned(),
        method: "Update".to_owned(),
        payload: request.write_to_bytes().unwrap(),
        timeout_nano: context.timeout_nano,
        metadata: ttrpc::context::to_pb(context.metadata),
        ..ttrpc::Request::default()
    };
    client.request(call).map(|_| ()).map_err(|error| error.to_string())
}

/// Returns a client of the Sandbox service of a pod's shim. The shim has to be the pod's sandbox controller.
#[track_caller]
pub fn sandbox_client(id: &str) -> SandboxClient {
    let path = format!("/run/containerd/io.containerd.sandbox.controller.v1.shim/{KUBERNETES}/{id}/address");
    let address = fs::read_to_string(&path).unwrap_or_else(|error| panic!("failed to read {path}: {error}"));
    let client =
        ttrpc::Client::connect(address.trim()).unwrap_or_else(|error| panic!("failed to connect to the shim: {error}"));
    SandboxClient::new(client)
}

/// Returns a request context with a timeout and the containerd namespace.
pub fn context() -> ttrpc::context::Context {
    let mut context = ttrpc::context::with_timeout(30_000_000_000);
    context.metadata.insert("containerd-namespace-ttrpc".to_owned(), vec![NAMESPACE.to_owned()]);
    context
}
