//! stdin, stdout, stderr and terminals: no data is lost or mixed, and terminals have the requested size.
use std::io::Write;
use std::thread;
use std::time::Duration;

use husk_e2e::case;
use husk_e2e::command::Input;
use husk_e2e::pty::Terminal;
use sha2::{Digest, Sha256};

const BULK_BYTES: usize = 64 << 20;
const BULK_TIMEOUT: Duration = Duration::from_secs(240);

/// Returns pseudo-random bytes (xorshift64). Their hash changes if data is lost, repeated or reordered.
fn random_bytes(length: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

#[test]
fn stdin_transfers_64_mib_intact() {
    case("bulk-in", |case| {
        // The VM boots while the test generates the data.
        let mut running = case.busybox(&["sha256sum"]).start(Input::Pipe);
        let bytes = random_bytes(BULK_BYTES);
        let expected = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut stdin = running.take_stdin();
        let writer = thread::spawn(move || stdin.write_all(&bytes));
        let output = running.wait_within(BULK_TIMEOUT);
        writer
            .join()
            .unwrap()
            .unwrap_or_else(|error| panic!("failed to write to stdin: {error}\n{}", output.describe()));
        output.expect_clean().expect_out(&format!("{expected}  -"));
    });
}

#[test]
fn stdout_transfers_64_mib_intact() {
    case("bulk-out", |case| {
        // The script prints numbered blocks of numbered lines, so that the test detects lost, repeated or reordered
        // data.
        let script = "seq 1 200000 | head -c 1048576 > /tmp/block
            i=0; while [ $i -lt 64 ]; do i=$((i+1)); echo block $i; cat /tmp/block; done";
        let running = case.sh(script).start(Input::Null);
        let mut block = Vec::new();
        (1..=200_000).for_each(|number| writeln!(block, "{number}").unwrap());
        block.truncate(1 << 20);
        let mut expected = Vec::with_capacity(BULK_BYTES + 1024);
        for number in 1..=64 {
            writeln!(expected, "block {number}").unwrap();
            expected.extend_from_slice(&block);
        }
        let output = running.wait_within(BULK_TIMEOUT);
        assert_eq!(output.code, 0, "{}", output.describe());
        assert_eq!(output.stdout.len(), expected.len(), "stdout has a wrong number of bytes\n{}", output.describe());
        if output.stdout != expected {
            let difference = expected.iter().zip(&output.stdout).position(|(one, other)| one != other);
            panic!("the output differs from the expected data at byte {difference:?}");
        }
    });
}

#[test]
fn stdout_and_stderr_are_separate() {
    case("apart", |case| {
        let script = "for i in $(seq 1 2000); do echo out $i; echo err $i >&2; done";
        let output = case.sh(script).output().expect_code(0);
        let expected = |name: &str| (1..=2000).map(|i| format!("{name} {i}\n")).collect::<String>();
        assert!(output.out() == expected("out"), "stdout differs from what the container wrote\n{}", output.describe());
        assert!(output.err() == expected("err"), "stderr differs from what the container wrote\n{}", output.describe());
    });
}

#[test]
fn stdin_eof_arrives_and_output_continues() {
    case("eof", |case| {
        let mut running = case.sh("cat; echo end of input; sleep 1; echo after").start(Input::Pipe);
        running.write(b"one\ntwo\n");
        running.wait_for("two");
        assert!(running.is_running(), "cat must wait for more input");
        running.close_stdin();
        running.wait().expect_clean().expect_out("one\ntwo\nend of input\nafter");
    });
}

#[test]
fn unread_stdin_does_not_block_exit() {
    case("unread", |case| {
        let mut running = case.sh("exec 0<&-; echo done").start(Input::Pipe);
        let mut stdin = running.take_stdin();
        // ctr stops reading when the container has exited. Therefore a broken pipe is not an error.
        let writer = thread::spawn(move || stdin.write_all(&random_bytes(1 << 20)).is_ok());
        running.wait().expect_code(0);
        writer.join().unwrap();
    });
}

#[test]
fn terminal_has_requested_size_and_resizes() {
    case("tty", |case| {
        // With any runtime, the terminal's first size can arrive after the script's start. Therefore the script waits
        // for this size. At each later SIGWINCH, the trap interrupts `read`.
        let script = "tty; echo TERM=$TERM
            while [ \"$(stty size 2>/dev/null)\" != '31 97' ]; do sleep 0.1; done
            trap 'echo resized to $(stty size)' WINCH
            echo up; while :; do read line || continue; echo got $line; case $line in end) exit 5;; esac; done";
        let run = case.sh(script).flags(&["--tty"]);
        let mut terminal = Terminal::start(run.command(), 31, 97);
        terminal.running.wait_for("/dev/pts/0");
        terminal.running.wait_for("TERM=xterm");
        terminal.running.wait_for("up");
        terminal.resize(50, 132);
        terminal.running.wait_for("resized to 50 132");
        terminal.type_text("hello\n");
        terminal.running.wait_for("got hello");
        terminal.type_text("end\n");
        let output = terminal.running.wait();
        assert_eq!(output.code, 5, "{}", output.describe());
        assert!(output.out().contains("\r\n"), "a terminal must end lines with CR LF\n{}", output.describe());
    });
}

#[test]
fn ctrl_c_interrupts_foreground_process() {
    case("ctrl-c", |case| {
        let run = case.sh("trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 1; done").flags(&["-t"]);
        let mut terminal = Terminal::start(run.command(), 24, 80);
        terminal.running.wait_for("up");
        terminal.type_text("\x03");
        terminal.running.wait_for("interrupted");
        terminal.running.wait().expect_code(9);
    });
}
