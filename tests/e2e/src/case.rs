//! One guarded test: unique names, everything removed at the end, and the check that nothing is left over.

use std::cell::{Cell, RefCell};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::command::{Input, Output, Running, ctr, run_ctr};
use crate::leftovers::Snapshot;
use crate::run::Run;
use crate::{BUSYBOX, NAMESPACE, PYTHON, node, spec};

/// How long the node may take to come to rest after a test.
const SETTLE: Duration = Duration::from_secs(20);

/// A test in progress.
pub struct Case {
    name: String,
    runtime: String,
    next: Cell<u32>,
    dir: PathBuf,
    rootfs: RefCell<Vec<PathBuf>>,
}

/// Runs `body` as the test `name`; afterwards nothing of it may be left in the node.
#[track_caller]
pub fn case(name: &str, body: impl FnOnce(&Case)) {
    case_of(name, &crate::runtime(), body);
}

/// Like [`case`], with a runtime of the test's own choice.
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
    let cleaned = case.clean_up(result.is_err());
    if let Err(panic) = result {
        // The failure itself is what counts; what is left over is said as well, since it may explain it.
        if let Err(left) = before.compare_until_equal(Duration::from_secs(5)) {
            eprintln!("after the failed test these were left over:\n{left}");
        }
        resume_unwind(panic);
    }
    if let Err(left) = before.compare_until_equal(SETTLE) {
        panic!("left over after {name}:\n{left}\n--- containerd's log ends\n{}", node::log_tail(40));
    }
    assert!(cleaned.is_empty(), "{name} did not end by itself: {cleaned:?}");
}

impl Case {
    /// A container id that no other test uses.
    pub fn id(&self) -> String {
        self.next.set(self.next.get() + 1);
        format!("{}-{}", self.name, self.next.get())
    }

    /// A directory of this test's on the node, removed afterwards.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The runtime this case runs with.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// A `ctr run` of the busybox image.
    pub fn busybox<S: AsRef<str>>(&self, command: &[S]) -> Run {
        Run::new(&self.runtime, self.id(), BUSYBOX, command)
    }

    /// A `ctr run` of a busybox shell script.
    pub fn sh(&self, script: &str) -> Run {
        self.busybox(&["sh", "-c", script])
    }

    /// A `ctr run` of the Python image.
    pub fn python(&self, program: &str) -> Run {
        node::need_image(PYTHON);
        Run::new(&self.runtime, self.id(), PYTHON, &["python3", "-c", program])
    }

    /// A container that only sleeps, started in the background and up.
    #[track_caller]
    pub fn sleeper(&self) -> Container {
        self.container(self.sh("echo up; exec sleep 1000"))
    }

    /// Starts `run` in the background and waits for its line "up".
    #[track_caller]
    pub fn container(&self, run: Run) -> Container {
        let id = run.id().to_owned();
        let mut running = run.start(Input::Pipe);
        running.wait_for("up");
        Container { id, running }
    }

    /// A `ctr run` with a specification of the test's own: the default one, changed by `patch`.
    pub fn with_spec(&self, script: &str, patch: impl FnOnce(&mut Value)) -> Run {
        let id = self.id();
        let mut value = spec::default_spec();
        value["root"]["path"] = self.rootfs(&id).to_string_lossy().into();
        value["process"]["args"] = serde_json::json!(["sh", "-c", script]);
        value["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        patch(&mut value);
        let path = self.dir.join(format!("{id}.json"));
        fs::write(&path, serde_json::to_vec(&value).unwrap()).unwrap();
        Run::of_config(&self.runtime, id, &path)
    }

    /// A writable busybox tree of this test's own on the node, made by containerd's snapshotter.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        let path = self.dir.join(format!("{name}.rootfs"));
        fs::create_dir_all(&path).unwrap();
        run_ctr(&["images", "mount", "--rw", BUSYBOX, &path.to_string_lossy()]).expect_code(0);
        self.rootfs.borrow_mut().push(path.clone());
        path
    }

    /// Removes what is still there; gives the containers that had to be removed by force.
    fn clean_up(&self, failed: bool) -> Vec<String> {
        let prefix = format!("{}-", self.name);
        let listed = run_ctr(&["containers", "ls", "-q"]).out();
        let ids: Vec<String> = listed.lines().filter(|id| id.starts_with(&prefix)).map(str::to_owned).collect();
        for id in &ids {
            remove(id);
        }
        for path in self.rootfs.borrow().iter() {
            run_ctr(&["images", "unmount", "--rm", &path.to_string_lossy()]);
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

/// A container that runs in the background, its `ctr run --rm` with it.
pub struct Container {
    /// The container's id.
    pub id: String,
    /// Its `ctr run`.
    pub running: Running,
}

impl Container {
    /// Runs `ctr task exec` in it.
    #[track_caller]
    pub fn exec(&self, exec_id: &str, command: &[&str]) -> Output {
        self.exec_with(exec_id, &[], command)
    }

    /// Runs `ctr task exec` in it with further options.
    #[track_caller]
    pub fn exec_with(&self, exec_id: &str, options: &[&str], command: &[&str]) -> Output {
        Running::start(self.exec_command(exec_id, options, command), Input::Null).wait()
    }

    /// The command line of a `ctr task exec`.
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

    /// The pid containerd knows the task by.
    pub fn pid(&self) -> i32 {
        let list = run_ctr(&["tasks", "ls"]).expect_code(0).out();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.id)).map(str::to_owned);
        let line = line.unwrap_or_else(|| panic!("no task {} in\n{list}", self.id));
        line.split_whitespace().nth(1).and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no pid in {line}"))
    }

    /// The state `ctr task ls` gives.
    pub fn state(&self) -> String {
        let list = run_ctr(&["tasks", "ls"]).expect_code(0).out();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.id)).unwrap_or_default();
        line.split_whitespace().nth(2).unwrap_or_default().to_owned()
    }

    /// Kills the container and waits for the end of its `ctr run`, which must report signal 9.
    #[track_caller]
    pub fn kill(self) -> Output {
        self.task(&["kill", "--signal", "SIGKILL"]).expect_code(0);
        self.running.wait().expect_code(137)
    }
}
