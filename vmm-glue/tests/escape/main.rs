//! A program that takes the place of the VMM in the VMM's jail, and tries to get out.
//!
//! For each attempt and kind of thread, the program starts itself in the same way as the shim starts the VMM process.
//! The process enters the jail, and a thread of this kind makes the attempt. Each attempt is made twice: with enforced
//! seccomp filters, and with filters that only log. With filters that only log, another wall of the jail has to stop
//! the attempt, for example the root directory or landlock, unless [`Attempt::without_filters`] contains a reason. The
//! program prints a table of the results. The program fails unless each attempt that a wall has to stop ends with an
//! error of the kernel or by a filter. The program also fails if the rows differ from the rows in `docs/security.md`.
//! With `HUSK_UPDATE_DOCS=1` in the environment, the program writes the table to `docs/security.md`.
//!
//! The program needs root, as the shim does.

#![expect(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by a panic")]

mod attempts;
mod chains;
mod exhaustion;
mod outside;
mod payload;

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::ExitCode;

use husk_vmm::client::{ARGV0, Network, SpawnOptions, spawn};
use husk_vmm::config::SeccompMode;
use husk_vmm::control::wire;
use husk_vmm::jail::Kind;
use serde::{Deserialize, Serialize};
use syscalls::Errno;

use crate::attempts::{ATTEMPTS, Attempt};
use crate::outside::{Cgroup, Disk, Share};

/// The document that contains the table, and the table's section.
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md");
const SECTION: &str = "## Attempts to leave the jail\n";
/// The title of the table.
const TITLE: [&str; 2] = [
    "| attempt | with the filters | without the filters | why no other wall has to stop it |",
    "| --- | --- | --- | --- |",
];

/// What the program tells the process in the jail.
#[derive(Serialize, Deserialize)]
struct Order {
    /// Position of the attempt in [`ATTEMPTS`].
    attempt: usize,
    /// Position of the thread's kind in [`Kind::ALL`].
    kind: usize,
    seccomp: SeccompMode,
    share: PathBuf,
    /// PID of the program, outside the jail.
    parent: i32,
    /// Device number of a disk of the host.
    disk: u64,
}

/// What stopped an attempt.
#[derive(Serialize, Deserialize, PartialEq)]
enum Stopped {
    /// The kernel returned this errno.
    Errno(i32),
    /// There was nothing to use. The text says what the attempt looked for.
    Nothing(String),
    /// Something unexpected stopped the attempt.
    Unclear(String),
}

impl From<Errno> for Stopped {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno.into_raw())
    }
}

/// What the process in the jail answers.
#[derive(Serialize, Deserialize)]
enum Outcome {
    /// Something stopped the attempt.
    Stopped(Stopped),
    /// The attempt succeeded. The text says what the process has gained.
    Escaped(String),
}

/// How an attempt of a kind of thread has ended.
#[derive(PartialEq)]
enum Ended {
    /// Something other than the filter stopped the attempt.
    Stopped(Stopped),
    /// The filter ended the process. The text says at which system call.
    Killed(String),
    /// The attempt succeeded. The text says what the process has gained.
    Escaped(String),
    /// Anything else. Nobody knows what has stopped the attempt.
    Unclear(String),
}

impl Ended {
    /// Returns whether the test fails because of this end.
    fn is_failure(&self, attempt: &Attempt, seccomp: SeccompMode) -> bool {
        match (self, seccomp) {
            // Every errno of the kernel has a name. 0 is not an errno.
            (Self::Stopped(Stopped::Errno(errno)), _) => Errno::new(*errno).name().is_none(),
            (Self::Stopped(Stopped::Nothing(_)), _) | (Self::Killed(_), SeccompMode::Enforce) => false,
            (Self::Escaped(_), SeccompMode::Log) => attempt.without_filters.is_none(),
            // A filter that only logs does not end the process.
            (Self::Escaped(_), SeccompMode::Enforce) | (Self::Killed(_), SeccompMode::Log) => true,
            (Self::Stopped(Stopped::Unclear(_)) | Self::Unclear(_), _) => true,
        }
    }

    /// Returns the text for the table.
    fn text(&self) -> String {
        match self {
            Self::Stopped(Stopped::Errno(errno)) => {
                Errno::new(*errno).name().map_or_else(|| format!("unknown errno {errno}"), str::to_owned)
            }
            Self::Stopped(Stopped::Nothing(text)) => text.clone(),
            Self::Killed(how) => how.clone(),
            Self::Escaped(what) => format!("**succeeds**: {what}"),
            Self::Stopped(Stopped::Unclear(what)) | Self::Unclear(what) => format!("unclear: {what}"),
        }
    }
}

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        payload::run();
    }
    let directory = tempfile::tempdir().expect("create a directory");
    let share = Share::new(directory.path());
    let disk = Disk::new(directory.path());
    let cgroup = Cgroup::new();
    let address = SocketAddr::from_abstract_name("husk-escape").expect("make an abstract address");
    let _listener = UnixListener::bind_addr(&address).expect("bind an abstract socket");
    let parent = std::process::id().cast_signed();
    let mut failures = Vec::new();
    let mut table = Vec::new();
    let mut add_line = |line: String| {
        println!("{line}");
        table.push(line);
    };
    TITLE.iter().for_each(|line| add_line((*line).to_owned()));
    for (number, attempt) in ATTEMPTS.iter().enumerate() {
        let [enforced, logged] = [SeccompMode::Enforce, SeccompMode::Log].map(|seccomp| {
            let order =
                |kind| Order { attempt: number, kind, seccomp, share: share.0.clone(), parent, disk: disk.number() };
            let ends: Vec<_> = (0..Kind::ALL.len()).map(|kind| run(&order(kind), &cgroup)).collect();
            let failed = Kind::ALL.iter().zip(&ends).filter(|(_, end)| end.is_failure(attempt, seccomp));
            failures
                .extend(failed.map(|(kind, end)| format!("{}, {kind:?}, {seccomp:?}: {}", attempt.name, end.text())));
            cell(&ends)
        });
        let reason = attempt.without_filters.map(|reason| format!("{reason} ")).unwrap_or_default();
        add_line(format!("| {} | {enforced} | {logged} | {reason}|", attempt.name));
    }
    if std::env::var_os("HUSK_UPDATE_DOCS").is_some() {
        update_document(&table);
    }
    failures.extend(document_differences());
    // Other limits of pids have the same errno.
    if cgroup.refusals().expect("read pids.events of the cgroup") == 0 {
        failures.push("the cgroup's limit of pids has refused no pid".to_owned());
    }
    if failures.is_empty() {
        println!("something has stopped each attempt that a wall has to stop");
        return ExitCode::SUCCESS;
    }
    println!("failures:\n{}", failures.join("\n"));
    ExitCode::FAILURE
}

/// Replaces the table in the document.
fn update_document(table: &[String]) {
    let document = fs::read_to_string(DOCUMENT).expect("read docs/security.md");
    let (before, section) = document.split_once(SECTION).expect("docs/security.md lacks the table's section");
    let (introduction, rest) = section.split_once("\n|").expect("the section lacks a table");
    let (_, after) = rest.split_once("\n\n").expect("nothing follows the table");
    let table = table.join("\n");
    fs::write(DOCUMENT, format!("{before}{SECTION}{introduction}\n{table}\n\n{after}"))
        .expect("write docs/security.md");
}

/// Compares the attempts and the reasons with the table in the document. The document's results are from one kernel.
fn document_differences() -> Vec<String> {
    let document = fs::read_to_string(DOCUMENT).expect("read docs/security.md");
    let section = document.split_once(SECTION).map_or("", |(_, section)| section);
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(TITLE.len());
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let documented: Vec<_> = cells.map(|cells| (cells[1], cells[4])).collect();
    let made: Vec<_> = ATTEMPTS.iter().map(|made| (made.name, made.without_filters.unwrap_or_default())).collect();
    let missing = made.iter().filter(|row| !documented.contains(row));
    let unknown = documented.iter().filter(|row| !made.contains(row));
    let missing = missing.map(|row| format!("docs/security.md lacks the row {row:?}"));
    missing.chain(unknown.map(|row| format!("docs/security.md has the unknown row {row:?}"))).collect()
}

/// Returns the results of all kinds of threads as one cell of the table.
fn cell(ends: &[Ended]) -> String {
    let mut groups: Vec<(&Ended, Vec<String>)> = Vec::new();
    for (kind, end) in Kind::ALL.iter().zip(ends) {
        match groups.iter_mut().find(|(known, _)| known == &end) {
            Some((_, kinds)) => kinds.push(format!("{kind:?}")),
            None => groups.push((end, vec![format!("{kind:?}")])),
        }
    }
    match groups.as_slice() {
        [(end, _)] => end.text(),
        groups => groups
            .iter()
            .map(|(end, kinds)| format!("{}: {}", kinds.join(", "), end.text()))
            .collect::<Vec<_>>()
            .join("; "),
    }
}

/// Makes one attempt. Returns how the attempt has ended.
fn run(order: &Order, cgroup: &Cgroup) -> Ended {
    let options = SpawnOptions { network: Network::New, cgroups: vec![cgroup.procs()], ..SpawnOptions::default() };
    let process = spawn(options).expect("start the process");
    wire::send(&process.control, order, &[]).expect("send the order");
    let answer = wire::recv::<serde_json::Value>(&process.control);
    let status = husk_base::sys::process::wait(process.pid.cast_signed(), 0).expect("wait for the process");
    let Ok((answer, _)) = answer else {
        if status.is_some_and(|(_, status)| libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS) {
            // The thread has blocked all signals. Therefore the kernel ends the process without the SIGSYS handler.
            return Ended::Killed("killed by SIGSYS".to_owned());
        }
        return Ended::Unclear(format!("the process ended without an answer: {status:?}"));
    };
    match serde_json::from_value(answer.clone()) {
        Ok(Outcome::Stopped(stopped)) => Ended::Stopped(stopped),
        Ok(Outcome::Escaped(what)) => Ended::Escaped(what),
        // The answer can also be a notice from the SIGSYS handler, if the filter stopped the attempt.
        Err(_) => {
            match answer.pointer("/Notice/Exited/reason/Failed").and_then(serde_json::Value::as_str).and_then(call) {
                Some(call) => Ended::Killed(format!("killed at `{call}`")),
                None => Ended::Unclear(format!("unexpected answer: {answer}")),
            }
        }
    }
}

/// Returns the name of the call from the report of a violation. Returns `None` if the process ended for another reason.
fn call(report: &str) -> Option<&str> {
    let (_, call) = report.split_once(" made system call ")?;
    call.contains("which its seccomp filter does not allow").then(|| call.split(['(', ')']).nth(1))?
}
