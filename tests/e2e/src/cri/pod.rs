//! Pods for one test: run, filled with containers, looked into, and removed at the end with the check that nothing stays.

use std::cell::Cell;
use std::fs;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Status, bytes, call, handler, number, try_call, try_call_within};
use crate::leftovers::Snapshot;
use crate::{BUSYBOX, KUBERNETES, PAUSE, PYTHON, node};

/// How long the node may take to come to rest after a test.
const SETTLE: Duration = Duration::from_secs(20);
/// The label by which a test finds its pods again.
const LABEL: &str = "husk-e2e";

/// What kubelet sets for a pod that asks for nothing: the protocol's own default shares processes.
static KUBELET: LazyLock<Value> = LazyLock::new(|| json!({ "namespace_options": { "pid": "CONTAINER" } }));

/// The pods of one test.
pub struct Pods {
    name: String,
    handler: String,
    dir: PathBuf,
    next: Cell<u32>,
}

/// Runs `body` as the test `name`; afterwards nothing of its pods may be left in the node.
#[track_caller]
pub fn pods(name: &str, body: impl FnOnce(&Pods)) {
    pods_of(name, handler(), body);
}

/// Like [`pods`], with a runtime handler of the test's own choice.
#[track_caller]
pub fn pods_of(name: &str, handler: &str, body: impl FnOnce(&Pods)) {
    for image in [PAUSE, BUSYBOX] {
        need_image(image);
    }
    let dir = PathBuf::from(format!("/tmp/husk-e2e/{name}"));
    fs::create_dir_all(&dir).unwrap();
    let pods = Pods { name: name.to_owned(), handler: handler.to_owned(), dir, next: Cell::new(0) };
    let before = Snapshot::take();
    let result = catch_unwind(AssertUnwindSafe(|| body(&pods)));
    if result.is_err() {
        eprintln!("--- containerd's log ends\n{}", node::log_tail(60));
    }
    let removed = pods.remove_all();
    let _ = fs::remove_dir_all(&pods.dir);
    if let Err(panic) = result {
        if let Err(left) = before.compare_until_equal(Duration::from_secs(5)) {
            eprintln!("after the failed test these were left over:\n{left}");
        }
        resume_unwind(panic);
    }
    removed.unwrap_or_else(|error| panic!("{name}: {error}\n--- containerd's log ends\n{}", node::log_tail(40)));
    if let Err(left) = before.compare_until_equal(SETTLE) {
        panic!("left over after {name}:\n{left}\n--- containerd's log ends\n{}", node::log_tail(60));
    }
}

/// Imports an image for the CRI, and waits until it knows of it.
pub fn need_image(reference: &str) {
    node::need_image_in(KUBERNETES, reference);
    let request = json!({ "image": { "image": reference } });
    let known = node::eventually(Duration::from_secs(30), || {
        let answer = try_call_within(super::TIMEOUT, "ImageService", "ImageStatus", &request).ok()?;
        (!answer["image"].is_null()).then_some(())
    });
    assert!(known.is_some(), "the CRI does not know {reference}");
}

impl Pods {
    /// A directory of this test's on the node, removed afterwards.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration of a pod, with a name of its own.
    pub fn config(&self) -> Value {
        self.next.set(self.next.get() + 1);
        let name = format!("{}-{}", self.name, self.next.get());
        let logs = self.dir.join(format!("{name}.logs"));
        fs::create_dir_all(&logs).unwrap();
        json!({
            "metadata": { "name": name, "uid": format!("uid-{name}"), "namespace": "e2e", "attempt": 0 },
            "hostname": name,
            "log_directory": logs.to_string_lossy(),
            "labels": { LABEL: self.name },
            "linux": { "cgroup_parent": format!("/kubepods/{name}"), "security_context": KUBELET.clone() },
        })
    }

    /// Creates the directory of a volume, as the kubelet names it: `…/<uid>/volumes/kubernetes.io~<kind>/<name>`.
    pub fn volume(&self, pod: &Pod, kind: &str, name: &str) -> PathBuf {
        let uid = text(&pod.config["metadata"]["uid"]);
        let path = self.dir.join(uid).join("volumes").join(format!("kubernetes.io~{kind}")).join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Runs a pod with nothing in it.
    #[track_caller]
    pub fn pod(&self) -> Pod {
        self.run(self.config())
    }

    /// Runs a pod of this configuration.
    #[track_caller]
    pub fn run(&self, config: Value) -> Pod {
        self.run_by(&self.handler, config)
    }

    /// Runs a pod of this configuration by another runtime handler than the test's.
    #[track_caller]
    pub fn run_by(&self, handler: &str, config: Value) -> Pod {
        let answer = call("RunPodSandbox", &json!({ "config": config, "runtime_handler": handler }));
        Pod { id: text(&answer["pod_sandbox_id"]), config, next: Cell::new(0) }
    }

    /// Runs a pod that has to be refused; gives the error's text in lower case.
    #[track_caller]
    pub fn refused(&self, config: &Value) -> String {
        super::refused("RunPodSandbox", &json!({ "config": config, "runtime_handler": self.handler }))
    }

    /// Stops and removes whatever pods there still are.
    fn remove_all(&self) -> Result<(), String> {
        let filter = json!({ "filter": { "label_selector": { LABEL: self.name } } });
        let mut result = Ok(());
        for pod in call("ListPodSandbox", &filter)["items"].as_array().into_iter().flatten() {
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                if let Err(status) = try_call(method, &json!({ "pod_sandbox_id": pod["id"] })) {
                    result = Err(format!("{method}: {status}"));
                }
            }
        }
        // containerd leaves the parents to kubelet, which makes them.
        for number in 1..=self.next.get() {
            remove_parent(&format!("{}-{number}", self.name));
        }
        result
    }
}

/// A pod.
pub struct Pod {
    /// Its sandbox's id.
    pub id: String,
    /// Its configuration.
    pub config: Value,
    next: Cell<u32>,
}

impl Pod {
    /// The CRI's status of it, verbose.
    #[track_caller]
    pub fn status(&self) -> Value {
        call("PodSandboxStatus", &json!({ "pod_sandbox_id": self.id, "verbose": true }))
    }

    /// Whether the CRI counts it as ready.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        self.status()["status"]["state"] == "SANDBOX_READY"
    }

    /// Its addresses, the first one first.
    #[track_caller]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let network = &self.status()["status"]["network"];
        let more = network["additional_ips"].as_array().into_iter().flatten().map(|ip| &ip["ip"]);
        std::iter::once(&network["ip"]).chain(more).map(|ip| text(ip).parse().unwrap()).collect()
    }

    /// The path of its network namespace on the node.
    #[track_caller]
    pub fn netns(&self) -> PathBuf {
        let info: Value = serde_json::from_str(&text(&self.status()["info"]["info"])).unwrap();
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().unwrap();
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network").unwrap();
        text(&network["path"]).into()
    }

    /// The pid the CRI has for it.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let info: Value = serde_json::from_str(&text(&self.status()["info"]["info"])).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    /// The configuration of a busybox container that runs a shell script.
    pub fn sh(&self, script: &str) -> Value {
        self.next.set(self.next.get() + 1);
        let name = format!("c{}", self.next.get());
        json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": BUSYBOX },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": { "resources": {}, "security_context": KUBELET.clone() },
        })
    }

    /// The configuration of a container that runs a Python program; [`need_image`] has its image there.
    pub fn python(&self, program: &str) -> Value {
        let mut config = self.sh("");
        config["image"]["image"] = PYTHON.into();
        config["command"] = json!(["python3", "-c", program]);
        config
    }

    /// Creates a container without starting it.
    #[track_caller]
    pub fn create(&self, config: &Value) -> PodContainer {
        let request = json!({ "pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config });
        let answer = call("CreateContainer", &request);
        let log = PathBuf::from(text(&self.config["log_directory"])).join(text(&config["log_path"]));
        PodContainer { id: text(&answer["container_id"]), log }
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn start(&self, config: &Value) -> PodContainer {
        let container = self.create(config);
        container.start();
        container
    }

    /// A container that sleeps, to look into the pod with.
    #[track_caller]
    pub fn sleeper(&self) -> PodContainer {
        self.start(&self.sh("trap 'exit 0' TERM; sleep 100000 & wait"))
    }

    /// Stops it.
    #[track_caller]
    pub fn stop(&self) {
        call("StopPodSandbox", &json!({ "pod_sandbox_id": self.id }));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        call("RemovePodSandbox", &json!({ "pod_sandbox_id": self.id }));
        let name = text(&self.config["metadata"]["name"]);
        remove_parent(&name);
    }
}

/// Removes the cgroup of a pod's that kubelet would: in version 1 there is one in each hierarchy.
fn remove_parent(name: &str) {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([top.to_owned()]) {
        let _ = fs::remove_dir(hierarchy.join("kubepods").join(name));
    }
}

/// What a command in a container gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// Its exit code.
    pub code: i64,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// A container of a pod.
pub struct PodContainer {
    /// Its id.
    pub id: String,
    log: PathBuf,
}

impl PodContainer {
    /// Starts it.
    #[track_caller]
    pub fn start(&self) {
        call("StartContainer", &json!({ "container_id": self.id }));
    }

    /// Stops it, with so many seconds between SIGTERM and SIGKILL.
    #[track_caller]
    pub fn stop(&self, timeout: u32) {
        call("StopContainer", &json!({ "container_id": self.id, "timeout": timeout }));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        call("RemoveContainer", &json!({ "container_id": self.id }));
    }

    /// The CRI's status of it.
    #[track_caller]
    pub fn status(&self) -> Value {
        call("ContainerStatus", &json!({ "container_id": self.id }))["status"].clone()
    }

    /// Waits for its end; gives exit code and reason.
    #[track_caller]
    pub fn wait(&self) -> (i64, String) {
        self.wait_within(crate::command::TIMEOUT)
    }

    /// Waits so long for its end; gives exit code and reason.
    #[track_caller]
    pub fn wait_within(&self, limit: Duration) -> (i64, String) {
        let ended = node::eventually(limit, || {
            let status = self.status();
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        });
        let status = ended.unwrap_or_else(|| panic!("{} does not end: {}\n{}", self.id, self.status(), self.log()));
        (number(&status["exit_code"]), text(&status["reason"]))
    }

    /// Runs a command in it.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Executed {
        self.exec_within(Duration::from_secs(60), command)
    }

    /// Runs a command in it that may take so long.
    #[track_caller]
    pub fn exec_within(&self, limit: Duration, command: &[&str]) -> Executed {
        self.exec_sync(limit, command).unwrap_or_else(|status| panic!("{command:?}: {status}\n{}", node::log_tail(40)))
    }

    /// Runs a command in it, which may have ended.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn try_exec(&self, command: &[&str]) -> Result<Executed, Status> {
        self.exec_sync(Duration::from_secs(60), command)
    }

    fn exec_sync(&self, limit: Duration, command: &[&str]) -> Result<Executed, Status> {
        let request = json!({ "container_id": self.id, "cmd": command, "timeout": limit.as_secs() });
        let answer = try_call_within(limit + super::TIMEOUT, "RuntimeService", "ExecSync", &request)?;
        let text = |value| String::from_utf8_lossy(&bytes(value)).into_owned();
        Ok(Executed { code: number(&answer["exit_code"]), out: text(&answer["stdout"]), err: text(&answer["stderr"]) })
    }

    /// Runs a shell script in it that has to succeed without a word on standard error; gives what it prints.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let done = self.exec(&["sh", "-c", script]);
        assert!(done.code == 0 && done.err.is_empty(), "{script}\ngave {done:?}\n{}", node::log_tail(20));
        done.out.trim_end().to_owned()
    }

    /// Its log file.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| panic!("{}: {error}", self.log.display()))
    }

    /// Where its log is.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Waits until its log has a line with `text`.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let found = node::eventually(crate::command::TIMEOUT, || self.log().contains(text).then_some(()));
        assert!(found.is_some(), "{text:?} is not in the log:\n{}", self.log());
    }
}

/// A string, or nothing.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
