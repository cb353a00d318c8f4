//! Runs the pods of one test, with their containers and execs. Removes the pods at the end and checks for leftovers.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use husk_base::sync::lock;
use serde_json::{Value, json};

use super::{Status, bytes, call, handler, number, try_call, try_call_within};
use crate::leftovers::Snapshot;
use crate::{BUSYBOX, KUBERNETES, PAUSE, PYTHON, node};

/// Timeout for leftovers to disappear after a test.
const SETTLE: Duration = Duration::from_secs(20);
/// The label that identifies a test's pods.
const LABEL: &str = "husk-e2e";

/// The kubelet's default security context. It sets the PID namespace mode, because the CRI's default is POD and the
/// kubelet's default is CONTAINER.
pub static KUBELET: LazyLock<Value> = LazyLock::new(|| json!({ "namespace_options": { "pid": "CONTAINER" } }));

/// The pods of one test.
pub struct Pods {
    name: String,
    handler: String,
    dir: PathBuf,
    next: AtomicU32,
}

/// Runs `body` as the test `name`. Fails if the test's pods leave anything on the node.
#[track_caller]
pub fn pods(name: &str, body: impl FnOnce(&Pods)) {
    pods_with_handler(name, handler(), body);
}

/// Like [`pods`], but uses `handler` instead of the runtime handler under test.
#[track_caller]
pub fn pods_with_handler(name: &str, handler: &str, body: impl FnOnce(&Pods)) {
    for image in [PAUSE, BUSYBOX] {
        need_image(image);
    }
    let dir = PathBuf::from(format!("/tmp/husk-e2e/{name}"));
    fs::create_dir_all(&dir).unwrap();
    let pods = Pods { name: name.to_owned(), handler: handler.to_owned(), dir, next: AtomicU32::new(0) };
    let before = Snapshot::take();
    let result = catch_unwind(AssertUnwindSafe(|| body(&pods)));
    if result.is_err() {
        eprintln!("--- last 60 lines of containerd's log\n{}", node::log_tail(60));
    }
    let removed = pods.remove_all();
    let _ = fs::remove_dir_all(&pods.dir);
    if let Err(panic) = result {
        if let Err(left) = before.compare_until_equal(Duration::from_secs(5)) {
            eprintln!("leftovers of the failed test:\n{left}");
        }
        resume_unwind(panic);
    }
    removed.unwrap_or_else(|error| {
        panic!("{name}: {error}\n--- last 40 lines of containerd's log\n{}", node::log_tail(40))
    });
    if let Err(left) = before.compare_until_equal(SETTLE) {
        panic!("leftovers of {name}:\n{left}\n--- last 60 lines of containerd's log\n{}", node::log_tail(60));
    }
}

/// Imports an image for the CRI, and waits until the CRI lists it.
pub fn need_image(reference: &str) {
    static LISTED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut listed = lock(&LISTED);
    if listed.iter().any(|one| one == reference) {
        return;
    }
    node::need_image_in(KUBERNETES, reference);
    let request = json!({ "image": { "image": reference } });
    let known = node::eventually(Duration::from_secs(30), || {
        let answer = try_call_within(super::TIMEOUT, "ImageService", "ImageStatus", &request).ok()?;
        (!answer["image"].is_null()).then_some(())
    });
    assert!(known.is_some(), "the CRI does not list the imported image {reference}");
    listed.push(reference.to_owned());
}

impl Pods {
    /// Returns the test's directory on the node. The directory is removed when the test ends.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the runtime handler of the pods.
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// Returns the configuration of a pod with a new, unique name.
    pub fn config(&self) -> Value {
        let name = format!("{}-{}", self.name, self.next.fetch_add(1, Ordering::Relaxed) + 1);
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

    /// Creates the directory of a volume. Its path ends like a path of the kubelet:
    /// `…/<uid>/volumes/kubernetes.io~<kind>/<name>`.
    pub fn volume(&self, pod: &Pod, kind: &str, name: &str) -> PathBuf {
        let uid = text(&pod.config["metadata"]["uid"]);
        let path = self.dir.join(uid).join("volumes").join(format!("kubernetes.io~{kind}")).join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Creates the directory of an emptyDir on the node's disk. [`Pods::dir`] is on a tmpfs.
    pub fn disk_volume(&self, pod: &Pod, name: &str) -> DiskVolume {
        let dir = Path::new("/var/lib/kubelet/pods").join(text(&pod.config["metadata"]["uid"]));
        let path = dir.join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        DiskVolume { dir, path }
    }

    /// Runs a pod without containers.
    #[track_caller]
    pub fn pod(&self) -> Pod {
        self.run(self.config())
    }

    /// Runs a pod with this configuration.
    #[track_caller]
    pub fn run(&self, config: Value) -> Pod {
        self.run_with_handler(&self.handler, config)
    }

    /// Runs a pod with this configuration and this runtime handler.
    #[track_caller]
    pub fn run_with_handler(&self, handler: &str, config: Value) -> Pod {
        let answer = call("RunPodSandbox", &json!({ "config": config, "runtime_handler": handler }));
        Pod { id: text(&answer["pod_sandbox_id"]), config, next: Cell::new(0), netns: OnceCell::new() }
    }

    /// Requires that running a pod with this configuration fails. Returns the error message in lower case.
    #[track_caller]
    pub fn expect_error(&self, config: &Value) -> String {
        super::expect_error("RunPodSandbox", &json!({ "config": config, "runtime_handler": self.handler }))
    }

    /// Stops and removes the test's remaining pods.
    fn remove_all(&self) -> Result<(), String> {
        let filter = json!({ "filter": { "label_selector": { LABEL: self.name } } });
        let mut result = Ok(());
        for pod in call("ListPodSandbox", &filter)["items"].as_array().into_iter().flatten() {
            // RemovePodSandbox also stops the pod. With a separate StopPodSandbox, containerd would run the CNI plugins
            // twice.
            if let Err(status) = try_call("RemovePodSandbox", &json!({ "pod_sandbox_id": pod["id"] })) {
                result = Err(format!("RemovePodSandbox failed: {status}"));
            }
        }
        // containerd does not remove a pod's parent cgroup. On a Kubernetes node, the kubelet removes this cgroup.
        for number in 1..=self.next.load(Ordering::Relaxed) {
            remove_parent(&format!("{}-{number}", self.name));
        }
        result
    }
}

/// A volume on the node's disk. Dropping it removes its files.
pub struct DiskVolume {
    /// The directory of the pod's volumes.
    dir: PathBuf,
    path: PathBuf,
}

impl DiskVolume {
    /// Returns the volume's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DiskVolume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A pod.
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// Pod configuration.
    pub config: Value,
    next: Cell<u32>,
    netns: OnceCell<PathBuf>,
}

impl Pod {
    /// Returns the pod's verbose CRI status.
    #[track_caller]
    pub fn status(&self) -> Value {
        call("PodSandboxStatus", &json!({ "pod_sandbox_id": self.id, "verbose": true }))
    }

    /// Returns whether the pod is ready according to the CRI.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        self.status()["status"]["state"] == "SANDBOX_READY"
    }

    /// Returns the pod's IP addresses, the primary address first.
    #[track_caller]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let network = &self.status()["status"]["network"];
        let more = network["additional_ips"].as_array().into_iter().flatten().map(|ip| &ip["ip"]);
        std::iter::once(&network["ip"]).chain(more).map(|ip| text(ip).parse().unwrap()).collect()
    }

    /// Returns the path of the pod's network namespace on the node. Asks the CRI only once, because the path does
    /// not change.
    #[track_caller]
    pub fn netns(&self) -> PathBuf {
        let ask = || {
            let info: Value = serde_json::from_str(&text(&self.status()["info"]["info"])).unwrap();
            let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().unwrap();
            let network = namespaces.iter().find(|namespace| namespace["type"] == "network").unwrap();
            text(&network["path"]).into()
        };
        self.netns.get_or_init(ask).clone()
    }

    /// Returns the sandbox's pid according to the CRI.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let info: Value = serde_json::from_str(&text(&self.status()["info"]["info"])).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    /// Returns the configuration of a busybox container that runs a shell script.
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

    /// Returns the configuration of a container that runs a Python program. The caller has to import the image with
    /// [`need_image`] beforehand. Python starts without the module `site` (option `-S`), because this module would
    /// double the amount of data that Python reads at its start.
    pub fn python(&self, program: &str) -> Value {
        let mut config = self.sh("");
        config["image"]["image"] = PYTHON.into();
        config["command"] = json!(["python3", "-S", "-c", program]);
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

    /// Starts a container that only sleeps, so that tests can exec commands in it.
    #[track_caller]
    pub fn sleeper(&self) -> PodContainer {
        self.start(&self.sh("trap 'exit 0' TERM; sleep 100000 & wait"))
    }

    /// Stops the pod.
    #[track_caller]
    pub fn stop(&self) {
        call("StopPodSandbox", &json!({ "pod_sandbox_id": self.id }));
    }

    /// Removes the pod.
    #[track_caller]
    pub fn remove(&self) {
        call("RemovePodSandbox", &json!({ "pod_sandbox_id": self.id }));
        let name = text(&self.config["metadata"]["name"]);
        remove_parent(&name);
    }
}

/// Removes the parent cgroup of the pod `name`, as the kubelet does. With cgroup v1, each hierarchy has such a cgroup.
pub fn remove_parent(name: &str) {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([top.to_owned()]) {
        let _ = fs::remove_dir(hierarchy.join("kubepods").join(name));
    }
}

/// Result of a command in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// Exit code.
    pub code: i64,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A container of a pod.
pub struct PodContainer {
    /// Container id.
    pub id: String,
    log: PathBuf,
}

impl PodContainer {
    /// Starts the container.
    #[track_caller]
    pub fn start(&self) {
        call("StartContainer", &json!({ "container_id": self.id }));
    }

    /// Stops the container with SIGTERM, and with SIGKILL if it still runs after `timeout` seconds.
    #[track_caller]
    pub fn stop(&self, timeout: u32) {
        call("StopContainer", &json!({ "container_id": self.id, "timeout": timeout }));
    }

    /// Removes the container.
    #[track_caller]
    pub fn remove(&self) {
        call("RemoveContainer", &json!({ "container_id": self.id }));
    }

    /// Returns the container's CRI status.
    #[track_caller]
    pub fn status(&self) -> Value {
        call("ContainerStatus", &json!({ "container_id": self.id }))["status"].clone()
    }

    /// Waits for the container to exit. Returns the exit code and the reason from the CRI status.
    #[track_caller]
    pub fn wait(&self) -> (i64, String) {
        self.wait_within(crate::command::TIMEOUT)
    }

    /// Like [`PodContainer::wait`], with a timeout.
    #[track_caller]
    pub fn wait_within(&self, limit: Duration) -> (i64, String) {
        let ended = node::eventually(limit, || {
            let status = self.status();
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        });
        let status = ended.unwrap_or_else(|| {
            panic!("container {} has not exited: {}\nits log:\n{}", self.id, self.status(), self.log())
        });
        (number(&status["exit_code"]), text(&status["reason"]))
    }

    /// Runs a command in the container.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> ExecResult {
        self.exec_within(Duration::from_secs(60), command)
    }

    /// Like [`PodContainer::exec`], with a timeout.
    #[track_caller]
    pub fn exec_within(&self, limit: Duration, command: &[&str]) -> ExecResult {
        self.exec_sync(limit, command)
            .unwrap_or_else(|status| panic!("failed to run {command:?}: {status}\n{}", node::log_tail(40)))
    }

    /// Like [`PodContainer::exec`], but returns containerd's error, for example if the container has exited.
    pub fn try_exec(&self, command: &[&str]) -> Result<ExecResult, Status> {
        self.exec_sync(Duration::from_secs(60), command)
    }

    fn exec_sync(&self, limit: Duration, command: &[&str]) -> Result<ExecResult, Status> {
        let request = json!({ "container_id": self.id, "cmd": command, "timeout": limit.as_secs() });
        let answer = try_call_within(limit + super::TIMEOUT, "RuntimeService", "ExecSync", &request)?;
        let text = |value| String::from_utf8_lossy(&bytes(value)).into_owned();
        Ok(ExecResult {
            code: number(&answer["exit_code"]),
            out: text(&answer["stdout"]),
            err: text(&answer["stderr"]),
        })
    }

    /// Runs a shell script in the container. Requires success and an empty standard error. Returns the trimmed output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let done = self.exec(&["sh", "-c", script]);
        assert!(
            done.code == 0 && done.err.is_empty(),
            "expected success and empty stderr of {script}\nresult: {done:?}\n{}",
            node::log_tail(20)
        );
        done.out.trim_end().to_owned()
    }

    /// Returns the content of the container's log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| panic!("failed to read {}: {error}", self.log.display()))
    }

    /// Returns the path of the container's log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Waits until the container's log contains `text`.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let found = node::eventually(crate::command::TIMEOUT, || self.log().contains(text).then_some(()));
        assert!(found.is_some(), "{text:?} is not in the container's log:\n{}", self.log());
    }
}

/// Returns the string in `value`, or an empty string if `value` is not a string.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
