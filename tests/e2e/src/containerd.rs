//! Calls containerd's services directly for frequent requests. In an emulated node, starting `ctr` for each request
//! would take 0.1 to 0.3 s.

use std::time::Duration;

use serde_json::{Value, json};

use crate::grpc::{self, Status};

/// Timeout of a call.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The snapshotter that `ctr` and the CRI use by default.
const SNAPSHOTTER: &str = "overlayfs";

/// A container's task, which may be running or have exited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// The pid of the task's first process on the node.
    pub pid: i32,
    /// The task's status: `CREATED`, `RUNNING`, `STOPPED`, `PAUSED` …
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

/// Deletes a container from containerd, and removes the container's snapshot. The container must not have a task.
///
/// The snapshot is removed first, as containerd's own client does (`WithSnapshotCleanup`). containerd's garbage
/// collection may remove a snapshot that no container references at any time.
///
/// # Errors
/// The status of the failed call.
pub fn delete_container(namespace: &str, id: &str) -> Result<(), Status> {
    remove_snapshot(namespace, id)?;
    call(namespace, "containers.v1.Containers", "Delete", &json!({ "id": id })).map(drop)
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

/// Pauses a container.
///
/// # Errors
/// The status of the failed call.
pub fn pause(namespace: &str, id: &str) -> Result<(), Status> {
    call(namespace, "tasks.v1.Tasks", "Pause", &json!({ "container_id": id })).map(drop)
}

/// Resumes a paused container.
///
/// # Errors
/// The status of the failed call.
pub fn resume(namespace: &str, id: &str) -> Result<(), Status> {
    call(namespace, "tasks.v1.Tasks", "Resume", &json!({ "container_id": id })).map(drop)
}

/// Asks a container's shim for the container's pids. Returns their number.
///
/// # Errors
/// The status of the failed call.
pub fn pids(namespace: &str, id: &str) -> Result<usize, Status> {
    let answer = call(namespace, "tasks.v1.Tasks", "ListPids", &json!({ "container_id": id }))?;
    Ok(items(&answer["processes"]).count())
}

/// Returns the key of a snapshot's parent. For a snapshot of an image, the parent is the image's uppermost layer.
///
/// # Errors
/// The status of the failed call.
pub fn snapshot_parent(namespace: &str, key: &str) -> Result<String, Status> {
    let request = json!({ "snapshotter": SNAPSHOTTER, "key": key });
    Ok(text(&call(namespace, "snapshots.v1.Snapshots", "Stat", &request)?["info"]["parent"]))
}

/// Creates a writable snapshot. Returns the options of its overlay mount.
///
/// # Errors
/// The status of the failed call.
#[track_caller]
pub fn prepare_snapshot(namespace: &str, key: &str, parent: &str) -> Result<String, Status> {
    // Without this label, containerd's garbage collection would remove the snapshot.
    let labels = json!({ "containerd.io/gc.root": "husk-e2e" });
    let request = json!({ "snapshotter": SNAPSHOTTER, "key": key, "parent": parent, "labels": labels });
    let answer = call(namespace, "snapshots.v1.Snapshots", "Prepare", &request)?;
    let mounts: Vec<&Value> = items(&answer["mounts"]).collect();
    assert!(mounts.len() == 1 && mounts[0]["type"] == "overlay", "expected one overlay mount, got {answer}");
    Ok(items(&mounts[0]["options"]).map(text).collect::<Vec<_>>().join(","))
}

/// Removes a snapshot.
///
/// # Errors
/// The status of the failed call.
pub fn remove_snapshot(namespace: &str, key: &str) -> Result<(), Status> {
    let request = json!({ "snapshotter": SNAPSHOTTER, "key": key });
    call(namespace, "snapshots.v1.Snapshots", "Remove", &request).map(drop)
}

/// Publishes an event without content. containerd sends the event to all subscribers.
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
