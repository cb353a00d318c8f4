//! containerd's next line, put over the node's own: the programs of one package, unpacked once, and their configuration.

use super::Add;
use crate::cache::{self, Key};
use crate::{cmd, paths, pins, setup, ui};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Debian's release that has it, when the node's own has not.
const SUITE: &str = "sid";
/// Changes when the unpacking does.
const RECIPE: u32 = 1;
/// What of the package is put into the node.
const PROGRAMS: [&str; 3] = ["usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr"];

/// Which line of containerd the node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Line {
    /// The node's own, 1.7.
    #[default]
    #[value(name = "1.7")]
    One,
    /// The node's own, on a host with version 1 of control groups.
    #[value(name = "1.7-cgroup1")]
    Legacy,
    /// 2.x, of Debian's unstable release.
    #[value(name = "2")]
    Two,
    /// The same, as a service of systemd's, on a host with that as its PID 1.
    #[value(name = "2-systemd")]
    Systemd,
}

impl Line {
    /// Its name, as `--containerd` takes it.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// What the node's init finds of it on the kernel's command line.
    pub fn parameters(self) -> &'static str {
        match self {
            Line::One | Line::Two => "",
            Line::Legacy => "husk.cgroups=1",
            // Without BPF among the security modules: systemd's program for it takes an emulated machine seconds to load.
            Line::Systemd => "husk.systemd lsm=apparmor",
        }
    }
}

/// What is put over the node for this line: nothing for its own.
pub fn files(line: Line) -> Result<Vec<Add>> {
    if matches!(line, Line::One | Line::Legacy) {
        return Ok(Vec::new());
    }
    let programs = paths::node().join("containerd-2");
    programs_of_two(&programs)?;
    let mut add: Vec<Add> =
        PROGRAMS.iter().map(|path| Add::new(programs.join(path), Path::new("/").join(path))).collect();
    // Husk's drop-in of the other configuration version takes the place of the one in dist/root.
    add.push(Add::new(paths::root().join("deploy/containerd/husk-2.toml"), "/etc/containerd/conf.d/husk.toml"));
    add.push(Add::new(paths::root().join("tests/node/containerd-2"), "/"));
    if line == Line::Systemd {
        // systemd itself is in the node's tree: Debian's packages depend on it.
        add.push(Add::new(paths::root().join("tests/node/systemd"), "/"));
    }
    Ok(add)
}

/// Unpacks the programs if they are not there. The caller holds the node's lock.
fn programs_of_two(dir: &Path) -> Result<()> {
    let key = Key::new("containerd-2", RECIPE).text(SUITE).text(pins::RELEASE).finish();
    let made: Vec<_> = PROGRAMS.iter().map(|path| dir.join(path)).collect();
    if cache::fresh("containerd-2", &key, &made.iter().map(|path| path.as_path()).collect::<Vec<_>>()) {
        return Ok(());
    }
    if !cmd::is_root() {
        bail!("unpacking containerd 2 for the test node needs root: run this as root");
    }
    cache::forget("containerd-2")?;
    let tree = dir.with_extension("part");
    for old in [dir, &tree] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    cache::make_dir(&paths::node())?;
    ui::say("node", format!("unpacking containerd of Debian {SUITE}"));
    // With what it depends on, which the node has already and which is not kept: resolved and checked by apt itself.
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=extract", "--include=containerd"]);
    // The lists of an unstable release count for a week only; a mirror, or this machine's clock, may be further off.
    command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    command.arg(SUITE).arg(&tree).args(setup::debian_mirror()?);
    cmd::logged("node", "node-containerd-2", &mut command)?;
    for path in PROGRAMS {
        let to = dir.join(path);
        cache::make_dir(to.parent().unwrap_or(dir))?;
        fs::rename(tree.join(path), &to).with_context(|| format!("Debian's containerd has no {path}"))?;
    }
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    cache::done("containerd-2", &key)
}
