//! A pod's volumes: what kubelet updates is seen as it happens, and files behave as files do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::{PYTHON, node};
use serde_json::json;

/// What kubelet's AtomicWriter does (Kubernetes, pkg/volume/util/atomic_writer.go): a new directory with a time in its
/// name, and the link `..data` renamed to it in one step.
fn publish(volume: &Path, version: &str, value: &str) {
    let old = fs::read_link(volume.join("..data")).ok();
    let dir = volume.join(version);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("key"), value).unwrap();
    fs::set_permissions(dir.join("key"), PermissionsExt::from_mode(0o640)).unwrap();
    for number in 0..100 {
        fs::write(dir.join(format!("more-{number}")), format!("{value} {number}")).unwrap();
    }
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old)).unwrap();
    } else {
        for name in ["key", "more-0", "more-99"] {
            symlink(format!("..data/{name}"), volume.join(name)).unwrap();
        }
    }
}

const WATCH: &str = r#"
import ctypes, os, struct
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, b"/config", 0x80) > 0
print("watching", open("/config/key").read(), oct(os.stat("/config/key").st_mode), flush=True)
while True:
    events = os.read(fd, 65536)
    while events:
        _, mask, _, length = struct.unpack_from("iIII", events)
        name, events = events[16:16 + length].rstrip(b"\0"), events[16 + length:]
        print("event", name.decode(), open("/config/key").read(), open("/config/more-99").read(), flush=True)
        if name == b"..data" and open("/config/key").read() == "third":
            raise SystemExit(0)
"#;

#[test]
fn changes_of_a_config_map_are_noticed() {
    need_image(PYTHON);
    pods("cri-config-map", |pods| {
        let volume = pods.dir().join("volumes/kubernetes.io~configmap/settings");
        fs::create_dir_all(&volume).unwrap();
        publish(&volume, "..1", "first");
        let pod = pods.pod();
        let mut config = pod.sh("");
        config["image"]["image"] = json!(PYTHON);
        config["command"] = json!(["python3", "-c", WATCH]);
        config["mounts"] =
            json!([{ "host_path": volume.to_string_lossy(), "container_path": "/config", "readonly": true }]);
        let container = pod.start(&config);
        container.wait_for("watching first 0o100640");
        publish(&volume, "..2", "second");
        container.wait_for("event ..data second second 99");
        let denied = container.exec(&["sh", "-c", "echo x > /config/..data/key"]);
        assert!(denied.code != 0 && denied.err.contains("ead-only"), "{denied:?}");
        assert_eq!(container.exec(&["ls", "-A", "/config"]).out.lines().count(), 5);
        publish(&volume, "..3", "third");
        assert_eq!(container.wait().0, 0);
    });
}

/// Everything a file system is asked for by databases and package managers, on whatever `/volume` is.
const FILES: &str = r#"
import ctypes, fcntl, mmap, os, stat, struct, subprocess, sys, threading
os.chdir("/volume")
def done(what): print("ok", what, flush=True)

with open("a", "w") as f: f.write("one")
os.chmod("a", 0o4751); os.chown("a", 1234, 5678)
os.utime("a", ns=(1_000_000_001, 2_000_000_002))
os.setxattr("a", "user.husk", b"value")
os.link("a", "b"); os.symlink("a", "c")
s = os.lstat("b")
assert (s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns) == (1234, 5678, 2, 2_000_000_002), s
assert os.getxattr("b", "user.husk") == b"value" and os.readlink("c") == "a"
os.chmod("a", 0o4751); assert stat.S_IMODE(os.stat("a").st_mode) == 0o4751
done("attributes")

f = open("open", "w+"); f.write("still here"); f.flush(); os.unlink("open")
f.seek(0); assert f.read() == "still here" and os.fstat(f.fileno()).st_nlink == 0; f.close()
done("unlink while open")

with open("new", "w") as f: f.write("new")
with open("old", "w") as f: f.write("old")
reader = open("old"); os.rename("new", "old")
assert open("old").read() == "new" and reader.read() == "old" and not os.path.exists("new")
done("rename over")

def append(tag):
    with open("log", "ab", buffering=0) as f:
        for _ in range(50): f.write(tag * 20 + b"\n")
threads = [threading.Thread(target=append, args=(t,)) for t in (b"x", b"y", b"z")]
[t.start() for t in threads]; [t.join() for t in threads]
lines = open("log", "rb").read().splitlines()
assert len(lines) == 150 and all(len(set(l)) == 1 and len(l) == 20 for l in lines)
done("append")

one, two = open("lock", "w"), open("lock", "w")
fcntl.flock(one, fcntl.LOCK_EX)
try: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB); raise SystemExit("locked twice")
except BlockingIOError: pass
fcntl.flock(one, fcntl.LOCK_UN); fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
range = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 10, 0)
fcntl.fcntl(one, fcntl.F_SETLK, range)
done("locks")

with open("map", "w+b") as f:
    f.truncate(1 << 20); m = mmap.mmap(f.fileno(), 1 << 20)
    m[4096:4101] = b"hello"; m.flush(); f.seek(4096); assert f.read(5) == b"hello"
    f.seek(4096); f.write(b"HELLO"); f.flush(); assert m[4096:4101] == b"HELLO"
    os.fsync(f.fileno()); os.fdatasync(f.fileno())
fd = os.open(".", os.O_DIRECTORY); os.fsync(fd); os.close(fd)
done("mmap and fsync")

with open("sparse", "w+b") as f:
    f.truncate(1 << 30); f.seek(1 << 29); f.write(b"x"); f.flush()
    assert os.stat("sparse").st_blocks < 1024 and os.stat("sparse").st_size == 1 << 30
    os.posix_fallocate(f.fileno(), 0, 1 << 16)
done("sparse files")

os.mkfifo("fifo")
writer = threading.Thread(target=lambda: open("fifo", "w").write("through")); writer.start()
assert open("fifo").read() == "through"; writer.join()
import socket
server = socket.socket(socket.AF_UNIX); server.bind("socket"); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect("socket")
server.accept()[0].send(b"hi"); assert client.recv(2) == b"hi"
done("fifos and sockets")

os.mkdir("many")
for i in __import__("builtins").range(500): open(f"many/{i}", "w").close()
assert len(os.listdir("many")) == 500
for name in os.listdir("many"): os.unlink(f"many/{name}")
os.rmdir("many")
done("directories")
"#;

#[test]
fn files_behave_as_files_do() {
    need_image(PYTHON);
    pods("cri-files", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(&volume).unwrap();
        let pod = pods.pod();
        let mut config = pod.sh("");
        config["image"]["image"] = json!(PYTHON);
        config["command"] = json!(["python3", "-c", FILES]);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume" }]);
        let container = pod.start(&config);
        let (code, _) = container.wait();
        assert_eq!(code, 0, "{}", container.log());
        assert_eq!(container.log().matches(" ok ").count(), 9, "{}", container.log());
        // The node sees what the pod has made.
        let meta = fs::metadata(volume.join("a")).unwrap();
        assert_eq!((std::os::unix::fs::MetadataExt::uid(&meta), meta.permissions().mode() & 0o7777), (1234, 0o4751));
        assert_eq!(fs::read_to_string(volume.join("old")).unwrap(), "new");
    });
}

#[test]
fn volumes_are_shared_between_containers_and_with_the_node() {
    pods("cri-shared-volume", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(volume.join("sub")).unwrap();
        let pod = pods.pod();
        let with = |host: &Path, inside: &str| {
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["mounts"] = json!([
                { "host_path": host.to_string_lossy(), "container_path": inside, "propagation": "PROPAGATION_HOST_TO_CONTAINER" }
            ]);
            pod.start(&config)
        };
        // The whole volume in one, a subPath of it in the other.
        let (whole, part) = (with(&volume, "/data"), with(&volume.join("sub"), "/part"));
        whole.sh("echo one > /data/sub/file");
        assert_eq!(part.sh("cat /part/file"), "one");
        part.sh("echo two > /part/other; mv /part/file /part/moved");
        assert_eq!(whole.sh("cat /data/sub/other /data/sub/moved"), "two\none");
        // What the node writes is there at the next look, what it mounts too.
        fs::write(volume.join("sub/moved"), "changed on the node\n").unwrap();
        let seen = node::eventually(Duration::from_secs(5), || {
            (part.sh("cat /part/moved") == "changed on the node").then_some(())
        });
        assert!(seen.is_some(), "{}", part.sh("cat /part/moved"));
        let below = volume.join("sub/below");
        fs::create_dir(&below).unwrap();
        nix::mount::mount(Some("tmpfs"), &below, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
        fs::write(below.join("deep"), "mounted later\n").unwrap();
        let seen = node::eventually(Duration::from_secs(5), || {
            (part.exec(&["cat", "/part/below/deep"]).out.trim() == "mounted later").then_some(())
        });
        let text = part.exec(&["cat", "/part/below/deep"]);
        nix::mount::umount2(&below, nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert!(seen.is_some(), "{text:?}");
    });
}
