//! A pod's volumes: what kubelet updates is seen as it happens, and files behave as files do.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::cri::{Pod, kubelet};
use husk_e2e::{PYTHON, node};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

/// A version of a ConfigMap with a hundred and one entries.
fn publish(volume: &Path, version: &str, value: &str) {
    let more: Vec<_> = (0..100).map(|n| (format!("more-{n}"), format!("{value} {n}"))).collect();
    let more = more.iter().map(|(name, text)| (name.as_str(), text.as_bytes(), 0o644));
    let entries: Vec<_> = [("key", value.as_bytes(), 0o640)].into_iter().chain(more).collect();
    kubelet::publish(volume, version, &entries);
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
        mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(below.join("deep"), "mounted later\n").unwrap();
        let seen = node::eventually(Duration::from_secs(5), || {
            (part.exec(&["cat", "/part/below/deep"]).out.trim() == "mounted later").then_some(())
        });
        let text = part.exec(&["cat", "/part/below/deep"]);
        umount2(&below, MntFlags::MNT_DETACH).unwrap();
        assert!(seen.is_some(), "{text:?}");
    });
}

/// Serves a socket and holds a lock until it was asked.
const SERVE: &str = r#"
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

/// Asks by the socket in a directory, and tries the lock and to write there.
const ASK: &str = r#"
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
asking = socket.socket(socket.AF_UNIX)
asking.connect("socket")
asking.sendall(b"you")
print(asking.recv(100).decode())
"#;

#[test]
fn sockets_and_locks_of_a_volume_work_between_containers() {
    need_image(PYTHON);
    pods("cri-sockets", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(&volume).unwrap();
        let pod = pods.pod();
        serving(&pod, &volume);
        assert_eq!(asking(&pod, &volume, "/data", &json!({})), "held writes hello you");
    });
}

/// A container that has `volume` and serves the socket in it.
fn serving(pod: &Pod, volume: &Path) {
    let mut config = pod.python(SERVE);
    config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/data" }]);
    pod.start(&config).wait_for("serving");
}

/// What a container says that has `volume` at `/data`, with more said of that, and asks in `at`.
#[track_caller]
fn asking(pod: &Pod, volume: &Path, at: &str, more: &Value) -> String {
    let mut config = pod.python(ASK);
    config["command"].as_array_mut().unwrap().push(at.into());
    let mut mount = json!({ "host_path": volume.to_string_lossy(), "container_path": "/data" });
    mount.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config["mounts"] = json!([mount]);
    let asking = pod.start(&config);
    let code = asking.wait().0;
    let said = asking.log().lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect::<Vec<_>>().join(" ");
    assert_eq!(code, 0, "{said}");
    said
}

/// A pod's directory as the kubelet makes it, on the node's disk; with what it mounted gone at the end.
struct Kubelets {
    dir: PathBuf,
    mounts: RefCell<Vec<PathBuf>>,
}

impl Kubelets {
    fn of(pod: &Pod) -> Self {
        let uid = pod.config["metadata"]["uid"].as_str().unwrap();
        Self { dir: Path::new("/var/lib/kubelet/pods").join(uid), mounts: RefCell::default() }
    }

    /// A volume of a plugin.
    fn volume(&self, plugin: &str) -> PathBuf {
        let path = self.dir.join("volumes").join(plugin).join("data");
        fs::create_dir_all(path.join("sub")).unwrap();
        path
    }

    /// A subPath of `volume` for container number `container`: a mount of its own.
    fn sub_path(&self, volume: &Path, container: usize) -> PathBuf {
        let path = self.dir.join(format!("volume-subpaths/data/{container}/0"));
        fs::create_dir_all(&path).unwrap();
        mount(Some(&volume.join("sub")), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        self.mounts.borrow_mut().push(path.clone());
        path
    }
}

impl Drop for Kubelets {
    fn drop(&mut self) {
        for path in self.mounts.borrow().iter() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn sockets_and_locks_work_however_a_container_has_its_volume() {
    need_image(PYTHON);
    let (plain, only_reads) = (json!({}), json!({ "readonly": true }));
    let sees_mounts = json!({ "propagation": "PROPAGATION_HOST_TO_CONTAINER" });
    pods("cri-sockets-ways", |pods| {
        for plugin in ["kubernetes.io~empty-dir", "kubernetes.io~csi"] {
            let pod = pods.pod();
            let kubelets = Kubelets::of(&pod);
            let volume = kubelets.volume(plugin);
            serving(&pod, &kubelets.sub_path(&volume, 0));
            let part = kubelets.sub_path(&volume, 1);
            assert_eq!(asking(&pod, &part, "/data", &plain), "held writes hello you", "{plugin}");
            if plugin == "kubernetes.io~empty-dir" {
                let part = kubelets.sub_path(&volume, 2);
                let read_only = "held Read-only file system hello you";
                assert_eq!(asking(&pod, &part, "/data", &only_reads), read_only);
                assert_eq!(asking(&pod, &volume, "/data/sub", &only_reads), read_only);
                assert_eq!(asking(&pod, &volume, "/data/sub", &plain), "held writes hello you");
                assert_eq!(asking(&pod, &volume, "/data/sub", &sees_mounts), "held writes hello you");
            }
            pod.remove();
        }
    });
}

/// What overlayfs needs of the file system its upper directory is on: whiteouts, `trusted.` attributes, renames.
const OVERLAY: &str = "
    cd /data && mkdir lower upper work merged lower/dir && echo 1 > lower/gone && echo 2 > lower/dir/kept
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    cd merged && rm gone && mv dir moved 2>&1 | head -n 1; rm -rf dir && mkdir dir && echo new > dir/new
    ls; ls dir; cd .. && umount merged
    stat -c '%F %t:%T' upper/gone
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
    ls merged merged/dir
    umount merged && rm -rf /data/*";

#[test]
fn overlay_mounts_have_their_upper_directory_on_an_empty_dir() {
    pods("cri-overlay", |pods| {
        // On the node's disk, as the kubelet's are.
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
        let log = container.exec(&["sh", "-c", "dmesg | tail -n 5"]);
        pod.stop();
        fs::remove_dir_all(dir).unwrap();
        let expected = "dir\nmoved\nnew\ncharacter special file 0:0\nmerged:\ndir\nmoved\n\nmerged/dir:\nnew\n";
        assert_eq!(seen.out, expected, "{}\n{}", seen.err, log.out);
    });
}

/// As root of a user namespace, which is an ordinary user to the pod and to the node.
const MAPPED: &str = "
    cd /data && mkdir -m 0 closed && echo inside > closed/file && cat closed/file && stat -c %u:%g closed/file
    mkdir lower upper work merged && echo 1 > lower/gone
    mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr merged
    rm merged/gone && echo new > merged/new && ls merged && stat -c '%F' upper/gone && umount merged";

#[test]
fn root_of_a_user_namespace_is_not_held_by_modes() {
    pods("cri-mapped", |pods| {
        let dir = Path::new("/var/lib/kubelet/pods/uid-cri-mapped");
        let volume = dir.join("volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(&volume).unwrap();
        fs::set_permissions(&volume, PermissionsExt::from_mode(0o777)).unwrap();
        let pod = pods.pod();
        let mut config = pod.sh("sleep 100000");
        config["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        config["linux"]["security_context"]["run_as_group"] = json!({ "value": 1000 });
        // The default profile forbids mounts, in a user namespace too.
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
