//! Tests that copy data between containerd and the guest. containerd's ends are real fifos, files and loggers. A socket
//! pair replaces the vsock connection to the guest.

use std::{
    fs::{self, OpenOptions},
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const LONG: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

fn logger_context() -> LoggerContext<'static> {
    LoggerContext { id: "c1", namespace: "ns", launcher: crate::launcher::of_tests() }
}

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().into()
}

/// Returns bytes whose pattern does not repeat at page or buffer boundaries.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8 ^ (n / 65_521) as u8).collect()
}

fn reader(path: &str) -> std::thread::JoinHandle<Vec<u8>> {
    let mut file = fs::File::open(path).unwrap();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        file.read_to_end(&mut all).unwrap();
        all
    })
}

async fn pipes(paths: &Paths) -> (Relay, [Option<UnixStream>; 3]) {
    let stdio = Stdio::open(paths, &logger_context()).await.unwrap();
    let needed = stdio.needed_streams();
    assert!(!needed.terminal);
    let pair = |want: bool| want.then(|| UnixStream::pair().unwrap()).unzip();
    let ((stdin, guest_in), (stdout, guest_out), (stderr, guest_err)) =
        (pair(needed.stdin), pair(needed.stdout), pair(needed.stderr));
    (stdio.start(Streams::Pipes { stdin, stdout, stderr }).unwrap(), [guest_in, guest_out, guest_err])
}

#[tokio::test]
async fn large_output_and_many_short_lines_arrive_completely() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), stderr: fifo(dir.path(), "err"), ..Paths::default() };
    let (relay, [_, out, err]) = pipes(&paths).await;
    let (out_reader, err_reader) = (reader(&paths.stdout), reader(&paths.stderr));
    let bytes = pattern(64 * MIB);
    let (mut out, mut err) = (out.unwrap(), err.unwrap());
    tokio::join!(async { out.write_all(&bytes).await.unwrap() }, async {
        for n in 0..20_000 {
            err.write_all(format!("{n}\n").as_bytes()).await.unwrap();
        }
    });
    drop((out, err));
    relay.drain(LONG, LONG).await;
    drop(relay);
    assert!(out_reader.join().unwrap() == bytes);
    let lines: String = (0..20_000).map(|n| format!("{n}\n")).collect();
    assert!(err_reader.join().unwrap() == lines.as_bytes());
}

#[tokio::test]
async fn large_stdin_arrives_completely_and_ends_after_close_io() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdin: fifo(dir.path(), "in"), ..Paths::default() };
    let (relay, [guest, _, _]) = pipes(&paths).await;
    let bytes = pattern(64 * MIB);
    let (half, rest) = bytes.split_at(32 * MIB + 7);
    let (first, second, path) = (half.to_vec(), rest.to_vec(), paths.stdin.clone());
    let writer = std::thread::spawn(move || {
        // The first client disconnects before the second client connects. Stdin must stay open.
        for part in [first, second] {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(&part).unwrap();
        }
    });
    let mut guest = guest.unwrap();
    let mut received = vec![0; bytes.len()];
    guest.read_exact(&mut received).await.unwrap();
    assert!(received == bytes);
    writer.join().unwrap();
    let more = tokio::time::timeout(Duration::from_millis(100), guest.read_u8()).await;
    assert!(more.is_err(), "stdin ended before CloseIO");
    relay.close_stdin();
    relay.close_stdin();
    assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn client_can_disconnect_and_reconnect() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    // The fifo does not have a reader yet. Neither opening the fifo nor writing to it waits for a reader.
    let (relay, [_, guest, _]) = pipes(&paths).await;
    let mut guest = guest.unwrap();
    guest.write_all(b"one\n").await.unwrap();
    let read = |expected: &'static [u8]| {
        let path = paths.stdout.clone();
        tokio::task::spawn_blocking(move || {
            let mut received = vec![0; expected.len()];
            fs::File::open(path).unwrap().read_exact(&mut received).unwrap();
            assert_eq!(received, expected);
        })
    };
    read(b"one\n").await.unwrap();
    guest.write_all(b"two\n").await.unwrap();
    read(b"two\n").await.unwrap();
    drop(guest);
    relay.drain(LONG, LONG).await;
}

#[tokio::test]
async fn many_short_lines_fit_into_a_fifo_without_a_reader() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let (relay, [_, guest, _]) = pipes(&paths).await;
    let mut guest = guest.unwrap();
    for _ in 0..1000 {
        guest.write_all(b"a line of some length\n").await.unwrap();
        tokio::task::yield_now().await;
    }
    drop(guest);
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&paths.stdout).unwrap();
    // `drain` returns before the timeout, because all output is in the fifo.
    tokio::time::timeout(LONG, relay.drain(LONG, LONG)).await.unwrap();
    drop(relay);
    let mut received = Vec::new();
    (&open).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 22_000);
}

#[tokio::test]
async fn drain_ends_although_output_arrives_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let (relay, [_, guest, _]) = pipes(&paths).await;
    let mut guest = guest.unwrap();
    std::thread::spawn({
        let path = paths.stdout.clone();
        move || std::io::copy(&mut fs::File::open(path).unwrap(), &mut std::io::sink())
    });
    let talker = tokio::spawn(async move {
        loop {
            guest.write_all(b"line\n").await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    relay.drain(LONG, Duration::from_millis(500)).await;
    assert!(!talker.is_finished());
    talker.abort();
}

#[tokio::test]
async fn drain_ends_although_a_full_fifo_has_no_reader() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths { stdout: fifo(dir.path(), "out"), ..Paths::default() };
    let (relay, [_, guest, _]) = pipes(&paths).await;
    let mut guest = guest.unwrap();
    let write = tokio::spawn(async move { guest.write_all(&pattern(8 * MIB)).await });
    relay.drain(Duration::from_millis(200), LONG).await;
    assert!(!write.is_finished());
    drop(relay);
    assert!(write.await.unwrap().is_err(), "the guest's write did not fail");
}

#[tokio::test]
async fn file_is_truncated_and_gets_both_streams() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/log file");
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, "old").unwrap();
    let uri = format!("file://{}", path.to_str().unwrap().replace(' ', "%20"));
    let paths = Paths { stdout: uri.clone(), stderr: uri, ..Paths::default() };
    let (relay, [_, out, err]) = pipes(&paths).await;
    let (mut out, mut err) = (out.unwrap(), err.unwrap());
    let bytes = pattern(4 * MIB);
    out.write_all(&bytes).await.unwrap();
    drop(out);
    err.write_all(b"err").await.unwrap();
    drop(err);
    relay.drain(LONG, LONG).await;
    assert_eq!(fs::read(&path).unwrap().len(), bytes.len() + 3);
}

fn logger(dir: &Path, script: &str) -> String {
    let path = dir.join("logger");
    fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().into()
}

#[tokio::test]
async fn logger_gets_both_streams_and_ends_at_eof() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let program = logger(
        dir.path(),
        "out=$2; echo \"$CONTAINER_ID $CONTAINER_NAMESPACE\" >$out.who\nexec 5>&-\n/bin/cat <&4 >$out.err & exec 4<&-\n\
         /bin/cat <&3 >$out; wait; echo done >$out.done",
    );
    let uri = format!("binary://{program}?path={}", log.display());
    let paths = Paths { stdout: uri.clone(), stderr: uri, ..Paths::default() };
    let (relay, [_, out, err]) = pipes(&paths).await;
    let (mut out, mut err) = (out.unwrap(), err.unwrap());
    let bytes = pattern(MIB);
    out.write_all(&bytes).await.unwrap();
    err.write_all(b"err").await.unwrap();
    drop((out, err));
    relay.drain(LONG, LONG).await;
    drop(relay);
    let done = dir.path().join("log.done");
    tokio::time::timeout(LONG, async {
        while !fs::read_to_string(&done).is_ok_and(|text| text == "done\n") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert!(fs::read(&log).unwrap() == bytes);
    assert_eq!(fs::read_to_string(dir.path().join("log.err")).unwrap(), "err");
    assert_eq!(fs::read_to_string(dir.path().join("log.who")).unwrap(), "c1 ns\n");
}

#[tokio::test]
async fn output_for_a_dead_logger_is_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let program = logger(dir.path(), "exec 5>&-\nexec /bin/head -c 10 <&3 >/dev/null");
    let paths = Paths { stdout: format!("binary://{program}"), ..Paths::default() };
    let (relay, [_, out, _]) = pipes(&paths).await;
    let mut out = out.unwrap();
    out.write_all(&pattern(4 * MIB)).await.unwrap();
    drop(out);
    relay.drain(LONG, LONG).await;
}

#[tokio::test]
async fn terminal_has_one_bidirectional_stream() {
    let dir = tempfile::tempdir().unwrap();
    let paths =
        Paths { stdin: fifo(dir.path(), "in"), stdout: fifo(dir.path(), "out"), stderr: String::new(), terminal: true };
    let stdio = Stdio::open(&paths, &logger_context()).await.unwrap();
    assert_eq!(stdio.needed_streams(), NeededStreams { stdin: true, stdout: true, stderr: false, terminal: true });
    let (host, mut guest) = UnixStream::pair().unwrap();
    let relay = stdio.start(Streams::Terminal(host)).unwrap();
    let output = reader(&paths.stdout);
    let mut client = OpenOptions::new().write(true).open(&paths.stdin).unwrap();
    client.write_all(b"typed").unwrap();
    let mut typed = [0; 5];
    guest.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"typed");
    guest.write_all(b"shown").await.unwrap();
    drop(guest);
    relay.drain(LONG, LONG).await;
    drop(relay);
    assert_eq!(output.join().unwrap(), b"shown");
}

#[tokio::test]
async fn open_reports_the_stream_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let open = async |stdin: &str, stdout: &str| {
        let paths = Paths { stdin: stdin.into(), stdout: stdout.into(), ..Paths::default() };
        Stdio::open(&paths, &logger_context()).await.unwrap_err()
    };
    assert!(matches!(open("", "/nowhere/x").await, StdioError::Open { stream: "stdout", .. }));
    assert!(matches!(open("/nowhere/x", "").await, StdioError::Open { stream: "stdin", .. }));
    assert!(matches!(open(file, "").await, StdioError::NotFifo { .. }));
    assert!(matches!(open("", "binary:///nowhere/x").await, StdioError::Logger { .. }));
}
