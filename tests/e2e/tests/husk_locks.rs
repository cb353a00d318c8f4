//! File locks in volumes: between pods, with the node, and within one pod. Also tests that fallocate(2) removes and
//! inserts ranges.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::cri::{Pod, PodContainer, Pods};
use husk_e2e::disk::Disk;
use husk_e2e::{PYTHON, node};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use serde_json::json;

/// Functions for the programs below: takes locks of each kind on the files `flock`, `posix` and `ofd` of the volume.
const COMMON: &str = r#"
import ctypes, errno, fcntl, os, signal, struct, subprocess, sys, time
os.chdir("/volume")
def say(*words): print(*words, flush=True)
def range_lock(kind): return struct.pack("hhqqi4x", kind, 0, 0, 0, 0)
def take(kind, wait=False, shared=False):
    f = open(kind, "a+"); wait = 0 if wait else fcntl.LOCK_NB
    if kind == "flock": fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | wait)
    elif kind == "posix": fcntl.lockf(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | wait)
    else:
        how = range_lock(fcntl.F_RDLCK if shared else fcntl.F_WRLCK)
        fcntl.fcntl(f, fcntl.F_OFD_SETLK if wait else fcntl.F_OFD_SETLKW, how)
    return f
def state(kind, **how):
    try: take(kind, **how).close(); return "free"
    except OSError as e: assert e.errno in (errno.EAGAIN, errno.EACCES), e; return "locked"
def states(): return " ".join(state(kind) for kind in ("flock", "posix", "ofd"))
"#;

/// Takes all locks and keeps them.
const HOLD: &str = r#"
held = [take(kind) for kind in ("flock", "posix", "ofd")]
say("held")
time.sleep(1000)
"#;

/// Starts a container with a Python program and the volume `/volume`.
fn start(pod: &Pod, volume: &Path, program: &str) -> PodContainer {
    let mut config = pod.python(&format!("{COMMON}{program}"));
    config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume" }]);
    pod.start(&config)
}

/// Runs a Python program in a running container.
#[track_caller]
fn run(container: &PodContainer, program: &str) -> String {
    let result = container.exec(&["python3", "-S", "-c", &format!("{COMMON}{program}")]);
    assert_eq!((result.code, result.err.as_str()), (0, ""), "{}", result.out);
    result.out.trim_end().to_owned()
}

fn volume(pods: &Pods) -> std::path::PathBuf {
    let volume = pods.dir().join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    volume
}

/// Returns whether the node can take the locks of all three kinds of a volume. Releases them again.
fn free_on_node(volume: &Path) -> bool {
    let open = |name| File::options().read(true).append(true).open(volume.join(name)).unwrap();
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    let ranges = [open("posix"), open("ofd")];
    let free = ranges.iter().all(|file| fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).is_ok());
    let file = open("flock");
    // SAFETY: the call takes no pointers.
    free && unsafe { libc::flock(std::os::fd::AsRawFd::as_raw_fd(&file), libc::LOCK_EX | libc::LOCK_NB) } == 0
}

#[test]
fn locks_hold_between_pods_and_with_the_node_until_the_holder_dies() {
    need_image(PYTHON);
    pods("cri-locks", |pods| {
        let volume = volume(pods);
        let (one, two) = (pods.pod(), pods.pod());
        let witness = start(&two, &volume, "say('up')\ntime.sleep(1000)");
        witness.wait_for("up");
        let holder = start(&one, &volume, HOLD);
        holder.wait_for("held");
        // Another process of the same container, another pod, and the node.
        assert_eq!(run(&holder, "say(states())"), "locked locked locked");
        assert_eq!(run(&witness, "say(states())"), "locked locked locked");
        assert!(!free_on_node(&volume));
        // The container dies.
        holder.stop(0);
        node::eventually(Duration::from_secs(20), || free_on_node(&volume).then_some(())).expect("locks stay");
        assert_eq!(run(&witness, "say(states())"), "free free free");
        // The VMM dies, while the other pod waits.
        let holder = start(&one, &volume, HOLD);
        holder.wait_for("held");
        let waits = "say('asks')\nfor kind in ('flock', 'posix', 'ofd'): take(kind, wait=True); say('got', kind)";
        let waiter = start(&two, &volume, waits);
        waiter.wait_for("asks");
        // The program sleeps in flock(2), because it does nothing else that waits.
        let sleeps = || run(&waiter, "say(open('/proc/1/stat').read().rsplit(')')[1].split()[0])") == "S";
        node::eventually(Duration::from_secs(20), || sleeps().then_some(())).expect("the program does not wait");
        assert!(!waiter.log().contains("got"), "{}", waiter.log());
        node::send_signal(one.pid(), Signal::SIGKILL);
        assert_eq!(waiter.wait().0, 0, "{}", waiter.log());
        assert_eq!(waiter.log().matches("got").count(), 3, "{}", waiter.log());
    });
}

/// Checks waits, the reported holder, interrupts and deadlocks within one container.
const WAITS: &str = r#"
for kind in ("flock", "posix", "ofd"):
    f = take(kind, shared=True)
    pid = os.fork()
    if not pid:
        f.close(); g = take(kind, shared=True); say("shared", kind, state(kind)); g.close()
        begun = time.monotonic(); take(kind, wait=True); say("waited", kind, time.monotonic() - begun > 1); os._exit(0)
    time.sleep(3); f.close(); assert os.wait()[1] == 0
f = open("posix", "r+"); fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)
pid = os.fork()
if not pid:
    found = fcntl.fcntl(open("posix", "r+"), fcntl.F_GETLK, range_lock(fcntl.F_WRLCK))
    t, _, start, length, who = struct.unpack("hhqqi4x", found)
    say("getlk", t == fcntl.F_WRLCK, start, length, who == os.getppid()); os._exit(0)
os.wait(); f.close()
for kind in ("flock", "posix", "ofd"):
    f = take(kind)
    for number in (signal.SIGKILL, signal.SIGUSR1):
        pid = os.fork()
        if not pid:
            def stop(*_): raise KeyboardInterrupt
            signal.signal(signal.SIGUSR1, stop)
            try: take(kind, wait=True)
            except KeyboardInterrupt: os._exit(7)
        time.sleep(3); os.kill(pid, number); begun = time.monotonic(); status = os.wait()[1]
        say("interrupted", kind, number.name, status, time.monotonic() - begun < 5)
    f.close()
a, b = open("posix", "r+"), open("ofd", "r+")
fcntl.lockf(a, fcntl.LOCK_EX)
pid = os.fork()
if not pid:
    b = open("ofd", "r+"); fcntl.lockf(b, fcntl.LOCK_EX); time.sleep(1)
    fcntl.lockf(open("posix", "r+"), fcntl.LOCK_EX); os._exit(0)
time.sleep(3)
try: fcntl.lockf(b, fcntl.LOCK_EX); say("no deadlock")
except OSError as e: say("deadlock", e.errno == errno.EDEADLK)
a.close(); os.wait()
say("end", states())
"#;

#[test]
fn waits_end_with_the_lock_an_interrupt_or_a_deadlock() {
    need_image(PYTHON);
    pods("cri-lock-waits", |pods| {
        let (volume, pod) = (volume(pods), pods.pod());
        // An emptyDir belongs to the pod alone. Its locks stay in the guest.
        for volume in [volume, pods.volume(&pod, "empty-dir", "cache")] {
            let container = start(&pod, &volume, WAITS);
            assert_eq!(container.wait().0, 0, "{}", container.log());
            let log = container.log();
            let mut expected =
                vec!["getlk True 5 10 True".to_owned(), "deadlock True".into(), "end free free free".into()];
            for kind in ["flock", "posix", "ofd"] {
                expected.push(format!("shared {kind} locked"));
                expected.push(format!("waited {kind} True"));
                expected.push(format!("interrupted {kind} SIGKILL 9 True"));
                expected.push(format!("interrupted {kind} SIGUSR1 1792 True"));
            }
            for line in expected {
                assert!(log.contains(&line), "{line} is missing:\n{log}");
            }
        }
    });
}

/// Takes a POSIX lock of the file `OWN`. Then waits for one of the file `OTHER`, and later for one of the file `node`,
/// each as soon as there is a certain file. After a deadlock, releases the first lock, and waits for no other.
const DEADLOCK: &str = r#"
files = {}
def until(name):
    while not os.path.exists(name): time.sleep(0.1)
def lock(name):
    files[name] = open(name, "a+"); say("asks", name)
    try: fcntl.lockf(files[name], fcntl.LOCK_EX); say("got", name)
    except OSError as e: say("deadlock", name, e.errno == errno.EDEADLK); files[OWN].close(); time.sleep(1000)
lock(OWN); until("go-" + OWN); lock(OTHER); until("go-node"); lock("node")
time.sleep(1000)
"#;

#[test]
fn deadlock_between_pods_and_with_the_node_is_refused() {
    need_image(PYTHON);
    pods("cri-lock-deadlocks", |pods| {
        let volume = volume(pods);
        let (one, two) = (pods.pod(), pods.pod());
        let program = |own: &str, other: &str| format!("OWN, OTHER = '{own}', '{other}'\n{DEADLOCK}");
        let first = start(&one, &volume, &program("first", "second"));
        let second = start(&two, &volume, &program("second", "first"));
        first.wait_for("got first");
        second.wait_for("got second");
        let go = |name: &str| std::fs::write(volume.join(format!("go-{name}")), "").unwrap();
        // After this line, the program sleeps only in fcntl(2).
        let waits_for = |container: &PodContainer, name: &str| {
            container.wait_for(&format!("asks {name}"));
            let sleeps = || run(container, "say(open('/proc/1/stat').read().rsplit(')')[1].split()[0])") == "S";
            node::eventually(Duration::from_secs(20), || sleeps().then_some(())).expect("the program does not wait");
            assert!(!container.log().contains(&format!("got {name}")), "{}", container.log());
        };
        go("first");
        waits_for(&first, "second");
        go("second");
        second.wait_for("deadlock first True");
        first.wait_for("got second");
        // The node's process is this one. All of its threads own its POSIX locks together.
        let open = |name| File::options().read(true).append(true).create(true).open(volume.join(name)).unwrap();
        let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        let (own, other) = (open("node"), open("first"));
        fcntl(own.as_fd(), FcntlArg::F_SETLK(&lock)).unwrap();
        let mut holder = lock;
        fcntl(other.as_fd(), FcntlArg::F_GETLK(&mut holder)).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", one.pid())).unwrap();
        assert!(status.contains(&format!("\nTgid:\t{}\n", holder.l_pid)), "{}: {status}", holder.l_pid);
        go("node");
        waits_for(&first, "node");
        let (result, results) = std::sync::mpsc::channel();
        std::thread::spawn(move || result.send(fcntl(other.as_fd(), FcntlArg::F_SETLKW(&lock))));
        assert_eq!(results.recv_timeout(Duration::from_secs(60)), Ok(Err(nix::errno::Errno::EDEADLK)));
        drop(own);
        first.wait_for("got node");
    });
}

/// Removes and inserts ranges of a file that is also mapped.
const RANGES: &str = r#"
import mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
def blocks(): return "".join(chr(os.pread(fd, 1, at)[0] or 46) for at in range(0, os.fstat(fd).st_size, 4096))
fd = os.open("ranges", os.O_RDWR | os.O_CREAT); os.write(fd, b"".join(bytes([c]) * 4096 for c in b"abcdef"))
m = mmap.mmap(fd, 6 * 4096); m[5 * 4096] = ord("F")
assert libc.fallocate(fd, 8, 4096, 8192) == 0, os.strerror(ctypes.get_errno())
say(blocks(), chr(m[4096]), os.fstat(fd).st_size)
assert libc.fallocate(fd, 32, 4096, 4096) == 0, os.strerror(ctypes.get_errno())
say(blocks(), m[4096], chr(m[2 * 4096]), os.fstat(fd).st_size, os.lseek(fd, 0, 2))
"#;

#[test]
fn fallocate_removes_and_inserts_ranges() {
    need_image(PYTHON);
    pods("cri-ranges", |pods| {
        // Not every file system can remove and insert ranges. ext4 can.
        let disk = Disk::new(&pods.dir().join("disk"), 64);
        let (volume, pod) = (volume(pods), pods.pod());
        let _mounted = disk.format().mount(&volume, "defaults");
        let container = start(&pod, &volume, RANGES);
        assert_eq!(container.wait().0, 0, "{}", container.log());
        let log = container.log();
        assert!(log.contains("adeF d 16384") && log.contains("a.deF 0 d 20480 20480"), "{log}");
        assert_eq!(std::fs::metadata(volume.join("ranges")).unwrap().len(), 20480);
    });
}
