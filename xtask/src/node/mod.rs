//! `cargo xtask node`: the test node, a Debian VM with KVM and containerd that runs on any machine.

mod boot;
mod containerd;
mod imported;
pub mod kvm;
mod legacy;
mod rootfs;
mod tar;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{cmd, files, images, lock, paths, ui};

pub use boot::{Crashed, Limits, Progress};
pub use containerd::Line;

/// A script, and the node in which it runs.
pub struct Run {
    /// A shell script.
    pub script: PathBuf,
    /// The arguments of the script.
    pub args: Vec<String>,
    /// Environment variables of the script.
    pub env: Vec<(String, String)>,
    /// Files and directories to copy into the node, in addition to `dist/root`.
    pub add: Vec<Add>,
    /// Whether the node's containerd already has the OCI images, so that the script need not import them.
    pub imported: bool,
    /// The node's size.
    pub machine: Machine,
    /// The node's containerd line.
    pub containerd: Line,
    /// Time limits after which the node is stopped.
    pub limits: Limits,
    /// Selects one of the nodes that can run at the same time.
    pub seat: Seat,
}

/// Identifies one of the nodes that can run at the same time. Each of these nodes has its own files and logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    number: usize,
    /// Whether other nodes run at the same time. If so, each line on the terminal starts with the node's number.
    beside: bool,
}

impl Seat {
    /// Identifies one of several nodes that run at the same time. The first node has the number 0.
    pub fn beside(number: usize) -> Seat {
        Seat { number, beside: true }
    }

    /// Returns `plain`, `between` and the node's number, counted from 1, as one name. For the first node, returns only
    /// `plain`.
    fn name(self, plain: &str, between: &str) -> String {
        if self.number == 0 { plain.to_owned() } else { format!("{plain}{between}{}", self.number + 1) }
    }

    /// Returns the node's directory.
    pub fn dir(self) -> PathBuf {
        paths::state().join(self.name("node", "/"))
    }

    /// Returns the directory for copies of the files that a script leaves in `/out`.
    pub fn out_dir(self) -> PathBuf {
        self.dir().join("out")
    }

    /// Copies a file that the script left in `/out`. Does nothing if the script left no such file.
    pub fn keep(self, name: &str, to: &Path) -> Result<()> {
        let from = self.out_dir().join(name);
        match fs::copy(&from, to) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            copied => {
                copied.map(drop).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))
            }
        }
    }

    /// Returns the path of the node's log called `name`.
    fn log(self, name: &str) -> Result<PathBuf> {
        cmd::log_path(&self.name(name, "-"))
    }

    /// Returns the path of the serial console's log. The next boot overwrites this log.
    pub fn console(self) -> Result<PathBuf> {
        self.log("node-console")
    }

    /// Returns the prefix of each line of the node's output.
    fn label(self) -> String {
        if self.beside { format!("{}| ", self.number + 1) } else { String::new() }
    }

    /// Prints a line about the node.
    fn say(self, text: impl AsRef<str>) {
        let step = if self.beside { format!("node {}", self.number + 1) } else { "node".to_owned() };
        ui::say(&step, text);
    }
}

impl Limits {
    /// Creates limits from seconds.
    pub const fn secs(total: u64, quiet: u64) -> Limits {
        Limits { total: Duration::from_secs(total), quiet: Duration::from_secs(quiet) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits::secs(2700, 2700)
    }
}

/// The size of a node.
#[derive(Clone, Copy)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Machine { cpus: 2, memory: 6144 }
    }
}

/// A file or directory of this machine, and its path in the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add {
    /// The path on this machine.
    pub from: PathBuf,
    /// The path in the node.
    pub to: PathBuf,
}

impl Add {
    /// Creates the instruction to copy `from` to the path `to` in the node.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        Add { from: from.into(), to: to.into() }
    }
}

impl std::str::FromStr for Add {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.rsplit_once(':') {
            Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok(Add::new(from, to)),
            _ => bail!("expected HOSTPATH:NODEPATH with an absolute NODEPATH, found `{text}`"),
        }
    }
}

/// The name of the lock for the files that all nodes share: the disk, the kernel, the initramfs and containerd's
/// programs.
const PARTS: &str = "node/parts";

/// The directory of the OCI images in the node.
pub const IMAGES: &str = "/husk/images";

/// Builds the OCI images that the demo and most suites use.
pub fn images() -> Result<Vec<Add>> {
    image_tars(images::build)
}

/// Builds the OCI images for the suite whose containers build images.
pub fn builder_images() -> Result<Vec<Add>> {
    image_tars(images::build_builders)
}

/// Builds the OCI image with fsx.
pub fn fsx_image() -> Result<Vec<Add>> {
    image_tars(images::build_fsx)
}

fn image_tars(build: impl FnOnce(&Path) -> Result<Vec<PathBuf>>) -> Result<Vec<Add>> {
    let _lock = lock::take("images")?;
    let tars = build(&paths::state().join("images")).context("failed to build the OCI images")?;
    Ok(tars
        .into_iter()
        .map(|tar| {
            let name = tar.file_name().unwrap_or_default().to_owned();
            Add::new(tar, Path::new(IMAGES).join(name))
        })
        .collect())
}

/// Builds the node's disk, kernel and initramfs, without booting the node.
pub fn prepare() -> Result<()> {
    node(Line::One).map(drop)
}

/// Like [`prepare`], but also makes the disk of a node whose containerd already has the OCI images.
pub fn prepare_images() -> Result<()> {
    let seat = Seat::default();
    let _lock = lock::take(&seat.name("node", "/"))?;
    disk_with_images(seat, &node(Line::One)?);
    Ok(())
}

/// Returns the disk with the imported OCI images. If that disk cannot be made, returns the disk without images. The
/// caller holds the lock of the node `seat`.
fn disk_with_images(seat: Seat, node: &rootfs::Node) -> PathBuf {
    let disk = || {
        let images = images()?;
        let _lock = lock::take(PARTS)?;
        imported::disk(seat, node, &images)
    };
    disk().unwrap_or_else(|error| {
        seat.say(format!(
            "failed to import the images into the node's disk; the tests will import the images: {error:#}"
        ));
        node.disk.clone()
    })
}

fn node(line: Line) -> Result<rootfs::Node> {
    let _lock = lock::take(PARTS)?;
    let node = rootfs::node()?;
    if line == Line::Legacy { legacy::node(node) } else { Ok(node) }
}

/// Boots the node, runs the script after containerd answers, and returns the script's exit code.
pub fn run(run: &Run) -> Result<u8> {
    run_observed(run, &mut |_| {})
}

/// Like [`run`], but also passes the script's events to `observe` as they happen.
pub fn run_observed(run: &Run, observe: &mut dyn FnMut(Progress<'_>)) -> Result<u8> {
    let seat = run.seat;
    let _lock = lock::take(&seat.name("node", "/"))?;
    let mut node = node(run.containerd)?;
    if run.imported {
        node.disk = disk_with_images(seat, &node);
    }
    let mut call = String::from("exec bash /husk/script");
    for arg in &run.args {
        call.push_str(&format!(" '{}'", arg.replace('\'', "'\\''")));
    }
    let mut env = String::new();
    for (name, value) in &run.env {
        env.push_str(&format!("export {name}='{}'\n", value.replace('\'', "'\\''")));
    }
    let script = fs::read(&run.script).with_context(|| format!("failed to read {}", run.script.display()))?;
    let extras = extras(
        seat,
        run.containerd,
        &run.add,
        &[("husk/run", format!("{env}{call}\n").as_bytes()), ("husk/script", &script)],
    )?;
    let out = out_disk(seat)?;
    let boot = boot::Boot {
        seat,
        node: &node,
        keep: false,
        extras: &extras,
        out: &out,
        machine: run.machine,
        parameters: run.containerd.parameters(),
    };
    let end = boot::run(&boot, run.limits, observe)?;
    fetch(seat, &out)?;
    Ok(end)
}

/// Boots the node with a shell on the terminal.
pub fn shell(containerd: Line, add: &[Add], machine: Machine) -> Result<()> {
    let seat = Seat::default();
    let _lock = lock::take(&seat.name("node", "/"))?;
    let node = node(containerd)?;
    let extras = extras(seat, containerd, add, &[])?;
    let out = out_disk(seat)?;
    let parameters = containerd.parameters();
    boot::shell(&boot::Boot { seat, node: &node, keep: false, extras: &extras, out: &out, machine, parameters })?;
    fetch(seat, &out)
}

/// Path of Husk's configuration in the node and in `dist/root`.
const CONFIG: &str = "etc/husk/config.toml";

/// Returns Husk's configuration for the node: the installed one, followed by the settings in `more`. The node can be
/// emulated, and is then slow. Guests boot, because a template that is made in the background would disturb tests.
pub fn configuration(more: &str) -> Result<String> {
    let path = paths::dist().join(CONFIG);
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    Ok(format!("{text}\ntimeout_factor = 5\ntemplate = \"off\"\n{more}"))
}

/// Writes the tar that the node unpacks over its root file system. The tar has `tests/node/root`, `dist/root`, what the
/// containerd line needs, `add` and `files`.
fn extras(seat: Seat, line: Line, add: &[Add], files: &[(&str, &[u8])]) -> Result<PathBuf> {
    let path = seat.dir().join("extras.tar");
    let file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    let mut tar = tar::Tar::new(file);
    tar.add(&paths::root().join("tests/node/root"), Path::new("/"))?;
    if paths::dist().exists() {
        tar.add(&paths::dist(), Path::new("/"))?;
        tar.content(CONFIG, configuration("")?.as_bytes())?;
    } else {
        ui::say("node", "dist/root does not exist, so the node has no Husk; `cargo xtask dist` builds dist/root");
    }
    let programs = {
        let _lock = lock::take(PARTS)?;
        containerd::files(line)?
    };
    for Add { from, to } in programs.iter().chain(&legacy::files(line)).chain(add) {
        tar.add(from, to)?;
    }
    for (name, content) in files {
        tar.content(name, content)?;
    }
    tar.finish()?;
    Ok(path)
}

/// Creates the disk to which the node writes a tar of `/out`.
fn out_disk(seat: Seat) -> Result<PathBuf> {
    let path = seat.dir().join("out.img");
    let file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    file.set_len(4 << 30).context("failed to resize the node's output disk")?;
    Ok(path)
}

/// Unpacks the files that the node left in `/out`.
fn fetch(seat: Seat, disk: &Path) -> Result<()> {
    let dir = seat.out_dir();
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    }
    files::make_dir(&dir)?;
    let mut unpack = Command::new("tar");
    unpack.args(["-x", "--no-same-owner", "-f"]).arg(disk).arg("-C").arg(&dir);
    cmd::output(&mut unpack).map(drop).context("failed to unpack the tar of the node's /out")
}
