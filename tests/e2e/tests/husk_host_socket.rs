//! Connections from containers to Unix sockets of the node, as the configuration key `host_sockets` allows them.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use husk_e2e::case::Container;
use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::userns::{self, HOST_ID_BASE};
use husk_e2e::cri::{Pod, pods};
use husk_e2e::node::Config;
use husk_e2e::{Case, PYTHON, case, containerd_log, node, vm};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use serde_json::{Value, json};

/// Functions of the Python programs in the containers.
const COMMON: &str = r#"
import errno, hashlib, os, socket, sys, threading, time
def dial(path, kind=socket.SOCK_STREAM):
    s = socket.socket(socket.AF_UNIX, kind)
    s.connect("/v/" + path)
    return s
def line(s):
    text = b""
    while not text.endswith(b"\n"):
        byte = s.recv(1)
        if not byte: break
        text += byte
    return text.decode().strip()
def error(call):
    try: call()
    except OSError as e: return errno.errorcode[e.errno]
    return "none"
def attempt(path, s):
    return error(lambda: s.connect("/v/" + path))
def everything(s): return b"".join(iter(lambda: s.recv(1 << 16), b""))
"#;

/// A daemon of the node. It greets each client with the client's credentials, and echoes the client's data. After the
/// client's end of file, it says "end".
struct Daemon {
    path: PathBuf,
    /// The cgroups of each client's process.
    cgroups: Receiver<String>,
    /// A message for each connection that has ended.
    ended: Receiver<()>,
}

impl Daemon {
    fn start(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        let ((seen, cgroups), (end, ended)) = (mpsc::channel(), mpsc::channel());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let peer = getsockopt(&client, sockopt::PeerCredentials).unwrap();
                let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", peer.pid())).unwrap_or_default();
                let greeting = format!("{} {}\n", peer.uid(), peer.gid());
                // The receiver is gone when the test has ended.
                let _ = seen.send(cgroup);
                let end = end.clone();
                std::thread::spawn(move || {
                    let _ = echo(client, &greeting);
                    let _ = end.send(());
                });
            }
        });
        Self { path: path.to_owned(), cgroups, ended }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn echo(mut client: UnixStream, greeting: &str) -> std::io::Result<()> {
    client.write_all(greeting.as_bytes())?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match client.read(&mut buffer)? {
            0 => return client.write_all(b"end"),
            read => client.write_all(&buffer[..read])?,
        }
    }
}

/// Starts a container with the test's directory `node` at `/v`.
fn start(case: &Case, node: &Path) -> Container {
    let flag = format!("type=bind,src={},dst=/v,options=rbind:rw", node.display());
    let program = "import time; print('up', flush=True); time.sleep(1000)";
    case.container(case.python(program).flags(&["--mount", &flag]))
}

/// Runs a Python program in the container, and returns its output.
#[track_caller]
fn run(container: &Container, name: &str, program: &str) -> String {
    let done = container.exec(name, &["python3", "-S", "-c", &format!("{COMMON}{program}")]).expect_clean();
    done.out().trim_end().to_owned()
}

fn directory(case: &Case) -> PathBuf {
    directory_in(case.dir())
}

fn directory_in(parent: &Path) -> PathBuf {
    let node = parent.join("node");
    fs::create_dir_all(node.join("in/deep")).unwrap();
    node
}

/// A daemon that does not accept, and whose backlog is full.
struct Full {
    path: PathBuf,
    _sockets: [OwnedFd; 2],
}

impl Full {
    fn start(path: &Path) -> Self {
        let (flags, address) = (SockFlag::SOCK_CLOEXEC, UnixAddr::new(path).unwrap());
        let [listener, client] = [(); 2].map(|()| socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap());
        bind(listener.as_raw_fd(), &address).unwrap();
        // With a backlog of 0, one connection fits.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        connect(client.as_raw_fd(), &address).unwrap();
        Self { path: path.to_owned(), _sockets: [listener, client] }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Returns the configuration of a container of a pod, with the test's directory `node` at `/v`.
fn python_in(pod: &Pod, node: &Path, program: &str) -> Value {
    let mut config = pod.python(&format!("{COMMON}{program}"));
    config["mounts"] = json!([{ "host_path": node.to_string_lossy(), "container_path": "/v" }]);
    config
}

/// Allows the socket `exact`, and the sockets below `in`.
fn allow(node: &Path) -> Config {
    let at = node.display();
    Config::set(&format!("host_sockets = [\"{at}/exact\", \"{at}/in/\"]\n"))
}

#[test]
fn allowed_sockets_answer_with_the_users_credentials() {
    case("host-socket", |case| {
        let node = directory(case);
        let _config = allow(&node);
        let exact = Daemon::start(&node.join("exact"));
        let _deep = Daemon::start(&node.join("in/deep/one"));
        let container = start(case, &node);
        let echoed = |name: &str, path: &str| {
            let program = format!("s = dial('{path}'); who = line(s); s.sendall(b'ping\\n'); print(who, line(s))");
            run(&container, name, &program)
        };
        assert_eq!(echoed("exact", "exact"), "0 0 ping");
        assert_eq!(echoed("deep", "in/deep/one"), "0 0 ping");
        let cgroup = exact.cgroups.recv().unwrap();
        assert!(cgroup.contains(&container.id), "the client is not in the pod's cgroup: {cgroup}");
        let user = "os.setgroups([2000]); os.setgid(1001); os.setuid(1000)";
        let as_user = format!("{user}; print(line(dial('exact')), error(lambda: dial('in/deep/group')))");
        assert_eq!(run(&container, "user", &as_user), "1000 1001 ENOENT");
        // Permissions count as on the node, with supplementary groups.
        let group = Daemon::start(&node.join("in/group"));
        fs::set_permissions(&group.path, fs::Permissions::from_mode(0o660)).unwrap();
        chown(&group.path, Some(5), Some(2000)).unwrap();
        assert_eq!(run(&container, "group", &format!("{user}; print(line(dial('in/group')))")), "1000 1001");
        let none = "os.setgroups([]); os.setgid(1001); os.setuid(1000); print(error(lambda: dial('in/group')))";
        assert_eq!(run(&container, "no-group", none), "EACCES");
        // Root may connect to the sockets of all users.
        assert_eq!(run(&container, "root", "print(line(dial('in/group')))"), "0 0");
        // The daemon starts again.
        drop(group);
        let _group = Daemon::start(&node.join("in/group"));
        assert_eq!(echoed("again", "in/group"), "0 0 ping");
        container.kill();
    });
}

#[test]
fn data_flows_both_ways_with_half_close_and_without_fds() {
    case("host-socket-data", |case| {
        let node = directory(case);
        let _config = allow(&node);
        let exact = Daemon::start(&node.join("exact"));
        let container = start(case, &node);
        let half_close =
            "s = dial('exact'); line(s); s.sendall(b'abc'); s.shutdown(socket.SHUT_WR); print(everything(s))";
        assert_eq!(run(&container, "half", half_close), "b'abcend'");
        let large = "s = dial('exact'); line(s); data = os.urandom(1 << 20) * 16\n\
            def send(): s.sendall(data); s.shutdown(socket.SHUT_WR)\n\
            t = threading.Thread(target=send); t.start(); print(everything(s) == data + b'end'); t.join()";
        assert_eq!(run(&container, "large", large), "True");
        // A client that does not read delays only itself.
        let stalled = "a = dial('exact'); line(a); a.setblocking(False)\n\
            try:\n    while True: a.send(bytes(1 << 16))\n\
            except BlockingIOError: pass\n\
            b = dial('exact'); line(b); b.sendall(b'x\\n'); print(line(b))";
        assert_eq!(run(&container, "stalled", stalled), "x");
        // Fds do not leave the guest.
        let fds = "s = dial('exact'); line(s); r, w = os.pipe(); socket.send_fds(s, [b'y\\n'], [w]); os.close(w)\n\
            print(line(s), os.read(r, 1))";
        assert_eq!(run(&container, "fds", fds), "y b''");
        let flags = "s = socket.socket(socket.AF_UNIX); s.setblocking(False); s.connect('/v/exact')\n\
            s.setblocking(True); print(line(s))";
        assert_eq!(run(&container, "nonblocking", flags), "0 0");
        for (kind, expected) in [("SEQPACKET", "ECONNREFUSED"), ("DGRAM", "ECONNREFUSED")] {
            let program = format!("print(error(lambda: dial('exact', socket.SOCK_{kind})))");
            assert_eq!(run(&container, kind, &program), expected);
        }
        while exact.ended.try_recv().is_ok() {}
        // The end of the pod ends its connections.
        // A process of the container holds the connection, and no client: a `ctr exec` whose container is deleted
        // leaves its fifos.
        let hold = "s = dial('exact'); print(line(s), flush=True)\n\
            if os.fork() == 0:\n    for fd in range(3): os.close(fd)\n    time.sleep(1000)";
        assert_eq!(run(&container, "hold", hold), "0 0");
        container.kill();
        exact.ended.recv_timeout(Duration::from_secs(30)).expect("the connection stays open after the pod's end");
    });
}

#[test]
fn volume_can_be_a_socket() {
    case("host-socket-file", |case| {
        let node = directory(case);
        let config = allow(&node);
        let exact = Daemon::start(&node.join("exact"));
        let run_with = || {
            let flag = format!("type=bind,src={},dst=/v/socket,options=rbind:rw", exact.path.display());
            let program = format!("{COMMON}s = dial('socket'); print(line(s)); s.sendall(b'x\\n'); print(line(s))");
            case.python(&program).flags(&["--mount", &flag]).output()
        };
        run_with().expect_out("0 0\nx\n");
        drop(config);
        run_with().expect_error(&["to allow it, add", "/exact to host_sockets"]);
    });
}

#[test]
fn connections_are_limited() {
    case("host-socket-many", |case| {
        let node = directory(case);
        let _config = allow(&node);
        let _exact = Daemon::start(&node.join("exact"));
        let container = start(case, &node);
        let many = "all = [dial('exact') for _ in range(64)]; print([line(s) for s in all] == ['0 0'] * 64)\n\
            print(error(lambda: dial('exact'))); all.pop().close()\n\
            while error(lambda: all.append(dial('exact'))) != 'none': time.sleep(0.2)\n\
            print(line(all[-1]))";
        assert_eq!(run(&container, "many", many), "True\nEAGAIN\n0 0");
        container.kill();
    });
}

#[test]
fn other_sockets_refuse_connections_and_the_log_names_the_key() {
    case("host-socket-refused", |case| {
        let node = directory(case);
        let config = allow(&node);
        let other = Daemon::start(&node.join("other"));
        let log = containerd_log::len();
        let container = start(case, &node);
        assert_eq!(run(&container, "other", "print(error(lambda: dial('other')))"), "ECONNREFUSED");
        // A socket of the node to which no daemon listens.
        drop(UnixListener::bind(node.join("exact")).unwrap());
        assert_eq!(run(&container, "dead", "print(error(lambda: dial('exact')))"), "ECONNREFUSED");
        let warning = || {
            let log = containerd_log::since(log);
            let path = other.path.display().to_string();
            let lines: Vec<_> =
                log.lines().filter(|line| line.contains(&path) && line.contains("host_sockets")).collect();
            (!lines.is_empty()).then(|| (lines.len(), lines[0].to_owned()))
        };
        let (_, text) = node::eventually(Duration::from_secs(10), warning).expect("no warning in the log");
        assert!(text.contains("level=warning") && text.contains(&container.id), "{text}");
        assert_eq!(run(&container, "repeat", "print(error(lambda: dial('other')))"), "ECONNREFUSED");
        assert_eq!(warning().unwrap().0, 1, "each refusal is logged");
        // Sockets of the guest still work, in volumes and in the root file system.
        let own = "for path in ('/v/own', '/v/in/own', '/tmp/own'):\n\
            \x20   server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen()\n\
            \x20   client = socket.socket(socket.AF_UNIX); client.connect(path)\n\
            \x20   server.accept()[0].sendall(b'own\\n'); print(line(client)); server.close()\n\
            \x20   print(error(lambda: socket.socket(socket.AF_UNIX).connect(path))); os.unlink(path)";
        assert_eq!(run(&container, "own", own), ["own\nECONNREFUSED"; 3].join("\n"));
        container.kill();
        drop(config);
        // By default, no socket is allowed. A container without the volume does not have the sockets.
        let container = start(case, &node);
        assert_eq!(run(&container, "default", "print(error(lambda: dial('other')))"), "ECONNREFUSED");
        container.kill();
        let program = "import time; print('up', flush=True); time.sleep(1000)";
        let without = case.container(case.python(program));
        assert_eq!(run(&without, "without", "print(error(lambda: dial('other')))"), "ENOENT");
        without.kill();
    });
}

#[test]
fn socket_of_a_failed_connect_can_be_used_again() {
    case("host-socket-retry", |case| {
        let node = directory(case);
        let _config = allow(&node);
        let _exact = Daemon::start(&node.join("exact"));
        let _other = Daemon::start(&node.join("other"));
        let full = Full::start(&node.join("in/full"));
        let container = start(case, &node);
        // A refusal by the configuration, a socket without a daemon, and a missing socket.
        drop(UnixListener::bind(node.join("in/dead")).unwrap());
        let retry = "s = socket.socket(socket.AF_UNIX)\n\
            print(attempt('other', s), attempt('in/dead', s), attempt('in/none', s), attempt('exact', s), line(s))\n\
            print(s.getpeername(), attempt('exact', s), attempt('other', s)); s.sendall(b'x\\n'); print(line(s))";
        let expected = "ECONNREFUSED ECONNREFUSED ENOENT none 0 0\n/v/exact EISCONN EISCONN\nx";
        assert_eq!(run(&container, "retry", retry), expected);
        // Two threads connect the same socket, and one succeeds.
        let threads = "for _ in range(20):\n\
            \x20   s, results = socket.socket(socket.AF_UNIX), []\n\
            \x20   both = [threading.Thread(target=lambda: results.append(attempt('exact', s))) for _ in range(2)]\n\
            \x20   for t in both: t.start()\n\
            \x20   for t in both: t.join()\n\
            \x20   assert sorted(results) == ['EISCONN', 'none'], results\n\
            \x20   assert line(s) == '0 0'; s.close()\n\
            print('one')";
        assert_eq!(run(&container, "threads", threads), "one");
        // The relay is not an abstract socket, to which Landlock would forbid connections.
        let scoped = "import ctypes, struct\n\
            libc, attr = ctypes.CDLL(None), struct.pack('QQQ', 0, 0, 1)\n\
            rules = libc.syscall(444, attr, len(attr), 0); libc.prctl(38, 1, 0, 0, 0)\n\
            assert rules >= 0 and libc.syscall(446, rules, 0) == 0; print(line(dial('exact')))";
        assert_eq!(run(&container, "scoped", scoped), "0 0");
        // SO_SNDTIMEO limits the wait, as for a full backlog of a socket of the guest.
        let limited = "import struct\n\
            s = socket.socket(socket.AF_UNIX); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('ll', 0, 300000))\n\
            print(attempt('in/full', s)); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('ll', 0, 0))\n\
            print(attempt('exact', s), line(s))";
        assert_eq!(run(&container, "limited", limited), "EAGAIN\nnone 0 0");
        // While a thread waits, another connects, listens or shuts down.
        let meanwhile = "own = socket.socket(socket.AF_UNIX); own.bind('/tmp/own'); own.listen()\n\
            def during(act):\n\
            \x20   s, results = socket.socket(socket.AF_UNIX), []\n\
            \x20   t = threading.Thread(target=lambda: results.append(attempt('in/full', s))); t.start()\n\
            \x20   act(s); t.join(); return s, results[0]\n\
            s, result = during(lambda s: s.connect('/tmp/own')); own.accept()[0].sendall(b'own\\n')\n\
            print(result in ('ETIMEDOUT', 'EISCONN'), line(s))\n\
            s, result = during(lambda s: s.shutdown(socket.SHUT_RDWR)); print(result)";
        assert_eq!(run(&container, "meanwhile", meanwhile), "True own\nETIMEDOUT");
        // SIGKILL ends the wait at once, and the slots of the killed processes are free.
        let killed = "import signal\n\
            for _ in range(70):\n\
            \x20   r, w = os.pipe(); pid = os.fork()\n\
            \x20   if pid == 0: os.write(w, b'x'); attempt('in/full', socket.socket(socket.AF_UNIX)); os._exit(0)\n\
            \x20   os.read(r, 1); os.kill(pid, signal.SIGKILL); os.close(r); os.close(w)\n\
            \x20   assert os.waitpid(pid, 0)[1] == signal.SIGKILL\n\
            print('killed')";
        assert_eq!(run(&container, "killed", killed), "killed");
        drop(full);
        container.kill();
    });
}

#[test]
fn closed_clients_free_their_connections_while_the_daemon_ignores_them() {
    case("host-socket-ignored", |case| {
        let node = directory(case);
        let _config = allow(&node);
        // The daemon accepts, but neither reads nor closes.
        let listener = UnixListener::bind(node.join("exact")).unwrap();
        let (accept, accepted) = mpsc::channel();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let _ = accept.send(client);
            }
        });
        let container = start(case, &node);
        let program = "for number in range(80):\n\
            \x20   s = dial('exact'); s.sendall(b'last words')\n\
            \x20   if number % 2: s.shutdown(socket.SHUT_WR)\n\
            \x20   s.close()\n\
            print('closed')";
        assert_eq!(run(&container, "closed", program), "closed");
        for _ in 0..80 {
            let mut client = accepted.recv_timeout(Duration::from_secs(60)).unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "last words");
            let ended = node::eventually(Duration::from_secs(60), || client.write_all(b"x").is_err().then_some(()));
            assert!(ended.is_some(), "the relaying process stays");
        }
        container.kill();
    });
}

#[test]
fn daemon_sees_the_host_ids_of_a_user_namespace() {
    need_image(PYTHON);
    pods("host-socket-userns", |pods| {
        let node = directory_in(pods.dir());
        let _config = allow(&node);
        let exact = Daemon::start(&node.join("exact"));
        let pod = userns::pod(pods);
        let program = "s = dial('exact'); print(line(s), flush=True)\n\
            os.setgroups([7]); os.setgid(6); os.setuid(5); s = dial('exact'); print(line(s), 'done', flush=True)";
        let container = pod.start(&userns::with_user_namespace(python_in(&pod, &node, program)));
        assert_eq!(container.wait().0, 0, "{}", container.log());
        let (root, user) = (HOST_ID_BASE, [HOST_ID_BASE + 5, HOST_ID_BASE + 6]);
        let log = container.log();
        assert!(
            log.contains(&format!("{root} {root}")) && log.contains(&format!("{} {} done", user[0], user[1])),
            "{log}"
        );
        pod.stop();
        drop(exact);
    });
}

#[test]
fn deletion_of_a_container_ends_its_connections_only() {
    need_image(PYTHON);
    pods("host-socket-delete", |pods| {
        let node = directory_in(pods.dir());
        let _config = allow(&node);
        let [exact, deep] = ["exact", "in/deep/one"].map(|name| Daemon::start(&node.join(name)));
        let pod = pods.pod();
        let hold = |path: &str| {
            let program =
                format!("s = dial('{path}'); print(line(s), 'connected', flush=True); print(line(s), flush=True)");
            let container = pod.start(&python_in(&pod, &node, &program));
            container.wait_for("connected");
            container
        };
        let (first, second) = (hold("exact"), hold("in/deep/one"));
        first.stop(0);
        first.remove();
        exact.ended.recv_timeout(Duration::from_secs(60)).expect("the connection outlives its container");
        assert!(deep.ended.try_recv().is_err(), "the connection of another container has ended");
        second.stop(0);
        deep.ended.recv_timeout(Duration::from_secs(60)).expect("the connection outlives its container");
        pod.stop();
    });
}

#[test]
fn connections_outlive_sigterm_until_the_containers_have_ended() {
    need_image(PYTHON);
    pods("host-socket-sigterm", |pods| {
        let node = directory_in(pods.dir());
        let _config = allow(&node);
        let exact = Daemon::start(&node.join("exact"));
        let pod = pods.pod();
        let program = "import signal\n\
            s = dial('exact'); line(s)\n\
            def end(*_): s.sendall(b'goodbye\\n'); open('/v/last', 'w').write(line(s)); os._exit(7)\n\
            signal.signal(signal.SIGTERM, end); print('ready', flush=True)\n\
            while True: time.sleep(1000)";
        let container = pod.start(&python_in(&pod, &node, program));
        container.wait_for("ready");
        // As systemd stops a scope. The cgroup contains the VMM and the relaying process.
        let cgroup = exact.cgroups.recv().unwrap();
        let path = cgroup.lines().find_map(|line| line.split("::").nth(1)).expect("no cgroup v2");
        let procs = fs::read_to_string(format!("/sys/fs/cgroup{path}/cgroup.procs")).unwrap();
        let pids: Vec<i32> = procs.lines().map(|pid| pid.parse().unwrap()).collect();
        assert!(pids.contains(&vm::vmm_pids_of(&pod.id)[0]), "the relaying process is not in the pod's cgroup");
        pids.into_iter().for_each(|pid| node::send_signal(pid, Signal::SIGTERM));
        assert_eq!(container.wait().0, 7);
        assert_eq!(fs::read_to_string(node.join("last")).unwrap(), "goodbye");
        pod.stop();
    });
}
