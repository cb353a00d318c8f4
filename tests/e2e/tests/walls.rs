//! What a container must not reach: the guest's agent over vsock, and the node's own file systems by way of a volume.

use husk_e2e::case;

/// Dials every context id a guest knows of at the agent's ports and around them, all at once, and tells who answered.
///
/// A packet that nobody takes is a connection that ends with ETIMEDOUT after the kernel's own two seconds, so every
/// socket comes to an end.
const DIAL: &str = r#"
import errno, os, select, socket
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
except OSError as error:
    print("no socket:", errno.errorcode[error.errno])
    raise SystemExit
cids = [*range(0, 17), 0x7fffffff, 0xfffffffe, 0xffffffff]
try:
    import fcntl, struct
    with open("/dev/vsock") as device:
        cids.append(struct.unpack("I", fcntl.ioctl(device, 0x7b9, bytes(4)))[0])
except OSError:
    pass
poll, waiting, answered, refused = select.poll(), {}, [], set()
for cid in cids:
    for port in [0, 1, 1023, 1024, 1025, 1026, 1027, 1028]:
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        s.setblocking(False)
        error = s.connect_ex((cid, port))
        if error == errno.EINPROGRESS:
            poll.register(s, select.POLLOUT)
            waiting[s.fileno()] = (s, cid, port)
        elif error:
            refused.add(errno.errorcode[error])
        else:
            answered.append((cid, port))
while waiting:
    for fd, _ in poll.poll():
        s, cid, port = waiting.pop(fd)
        poll.unregister(fd)
        error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            refused.add(errno.errorcode[error])
        else:
            answered.append((cid, port))
        s.close()
print("answered:", sorted(answered), "of", os.getuid())
"#;

#[test]
fn no_container_can_connect_to_the_agent() {
    let ways: [(&str, &[&str]); 4] = [
        ("0", &[]),
        ("1000", &["--user", "1000:1000"]),
        ("0", &["--privileged", "--privileged-without-host-devices"]),
        ("0", &["--seccomp"]),
    ];
    case("vsock-dial", |case| {
        for (user, flags) in ways {
            let output = case.python(DIAL).flags(flags).output().expect_code(0);
            let text = output.out();
            let expected = format!("answered: [] of {user}");
            // containerd's default profile may keep the address family away altogether.
            let kept_away = flags.contains(&"--seccomp") && text.trim() == "no socket: EPERM";
            assert!(kept_away || text.trim() == expected, "{flags:?}\n{}", output.describe());
        }
    });
}

#[test]
fn dialling_the_agent_stops_no_exec() {
    case("vsock-flood", |case| {
        // As many as wait for a header at most, and some, each kept open.
        let program = "import socket, time\n\
            held = []\n\
            for cid in (1, 3):\n    for _ in range(300):\n        \
                s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n        s.setblocking(False)\n        \
                s.connect_ex((cid, 1025))\n        held.append(s)\n\
            print('up', flush=True)\ntime.sleep(1000)";
        let container = case.container(case.python(program));
        for exec in ["one", "two"] {
            container.exec(exec, &["echo", "still served"]).expect_out("still served");
        }
        container.kill();
    });
}
