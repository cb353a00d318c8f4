//! Runs programs with a timeout and collects their output. If a check of the output fails, the output is printed.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::containerd_log::log_tail;

/// Timeout of each command. An emulated node is about 15 times slower than hardware, and up to ten pods share the node.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// Returns a `ctr` command line in the suites' containerd namespace.
pub fn ctr<S: AsRef<str>>(args: &[S]) -> Command {
    let mut command = Command::new("ctr");
    command.args(["-n", crate::NAMESPACE]).args(args.iter().map(AsRef::as_ref));
    command
}

/// Runs `ctr` without input and waits for its end.
pub fn run_ctr<S: AsRef<str>>(args: &[S]) -> Output {
    Running::start(ctr(args), Input::Null).wait()
}

/// Standard input of a program.
#[derive(Debug)]
pub enum Input {
    /// `/dev/null`.
    Null,
    /// A pipe to which the test writes.
    Pipe,
}

/// Result of a program that has exited.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line.
    pub command: String,
    /// Exit code, or 128 + n after signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Time from start to exit.
    pub took: Duration,
}

impl Output {
    /// Returns standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Returns standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Requires the exit code `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit code {code}\n{}", self.describe());
        self
    }

    /// Requires success and an empty standard error.
    #[track_caller]
    pub fn expect_clean(self) -> Self {
        assert!(self.code == 0 && self.stderr.is_empty(), "expected success and empty stderr\n{}", self.describe());
        self
    }

    /// Requires success and exactly the output `expected`, apart from trailing white space.
    #[track_caller]
    pub fn expect_out(self, expected: &str) -> Self {
        let out = self.out();
        assert!(
            self.code == 0 && out.trim_end() == expected.trim_end(),
            "expected success and the output:\n{expected}\n{}",
            self.describe()
        );
        self
    }

    /// Requires failure (exit code 1) with an error that contains all `parts`. Ignores case.
    #[track_caller]
    pub fn expect_error(self, parts: &[&str]) -> Self {
        let err = self.err().to_lowercase();
        let missing: Vec<_> = parts.iter().filter(|part| !err.contains(&part.to_lowercase())).collect();
        assert!(
            self.code == 1 && missing.is_empty(),
            "expected exit code 1 and an error that contains {missing:?}\n{}",
            self.describe()
        );
        self
    }

    /// Returns the value of a line `key: value` or `key=value` of the output.
    #[track_caller]
    pub fn value(&self, key: &str) -> String {
        let out = self.out();
        out.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix([':', '=']).map(|value| value.trim().to_owned()))
            .unwrap_or_else(|| panic!("no {key} in the output\n{}", self.describe()))
    }

    /// Describes this run, with the last lines of containerd's log, for a failure message.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "$ {}\nexit code {} after {:.1?}", self.command, self.code, self.took);
        let _ = writeln!(text, "--- stdout ({} bytes)\n{}", self.stdout.len(), shorten(&self.out()));
        let _ = writeln!(text, "--- stderr ({} bytes)\n{}", self.stderr.len(), shorten(&self.err()));
        let _ = writeln!(text, "--- last 40 lines of containerd's log\n{}", log_tail(40));
        text
    }
}

fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 4000;
    let start: String = text.chars().take(MAX_CHARS).collect();
    if start.len() < text.len() { format!("{start} …") } else { start }
}

enum Message {
    Out(Vec<u8>),
    Err(Vec<u8>),
    End,
}

/// A program that runs in the background.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    messages: Receiver<Message>,
    open: usize,
    output: Output,
    started: Instant,
    /// Number of bytes of standard output that `wait_for` has consumed.
    seen: usize,
}

impl Running {
    /// Starts `command` and collects its output.
    #[track_caller]
    pub fn start(mut command: Command, input: Input) -> Self {
        let line = format!("{command:?}").replace('"', "");
        command.stdin(match input {
            Input::Null => Stdio::null(),
            Input::Pipe => Stdio::piped(),
        });
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("failed to run {line}: {error}"));
        let (sender, messages) = channel();
        let err_sender = sender.clone();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        thread::spawn(move || pump(out, &|bytes| sender.send(bytes.map_or(Message::End, Message::Out)).is_ok()));
        thread::spawn(move || pump(err, &|bytes| err_sender.send(bytes.map_or(Message::End, Message::Err)).is_ok()));
        Self::new(child, line, messages, 2)
    }

    /// Starts `command` on a terminal. `master` is the fd of the terminal's master side.
    #[track_caller]
    pub fn start_on_terminal(mut command: Command, master: OwnedFd) -> Self {
        let line = format!("{command:?}").replace('"', "");
        let child = command.spawn().unwrap_or_else(|error| panic!("failed to run {line}: {error}"));
        // Closes the fds of the slave side in `command`. Otherwise, reads from the master side would never end.
        drop(command);
        let (sender, messages) = channel();
        let master = std::fs::File::from(master);
        thread::spawn(move || pump(master, &|bytes| sender.send(bytes.map_or(Message::End, Message::Out)).is_ok()));
        Self::new(child, line, messages, 1)
    }

    fn new(mut child: Child, command: String, messages: Receiver<Message>, open: usize) -> Self {
        let stdin = child.stdin.take();
        let output = Output { command, code: -1, stdout: Vec::new(), stderr: Vec::new(), took: Duration::ZERO };
        Self { child, stdin, messages, open, output, started: Instant::now(), seen: 0 }
    }

    /// Writes to the program's standard input.
    #[track_caller]
    pub fn write(&mut self, bytes: &[u8]) {
        self.stdin
            .as_mut()
            .unwrap()
            .write_all(bytes)
            .unwrap_or_else(|error| panic!("failed to write to the program's stdin: {error}"));
    }

    /// Takes the write end of standard input, so that another thread can write to it.
    pub fn take_stdin(&mut self) -> ChildStdin {
        self.stdin.take().unwrap()
    }

    /// Closes the program's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Returns the program's pid.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for the next line of standard output that contains `text`, and returns the line.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        if let Some(line) = self.try_wait_for(text, TIMEOUT) {
            return line;
        }
        let output = self.kill();
        panic!("the program has not printed {text:?}\n{}", output.describe());
    }

    /// Like [`Running::wait_for`], but with the timeout `limit`. If the timeout expires or the output ends, returns
    /// `None` and does not kill the program.
    pub fn try_wait_for(&mut self, text: &str, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(line) = self.next_line_with(text) {
                return Some(line);
            }
            if !self.receive(deadline) {
                return None;
            }
        }
    }

    fn next_line_with(&mut self, text: &str) -> Option<String> {
        while let Some(length) = self.output.stdout.get(self.seen..)?.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&self.output.stdout[self.seen..self.seen + length]).into_owned();
            self.seen += length + 1;
            if line.contains(text) {
                return Some(line.trim_end().to_owned());
            }
        }
        None
    }

    /// Receives one message. Returns false if no message arrives before the deadline, or if the output has ended.
    fn receive(&mut self, deadline: Instant) -> bool {
        if self.open == 0 {
            return false;
        }
        match self.messages.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Message::Out(bytes)) => self.output.stdout.extend(bytes),
            Ok(Message::Err(bytes)) => self.output.stderr.extend(bytes),
            Ok(Message::End) => self.open -= 1,
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => self.open = 0,
        }
        true
    }

    /// Returns whether the program has already printed a line with `text` on standard output. Lines that
    /// [`Running::wait_for`] has consumed count too.
    pub fn has_printed(&mut self, text: &str) -> bool {
        while self.receive(Instant::now()) {}
        self.output.out().lines().any(|line| line.contains(text))
    }

    /// Returns whether the program is running.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Waits for the program to exit.
    #[track_caller]
    pub fn wait(self) -> Output {
        self.wait_within(TIMEOUT)
    }

    /// Waits for the program to exit, with a timeout.
    #[track_caller]
    pub fn wait_within(mut self, limit: Duration) -> Output {
        self.stdin = None;
        let deadline = self.started.max(Instant::now()) + limit;
        while self.open > 0 {
            if !self.receive(deadline) {
                let output = self.kill();
                panic!("the program still runs after {limit:?}\n{}", output.describe());
            }
        }
        self.finish()
    }

    fn kill(&mut self) -> Output {
        let _ = self.child.kill();
        self.finish()
    }

    fn finish(&mut self) -> Output {
        use std::os::unix::process::ExitStatusExt;
        if let Ok(status) = self.child.wait() {
            self.output.code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        }
        self.output.took = self.started.elapsed();
        self.output.clone()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Passes the data from `source` to `send`, and `None` at the end of `source`. A terminal ends with the error EIO when
/// all fds of its slave side are closed.
fn pump(mut source: impl Read, send: &dyn Fn(Option<Vec<u8>>) -> bool) {
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(length @ 1..) = source.read(&mut buffer) {
        if !send(Some(buffer[..length].to_vec())) {
            return;
        }
    }
    send(None);
}
