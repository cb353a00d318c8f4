//! The program that connects to a socket of the node and relays the data, started by the launcher. This test has a
//! binary of its own, because it starts itself as the program.

#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use husk_shim::launcher::{Launcher, Program};
use husk_shim::sandbox::host_sockets::program;
use husk_shim::vm::host_socket::Credentials;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;

/// Starts the program for the socket at `path`. Returns the other end of its stream.
async fn start(launcher: &Launcher, path: &Path, credentials: &Credentials) -> (UnixStream, Program) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let socket: OwnedFd = File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap().into();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let (args, fds) = (program::args(credentials), [theirs.as_fd(), socket.as_fd(), null.as_fd()]);
    let options = program::options(&args, &fds, None);
    let program = launcher.start_program(&options).await.unwrap();
    (ours, program)
}

fn reply(stream: &mut UnixStream) -> i32 {
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    byte[0].into()
}

fn status_of(pid: i32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn listen(path: &Path, uid: u32, mode: u32) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    chown(path, Some(uid), Some(5)).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    listener
}

async fn check() {
    let launcher = Launcher::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let user = Credentials { uid: 1234, gid: 2345, groups: vec![5, 7] };
    let root = Credentials { uid: 0, gid: 0, groups: Vec::new() };

    // The directory is closed to the user. As in the guest, only the permissions of the socket count.
    let path = dir.path().join("group");
    let listener = listen(&path, 0, 0o660);
    let (mut stream, relay) = start(&launcher, &path, &user).await;
    assert_eq!(reply(&mut stream), 0);
    let (mut daemon, _) = listener.accept().unwrap();
    let peer = getsockopt(&daemon, sockopt::PeerCredentials).unwrap();
    assert_eq!((peer.uid(), peer.gid(), peer.pid()), (1234, 2345, relay.pid()));
    let (pid, is) = (relay.pid(), |key| status_of(relay.pid(), key));
    assert_eq!(is("Uid:"), "1234 1234 1234 1234");
    assert_eq!(is("Groups:"), "5 7");
    assert_eq!(is("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(is(set), "0000000000000000", "{set}");
    }
    // When the node shuts down, systemd sends SIGTERM to all processes of the pod's scope.
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    let data: Vec<u8> = (0..1_000_003_u32).map(|number| (number % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        daemon.read_to_end(&mut received).unwrap();
        assert!(received == data);
    });
    // After the half-close, data still flows in the other direction.
    daemon.write_all(b"answer").unwrap();
    drop(daemon);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert!(relay.wait().await.unwrap().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());

    // Root may use the sockets of all users, but keeps no capability.
    let path = dir.path().join("user");
    let listener = listen(&path, 1234, 0o600);
    let (mut stream, relay) = start(&launcher, &path, &root).await;
    assert_eq!(reply(&mut stream), 0);
    assert_eq!(status_of(relay.pid(), "CapPrm:"), "0000000000000000");
    drop((stream, listener));
    relay.wait().await.unwrap();

    // If the client has gone, the process ends, although the daemon has not closed its socket.
    let path = dir.path().join("ignored");
    let listener = listen(&path, 0, 0o600);
    let (mut stream, relay) = start(&launcher, &path, &root).await;
    assert_eq!(reply(&mut stream), 0);
    let (mut daemon, _) = listener.accept().unwrap();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    assert!(relay.wait().await.unwrap().success());
    let mut words = String::new();
    daemon.read_to_string(&mut words).unwrap();
    assert_eq!(words, "last words");

    // The node's permissions count, and errors of the node are passed on.
    let other = Credentials { uid: 4321, ..user };
    let path = dir.path().join("user");
    let (mut stream, _relay) = start(&launcher, &path, &other).await;
    assert_eq!(reply(&mut stream), libc::EACCES);
    let (mut stream, _relay) = start(&launcher, &path, &root).await;
    assert_eq!(reply(&mut stream), libc::ECONNREFUSED);
}

// The main thread runs the test, because the launcher ends with the thread that has started it, and because this
// process must have a single thread when it forks the launcher.
fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == program::ARGV0) {
        return program::main(args);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check());
    println!("test program_connects_as_the_user_and_relays_data ... ok");
    ExitCode::SUCCESS
}
