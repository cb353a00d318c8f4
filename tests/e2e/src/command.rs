//! Runs programs with a time-out and collects what they print; a failed expectation shows everything there is to know.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::node;

/// How long anything may take. The emulated node is some 15 times slower than hardware, and ten pods share it at times.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// A `ctr` command line in the suites' namespace.
pub fn ctr<S: AsRef<str>>(args: &[S]) -> Command {
    let mut command = Command::new("ctr");
    command.args(["-n", crate::NAMESPACE]).args(args.iter().map(AsRef::as_ref));
    command
}

/// Runs `ctr` to its end without input.
pub fn run_ctr<S: AsRef<str>>(args: &[S]) -> Output {
    Running::start(ctr(args), Input::Null).wait()
}

/// What a program is given to read.
#[derive(Debug)]
pub enum Input {
    /// Nothing: `/dev/null`.
    Null,
    /// A pipe that the test writes to.
    Pipe,
}

/// What ended, and what it printed.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line.
    pub command: String,
    /// Exit code; 128 + n after signal n.
    pub code: i32,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: Vec<u8>,
    /// Wall time.
    pub took: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Demands an exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit code {code}\n{}", self.describe());
        self
    }

    /// Demands success and an empty standard error.
    #[track_caller]
    pub fn expect_clean(self) -> Self {
        assert!(self.code == 0 && self.stderr.is_empty(), "expected success and no message\n{}", self.describe());
        self
    }

    /// Demands success and exactly this output, line ends aside.
    #[track_caller]
    pub fn expect_out(self, expected: &str) -> Self {
        let out = self.out();
        assert!(
            self.code == 0 && out.trim_end() == expected.trim_end(),
            "expected output:\n{expected}\n{}",
            self.describe()
        );
        self
    }

    /// Demands failure (exit code 1) with an error that contains all of `parts`, in whatever case.
    #[track_caller]
    pub fn expect_error(self, parts: &[&str]) -> Self {
        let err = self.err().to_lowercase();
        let missing: Vec<_> = parts.iter().filter(|part| !err.contains(&part.to_lowercase())).collect();
        assert!(self.code == 1 && missing.is_empty(), "expected exit code 1 and {missing:?}\n{}", self.describe());
        self
    }

    /// The value after `key` and a colon or equals sign on a line of the output.
    #[track_caller]
    pub fn value(&self, key: &str) -> String {
        let out = self.out();
        out.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix([':', '=']).map(|value| value.trim().to_owned()))
            .unwrap_or_else(|| panic!("no {key} in the output\n{}", self.describe()))
    }

    /// Everything about this run and the end of containerd's log, for a failure's message.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "$ {}\nexit code {} after {:.1?}", self.command, self.code, self.took);
        let _ = writeln!(text, "--- stdout ({} bytes)\n{}", self.stdout.len(), shorten(&self.out()));
        let _ = writeln!(text, "--- stderr ({} bytes)\n{}", self.stderr.len(), shorten(&self.err()));
        let _ = writeln!(text, "--- containerd's log ends\n{}", node::log_tail(40));
        text
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 4000;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

enum Message {
    Out(Vec<u8>),
    Err(Vec<u8>),
    End,
}

/// A program that runs while the test goes on.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    messages: Receiver<Message>,
    open: usize,
    output: Output,
    started: Instant,
    /// How much of standard output `wait_for` has looked at.
    seen: usize,
}

impl Running {
    /// Starts `command` with its outputs collected.
    #[track_caller]
    pub fn start(mut command: Command, input: Input) -> Self {
        let line = format!("{command:?}").replace('"', "");
        command.stdin(match input {
            Input::Null => Stdio::null(),
            Input::Pipe => Stdio::piped(),
        });
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
        let (sender, messages) = channel();
        let err_sender = sender.clone();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        thread::spawn(move || pump(out, &|bytes| sender.send(bytes.map_or(Message::End, Message::Out)).is_ok()));
        thread::spawn(move || pump(err, &|bytes| err_sender.send(bytes.map_or(Message::End, Message::Err)).is_ok()));
        Self::new(child, line, messages, 2)
    }

    /// Starts `command` on a terminal; `master` is the test's end of it.
    #[track_caller]
    pub fn start_on_terminal(mut command: Command, master: OwnedFd) -> Self {
        let line = format!("{command:?}").replace('"', "");
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot run {line}: {error}"));
        // The command holds the terminal's other side, and the master ends only when every copy is closed.
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
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap_or_else(|error| panic!("cannot write to stdin: {error}"));
    }

    /// Hands the writing side of standard input out, for a thread.
    pub fn take_stdin(&mut self) -> ChildStdin {
        self.stdin.take().unwrap()
    }

    /// Ends the program's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The program's process.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until standard output has a line with `text` that was not waited for before, and returns that line.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        if let Some(line) = self.try_wait_for(text, TIMEOUT) {
            return line;
        }
        let output = self.give_up();
        panic!("{text:?} was not printed\n{}", output.describe());
    }

    /// Like [`Running::wait_for`], for no longer than told; without such a line the program goes on.
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

    /// Takes one message; false when there will be none before the deadline.
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

    /// Whether standard output so far, waited for or not, has a line with `text`.
    pub fn has_printed(&mut self, text: &str) -> bool {
        while self.receive(Instant::now()) {}
        self.output.out().lines().any(|line| line.contains(text))
    }

    /// Whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Waits for the program's end.
    #[track_caller]
    pub fn wait(self) -> Output {
        self.wait_within(TIMEOUT)
    }

    /// Waits for the program's end, for no longer than told.
    #[track_caller]
    pub fn wait_within(mut self, limit: Duration) -> Output {
        self.stdin = None;
        let deadline = self.started.max(Instant::now()) + limit;
        while self.open > 0 {
            if !self.receive(deadline) {
                let output = self.give_up();
                panic!("not done after {limit:?}\n{}", output.describe());
            }
        }
        self.finish()
    }

    fn give_up(&mut self) -> Output {
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

/// Sends what `source` gives, then `None`. A terminal whose other side is closed gives EIO: that is its end.
fn pump(mut source: impl Read, send: &dyn Fn(Option<Vec<u8>>) -> bool) {
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(length @ 1..) = source.read(&mut buffer) {
        if !send(Some(buffer[..length].to_vec())) {
            return;
        }
    }
    send(None);
}
