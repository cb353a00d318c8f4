//! A pod's volumes: ConfigMap updates, sharing between containers and node, sockets, locks, and overlayfs on a volume.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_base::sys::xattr;
use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::cri::{Pod, kubelet};
use husk_e2e::{PYTHON, node};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

/// Publishes a version of a ConfigMap with 101 entries.
fn publish(volume: &Path, version: &str, value: &str) {
    let more: Vec<_> = (0..100).map(|n| (format!("more-{n}"), format!("{value} {n}"))).collect();
    let more = more.iter().map(|(name, text)| (name.as_str(), text.as_bytes(), 0o644));
    let entries: Vec<_> = [("key", value.as_bytes(), 0o640)].into_iter().chain(more).collect();
    kubelet::write_atomically(volume, version, &entries);
}

/// Prints a line for each inotify event of the ConfigMap's volume, until the value of `key` is "third".
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
fn config_map_changes_raise_inotify_events() {
    need_image(PYTHON);
    pods("cri-config-map", |pods| {
        let pod = pods.pod();
        let volume = pods.volume(&pod, "configmap", "settings");
        publish(&volume, "..1", "first");
        let mut config = pod.python(WATCH);
        config["mounts"] =
            json!([{ "host_path": volume.to_string_lossy(), "container_path": "/config", "readonly": true }]);
        let container = pod.start(&config);
        container.wait_for("watching first 0o100640");
        publish(&volume, "..2", "second");
        container.wait_for("event ..data second second 99");
        let denied = container.exec(&["sh", "-c", "echo x > /config/..data/key"]);
        assert!(denied.code != 0 && denied.err.contains("ead-only"), "{denied:?}");
        assert_eq!(container.exec(&["ls", "-A", "/config"]).out.lines().count(), 103);
        publish(&volume, "..3", "third");
        assert_eq!(container.wait().0, 0);
    });
}

#[test]
fn containers_and_node_share_volumes_and_later_mounts() {
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
        // One container mounts the volume, and the other container mounts a subPath of the volume.
        let (parent, part) = (with(&volume, "/data"), with(&volume.join("sub"), "/part"));
        parent.sh("echo one > /data/sub/file");
        assert_eq!(part.sh("cat /part/file"), "one");
        part.sh("echo two > /part/other; mv /part/file /part/moved");
        assert_eq!(parent.sh("cat /data/sub/other /data/sub/moved"), "two\none");
        // The containers see files that the node writes, and file systems that the node mounts.
        fs::write(volume.join("sub/moved"), "changed on the node\n").unwrap();
        let seen = node::eventually(Duration::from_secs(5), || {
            (part.sh("cat /part/moved") == "changed on the node").then_some(())
        });
        assert!(
            seen.is_some(),
            "the container must read what the node wrote, but reads {:?}",
            part.sh("cat /part/moved")
        );
        let submount = volume.join("sub/below");
        fs::create_dir(&submount).unwrap();
        mount(Some("tmpfs"), &submount, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(submount.join("deep"), "mounted later\n").unwrap();
        let seen = node::eventually(Duration::from_secs(5), || {
            (part.exec(&["cat", "/part/below/deep"]).out.trim() == "mounted later").then_some(())
        });
        let text = part.exec(&["cat", "/part/below/deep"]);
        umount2(&submount, MntFlags::MNT_DETACH).unwrap();
        assert!(seen.is_some(), "the container does not see the file system that the node mounted later: {text:?}");
    });
}

/// Serves a UNIX socket and holds a lock.
const SERVER: &str = r#"
import fcntl, os, socket
lock = open("/data/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
server = socket.socket(socket.AF_UNIX)
server.bind("/data/socket")
server.listen()
print("serving", flush=True)
while True:
    peer, _ = server.accept()
    peer.sendall(b"hello " + peer.recv(100))
    peer.close()
"#;

/// Tries the lock, tries to write and sends a request to the socket, all in the directory `argv[1]`.
const CLIENT: &str = r#"
import fcntl, os, socket, sys
os.chdir(sys.argv[1])
try:
    fcntl.flock(open("lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("held")
try:
    open("written", "w")
    print("writes")
except OSError as error:
    print(error.strerror)
client = socket.socket(socket.AF_UNIX)
client.connect("socket")
client.sendall(b"you")
print(client.recv(100).decode())
"#;

#[test]
fn containers_share_sockets_and_locks_of_a_volume() {
    need_image(PYTHON);
    pods("cri-sockets", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(&volume).unwrap();
        let pod = pods.pod();
        start_server(&pod, &volume);
        assert_eq!(run_client(&pod, &volume, "/data", &json!({})), "held writes hello you");
    });
}

/// Starts a container that serves a socket in `volume`.
fn start_server(pod: &Pod, volume: &Path) {
    start_program(pod, SERVER, volume);
}

/// Starts a container that runs a Python program, which prints "serving". The container has `volume` at `/data`.
fn start_program(pod: &Pod, program: &str, volume: &Path) {
    start_program_with(pod, program, volume, &json!({}));
}

/// Starts a container like [`start_program`]. The mount has the additional fields `more`.
fn start_program_with(pod: &Pod, program: &str, volume: &Path, more: &Value) {
    let mut config = pod.python(program);
    config["mounts"] = json!([mount_at_data(volume, more)]);
    pod.start(&config).wait_for("serving");
}

fn mount_at_data(volume: &Path, more: &Value) -> Value {
    let mut mount = json!({ "host_path": volume.to_string_lossy(), "container_path": "/data" });
    mount.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    mount
}

/// Runs [`CLIENT`] in a container that has `volume` at `/data`. The mount has the additional fields `more`. The client
/// works in the directory `at`. Returns the client's output in one line.
#[track_caller]
fn run_client(pod: &Pod, volume: &Path, at: &str, more: &Value) -> String {
    run_program(pod, CLIENT, volume, at, more)
}

/// Runs a Python program in a container like [`run_client`].
#[track_caller]
fn run_program(pod: &Pod, program: &str, volume: &Path, at: &str, more: &Value) -> String {
    let mut config = pod.python(program);
    config["command"].as_array_mut().unwrap().push(at.into());
    config["mounts"] = json!([mount_at_data(volume, more)]);
    let client = pod.start(&config);
    let code = client.wait().0;
    let output = client.log().lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect::<Vec<_>>().join(" ");
    assert_eq!(code, 0, "{output}");
    output
}

/// A pod's directory on the node's disk, as the kubelet creates it. Dropping this value unmounts the subPaths and
/// removes the directory.
struct PodDir {
    dir: PathBuf,
    mounts: RefCell<Vec<PathBuf>>,
}

impl PodDir {
    fn of(pod: &Pod) -> Self {
        let uid = pod.config["metadata"]["uid"].as_str().unwrap();
        Self { dir: Path::new("/var/lib/kubelet/pods").join(uid), mounts: RefCell::default() }
    }

    /// Creates a volume of a plugin.
    fn volume(&self, plugin: &str) -> PathBuf {
        let path = self.dir.join("volumes").join(plugin).join("data");
        fs::create_dir_all(path.join("sub")).unwrap();
        path
    }

    /// Bind-mounts a subPath of `volume` for container number `container`.
    fn sub_path(&self, volume: &Path, container: usize) -> PathBuf {
        let path = self.dir.join(format!("volume-subpaths/data/{container}/0"));
        fs::create_dir_all(&path).unwrap();
        mount(Some(&volume.join("sub")), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        self.mounts.borrow_mut().push(path.clone());
        path
    }
}

impl Drop for PodDir {
    fn drop(&mut self) {
        for path in self.mounts.borrow().iter() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn containers_share_sockets_and_locks_with_any_kind_of_mount() {
    need_image(PYTHON);
    let (plain, only_reads) = (json!({}), json!({ "readonly": true }));
    let sees_mounts = json!({ "propagation": "PROPAGATION_HOST_TO_CONTAINER" });
    pods("cri-sockets-ways", |pods| {
        for plugin in ["kubernetes.io~empty-dir", "kubernetes.io~csi"] {
            let pod = pods.pod();
            let pod_dir = PodDir::of(&pod);
            let volume = pod_dir.volume(plugin);
            start_server(&pod, &pod_dir.sub_path(&volume, 0));
            let part = pod_dir.sub_path(&volume, 1);
            assert_eq!(
                run_client(&pod, &part, "/data", &plain),
                "held writes hello you",
                "wrong output of the client for a volume of {plugin}"
            );
            let part = pod_dir.sub_path(&volume, 2);
            let read_only = "held Read-only file system hello you";
            assert_eq!(run_client(&pod, &part, "/data", &only_reads), read_only);
            if plugin == "kubernetes.io~empty-dir" {
                assert_eq!(run_client(&pod, &volume, "/data/sub", &only_reads), read_only);
                assert_eq!(run_client(&pod, &volume, "/data/sub", &plain), "held writes hello you");
                assert_eq!(run_client(&pod, &volume, "/data/sub", &sees_mounts), "held writes hello you");
            }
            pod.remove();
        }
    });
}

/// For each client: changes a mapped file, answers, and writes to a fifo. Holds a lock all the time. The volume, or its
/// directory `sub`, is at `/data`.
const MEETING_SERVER: &str = r#"
import fcntl, mmap, os, socket
os.chdir("/data/sub" if os.path.isdir("/data/sub") else "/data")
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
os.mkfifo("fifo")
open("map", "wb").write(bytes(4096))
mapping = mmap.mmap(os.open("map", os.O_RDWR), 4096)
server = socket.socket(socket.AF_UNIX)
server.bind("socket")
server.listen()
print("serving", flush=True)
while True:
    peer, _ = server.accept()
    peer.recv(100)
    mapping[0] += 1
    peer.sendall(b"changed")
    peer.close()
    with open("fifo", "w") as fifo:
        fifo.write("through a fifo")
"#;

/// Prints what the client of [`MEETING_SERVER`] sees in the directory `argv[1]`. In `sub` of the whole volume, moves a
/// file and a link out of `sub` and back.
const MEETING_CLIENT: &str = r#"
import fcntl, mmap, os, signal, socket, sys
signal.alarm(60)
os.chdir(sys.argv[1])
try:
    fcntl.flock(open("lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("held")
mapping = mmap.mmap(os.open("map", os.O_RDONLY), 4096, prot=mmap.PROT_READ)
before = mapping[0]
client = socket.socket(socket.AF_UNIX)
client.connect("socket")
client.sendall(b"change")
client.recv(100)
print(mapping[0] - before)
print(open("fifo").read())
try:
    open("written", "w").write("content")
    print("writes")
    if sys.argv[1] == "/data/sub":
        os.rename("written", "../moved")
        os.link("../moved", "linked")
        os.rename("../moved", "written")
        os.unlink("linked")
        print(open("written").read())
except OSError as error:
    print(error.strerror)
"#;

/// Uses a volume until the pod ends. The files of the volume stay in the guest's cache.
const HOLDER: &str = r#"
import os, signal
held = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path, _, _ in os.walk("/data")]
print("serving", flush=True)
signal.pause()
"#;

#[test]
fn containers_with_a_volume_in_several_ways_meet_in_its_files() {
    need_image(PYTHON);
    let (plain, only_reads) = (json!({}), json!({ "readonly": true }));
    pods("cri-volume-ways", |pods| {
        let pod = pods.pod();
        let pod_dir = PodDir::of(&pod);
        let volume = pod_dir.volume("kubernetes.io~csi");
        start_program(&pod, MEETING_SERVER, &volume);
        let (part, read_only_part) = (pod_dir.sub_path(&volume, 1), pod_dir.sub_path(&volume, 2));
        for (source, at, more) in [
            (&part, "/data", &plain),
            (&read_only_part, "/data", &only_reads),
            (&volume.join("sub"), "/data", &plain),
            (&volume, "/data/sub", &only_reads),
        ] {
            let writes = if more == &plain { "writes" } else { "Read-only file system" };
            let content = if (more, at) == (&plain, "/data/sub") { " content" } else { "" };
            assert_eq!(
                run_program(&pod, MEETING_CLIENT, source, at, more),
                format!("held 1 through a fifo {writes}{content}"),
                "wrong output of the client with {} at {at}, {more}",
                source.display()
            );
        }
        pod.remove();
    });
}

/// A mount in the share does not grow. Therefore, the later container gets a mount of its own, and the VMM joins the
/// mounts.
#[test]
fn containers_meet_if_a_part_or_a_read_only_mount_comes_first() {
    need_image(PYTHON);
    let (plain, only_reads) = (json!({}), json!({ "readonly": true }));
    pods("cri-volume-orders", |pods| {
        // The part is writable, and comes first.
        let pod = pods.pod();
        let pod_dir = PodDir::of(&pod);
        let volume = pod_dir.volume("kubernetes.io~csi");
        let part = pod_dir.sub_path(&volume, 1);
        start_program(&pod, MEETING_SERVER, &part);
        let whole = "held 1 through a fifo writes content";
        for (source, at, more, expected) in [
            (&volume, "/data/sub", &only_reads, "held 1 through a fifo Read-only file system"),
            (&volume, "/data/sub", &plain, whole),
            // By now, the mount of the whole volume is gone.
            (&part, "/data", &only_reads, "held 1 through a fifo Read-only file system"),
            (&part, "/data", &plain, "held 1 through a fifo writes"),
        ] {
            let output = run_program(&pod, MEETING_CLIENT, source, at, more);
            assert_eq!(output, expected, "{} at {at}, {more}", source.display());
        }
        pod.remove();
        // All readers come first.
        let pod = pods.pod();
        let pod_dir = PodDir::of(&pod);
        let volume = pod_dir.volume("kubernetes.io~csi");
        let part = pod_dir.sub_path(&volume, 1);
        for source in [&part, &volume] {
            start_program_with(&pod, HOLDER, source, &only_reads);
        }
        start_program(&pod, MEETING_SERVER, &volume);
        for (source, at, more, expected) in [
            (&part, "/data", &only_reads, "held 1 through a fifo Read-only file system"),
            (&volume, "/data/sub", &plain, whole),
            (&part, "/data", &plain, "held 1 through a fifo writes"),
        ] {
            let output = run_program(&pod, MEETING_CLIENT, source, at, more);
            assert_eq!(output, expected, "{} at {at}, {more}, after readers", source.display());
        }
    });
}

/// Uses the features that overlayfs needs from the file system of its upper directory: whiteouts, `trusted.*`
/// attributes, renames. The owner of a symbolic link and the mode of a fifo change, because overlayfs copies such files
/// to the upper directory without attributes.
const OVERLAY: &str = "
    cd /data && mkdir lower upper work merged lower/dir && echo 1 > lower/gone && echo 2 > lower/dir/kept
    ln -s dir/kept lower/link && mkfifo lower/pipe
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    cd merged && rm gone && mv dir moved 2>&1 | head -n 1; rm -rf dir && mkdir dir && echo new > dir/new
    chown -h 7:7 link && chmod 600 pipe
    ls; ls dir; cd .. && umount merged
    stat -c '%F %t:%T' upper/gone
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    ls merged merged/dir
    readlink merged/link && stat -c '%F %a %u' merged/link merged/pipe
    umount merged";

/// Replaces a file of overlayfs by a file that was created without a name, and writes to this file by its old fd.
const OVERLAY_TMPFILE: &str = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.chdir("/data")
for name in ("below", "above", "scratch", "union"):
    os.mkdir(name)
with open("below/name", "w") as file:
    file.write("old")
options = b"lowerdir=below,upperdir=above,workdir=scratch"
assert libc.mount(b"overlay", b"union", b"overlay", 0, options) == 0, os.strerror(ctypes.get_errno())
fd = os.open("union", os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(fd, b"new")
# With a directory fd, Python calls linkat() with AT_SYMLINK_FOLLOW.
os.link(str(fd), "union/linked", src_dir_fd=os.open("/proc/self/fd", os.O_RDONLY))
os.rename("union/linked", "union/name")
os.write(fd, b"er")
by_fd, by_name = os.fstat(fd), os.stat("union/name")
print(open("union/name").read(), by_fd.st_nlink, by_fd.st_ino == by_name.st_ino, os.listdir("union"))
os.close(fd)
assert libc.umount(b"union") == 0, os.strerror(ctypes.get_errno())
"#;

#[test]
fn overlayfs_works_with_its_upper_directory_on_an_empty_dir() {
    need_image(PYTHON);
    pods("cri-overlay", |pods| {
        // The directory is on the node's disk, like the kubelet's volumes.
        let dir = Path::new("/var/lib/kubelet/pods/uid-cri-overlay");
        let volume = dir.join("volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(&volume).unwrap();
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = pods.run(config);
        let mut config = pod.sh("sleep 100000");
        config["linux"]["security_context"]["privileged"] = json!(true);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
        let container = pod.start(&config);
        let seen = container.exec(&["sh", "-c", OVERLAY]);
        let mut config = pod.python(OVERLAY_TMPFILE);
        config["linux"]["security_context"]["privileged"] = json!(true);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
        let replacing = pod.start(&config);
        let (code, output) = (replacing.wait().0, replacing.log());
        let log = container.exec(&["sh", "-c", "dmesg | tail -n 5"]);
        pod.stop();
        let attributes = xattr::list(&volume.join("upper/dir"));
        let content = fs::read_to_string(volume.join("above/name"));
        fs::remove_dir_all(dir).unwrap();
        let expected = "dir\nlink\nmoved\npipe\nnew\ncharacter special file 0:0\n\
            merged:\ndir\nlink\nmoved\npipe\n\nmerged/dir:\nnew\n\
            dir/kept\nsymbolic link 777 7\nfifo 600 0\n";
        assert_eq!(seen.out, expected, "{}\n{}", seen.err, log.out);
        assert!(code == 0 && output.contains("newer 1 True ['name']"), "{code} {output}\n{}", log.out);
        assert_eq!(content.unwrap(), "newer");
        // Husk adds a prefix to the attribute's name, and runc does not.
        let attributes = String::from_utf8(attributes.unwrap()).unwrap();
        assert!(
            attributes.split('\0').any(|name| name.ends_with("trusted.overlay.opaque")),
            "the new directory is not opaque on the node: {attributes:?}"
        );
    });
}

/// A script that runs as root of a user namespace. This root is an unprivileged user for the pod and for the node.
const MAPPED: &str = "
    cd /data && mkdir -m 0 closed && echo inside > closed/file && cat closed/file && stat -c %u:%g closed/file
    mkdir lower upper work merged && echo 1 > lower/gone
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr merged
    rm merged/gone && echo new > merged/new && ls merged && stat -c '%F' upper/gone && umount merged";

#[test]
fn root_of_a_user_namespace_overrides_file_modes_of_its_files() {
    pods("cri-mapped", |pods| {
        let dir = Path::new("/var/lib/kubelet/pods/uid-cri-mapped");
        let volume = dir.join("volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(&volume).unwrap();
        fs::set_permissions(&volume, PermissionsExt::from_mode(0o777)).unwrap();
        let pod = pods.pod();
        let mut config = pod.sh("sleep 100000");
        config["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        config["linux"]["security_context"]["run_as_group"] = json!({ "value": 1000 });
        // The default AppArmor profile forbids mounts, also in a user namespace.
        config["linux"]["security_context"]["apparmor"] = json!({ "profile_type": "Unconfined" });
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
        let container = pod.start(&config);
        let seen = container.exec(&["unshare", "-U", "-r", "-m", "sh", "-c", MAPPED]);
        let owner = fs::metadata(volume.join("closed/file")).map(|file| (file.uid(), file.gid()));
        pod.stop();
        fs::remove_dir_all(dir).unwrap();
        assert_eq!((seen.code, seen.out.as_str()), (0, "inside\n0:0\nnew\ncharacter special file\n"), "{}", seen.err);
        assert_eq!(owner.unwrap(), (1000, 1000));
    });
}
