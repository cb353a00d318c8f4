//! Nothing of standard input and output is lost or mixed; terminals have the size they are given.
use std::io::Write;
use std::thread;
use std::time::Duration;

use husk_e2e::case;
use husk_e2e::command::Input;
use husk_e2e::pty::Terminal;
use sha2::{Digest, Sha256};

const AMOUNT: usize = 64 << 20;
const LONG: Duration = Duration::from_secs(240);

/// Bytes that no compression and no accident of order leaves alike (xorshift64).
fn noise(amount: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(amount);
    while bytes.len() < amount {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

#[test]
fn sixty_four_mebibytes_in() {
    case("bulk-in", |case| {
        let bytes = noise(AMOUNT);
        let expected = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut running = case.busybox(&["sha256sum"]).start(Input::Pipe);
        let mut stdin = running.take_stdin();
        let writer = thread::spawn(move || stdin.write_all(&bytes));
        let output = running.wait_within(LONG);
        writer.join().unwrap().unwrap_or_else(|error| panic!("stdin broke: {error}\n{}", output.describe()));
        output.expect_clean().expect_out(&format!("{expected}  -"));
    });
}

#[test]
fn sixty_four_mebibytes_out() {
    case("bulk-out", |case| {
        // Numbered blocks of numbered lines: whatever is lost, repeated or swapped shows.
        let script = "seq 1 200000 | head -c 1048576 > /tmp/block
            i=0; while [ $i -lt 64 ]; do i=$((i+1)); echo block $i; cat /tmp/block; done";
        let output = case.sh(script).start(Input::Null).wait_within(LONG);
        assert_eq!(output.code, 0, "{}", output.describe());
        let mut block = Vec::new();
        (1..=200_000).for_each(|number| writeln!(block, "{number}").unwrap());
        block.truncate(1 << 20);
        let mut expected = Vec::with_capacity(AMOUNT + 1024);
        for number in 1..=64 {
            writeln!(expected, "block {number}").unwrap();
            expected.extend_from_slice(&block);
        }
        assert_eq!(output.stdout.len(), expected.len(), "bytes arrived\n{}", output.describe());
        let difference = expected.iter().zip(&output.stdout).position(|(one, other)| one != other);
        assert_eq!(difference, None, "the first wrong byte");
    });
}

#[test]
fn stdout_and_stderr_stay_apart() {
    case("apart", |case| {
        let script = "for i in $(seq 1 2000); do echo out $i; echo err $i >&2; done";
        let output = case.sh(script).output().expect_code(0);
        let expected = |name: &str| (1..=2000).map(|i| format!("{name} {i}\n")).collect::<String>();
        assert!(output.out() == expected("out"), "stdout is not what was written\n{}", output.describe());
        assert!(output.err() == expected("err"), "stderr is not what was written\n{}", output.describe());
    });
}

#[test]
fn the_end_of_stdin_arrives_and_output_after_it_too() {
    case("eof", |case| {
        let mut running = case.sh("cat; echo end of input; sleep 1; echo after").start(Input::Pipe);
        running.write(b"one\ntwo\n");
        running.wait_for("two");
        assert!(running.is_running(), "cat must wait for more");
        running.close_stdin();
        running.wait().expect_clean().expect_out("one\ntwo\nend of input\nafter");
    });
}

#[test]
fn stdin_that_nobody_reads_does_no_harm() {
    case("unread", |case| {
        let mut running = case.sh("exec 0<&-; echo done").start(Input::Pipe);
        let mut stdin = running.take_stdin();
        // ctr stops reading when the container is gone: a broken pipe here is right.
        let writer = thread::spawn(move || stdin.write_all(&noise(1 << 20)).is_ok());
        running.wait().expect_code(0);
        writer.join().unwrap();
    });
}

#[test]
fn a_terminal_has_the_size_it_is_given() {
    case("tty", |case| {
        // The first size may come a moment after the start, as with any runtime; `read` ends early for a trap.
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
        terminal.type_in("hello\n");
        terminal.running.wait_for("got hello");
        terminal.type_in("end\n");
        let output = terminal.running.wait();
        assert_eq!(output.code, 5, "{}", output.describe());
        assert!(output.out().contains("\r\n"), "a terminal ends lines by CR LF\n{}", output.describe());
    });
}

#[test]
fn control_characters_reach_the_foreground_process() {
    case("ctrl-c", |case| {
        let run = case.sh("trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 1; done").flags(&["-t"]);
        let mut terminal = Terminal::start(run.command(), 24, 80);
        terminal.running.wait_for("up");
        terminal.type_in("\x03");
        terminal.running.wait_for("interrupted");
        terminal.running.wait().expect_code(9);
    });
}
