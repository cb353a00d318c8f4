//! `cargo xtask demo`: runs a container under Husk and shows its output and the timeline of its start.
//!
//! The demo runs on this machine if xtask runs as root, KVM is usable and containerd is installed. In this case, the
//! demo starts a separate containerd, and removes the files of this containerd at the end. If a condition is not met,
//! the demo runs in the test node.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::build::Profile;
use crate::node::{self, Add, Limits, Line, Machine, Run, Seat, kvm};
use crate::{cmd, dist, files, paths, setup, ui};

/// The options of `cargo xtask demo`.
#[derive(Args)]
pub struct Options {
    /// Build in the quick profile.
    #[arg(long)]
    quick: bool,
    /// Use the test node even if this machine can run the demo.
    #[arg(long)]
    node: bool,
}

/// Builds the programs and runs the demo. Returns the exit code.
pub fn demo(options: &Options) -> Result<u8> {
    setup::setup()?;
    let root = dist::dist(Profile::quick(options.quick))?;
    let images = node::images()?;
    let script = paths::root().join("tests/node/demo.sh");
    let why_node = if options.node { Some("requested by --node".to_owned()) } else { unsuitable() };
    let (code, timeline) = match why_node {
        None => {
            ui::say("demo", "running on this machine, with a separate containerd");
            let dir = paths::state().join("demo");
            let log = dir.join("timeline");
            (here(&root, &dir, &script, &log)?, log)
        }
        Some(why) => {
            ui::say("demo", format!("running in the test node ({why})"));
            (in_node(images, &script)?, Seat::default().out_dir().join("timeline"))
        }
    };
    if code == 0 {
        show(&timeline)?;
    }
    Ok(code)
}

/// Returns the reason why the demo cannot run on this machine, or `None` if it can.
fn unsuitable() -> Option<String> {
    if !cmd::is_root() {
        return Some("this process is not root".into());
    }
    if cmd::output(Command::new("containerd").arg("--version")).is_err() {
        return Some("containerd is not installed on this machine".into());
    }
    kvm::usable().err()
}

/// Returns Husk's configuration for the demo: the `config.toml` in `root`, followed by the settings in `more`.
fn configuration(root: &Path, more: &str) -> Result<String> {
    let path = root.join("etc/husk/config.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    Ok(format!("{text}\n{more}"))
}

fn in_node(mut add: Vec<Add>, script: &Path) -> Result<u8> {
    let config = paths::node().join("demo-config.toml");
    files::make_dir(&paths::node())?;
    let text = node::configuration("timeline_log = \"/out/timeline\"\n")?;
    fs::write(&config, text).with_context(|| format!("failed to write {}", config.display()))?;
    add.push(Add::new(config, "/etc/husk/config.toml"));
    let env = vec![
        ("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned()),
        ("HUSK_TIMELINE".to_owned(), "/out/timeline".to_owned()),
    ];
    node::run(&Run {
        script: script.to_path_buf(),
        args: vec![],
        env,
        add,
        imported: false,
        machine: Machine::default(),
        containerd: Line::One,
        limits: Limits::secs(600, 600),
        seat: Seat::default(),
    })
}

/// The demo's separate containerd. When this value is dropped, containerd is stopped and its files are removed.
struct Containerd {
    child: Child,
    root: PathBuf,
    state: PathBuf,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The child has not been reaped, so its PID cannot have been reused.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.root);
        let _ = fs::remove_dir_all(&self.state);
    }
}

/// Runs the demo on this machine.
fn here(root: &Path, dir: &Path, script: &Path, timeline: &Path) -> Result<u8> {
    files::make_dir(dir)?;
    let share = root.join("usr/local/share/husk");
    let mut more = String::new();
    let paths =
        [("kernel", share.join("vmlinux")), ("initrd", share.join("initrd.cpio")), ("timeline_log", timeline.into())];
    for (key, path) in paths {
        more.push_str(&format!("{key} = {:?}\n", path.display().to_string()));
    }
    let config = dir.join("config.toml");
    fs::write(&config, configuration(root, &more)?).with_context(|| format!("failed to write {}", config.display()))?;
    // The path of a UNIX socket has at most 107 bytes (unix(7)), so this directory has a short path.
    let state = PathBuf::from(format!("/run/husk-demo-{}", std::process::id()));
    let socket = state.join("containerd.sock");
    let settings = dir.join("containerd.toml");
    let text = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        dir.join("root").display().to_string(),
        state.display().to_string(),
        socket.display().to_string()
    );
    fs::write(&settings, text).with_context(|| format!("failed to write {}", settings.display()))?;
    let mut path = root.join("usr/local/bin").into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());

    let mut command = Command::new("containerd");
    command.arg("--config").arg(&settings).env("PATH", &path).env("HUSK_CONFIG", &config);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let child = child.context("failed to start containerd")?;
    let mut containerd = Containerd { child, root: dir.join("root"), state };
    wait_for_boot(&mut containerd.child)?;
    let mut run = Command::new("bash");
    run.arg(script).env("PATH", &path).env("CONTAINERD_ADDRESS", &socket);
    run.env("HUSK_IMAGES", paths::state().join("images")).env("HUSK_TIMELINE", timeline);
    let status = run.status().context("failed to start bash")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(125))
}

/// Waits until containerd logs that it has booted. Copies containerd's log to a file.
fn wait_for_boot(child: &mut Child) -> Result<()> {
    let log = cmd::log_path("demo-containerd")?;
    let mut file = File::create(&log).with_context(|| format!("failed to write {}", log.display()))?;
    let mut lines = BufReader::new(child.stderr.take().context("failed to get containerd's stderr")?).lines();
    for line in lines.by_ref() {
        let line = line?;
        writeln!(file, "{line}")?;
        if line.contains("containerd successfully booted") {
            std::thread::spawn(move || {
                for line in lines.map_while(Result::ok) {
                    let _ = writeln!(file, "{line}");
                }
            });
            return Ok(());
        }
    }
    bail!("containerd ended before it had booted; the last lines of {}:\n{}", log.display(), cmd::tail(&log, 10))
}

/// Prints the timeline of the last start.
fn show(path: &Path) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("failed to read the timeline {}", path.display()))?;
    let line = text.lines().last().with_context(|| format!("the timeline {} is empty", path.display()))?;
    println!(
        "\nThe steps of the start, with the milliseconds since the first step and since the previous step:\n{}",
        timeline(line)?
    );
    Ok(())
}

/// Formats the steps of a timeline, with the time since the first step and since the previous step.
fn timeline(line: &str) -> Result<String> {
    let value: Value = serde_json::from_str(line).context("failed to parse the timeline as JSON")?;
    let steps = value.get("steps").and_then(Value::as_array).context("the timeline has no steps")?;
    let mut text = String::new();
    let mut first = None;
    let mut before = None;
    for step in steps {
        let name = step.get("name").and_then(Value::as_str).unwrap_or("?");
        let at = step.get("at_ns").and_then(Value::as_u64).context("a step of the timeline has no time")?;
        let (start, last) = (*first.get_or_insert(at), before.replace(at).unwrap_or(at));
        let since = |from: u64| at.saturating_sub(from) as f64 / 1e6;
        text.push_str(&format!("    {:9.1}  {:+9.1}  {name}\n", since(start), since(last)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::timeline;

    #[test]
    fn steps_have_the_time_since_the_first_and_the_previous_step() {
        let line = r#"{"sandbox":"a","steps":[{"name":"one","at_ns":5000000},{"name":"two","at_ns":6500000}]}"#;
        assert_eq!(timeline(line).unwrap(), "          0.0       +0.0  one\n          1.5       +1.5  two\n");
        assert!(timeline("{}").is_err());
    }
}
