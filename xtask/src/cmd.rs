//! Runs programs. Their output goes to a log, to the terminal or to the caller. An error names the command.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{paths, ui};

/// If a program fails, this number of lines from the end of its log is shown.
const LOG_TAIL: usize = 30;

/// Returns the command line, cut after about 160 bytes.
fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
        if text.len() > 160 {
            text.push('…');
            break;
        }
    }
    text
}

fn start_error(command: &Command) -> String {
    format!("failed to start `{}`; `cargo xtask setup` installs the required packages", describe(command))
}

/// Runs `command` to its end, and writes its output to `target/husk/logs/<log>.log`. While the command runs, the
/// terminal shows the last line of the output.
pub fn logged(step: &str, log: &str, command: &mut Command) -> Result<()> {
    let path = log_path(log)?;
    let mut file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    let (reader, writer) = std::io::pipe().context("failed to create a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| start_error(command))?;
    let text = describe(command);
    // `command` owns the write ends of the pipe until its stdout and stderr are replaced. While a write end is open,
    // the reader sees no end of file.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let (sender, lines) = channel();
    let pump = std::thread::spawn(move || -> std::io::Result<()> {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            file.write_all(&line)?;
            let _ = sender.send(String::from_utf8_lossy(&line).trim().to_owned());
            line.clear();
        }
        Ok(())
    });
    let (mut count, mut last, mut reported) = (0_u64, String::new(), Instant::now());
    loop {
        match lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => {
                count += 1;
                last = line;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if ui::live() {
            ui::transient(step, &last);
        } else if reported.elapsed() > Duration::from_secs(20) {
            reported = Instant::now();
            ui::say(
                step,
                format!(
                    "still running ({count} lines of output; the last line: {})",
                    last.chars().take(90).collect::<String>()
                ),
            );
        }
    }
    ui::erase();
    let status = child.wait()?;
    if let Ok(result) = pump.join() {
        result.with_context(|| format!("failed to write {}", path.display()))?;
    }
    if !status.success() {
        bail!("`{text}` ended with {status}; the last lines of its log {}:\n{}", path.display(), tail(&path, LOG_TAIL));
    }
    Ok(())
}

/// Runs `command` with its output on the terminal.
pub fn shown(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| start_error(command))?;
    if !status.success() {
        bail!("`{}` ended with {status}", describe(command));
    }
    Ok(())
}

/// Runs `command` and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| start_error(command))?;
    if !out.status.success() {
        bail!("`{}` ended with {}: {}", describe(command), out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Returns the path of the log called `name`.
pub fn log_path(name: &str) -> Result<PathBuf> {
    let dir = paths::state().join("logs");
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    Ok(dir.join(format!("{name}.log")))
}

/// Returns the last `lines` lines of a file, indented.
pub fn tail(path: &std::path::Path, lines: usize) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let _ = file.read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all.iter().skip(from).map(|l| format!("    {}\n", l.trim_end())).collect()
}

/// Returns the number of processors that this process can use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Whether this process runs as root. Only root can unpack a root file system with the right file owners.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
