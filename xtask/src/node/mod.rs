//! `cargo xtask node`: a Debian machine with KVM and containerd in it, on any machine.

mod boot;
mod containerd;
pub mod kvm;
mod legacy;
mod rootfs;
mod tar;

use crate::{cache, cmd, images, lock, paths, ui};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub use boot::{Crashed, Limits, Progress};
pub use containerd::Line;

/// What is run in the node, and with what.
pub struct Run {
    /// A shell script.
    pub script: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables of its environment.
    pub env: Vec<(String, String)>,
    /// Files and directories put into the node, beside `dist/root`.
    pub add: Vec<Add>,
    /// The machine's size.
    pub machine: Machine,
    /// Its containerd.
    pub containerd: Line,
    /// How long it may take before the node is stopped.
    pub limits: Limits,
    /// Where it runs.
    pub seat: Seat,
}

/// Where a node runs: nodes side by side have seats of their own, with their own files and logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    number: usize,
    /// Whether others run at the same time: lines for the terminal say whose they are.
    beside: bool,
}

impl Seat {
    /// The seat of this number, counted from zero, with others beside it.
    pub fn beside(number: usize) -> Seat {
        Seat { number, beside: true }
    }

    /// A name of the seat's own: the first has the plain one.
    fn name(self, plain: &str, between: &str) -> String {
        if self.number == 0 { plain.to_owned() } else { format!("{plain}{between}{}", self.number + 1) }
    }

    /// Its directory.
    pub fn dir(self) -> PathBuf {
        paths::state().join(self.name("node", "/"))
    }

    /// Where the files end up that a script leaves in `/out`.
    pub fn out_dir(self) -> PathBuf {
        self.dir().join("out")
    }

    /// Where its log called `name` is.
    fn log(self, name: &str) -> Result<PathBuf> {
        cmd::log_path(&self.name(name, "-"))
    }

    /// The log of its serial console; the next boot overwrites it.
    pub fn console(self) -> Result<PathBuf> {
        self.log("node-console")
    }

    /// What stands before each line that is shown.
    fn label(self) -> String {
        if self.beside { format!("{}| ", self.number + 1) } else { String::new() }
    }

    /// Tells about it on the terminal.
    fn say(self, text: impl AsRef<str>) {
        let step = if self.beside { format!("node {}", self.number + 1) } else { "node".to_owned() };
        ui::say(&step, text);
    }
}

impl Limits {
    /// Limits of seconds.
    pub const fn secs(whole: u64, quiet: u64) -> Limits {
        Limits { whole: Duration::from_secs(whole), quiet: Duration::from_secs(quiet) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits::secs(2700, 2700)
    }
}

/// The machine's size.
#[derive(Clone, Copy)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Machine { cpus: 2, memory: 6144 }
    }
}

/// A file or directory of this machine, and where it is put in the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add {
    /// Here.
    pub from: PathBuf,
    /// There.
    pub to: PathBuf,
}

impl Add {
    /// Puts `from` at `to` in the node.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        Add { from: from.into(), to: to.into() }
    }
}

impl std::str::FromStr for Add {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.rsplit_once(':') {
            Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok(Add::new(from, to)),
            _ => bail!("{text} is not HOSTPATH:NODEPATH with an absolute NODEPATH"),
        }
    }
}

/// What nodes share is made by one xtask at a time.
const PARTS: &str = "node/parts";

/// Where the OCI images lie in the node.
pub const IMAGES: &str = "/husk/images";

/// Builds the OCI images that demo and most suites use, to be put into the node.
pub fn images() -> Result<Vec<Add>> {
    image_tars(images::build)
}

/// Builds the OCI images of the suite that builds images, to be put into the node.
pub fn builder_images() -> Result<Vec<Add>> {
    image_tars(images::build_builders)
}

/// Builds the OCI image of the suite that tries file systems, to be put into the node.
pub fn fsx_image() -> Result<Vec<Add>> {
    image_tars(images::build_fsx)
}

fn image_tars(build: impl FnOnce(&Path) -> Result<Vec<PathBuf>>) -> Result<Vec<Add>> {
    let _lock = lock::take("images")?;
    let tars = build(&paths::state().join("images")).context("cannot make the OCI images")?;
    Ok(tars
        .into_iter()
        .map(|tar| {
            let name = tar.file_name().unwrap_or_default().to_owned();
            Add::new(tar, Path::new(IMAGES).join(name))
        })
        .collect())
}

/// Makes the node's parts, without booting it.
pub fn prepare() -> Result<()> {
    node(Line::One).map(drop)
}

fn node(line: Line) -> Result<rootfs::Node> {
    let _lock = lock::take(PARTS)?;
    let node = rootfs::node()?;
    if line == Line::Legacy { legacy::node(node) } else { Ok(node) }
}

/// Boots the node, runs the script when containerd answers, and returns the script's exit code.
pub fn run(run: &Run) -> Result<u8> {
    run_observed(run, &mut |_| {})
}

/// Like [`run`]; passes what the script does to `observe`, as it happens.
pub fn run_observed(run: &Run, observe: &mut dyn FnMut(Progress<'_>)) -> Result<u8> {
    let seat = run.seat;
    let _lock = lock::take(&seat.name("node", "/"))?;
    let node = node(run.containerd)?;
    let mut call = String::from("exec bash /husk/script");
    for arg in &run.args {
        call.push_str(&format!(" '{}'", arg.replace('\'', "'\\''")));
    }
    let mut env = String::new();
    for (name, value) in &run.env {
        env.push_str(&format!("export {name}='{}'\n", value.replace('\'', "'\\''")));
    }
    let script = fs::read(&run.script).with_context(|| format!("cannot read {}", run.script.display()))?;
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
    boot::shell(&boot::Boot { seat, node: &node, extras: &extras, out: &out, machine, parameters })?;
    fetch(seat, &out)
}

/// The tar that the node unpacks over its root: the node's own files, what is installed, and what was asked for.
fn extras(seat: Seat, line: Line, add: &[Add], files: &[(&str, &[u8])]) -> Result<PathBuf> {
    let path = seat.dir().join("extras.tar");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut tar = tar::Tar::new(file);
    tar.add(&paths::root().join("tests/node/root"), Path::new("/"))?;
    if paths::dist().exists() {
        tar.add(&paths::dist(), Path::new("/"))?;
    } else {
        ui::say("node", "there is no dist/root yet: the node comes without Husk (`cargo xtask dist`)");
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

/// The disk that the node writes a tar of `/out` on.
fn out_disk(seat: Seat) -> Result<PathBuf> {
    let path = seat.dir().join("out.img");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    file.set_len(4 << 30).context("cannot size the node's output disk")?;
    Ok(path)
}

/// Unpacks what the node left.
fn fetch(seat: Seat, disk: &Path) -> Result<()> {
    let dir = seat.out_dir();
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    cache::make_dir(&dir)?;
    let mut unpack = Command::new("tar");
    unpack.args(["-x", "--no-same-owner", "-f"]).arg(disk).arg("-C").arg(&dir);
    cmd::output(&mut unpack).map(drop).context("cannot unpack what the node left in /out")
}
