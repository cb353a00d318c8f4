//! Starts many real shims with the stand-in for the VMM. What they take from the machine has to grow linearly.
//!
//! Neither containerd nor CNI nor KVM's VMs are needed, but root, and a `/dev/kvm` that can be opened.

#![allow(clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, KillRequest, ShutdownRequest, StartRequest};
use containerd_shim_protos::api::{StateRequest, Status, WaitRequest};
use containerd_shim_protos::shim_sync::TaskClient;
use husk_e2e::scale::sample::{self, Process, Values};
use husk_e2e::scale::{Series, limits};
use husk_proto::annotations::{CONTAINER_TYPE, POD_UID, SANDBOX_ID};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use ttrpc::context::{Context, with_duration};

/// The shim under test.
const SHIM: &str = env!("CARGO_BIN_EXE_husk-scale-shim");
/// Number of shims of a batch.
const BATCH: u32 = 6;
/// Number of batches.
const BATCHES: u32 = 10;
/// containerd's namespace, and the parent of the pods' cgroups.
const NAMESPACE: &str = "husk-scale-test";
/// Time limit of a request, and of the end of all processes.
const LIMIT: Duration = Duration::from_secs(60);

fn main() {
    shims_grow_linearly();
    println!("test shims_grow_linearly ... ok");
}

/// A shim with one container.
struct Shim {
    id: String,
    client: TaskClient,
}

fn context() -> Context {
    with_duration(LIMIT)
}

impl Shim {
    /// Starts a shim as containerd does, and a container in it.
    fn start(dir: &Path, number: u32) -> Self {
        let id = format!("pod-{number}");
        let bundle = dir.join(&id);
        fs::create_dir_all(bundle.join("rootfs")).expect("the directory is writable");
        // Most pods have a volume that the kubelet updates. The shim watches its directories.
        let volume = dir.join(&id).join("volumes/kubernetes.io~projected/token");
        fs::create_dir_all(&volume).expect("the directory is writable");
        fs::write(volume.join("token"), "secret").expect("the directory is writable");
        let options = ["rbind", "ro", "rprivate"];
        let mount = json!({ "destination": "/token", "type": "bind", "source": volume, "options": options });
        let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": { "args": ["sleep"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "annotations": { CONTAINER_TYPE: "container", SANDBOX_ID: id, POD_UID: id },
            "mounts": [mount],
            "linux": { "cgroupsPath": format!("/{NAMESPACE}/{id}"), "namespaces": namespaces },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).expect("the directory is writable");
        let mut command = Command::new(SHIM);
        command.args(["-namespace", NAMESPACE, "-id", &id, "-address", "/run/containerd/containerd.sock"]);
        command.args(["-publish-binary", "/bin/true", "start"]).current_dir(&bundle).stdin(Stdio::null());
        let output = command.env("HUSK_CONFIG", dir.join("config.toml")).output().expect("the shim can be executed");
        let address = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{address}{}", String::from_utf8_lossy(&output.stderr));
        let client = TaskClient::new(ttrpc::Client::connect(address.trim()).expect("the shim listens"));
        let bundle = bundle.to_string_lossy().into_owned();
        let create = CreateTaskRequest { id: id.clone(), bundle, ..Default::default() };
        client.create(context(), &create).expect("the shim creates the container");
        client.start(context(), &StartRequest { id: id.clone(), ..Default::default() }).expect("the container starts");
        Self { id, client }
    }

    /// Kills and deletes the container, and ends the shim.
    fn end(&self) {
        let Self { id, client } = self;
        let kill = KillRequest { id: id.clone(), signal: 9, ..Default::default() };
        client.kill(context(), &kill).expect("the container is killed");
        let exit = client.wait(context(), &WaitRequest { id: id.clone(), ..Default::default() });
        assert_eq!(exit.expect("the container exits").exit_status, 137);
        client.delete(context(), &DeleteRequest { id: id.clone(), ..Default::default() }).expect("deleted");
        // The connection may end before the answer.
        let _ = client.shutdown(context(), &ShutdownRequest { id: id.clone(), ..Default::default() });
    }

    fn is_running(&self) -> bool {
        let state = client_state(&self.client, &self.id);
        state == Some(Status::RUNNING)
    }
}

fn client_state(client: &TaskClient, id: &str) -> Option<Status> {
    let state = client.state(context(), &StateRequest { id: id.to_owned(), ..Default::default() }).ok()?;
    state.status.enum_value().ok()
}

/// Returns the processes of the shims of this test.
fn processes() -> Vec<Process> {
    let all = Process::all().into_iter();
    all.filter(|process| fs::read_link(process.dir.join("exe")).is_ok_and(|exe| exe == Path::new(SHIM))).collect()
}

fn measure() -> Values {
    let mut values = Values::new();
    sample::processes(&processes(), &mut values);
    let threads = ["shims", "launchers", "VMMs"].map(|kind| format!("threads of the {kind}"));
    let threads = threads.iter().filter_map(|name| values.get(name.as_str())).sum();
    values.insert("threads of the node", threads);
    values
}

fn shims_grow_linearly() {
    // The state directories of the shims are on a file system of the test, and their abstract sockets are in a network
    // namespace of the test.
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("this test needs root: it creates namespaces");
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).expect("mounts can become slaves");
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs can be mounted");
    let dir = tempfile::tempdir().expect("the directory for temporary files is writable");
    let image = dir.path().join("image");
    fs::write(&image, "no kernel").expect("the directory is writable");
    let config = format!("kernel = {image:?}\ninitrd = {image:?}\ntimeout_factor = 5\n");
    fs::write(dir.path().join("config.toml"), config).expect("the directory is writable");

    let (mut series, mut shims) = (Series::default(), Vec::new());
    for batch in 0..BATCHES {
        let begin = Instant::now();
        shims.extend((0..BATCH).map(|number| Shim::start(dir.path(), batch * BATCH + number)));
        let seconds = begin.elapsed().as_secs_f64() / f64::from(BATCH);
        series.add((batch + 1) * BATCH, measure(), seconds);
    }
    assert!(shims.iter().all(Shim::is_running));
    let outcome = series.judge(limits::read());
    println!("{}", outcome.report());
    shims.iter().for_each(Shim::end);
    let begin = Instant::now();
    while !processes().is_empty() {
        assert!(begin.elapsed() < LIMIT, "processes are left: {:?}", processes());
        thread::sleep(Duration::from_millis(100));
    }
    let left = left();
    assert!(left.is_empty(), "the shims have left {left:?}");
    assert!(outcome.findings.is_empty(), "{}", outcome.findings.join("\n"));
}

/// Removes the cgroups that the pods shared. Returns what the shims have left.
fn left() -> Vec<PathBuf> {
    let parents = ["/run/husk", "/run/containerd/s"].map(|path| Path::new(path).to_owned());
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let hierarchies = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).map(|path| path.join(NAMESPACE));
    for cgroup in hierarchies {
        // Fails if a pod's cgroup is left.
        if cgroup.exists() && fs::remove_dir(&cgroup).is_err() {
            return vec![cgroup];
        }
    }
    let entries =
        |path: &PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let namespace = parents[0].join(NAMESPACE);
    [&namespace, &parents[1]].into_iter().flat_map(entries as fn(&PathBuf) -> Vec<PathBuf>).collect()
}
