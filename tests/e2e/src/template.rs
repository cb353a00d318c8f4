//! Templates of the node: makes them, and removes them at the end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use husk_config::timeline::Timeline;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cri::{Pod, Pods};
use crate::node::{self, Config};
use crate::{KUBERNETES, containerd_log};

/// The directory of the templates.
pub const STORE: &str = "/run/husk-templates";
/// The name of a process that makes a template.
const BUILDER: &[u8] = b"husk-template\0";
/// How long a template may take on an emulated node, at the lowest priority.
const LIMIT: Duration = Duration::from_secs(300);

/// Lets the node make templates. Dropping it removes them.
pub struct Templates {
    config: Option<Config>,
    /// Whether the node had a template before.
    had_one: bool,
}

impl Templates {
    /// Removes the node's templates, and lets the shims make new ones.
    #[track_caller]
    pub fn on() -> Self {
        let had_one = !Self::complete().is_empty();
        husk_template("clear");
        Self { config: Some(Config::set("template = \"auto\"\n")), had_one }
    }

    /// Makes the templates for pods with the default number of vCPUs.
    #[track_caller]
    pub fn build() -> Self {
        let templates = Self::on();
        husk_template("build");
        assert!(!Self::complete().is_empty(), "`husk template build` has made no template");
        templates
    }

    /// Returns the directories of complete templates.
    pub fn complete() -> Vec<PathBuf> {
        let entries = fs::read_dir(STORE).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_complete = |path: &PathBuf| path.file_name().is_some_and(|name| name.len() == 64);
        entries.filter(is_complete).collect()
    }

    /// Starts a pod, and waits until its template is complete.
    #[track_caller]
    pub fn make(pods: &Pods) -> PathBuf {
        Self::make_for(pods, pods.config())
    }

    /// Like [`Templates::make`], for pods with this configuration.
    #[track_caller]
    pub fn make_for(pods: &Pods, config: Value) -> PathBuf {
        let before = Self::complete();
        let pod = pods.run(config);
        assert!(!is_clone(&pod), "the first guest was made from a template");
        let failed = || containerd_log::lines_with(&[&pod.id]).contains("failed to make a template");
        let new = || Self::complete().into_iter().find(|path| !before.contains(path));
        let made = node::eventually(LIMIT, || new().map(Some).or_else(|| failed().then_some(None)));
        pod.remove();
        made.flatten().unwrap_or_else(|| {
            let log = fs::read_to_string(Path::new(STORE).join("log")).unwrap_or_default();
            panic!("no template was made\n{log}\n{}", node::log_tail(20))
        })
    }
}

/// Lets the next pod make a template at once, although an earlier template could not be used. Returns the number of
/// templates whose making was delayed.
pub fn end_delays() -> usize {
    let entries = fs::read_dir(STORE).unwrap().flatten();
    let delayed: Vec<_> = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("delayed-")).collect();
    delayed.iter().for_each(|entry| fs::remove_file(entry.path()).unwrap());
    delayed.len()
}

#[track_caller]
fn husk_template(action: &str) {
    assert!(Command::new("husk").args(["template", action]).status().unwrap().success(), "husk template {action}");
}

/// Returns the processes that make templates.
pub fn builders() -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_builder = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(BUILDER));
    pids.filter(is_builder).map(Pid::from_raw).collect()
}

impl Drop for Templates {
    fn drop(&mut self) {
        // The last pod may have started a process that makes a template. Its VMM ends with it.
        let ended = node::eventually(LIMIT, || {
            let builders = builders();
            for pid in &builders {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            builders.is_empty().then_some(())
        });
        if ended.is_none() {
            eprintln!("the processes {:?} do not end", builders());
        }
        let _ = umount2(STORE, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(STORE);
        let _ = fs::remove_file("/run/husk-templates.lock");
        let cgroups = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"].map(|path| Path::new(path).join("husk-templates"));
        // A VMM leaves its cgroup when its process has ended.
        node::eventually(LIMIT, || {
            cgroups.iter().for_each(|cgroup| drop(fs::remove_dir(cgroup)));
            cgroups.iter().all(|cgroup| !cgroup.exists()).then_some(())
        });
        drop(self.config.take());
        if self.had_one {
            husk_template("build");
        }
    }
}

/// Returns the steps of a pod's start.
#[track_caller]
pub fn steps(pod: &Pod) -> Vec<String> {
    let path = format!("/run/husk/{KUBERNETES}/{}/timeline.json", pod.id);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    Timeline::from_lines(&text).unwrap().remove(0).steps.into_iter().map(|step| step.name).collect()
}

/// Returns whether a pod's guest was made from a template.
#[track_caller]
pub fn is_clone(pod: &Pod) -> bool {
    steps(pod).iter().any(|step| step == "template restored")
}
