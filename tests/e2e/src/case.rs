//! Isolated test cases: unique names, cleanup at the end, and the check for leftovers.

use std::cell::{Cell, RefCell};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use serde_json::Value;

use crate::command::{Input, Output, Running, ctr, run_ctr};
use crate::containerd::{self, Task};
use crate::leftovers::Snapshot;
use crate::run::Run;
use crate::{BUSYBOX, NAMESPACE, PYTHON, node, spec};

/// Timeout for leftovers to disappear after a test.
const SETTLE: Duration = Duration::from_secs(20);

/// A test in progress.
pub struct Case {
    name: String,
    runtime: String,
    next: Cell<u32>,
    dir: PathBuf,
    rootfs: RefCell<Vec<Rootfs>>,
}

/// A mounted rootfs.
struct Rootfs {
    path: PathBuf,
    /// Whether ctr has mounted the rootfs. If so, ctr also unmounts the rootfs, and removes the lease of the mount.
    by_ctr: bool,
}

/// Runs `body` as the test `name`. Fails if the test leaves anything on the node.
#[track_caller]
pub fn case(name: &str, body: impl FnOnce(&Case)) {
    case_of(name, &crate::runtime(), body);
}

/// Like [`case`], but uses `runtime` instead of the runtime under test.
#[track_caller]
pub fn case_of(name: &str, runtime: &str, body: impl FnOnce(&Case)) {
    node::need_image(BUSYBOX);
    let case = Case {
        name: name.to_owned(),
        runtime: runtime.to_owned(),
        next: Cell::new(0),
        dir: PathBuf::from(format!("/tmp/husk-e2e/{name}")),
        rootfs: RefCell::new(Vec::new()),
    };
    fs::create_dir_all(&case.dir).unwrap();
    let before = Snapshot::take();
    let result = catch_unwind(AssertUnwindSafe(|| body(&case)));
    let forced = case.clean_up(result.is_err());
    if let Err(panic) = result {
        // The test fails with its own error. The leftovers are printed too, because they may explain this error.
        if let Err(left) = before.compare_until_equal(Duration::from_secs(5)) {
            eprintln!("leftovers of the failed test:\n{left}");
        }
        resume_unwind(panic);
    }
    if let Err(left) = before.compare_until_equal(SETTLE) {
        panic!("leftovers of {name}:\n{left}\n--- last 40 lines of containerd's log\n{}", node::log_tail(40));
    }
    assert!(forced.is_empty(), "{name}: containers had to be removed by force: {forced:?}");
}

impl Case {
    /// Returns a new container id that no other test uses.
    pub fn id(&self) -> String {
        self.next.set(self.next.get() + 1);
        format!("{}-{}", self.name, self.next.get())
    }

    /// Returns the test's directory on the node. The directory is removed when the test ends.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the runtime of this case.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Prepares a `ctr run` of the busybox image.
    pub fn busybox<S: AsRef<str>>(&self, command: &[S]) -> Run {
        Run::new(&self.runtime, self.id(), BUSYBOX, command)
    }

    /// Prepares a `ctr run` of a shell script in the busybox image.
    pub fn sh(&self, script: &str) -> Run {
        self.busybox(&["sh", "-c", script])
    }

    /// Prepares a `ctr run` of a Python program.
    pub fn python(&self, program: &str) -> Run {
        node::need_image(PYTHON);
        Run::new(&self.runtime, self.id(), PYTHON, &["python3", "-c", program])
    }

    /// Starts a container in the background and waits until it runs. The container only sleeps.
    #[track_caller]
    pub fn sleeper(&self) -> Container {
        self.container(self.sh("echo up; exec sleep 1000"))
    }

    /// Starts `run` in the background and waits until it prints a line with "up".
    #[track_caller]
    pub fn container(&self, run: Run) -> Container {
        let id = run.id().to_owned();
        let mut running = run.start(Input::Pipe);
        running.wait_for("up");
        Container { id, running }
    }

    /// Prepares a `ctr run` with the default specification, modified by `patch`.
    pub fn with_spec(&self, script: &str, patch: impl FnOnce(&mut Value)) -> Run {
        let id = self.id();
        let mut value = spec::default_spec();
        value["root"]["path"] = self.rootfs(&id).to_string_lossy().into();
        value["process"]["args"] = serde_json::json!(["sh", "-c", script]);
        value["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        patch(&mut value);
        let path = self.dir.join(format!("{id}.json"));
        fs::write(&path, serde_json::to_vec(&value).unwrap()).unwrap();
        Run::from_config(&self.runtime, id, &path)
    }

    /// Mounts a writable busybox rootfs on the node for this test. containerd's snapshotter makes the rootfs.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        /// Snapshot key of the image's uppermost layer.
        static LAYER: OnceLock<String> = OnceLock::new();
        let path = self.dir.join(format!("{name}.rootfs"));
        fs::create_dir_all(&path).unwrap();
        let key = path.to_string_lossy();
        let by_ctr = match LAYER.get() {
            Some(layer) => {
                let options = containerd::prepare_snapshot(NAMESPACE, &key, layer);
                let options = options.unwrap_or_else(|status| panic!("failed to create the snapshot {key}: {status}"));
                mount(Some("overlay"), &path, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
                false
            }
            None => {
                // The key of the uppermost layer is not known yet, and only ctr can derive it from the image.
                run_ctr(&["images", "mount", "--rw", BUSYBOX, &key]).expect_code(0);
                let layer = containerd::snapshot_parent(NAMESPACE, &key);
                let layer =
                    layer.unwrap_or_else(|status| panic!("failed to get the parent of the snapshot {key}: {status}"));
                LAYER.get_or_init(|| layer);
                true
            }
        };
        self.rootfs.borrow_mut().push(Rootfs { path: path.clone(), by_ctr });
        path
    }

    /// Removes the test's remaining containers and mounts. Returns the ids of these containers, or an empty list if the
    /// test has failed.
    fn clean_up(&self, failed: bool) -> Vec<String> {
        let prefix = format!("{}-", self.name);
        let mut ids = containerd::containers(NAMESPACE).unwrap_or_default();
        ids.retain(|id| id.starts_with(&prefix));
        for id in &ids {
            remove(id);
        }
        for Rootfs { path, by_ctr } in self.rootfs.borrow().iter() {
            let key = path.to_string_lossy();
            if *by_ctr {
                run_ctr(&["images", "unmount", "--rm", &key]);
            } else {
                // If the unmount fails, the check for leftovers reports the mount.
                let _ = umount(path);
                let _ = containerd::remove_snapshot(NAMESPACE, &key);
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
        if failed { Vec::new() } else { ids }
    }
}

/// Removes a container by force, whatever state it is in.
pub fn remove(id: &str) {
    for args in [vec!["tasks", "delete", "--force", id], vec!["containers", "rm", id], vec!["snapshots", "rm", id]] {
        let mut command: Command = Command::new("timeout");
        command.args(["--kill-after=1", "20", "ctr", "-n", NAMESPACE]).args(args);
        let _ = command.output();
    }
}

/// A container in the background, and the `ctr run --rm` that started it.
pub struct Container {
    /// The container's id.
    pub id: String,
    /// The `ctr run` process.
    pub running: Running,
}

impl Container {
    /// Runs `ctr task exec` in the container.
    #[track_caller]
    pub fn exec(&self, exec_id: &str, command: &[&str]) -> Output {
        self.exec_with(exec_id, &[], command)
    }

    /// Runs `ctr task exec` in the container, with further options.
    #[track_caller]
    pub fn exec_with(&self, exec_id: &str, options: &[&str], command: &[&str]) -> Output {
        Running::start(self.exec_command(exec_id, options, command), Input::Null).wait()
    }

    /// Returns the command line of a `ctr task exec`.
    pub fn exec_command(&self, exec_id: &str, options: &[&str], command: &[&str]) -> Command {
        let mut args = vec!["tasks", "exec", "--exec-id", exec_id];
        args.extend(options);
        args.push(&self.id);
        args.extend(command);
        ctr(&args)
    }

    /// Runs `ctr task VERB … ID`.
    #[track_caller]
    pub fn task(&self, args: &[&str]) -> Output {
        let mut all = vec!["tasks"];
        all.extend(args);
        all.push(&self.id);
        run_ctr(&all)
    }

    /// Returns the pid that containerd reports for the task.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        self.record().pid
    }

    /// Returns the state that containerd reports for the task, such as `RUNNING`.
    #[track_caller]
    pub fn state(&self) -> String {
        self.record().status
    }

    #[track_caller]
    fn record(&self) -> Task {
        let tasks = containerd::tasks(NAMESPACE).unwrap_or_else(|status| panic!("failed to list the tasks: {status}"));
        let found = tasks.iter().find(|task| task.id == self.id).cloned();
        found.unwrap_or_else(|| panic!("containerd has no task {}; its tasks: {tasks:?}", self.id))
    }

    /// Kills the container with SIGKILL. Waits for its `ctr run` to exit, and requires exit code 137 (128 + 9).
    #[track_caller]
    pub fn kill(self) -> Output {
        containerd::kill(NAMESPACE, &self.id, libc::SIGKILL)
            .unwrap_or_else(|status| panic!("failed to kill {}: {status}", self.id));
        self.running.wait().expect_code(137)
    }
}
