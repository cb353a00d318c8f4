//! A program that takes the place of the VMM in the VMM's jail, and tries to get out.
//!
//! For each attempt and kind of thread, the program starts itself in the same way as the shim starts the VMM process.
//! The process enters the jail, and a thread of this kind makes the attempt. Each attempt is made twice: with enforced
//! seccomp filters, and with filters that only log. With filters that only log, another wall of the jail has to stop
//! the attempt, for example the root directory or landlock, unless [`Attempt::without_filters`] contains a reason. The
//! program prints a table of the results. The program fails if an attempt that a wall has to stop succeeds.
//!
//! The program needs root, as the shim does.

#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by a panic")]

mod attempts;
mod payload;

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use husk_vmm::client::{ARGV0, Network, SpawnOptions, spawn};
use husk_vmm::config::SeccompMode;
use husk_vmm::control::wire;
use husk_vmm::jail::Kind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use crate::attempts::ATTEMPTS;

/// The kinds of threads that serve the guest or the shim.
const KINDS: [Kind; 5] = [Kind::Control, Kind::Vcpu, Kind::DeviceLoop, Kind::FileServer, Kind::Disk];

/// Prefix of the result text of a successful attempt.
const ESCAPED: &str = "ESCAPED";

/// What the program tells the process in the jail.
#[derive(Serialize, Deserialize)]
struct Order {
    /// Position of the attempt in [`ATTEMPTS`].
    attempt: usize,
    /// Position of the thread's kind in [`KINDS`].
    kind: usize,
    seccomp: SeccompMode,
    share: PathBuf,
    /// PID of the program, outside the jail.
    parent: i32,
}

/// What the process in the jail answers.
#[derive(Serialize, Deserialize)]
enum Outcome {
    /// The attempt failed with this error.
    Failed(String),
    /// The attempt succeeded. The text says what the process has gained.
    Escaped(String),
}

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        payload::run();
    }
    let outside = tempfile::tempdir().expect("create a directory");
    let share = Share::new(outside.path());
    let address = SocketAddr::from_abstract_name("husk-escape").expect("make an abstract address");
    let _listener = UnixListener::bind_addr(&address).expect("bind an abstract socket");
    let parent = std::process::id().cast_signed();
    let mut escapes = 0;
    println!("| attempt | with the filters | without the filters | why no other wall has to stop it |");
    println!("| --- | --- | --- | --- |");
    for (number, attempt) in ATTEMPTS.iter().enumerate() {
        let results = [SeccompMode::Enforce, SeccompMode::Log].map(|seccomp| {
            let order = |kind| Order { attempt: number, kind, seccomp, share: share.0.clone(), parent };
            (0..KINDS.len()).map(|kind| run(&order(kind))).collect::<Vec<_>>()
        });
        let escaped = |results: &[String]| results.iter().filter(|result| result.starts_with(ESCAPED)).count();
        let [enforced, logged] = &results;
        escapes += escaped(enforced) + if attempt.without_filters.is_none() { escaped(logged) } else { 0 };
        let [enforced, logged] = results.map(|results| cell(&results));
        println!("| {} | {enforced} | {logged} | {} |", attempt.name, attempt.without_filters.unwrap_or_default());
    }
    if escapes == 0 {
        println!("no attempt that a wall has to stop has succeeded");
        return ExitCode::SUCCESS;
    }
    println!("{escapes} attempts that a wall has to stop have succeeded");
    ExitCode::FAILURE
}

/// Returns the results of all kinds of threads as one cell of the table.
fn cell(results: &[String]) -> String {
    let mut groups: Vec<(&str, Vec<String>)> = Vec::new();
    for (kind, result) in KINDS.iter().zip(results) {
        match groups.iter_mut().find(|(known, _)| known == result) {
            Some((_, kinds)) => kinds.push(format!("{kind:?}")),
            None => groups.push((result, vec![format!("{kind:?}")])),
        }
    }
    match groups.as_slice() {
        [(result, _)] => (*result).to_owned(),
        groups => groups
            .iter()
            .map(|(result, kinds)| format!("{}: {result}", kinds.join(", ")))
            .collect::<Vec<_>>()
            .join("; "),
    }
}

/// Makes one attempt. Returns the result as a text.
fn run(order: &Order) -> String {
    let options = SpawnOptions { network: Network::New, ..SpawnOptions::default() };
    let process = spawn(options).expect("start the process");
    wire::send(&process.control, order, &[]).expect("send the order");
    let answer = wire::recv::<serde_json::Value>(&process.control);
    let status = husk_base::sys::process::wait(process.pid.cast_signed(), 0).expect("wait for the process");
    let Ok((answer, _)) = answer else { return format!("the process ended without an answer: {status:?}") };
    match serde_json::from_value(answer.clone()) {
        Ok(Outcome::Failed(error)) => error,
        Ok(Outcome::Escaped(what)) => format!("{ESCAPED}: {what}"),
        // The answer can also be a notice from the SIGSYS handler, if the filter stopped the attempt.
        Err(_) => match answer.pointer("/Notice/Exited/reason/Failed").and_then(serde_json::Value::as_str) {
            Some(text) => killed(text),
            None => format!("unexpected answer: {answer}"),
        },
    }
}

/// Shortens the report of a violation to the name of the call.
fn killed(report: &str) -> String {
    let name = report.split(['(', ')']).nth(1).unwrap_or(report);
    format!("killed at `{name}`")
}

/// The pod's share, mounted as the shim mounts it.
struct Share(PathBuf);

impl Share {
    fn new(outside: &Path) -> Self {
        let path = outside.join("share");
        fs::create_dir(&path).expect("create the share");
        fs::write(path.join("inside"), "inside").expect("write a file in the share");
        fs::write(outside.join("secret"), "secret").expect("write a file beside the share");
        let none = None::<&str>;
        mount(Some(&path), &path, none, MsFlags::MS_BIND, none).expect("mount the share, which needs root");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(none, &path, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none).expect("set the share's flags");
        Self(path)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
