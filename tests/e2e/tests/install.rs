//! docs/install.md, followed to the letter: from a node with containerd and nothing of Husk's to a pod, and back again.
//!
//! What the page has root do on the node (lines with `#`) is done, in its order. What is for another machine (`$`) was done
//! before (`cargo xtask dist`), or needs a cluster: there CRI does what the kubelet would.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use husk_e2e::command::run_ctr;
use husk_e2e::cri::{call, manifest, pods_of, restart};
use husk_e2e::{KUBERNETES, PAUSE, PYTHON, node};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../docs/install.md");
const EXAMPLE: &str = "deploy/kubernetes/untrusted.yaml";
const CONFIG: &str = "/etc/containerd/config.toml";
const DROP_INS: &str = "/etc/containerd/conf.d";
/// Where the page's commands are given: beside `dist`.
const HERE: &str = "/root/husk";
/// Of Husk's, as `cargo xtask dist` lays it out.
const PARTS: [&str; 5] = [
    "usr/local/bin/containerd-shim-husk-v2",
    "usr/local/bin/husk",
    "usr/local/share/husk",
    "etc/husk",
    "etc/containerd/conf.d/husk.toml",
];
/// Where others than Husk write while a pod runs: containerd, CNI and the kubelet that the tests are.
const OTHERS: [&str; 13] = [
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
    /// The heading it is below.
    heading: &'static str,
    /// What is behind the fence.
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
    assert!(open.is_none(), "a block without an end");
    blocks
}

/// The commands of root's on the node below a heading.
#[track_caller]
fn commands(heading: &str) -> Vec<&'static str> {
    let found = blocks().into_iter().filter(|block| block.heading == heading && block.kind == "console");
    let lines: Vec<_> = found.flat_map(|block| block.lines).filter_map(|line| line.strip_prefix("# ")).collect();
    assert!(!lines.is_empty(), "there is nothing to be done below {heading:?}");
    lines
}

/// What the page has written into a file.
#[track_caller]
fn text(kind: &str) -> String {
    let block = blocks().into_iter().find(|block| block.kind == kind).unwrap_or_else(|| panic!("no block {kind:?}"));
    block.lines.join("\n") + "\n"
}

/// Gives a command as root; the node has no service manager.
#[track_caller]
fn give(command: &str) -> Output {
    if command == "systemctl restart containerd" {
        restart::restart();
        return Command::new("true").output().unwrap();
    }
    Command::new("sh").args(["-c", command]).current_dir(HERE).output().unwrap()
}

#[track_caller]
fn follow(commands: &[&str]) {
    for command in commands {
        let output = give(command);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        match *command {
            // An emulated node's KVM is too slow for real use, which it says.
            "husk check" => {
                let failed: Vec<_> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
                assert!(failed.iter().all(|line| line.contains(" kvm ")) && text.contains("ok    shim"), "{text}");
            }
            "husk ps" => assert!(output.status.success() && text.lines().count() == 1, "{command}: {text}"),
            // It is to find nothing, which it calls a failure.
            _ if command.starts_with("grep ") => assert!(output.status.code() == Some(1) && text.is_empty(), "{text}"),
            _ => assert!(output.status.success(), "{command}: {text}"),
        }
    }
}

/// All files of the node but those that others make.
fn files() -> BTreeSet<PathBuf> {
    fn walk(dir: &Path, all: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if OTHERS.iter().any(|other| path == Path::new(other)) {
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

/// The node as it was: given back when the test ends, however that goes.
struct Node {
    config: Vec<u8>,
    drop_in: Vec<u8>,
}

impl Node {
    /// Takes everything of Husk's away, into `dist` where it came from.
    fn bare() -> Self {
        let dist = Path::new(HERE).join("dist/root");
        for part in PARTS {
            let to = dist.join(part);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            let moved = Command::new("mv").arg(Path::new("/").join(part)).arg(&to).status().unwrap();
            assert!(moved.success(), "{part}");
        }
        let drop_in = dist.join("etc/containerd/conf.d/husk.toml");
        let this = Self { config: fs::read(CONFIG).unwrap(), drop_in: fs::read(&drop_in).unwrap() };
        // As it is shipped: the node's init adds the image of its sandboxes.
        let text = String::from_utf8(this.drop_in.clone()).unwrap();
        let shipped = text.split("[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image").next().unwrap();
        fs::write(drop_in, shipped).unwrap();
        let _ = fs::remove_dir(DROP_INS);
        let _ = fs::remove_dir("/run/husk");
        this
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = Command::new("cp").args(["-a", &format!("{HERE}/dist/root/."), "/"]).status();
        let _ = fs::write(Path::new(DROP_INS).join("husk.toml"), &self.drop_in);
        let _ = fs::write(CONFIG, &self.config);
        let _ = fs::remove_dir_all(HERE);
        restart::restart();
    }
}

/// Whether the node's containerd is of the 2.x line.
fn is_two() -> bool {
    run_ctr(&["version"]).expect_code(0).value("  Version").trim_start_matches('v').starts_with("2.")
}

/// The image of containerd's sandboxes is there, as on a node that has run a pod.
fn pause_is_there() {
    node::need_image_in(KUBERNETES, PAUSE);
    let config: Value =
        serde_json::from_str(call("Status", &json!({ "verbose": true }))["info"]["config"].as_str().unwrap()).unwrap();
    if let Some(image) = config["sandboxImage"].as_str().filter(|image| *image != PAUSE) {
        let tag = ["-n", KUBERNETES, "images", "tag", "--force", PAUSE, image];
        assert!(Command::new("ctr").args(tag).output().unwrap().status.success());
    }
}

/// What the page says to be reached: a pod with a kernel of its own.
fn a_pod_runs() {
    pause_is_there();
    let manifest = include_str!("../../../deploy/kubernetes/untrusted.yaml");
    pods_of("install", "husk", |pods| {
        let applied = manifest::apply(pods, manifest, &[("python:slim", PYTHON)]);
        let container = &applied.containers[0];
        assert_eq!(container.wait_within(Duration::from_secs(120)).0, 0, "{}", container.log());
        assert!(container.log().contains("hello from a kernel of my own"), "{}", container.log());
    });
}

#[test]
fn the_page_leads_to_a_pod_and_back() {
    assert!(PAGE.contains(&format!("$ kubectl apply -f {EXAMPLE}")), "another example: this runs {EXAMPLE}");
    let two = is_two();
    let _node = Node::bare();
    // A node where containerd has a configuration of its own.
    if two {
        fs::write(CONFIG, "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n").unwrap();
    } else {
        fs::write(CONFIG, "version = 2\n").unwrap();
    }
    let before = files();
    assert!(PARTS.iter().all(|part| !Path::new("/").join(part).exists()));
    follow(&commands("Put it there"));
    if two {
        follow(&commands("containerd 2.x"));
    } else {
        fs::write(CONFIG, text("toml imports")).unwrap();
    }
    follow(&commands("Tell containerd"));
    a_pod_runs();
    if !two {
        // The other way to tell it, for a configuration with a section of its own.
        fs::remove_file(Path::new(DROP_INS).join("husk.toml")).unwrap();
        let own = format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{PAUSE}\"\n");
        fs::write(CONFIG, own.clone() + &text("toml section") + &text("toml runc")).unwrap();
        follow(&commands("Tell containerd"));
        a_pod_runs();
        assert!(give("grep -n husk /etc/containerd/config.toml").status.success());
        fs::write(CONFIG, own.replace(PAUSE, "another")).unwrap();
    }
    follow(&commands("Remove it"));
    let after = files();
    let left: Vec<_> = after.difference(&before).collect();
    assert!(left.is_empty(), "left on the node: {left:#?}");
    let info = call("Status", &json!({ "verbose": true }))["info"]["config"].clone();
    assert!(!info.as_str().unwrap().contains("husk.v2"), "containerd still knows of it: {info}");
}
