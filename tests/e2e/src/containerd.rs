//! Calls containerd's own services, for what the suites ask often. `ctr` would start a process for each question, which
//! takes 0.1 to 0.3 s in an emulated node.

use std::time::Duration;

use serde_json::{Value, json};

use crate::grpc::{self, Status};

/// Timeout of a call.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A task: the running container, or what is left of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// The pid of its first process on the node.
    pub pid: i32,
    /// `CREATED`, `RUNNING`, `STOPPED`, `PAUSED` …
    pub status: String,
}

/// Returns the ids of the containers that containerd knows in a namespace.
///
/// # Errors
/// The status of the failed call.
pub fn containers(namespace: &str) -> Result<Vec<String>, Status> {
    let answer = call(namespace, "containers.v1.Containers", "List", &json!({}))?;
    Ok(items(&answer["containers"]).map(|container| text(&container["id"])).collect())
}

/// Returns the tasks that containerd knows in a namespace.
///
/// # Errors
/// The status of the failed call.
pub fn tasks(namespace: &str) -> Result<Vec<Task>, Status> {
    let answer = call(namespace, "tasks.v1.Tasks", "List", &json!({}))?;
    let pid = |task: &Value| task["pid"].as_i64().and_then(|pid| pid.try_into().ok()).unwrap_or_default();
    let tasks = items(&answer["tasks"]);
    Ok(tasks.map(|task| Task { id: text(&task["id"]), pid: pid(task), status: text(&task["status"]) }).collect())
}

/// Returns the references of the images that containerd has in a namespace.
///
/// # Errors
/// The status of the failed call.
pub fn images(namespace: &str) -> Result<Vec<String>, Status> {
    let answer = call(namespace, "images.v1.Images", "List", &json!({}))?;
    Ok(items(&answer["images"]).map(|image| text(&image["name"])).collect())
}

/// Sends a signal to the first process of a container.
///
/// # Errors
/// The status of the failed call.
pub fn kill(namespace: &str, id: &str, signal: i32) -> Result<(), Status> {
    call(namespace, "tasks.v1.Tasks", "Kill", &json!({ "container_id": id, "signal": signal })).map(drop)
}

/// Publishes an event without content. containerd sends it to all subscribers.
///
/// # Errors
/// The status of the failed call.
pub fn publish(namespace: &str, topic: &str) -> Result<(), Status> {
    let event = json!({ "type_url": "husk-e2e", "value": "" });
    call(namespace, "events.v1.Events", "Publish", &json!({ "topic": topic, "event": event })).map(drop)
}

fn call(namespace: &str, service: &str, method: &str, request: &Value) -> Result<Value, Status> {
    grpc::call(TIMEOUT, Some(namespace), &format!("containerd.services.{service}"), method, request)
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
