//! Provides containerd 2.x for the test node: the programs of Debian's package and their configuration. The package is
//! unpacked only once.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::Add;
use crate::stamp::{Key, Stamp};
use crate::user_cache::Step;
use crate::{cmd, files, paths, pins, setup, ui};

/// The Debian release that has containerd 2.x.
const SUITE: &str = "sid";
/// Increase this number whenever the unpacking changes.
const RECIPE: u32 = 1;
/// The programs of the package that are copied into the node.
const PROGRAMS: [&str; 3] = ["usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr"];

/// The containerd line of a node, and the kind of node on which containerd runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Line {
    /// containerd 1.7 of the node's Debian release.
    #[default]
    #[value(name = "1.7")]
    One,
    /// containerd 1.7 on a node with cgroup v1.
    #[value(name = "1.7-cgroup1")]
    Legacy,
    /// containerd 2.x of Debian's unstable release.
    #[value(name = "2")]
    Two,
    /// containerd 2.x as a systemd service, on a node with systemd as PID 1.
    #[value(name = "2-systemd")]
    Systemd,
}

impl Line {
    /// Returns the name by which the option `--containerd` selects this containerd line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Returns what this containerd line adds to the kernel command line of the node. The node's init reads the
    /// parameters that begin with `husk.`.
    pub fn parameters(self) -> &'static str {
        match self {
            Line::One | Line::Two => "",
            Line::Legacy => "husk.cgroups=1",
            // `lsm` omits the BPF LSM. With the BPF LSM, systemd would load a BPF program, which takes seconds on an
            // emulated node.
            Line::Systemd => "husk.systemd lsm=apparmor",
        }
    }
}

/// Returns the files that this containerd line adds to the node. containerd 1.7 is already part of the node.
pub fn files(line: Line) -> Result<Vec<Add>> {
    if matches!(line, Line::One | Line::Legacy) {
        return Ok(Vec::new());
    }
    let programs = paths::node().join("containerd-2");
    programs_of_two(&programs)?;
    let mut add: Vec<Add> =
        PROGRAMS.iter().map(|path| Add::new(programs.join(path), Path::new("/").join(path))).collect();
    // Husk's drop-in for configuration version 3 replaces the drop-in in dist/root.
    add.push(Add::new(paths::root().join("deploy/containerd/husk-2.toml"), "/etc/containerd/conf.d/husk.toml"));
    add.push(Add::new(paths::root().join("tests/node/containerd-2"), "/"));
    if line == Line::Systemd {
        // These files configure systemd. The node's root file system already has systemd, because some of the node's
        // Debian packages depend on systemd.
        add.push(Add::new(paths::root().join("tests/node/systemd"), "/"));
    }
    Ok(add)
}

/// Unpacks the programs, unless they are already unpacked. The caller holds the lock of the files that all nodes share.
fn programs_of_two(dir: &Path) -> Result<()> {
    let key = Key::new("containerd-2", RECIPE).text(SUITE).text(pins::RELEASE).finish();
    let stamp = Stamp::new("containerd-2");
    Step { kind: "containerd-2", key: &key, outputs: &[dir], stamp }.run(|| unpack(dir)).map(drop)
}

fn unpack(dir: &Path) -> Result<()> {
    if !cmd::is_root() {
        bail!("failed to unpack containerd 2 for the test node: only root can do that; run cargo xtask as root");
    }
    let tree = dir.with_extension("part");
    files::remove(&tree)?;
    files::make_dir(&paths::node())?;
    ui::say("node", format!("unpacking containerd of Debian {SUITE}"));
    // apt also fetches and verifies the package's dependencies. The function does not keep these dependencies, because
    // the node already has them.
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--include=containerd"]);
    // The package lists of the unstable release expire after a week. apt must not check their age, because a mirror may
    // have older lists, or this machine's clock may be wrong by more than a week.
    command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    command.arg(SUITE).arg(&tree).args(setup::debian_mirror()?);
    cmd::logged("node", "node-containerd-2", &mut command)?;
    for path in PROGRAMS {
        let to = dir.join(path);
        files::make_dir(to.parent().unwrap_or(dir))?;
        fs::rename(tree.join(path), &to)
            .with_context(|| format!("failed to find {path} in Debian's containerd package"))?;
    }
    files::remove(&tree)
}
