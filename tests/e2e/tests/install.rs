//! Tests docs/install.md: installs Husk on a node with containerd, runs a pod, and removes Husk.
//!
//! The test runs the page's commands for root on the node (lines with `#`) in their order. It does not run the commands
//! for another machine (lines with `$`), because `cargo xtask dist` has run before the test and the other commands need
//! a cluster. Instead, the test itself calls the CRI as the kubelet would.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use husk_e2e::cri::{call, is_containerd_2, manifest, pods_with_handler, restart};
use husk_e2e::{KUBERNETES, PAUSE, PYTHON, node};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../docs/install.md");
const EXAMPLE: &str = "deploy/kubernetes/untrusted.yaml";
const CONFIG: &str = "/etc/containerd/config.toml";
const DROP_INS: &str = "/etc/containerd/conf.d";
/// Directory in which the page's commands run. It contains `dist`.
const WORK_DIR: &str = "/root/husk";
/// Paths of Husk, as `cargo xtask dist` lays them out.
const HUSK_PATHS: [&str; 5] = [
    "usr/local/bin/containerd-shim-husk-v2",
    "usr/local/bin/husk",
    "usr/local/share/husk",
    "etc/husk",
    "etc/containerd/conf.d/husk.toml",
];
/// Paths to which programs other than Husk write while a pod runs: containerd, CNI, and the tests in the role of the
/// kubelet.
const FOREIGN_PATHS: [&str; 13] = [
    "/proc",
    "/sys",
    "/dev",
    "/tmp",
    "/out",
    "/husk",
    "/var/log",
    "/var/lib/containerd",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/run/containerd",
    "/run/netns",
    "/run/xtables.lock",
];

/// A fenced block of the page.
struct Block {
    /// Heading above the block.
    heading: &'static str,
    /// Info string: the text after the opening fence.
    kind: &'static str,
    lines: Vec<&'static str>,
}

fn blocks() -> Vec<Block> {
    let (mut blocks, mut heading, mut open) = (Vec::new(), "", None);
    for line in PAGE.lines() {
        match (line.strip_prefix("```"), open.as_mut()) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(kind), None) => open = Some(Block { heading, kind, lines: Vec::new() }),
            (None, Some(block)) => block.lines.push(line),
            (None, None) if line.starts_with("##") => heading = line.trim_start_matches('#').trim(),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block of docs/install.md has no closing fence");
    blocks
}

/// Returns the commands that the page lists below `heading` for root on the node.
#[track_caller]
fn commands(heading: &str) -> Vec<&'static str> {
    let found = blocks().into_iter().filter(|block| block.heading == heading && block.kind == "console");
    let lines: Vec<_> = found.flat_map(|block| block.lines).filter_map(|line| line.strip_prefix("# ")).collect();
    assert!(!lines.is_empty(), "docs/install.md has no commands below {heading:?}");
    lines
}

/// Returns the content of a configuration file from the page.
#[track_caller]
fn file_content(kind: &str) -> String {
    let block = blocks()
        .into_iter()
        .find(|block| block.kind == kind)
        .unwrap_or_else(|| panic!("docs/install.md has no block {kind:?}"));
    block.lines.join("\n") + "\n"
}

/// Runs a command as root. The node has no service manager, and therefore this function restarts containerd itself.
#[track_caller]
fn run(command: &str) -> Output {
    if command == "systemctl restart containerd" {
        restart::restart_containerd();
        return Command::new("true").output().unwrap();
    }
    Command::new("sh").args(["-c", command]).current_dir(WORK_DIR).output().unwrap()
}

/// Runs the page's commands and checks their results.
#[track_caller]
fn run_all(commands: &[&str]) {
    for command in commands {
        let output = run(command);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        match *command {
            // In an emulated node, only the KVM check may fail, because KVM is too slow there for real use.
            "husk check" => {
                let failed: Vec<_> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
                assert!(failed.iter().all(|line| line.contains(" kvm ")) && text.contains("ok    shim"), "{text}");
            }
            "husk ps" => assert!(output.status.success() && text.lines().count() == 1, "{command}: {text}"),
            // grep has to find nothing. If it finds nothing, it exits with 1.
            _ if command.starts_with("grep ") => assert!(output.status.code() == Some(1) && text.is_empty(), "{text}"),
            _ => assert!(output.status.success(), "{command} failed: {text}"),
        }
    }
}

/// Returns all files of the node except those in FOREIGN_PATHS.
fn node_files() -> BTreeSet<PathBuf> {
    fn walk(dir: &Path, all: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if FOREIGN_PATHS.iter().any(|foreign| path == Path::new(foreign)) {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&path, all);
            }
            all.insert(path);
        }
    }
    let mut all = BTreeSet::new();
    walk(Path::new("/"), &mut all);
    all
}

/// The node's original configuration. Dropping this value reinstalls Husk and restores the configuration, even after a
/// failure.
struct OriginalNode {
    config: Vec<u8>,
    drop_in: Vec<u8>,
}

impl OriginalNode {
    /// Saves the configuration, and uninstalls Husk by moving its files back to `dist`.
    fn save_and_uninstall() -> Self {
        let dist = Path::new(WORK_DIR).join("dist/root");
        for part in HUSK_PATHS {
            let to = dist.join(part);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            let moved = Command::new("mv").arg(Path::new("/").join(part)).arg(&to).status().unwrap();
            assert!(moved.success(), "failed to move {part}");
        }
        let drop_in = dist.join("etc/containerd/conf.d/husk.toml");
        let this = Self { config: fs::read(CONFIG).unwrap(), drop_in: fs::read(&drop_in).unwrap() };
        // Restores the drop-in as Husk ships it, because the node's init has added the sandbox image.
        let text = String::from_utf8(this.drop_in.clone()).unwrap();
        let shipped = text.split("[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image").next().unwrap();
        fs::write(drop_in, shipped).unwrap();
        let _ = fs::remove_dir(DROP_INS);
        let _ = fs::remove_dir("/run/husk");
        this
    }
}

impl Drop for OriginalNode {
    fn drop(&mut self) {
        let _ = Command::new("cp").args(["-a", &format!("{WORK_DIR}/dist/root/."), "/"]).status();
        let _ = fs::write(Path::new(DROP_INS).join("husk.toml"), &self.drop_in);
        let _ = fs::write(CONFIG, &self.config);
        let _ = fs::remove_dir_all(WORK_DIR);
        restart::restart_containerd();
    }
}

/// Makes sure that the node has containerd's sandbox image, like a node that has run a pod.
fn ensure_pause_image() {
    node::need_image_in(KUBERNETES, PAUSE);
    let config: Value =
        serde_json::from_str(call("Status", &json!({ "verbose": true }))["info"]["config"].as_str().unwrap()).unwrap();
    if let Some(image) = config["sandboxImage"].as_str().filter(|image| *image != PAUSE) {
        let tag = ["-n", KUBERNETES, "images", "tag", "--force", PAUSE, image];
        assert!(Command::new("ctr").args(tag).output().unwrap().status.success());
    }
}

/// Checks the result that the page promises: a pod that runs on its own kernel.
fn assert_pod_runs() {
    ensure_pause_image();
    let manifest = include_str!("../../../deploy/kubernetes/untrusted.yaml");
    pods_with_handler("install", "husk", |pods| {
        let applied = manifest::apply(pods, manifest, &[("python:slim", PYTHON)]);
        let container = &applied.containers[0];
        assert_eq!(container.wait_within(Duration::from_secs(120)).0, 0, "{}", container.log());
        assert!(container.log().contains("hello from a kernel of my own"), "{}", container.log());
    });
}

#[test]
fn documented_commands_install_and_remove_husk() {
    assert!(PAGE.contains(&format!("$ kubectl apply -f {EXAMPLE}")), "docs/install.md does not apply {EXAMPLE}");
    let is_v2 = is_containerd_2();
    let _node = OriginalNode::save_and_uninstall();
    // Before the installation, containerd already has a configuration.
    if is_v2 {
        fs::write(CONFIG, "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n").unwrap();
    } else {
        fs::write(CONFIG, "version = 2\n").unwrap();
    }
    let before = node_files();
    assert!(HUSK_PATHS.iter().all(|part| !Path::new("/").join(part).exists()));
    run_all(&commands("Copy the files to the node"));
    if is_v2 {
        run_all(&commands("containerd 2.x"));
    } else {
        fs::write(CONFIG, file_content("toml imports")).unwrap();
    }
    run_all(&commands("Configure containerd"));
    assert_pod_runs();
    if !is_v2 {
        // Tests the alternative for a configuration that already has a CRI section.
        fs::remove_file(Path::new(DROP_INS).join("husk.toml")).unwrap();
        let config = format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{PAUSE}\"\n");
        fs::write(CONFIG, config.clone() + &file_content("toml section") + &file_content("toml runc")).unwrap();
        run_all(&commands("Configure containerd"));
        assert_pod_runs();
        assert!(run("grep -n husk /etc/containerd/config.toml").status.success());
        fs::write(CONFIG, config.replace(PAUSE, "another")).unwrap();
    }
    run_all(&commands("Remove Husk"));
    let after = node_files();
    let left: Vec<_> = after.difference(&before).collect();
    assert!(left.is_empty(), "the removal of Husk left files on the node: {left:#?}");
    let info = call("Status", &json!({ "verbose": true }))["info"]["config"].clone();
    assert!(!info.as_str().unwrap().contains("husk.v2"), "containerd still has the runtime: {info}");
}
