//! The pod into which a fault is injected. Requests are made as a kubelet makes them: they are retried, and the ids of
//! a lost answer are looked up.

use std::fs;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cri::pod::{KUBELET, Pods, remove_parent, text};
use crate::cri::{Status, try_call_within};
use crate::{BUSYBOX, node};

/// Limit of a request that starts something.
pub const START_BUDGET: Duration = Duration::from_secs(120);
/// Limit of a request that ends a container or a pod.
pub const STOP_BUDGET: Duration = Duration::from_secs(45);
/// Limit of a query. Husk's limit is a second. A node that is emulated, and busy with a fault, gets more.
pub const QUERY_BUDGET: Duration = Duration::from_secs(6);
/// How long after its budget a request is still awaited.
pub const OVERTIME: Duration = Duration::from_secs(15);

/// Timeout for a container to begin with a script.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Command that a script of [`Victim::attack`] runs when it begins.
pub const BEGIN: &str = ": > /v/begun";

/// A request in the background.
pub struct Call {
    thread: JoinHandle<(Result<Value, Status>, Instant)>,
    begin: Instant,
}

/// A request that has ended.
pub struct Ended {
    /// The answer.
    pub result: Result<Value, Status>,
    /// When the request began.
    pub begin: Instant,
    /// When the request ended.
    pub end: Instant,
}

impl Call {
    /// Sends a request on a connection of its own. After `limit`, the connection is closed, as if the client were
    /// killed.
    pub fn start(method: &'static str, request: Value, limit: Duration) -> Self {
        let call = move || (try_call_within(limit, "RuntimeService", method, &request), Instant::now());
        Self { thread: std::thread::spawn(call), begin: Instant::now() }
    }

    /// Returns whether the request has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the request.
    pub fn join(self) -> Ended {
        let (result, end) = self.thread.join().expect("a request panicked");
        Ended { result, begin: self.begin, end }
    }
}

/// What a fault needs in the victim's container.
pub struct Equipment {
    /// A directory of the node, `/fs` in the container. The container writes to a file in it.
    pub host_path: Option<String>,
    /// The container's limits.
    pub resources: Value,
}

/// A container of the victim, and the file to which it writes.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The container's name in its metadata.
    pub name: String,
    file: PathBuf,
    /// The size of the file when containerd first said that the container does not run, and the time of this answer.
    ended: Option<(u64, Instant)>,
}

impl Writer {
    /// Returns how many times the container has written.
    pub fn size(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |metadata| metadata.len())
    }

    /// Records that containerd says that the container does not run.
    pub fn has_ended(&mut self) {
        let size = self.size();
        self.ended.get_or_insert((size, Instant::now()));
    }

    /// Returns when containerd first said that the container does not run.
    pub fn ended(&self) -> Option<Instant> {
        self.ended.map(|(_, at)| at)
    }

    /// Returns a text if the container has written although containerd had said that it does not run.
    pub fn judge(&self) -> Option<String> {
        let (ended, size) = (self.ended?.0, self.size());
        (size > ended).then(|| format!("container {} wrote {} times after its end", self.name, (size - ended) / 2))
    }
}

/// The pod into which a fault is injected.
pub struct Victim {
    /// The pod's name.
    pub name: String,
    /// The pod's configuration.
    pub config: Value,
    /// The pod's directory on the node, `/v` in its containers.
    pub dir: PathBuf,
    handler: String,
    /// Ids of all sandboxes and containers of the victim that containerd has told.
    pub ids: Vec<String>,
    /// The containers.
    pub writers: Vec<Writer>,
}

impl Victim {
    /// Prepares a pod.
    pub fn new(pods: &Pods) -> Self {
        let config = pods.config();
        let name = text(&config["metadata"]["name"]);
        let dir = pods.dir().join(format!("{name}.volume"));
        fs::create_dir_all(&dir).unwrap();
        Self { name, config, dir, handler: pods.handler().to_owned(), ids: Vec::new(), writers: Vec::new() }
    }

    /// Returns the request that runs the pod.
    pub fn run_request(&self) -> Value {
        json!({ "config": self.config, "runtime_handler": self.handler })
    }

    /// Returns the request that creates a container. The container writes to a file of its own twice a second, and
    /// later runs the script of [`Victim::attack`].
    pub fn create_request(&mut self, pod: &str, equipment: Equipment) -> Value {
        let name = format!("c{}", self.writers.len());
        self.writers.push(Writer { name: name.clone(), file: self.dir.join(&name), ended: None });
        let mut script = format!(
            "trap 'exit 0' TERM
            (until [ -e /v/attack ]; do sleep 0.5; done; . /v/attack) &
            (while :; do date >> /fs/data; sleep 0.5; done) 2>/dev/null &
            while :; do echo >> /v/{name}; echo >> /v/{name}; sleep 0.5; done"
        );
        let mut mounts = vec![json!({ "host_path": self.dir.to_string_lossy(), "container_path": "/v" })];
        match equipment.host_path {
            Some(path) => mounts.push(json!({ "host_path": path, "container_path": "/fs" })),
            None => script = script.replace("/fs/data", "/dev/null"),
        }
        json!({ "pod_sandbox_id": pod, "sandbox_config": self.config, "config": {
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": BUSYBOX },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "mounts": mounts,
            "linux": { "resources": equipment.resources, "security_context": KUBELET.clone() },
        }})
    }

    /// Makes the victim's containers run a shell script, and waits until a container has run the command [`BEGIN`] of
    /// this script.
    ///
    /// # Errors
    /// If the script cannot be written, or if no container begins with it.
    pub fn attack(&self, script: &str) -> Result<(), String> {
        let (part, whole) = (self.dir.join("attack.part"), self.dir.join("attack"));
        let written = fs::write(&part, script).and_then(|()| fs::rename(part, whole));
        written.map_err(|error| format!("failed to write the script: {error}"))?;
        let begun = node::eventually(BEGIN_TIMEOUT, || self.dir.join("begun").exists().then_some(()));
        begun.ok_or_else(|| "no container has begun with the script".to_owned())
    }

    /// Returns the ids of the victim's sandboxes, and whether each is ready.
    pub fn pods(&mut self) -> Result<Vec<(String, bool)>, Status> {
        let request = json!({ "filter": { "label_selector": self.config["labels"] } });
        let answer = try_call_within(STOP_BUDGET, "RuntimeService", "ListPodSandbox", &request)?;
        let all = answer["items"].as_array().into_iter().flatten();
        let own = all.filter(|pod| pod["metadata"]["name"] == self.name.as_str());
        let pods: Vec<_> = own.map(|pod| (text(&pod["id"]), pod["state"] == "SANDBOX_READY")).collect();
        self.note(pods.iter().map(|(id, _)| id));
        Ok(pods)
    }

    /// Returns the ids and names of a pod's containers, and whether containerd says that each runs. Records which
    /// containers have ended.
    pub fn containers(&mut self, pod: &str) -> Result<Vec<(String, String, bool)>, Status> {
        let request = json!({ "filter": { "pod_sandbox_id": pod } });
        let answer = try_call_within(STOP_BUDGET, "RuntimeService", "ListContainers", &request)?;
        let mut containers = Vec::new();
        for container in answer["containers"].as_array().into_iter().flatten() {
            let name = text(&container["metadata"]["name"]);
            let state = text(&container["state"]);
            containers.push((text(&container["id"]), name.clone(), state == "CONTAINER_RUNNING"));
            if state == "CONTAINER_EXITED" {
                self.writers.iter_mut().filter(|writer| writer.name == name).for_each(Writer::has_ended);
            }
        }
        self.note(containers.iter().map(|(id, ..)| id));
        Ok(containers)
    }

    fn note<'a>(&mut self, ids: impl Iterator<Item = &'a String>) {
        for id in ids {
            if !self.ids.contains(id) {
                self.ids.push(id.clone());
            }
        }
    }

    /// Removes the pod's parent cgroup, as the kubelet does.
    pub fn clean_up_cgroup(&self) {
        remove_parent(&self.name);
    }

    /// Removes what the kubelet removes after a pod: its cgroup and its volumes.
    pub fn clean_up(&self) {
        self.clean_up_cgroup();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
