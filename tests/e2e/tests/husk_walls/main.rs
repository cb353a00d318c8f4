//! Isolation: containers cannot reach the agent over vsock, and cannot reach the node's host-only file systems through
//! a volume. Also tests the VMM's jail and the shim's confinement (module `jail`).

mod jail;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_e2e::cri::pid_1;
use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::{Case, PYTHON, case, node};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use serde_json::json;

/// Connects to every CID that a guest can know, on the agent's ports and on nearby ports, at the same time.
/// Prints the CIDs and ports that answered.
///
/// If nothing answers, the kernel ends the attempt with ETIMEDOUT after its default of two seconds. Therefore no socket
/// waits forever.
const CONNECT: &str = r#"
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
fn container_cannot_connect_to_agent() {
    need_image(PYTHON);
    let variants = [
        ("0", json!({})),
        ("1000", json!({ "run_as_user": { "value": 1000 } })),
        ("0", json!({ "privileged": true })),
        ("0", json!({ "seccomp": { "profile_type": "RuntimeDefault" } })),
    ];
    pods("vsock-dial", |pods| {
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let pod = pods.run(config);
        // Run the containers at the same time, because the attempts of each container end only after a timeout.
        let started = variants.map(|(user, context)| {
            let mut config = pod.python(CONNECT);
            let fields = config["linux"]["security_context"].as_object_mut().unwrap();
            fields.extend(context.as_object().unwrap().clone());
            (pod.start(&config), user, context)
        });
        for (container, user, context) in started {
            let code = container.wait().0;
            let log = container.log();
            let text: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
            // containerd's default seccomp profile may deny all sockets of the family AF_VSOCK.
            let denied = context["seccomp"].is_object() && text == ["no socket: EPERM"];
            assert!(
                code == 0 && (denied || text == [format!("answered: [] of {user}")]),
                "container with {context}: exit code {code}\n{log}"
            );
        }
    });
}

#[test]
fn pid_1_of_a_shared_pid_namespace_is_confined() {
    pods("walls-pid-1", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("exec sleep 1000");
        config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["SYS_PTRACE"] });
        pid_1::check(&pod, config);
    });
}

#[test]
fn vsock_connection_flood_does_not_block_exec() {
    case("vsock-flood", |case| {
        // The agent lets at most 256 connections wait for their stream header (MAX_PENDING). This program opens more
        // connections, and keeps all of them open.
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

/// Types of the host-only file systems. These file systems are interfaces to the node's kernel, devices and processes.
const HOST_ONLY: [&str; 17] = [
    "proc",
    "sysfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "bpf",
    "configfs",
    "devtmpfs",
    "devpts",
    "mqueue",
    "pstore",
    "efivarfs",
    "binfmt_misc",
    "fusectl",
    "nsfs",
];
/// The types that the test itself mounts below its directory, whatever the node has mounted.
const TEST_MOUNTED: [&str; 11] =
    ["proc", "sysfs", "cgroup2", "debugfs", "tracefs", "securityfs", "bpf", "configfs", "devtmpfs", "devpts", "mqueue"];

/// Mounts below a directory of the node. Dropping this value unmounts them.
struct Mounted(Vec<PathBuf>);

impl Mounted {
    /// Mounts each type of `TEST_MOUNTED` below `dir`, and a tmpfs with a file in it.
    fn below(dir: &Path) -> Self {
        let mut mounted = Self(Vec::new());
        for kind in TEST_MOUNTED {
            mounted.add(kind, &dir.join(kind));
        }
        mounted.add("tmpfs", &dir.join("data"));
        fs::write(dir.join("data/file"), "of the node\n").unwrap();
        mounted
    }

    fn add(&mut self, kind: &str, at: &Path) {
        fs::create_dir_all(at).unwrap();
        let options = (kind == "devpts").then_some("newinstance");
        mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
            .unwrap_or_else(|error| panic!("failed to mount {kind}: {error}"));
        self.0.push(at.to_owned());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for at in self.0.iter().rev() {
            let _ = umount2(at, MntFlags::MNT_DETACH);
        }
    }
}

/// Returns the mount points of the node's file systems whose type `selects` accepts.
fn mount_points(selects: impl Fn(&str) -> bool) -> Vec<String> {
    let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let selected =
        list.lines().filter(|line| selects(line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap()));
    selected.map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect()
}

/// Returns the mount points of the node's host-only file systems.
fn host_only_mounts() -> Vec<String> {
    mount_points(|kind| HOST_ONLY.contains(&kind))
}

/// Lists the entries of each mount point below each directory in `HOSTS`, and prints the mount points with entries.
/// Then tries to open files that would give a container control of the node, and to detach the mounts of the node.
const INSPECT: &str = r#"
import errno, os
def detach(host, at):
    path, made = host + at, host + at + ".made"
    def create():
        os.close(os.open(path + "/created", os.O_CREAT | os.O_WRONLY))
    def replace():
        os.mkdir(made)
        os.rename(made, path)
    actions = {
        "remove": lambda: os.rmdir(path),
        "rename": lambda: os.rename(path, host + at + ".moved"),
        "replace": replace,
        "create a file in": create,
    }
    for name, action in actions.items():
        try:
            action()
            print(host, "could", name, at)
        except OSError as error:
            # EROFS comes from a read-only volume, and from the read-only cover at the place of the mount.
            if error.errno not in (errno.EBUSY, errno.EROFS):
                print(host, "could not", name, at, "because of", errno.errorcode[error.errno])
        if os.path.isdir(made):
            os.rmdir(made)
def inspect(host):
    for at in MOUNTS:
        path = host + at
        if os.path.isdir(path):
            found = os.listdir(path)
        elif os.path.exists(path):
            found = [f"{len(open(path, 'rb').read())} bytes"]
        else:
            found = []
        # If a mount point is a file, such as that of a network namespace, its cover is an empty file.
        if found not in ([], ["0 bytes"]):
            print(host, "has", at, found[:3])
    for at in ["proc/kcore", "proc/1/mem", "proc/1/root/etc/hostname", "proc/sys/kernel/core_pattern", "proc/sysrq-trigger",
               "sys/kernel/uevent_helper", "sys/fs/cgroup/cgroup.procs", "sys/kernel/debug/sched/debug", "dev/mem", "dev/kmsg",
               "dev/vda", "dev/kvm", "dev/vhost-net"]:
        for flags in (os.O_RDONLY, os.O_WRONLY):
            try:
                os.close(os.open(f"{host}/{at}", flags | os.O_NONBLOCK))
                print(host, "opened", at, flags)
            except OSError:
                pass
    # Files that are shared with the guest must not be reachable by a second path.
    for top, dirs, files in os.walk(host + "/run/husk"):
        if any(part in ("share", "guest", "stage") for part in top.split("/")) and dirs + files:
            print("reached", top, dirs, files)
    for at in PLACES:
        detach(host, at)
    print(open(host + DATA).read().strip())
for host in HOSTS:
    inspect(host)
"#;

/// Returns the mount points that a container must not be able to remove: those of the test, and three of the node.
fn places(dir: &Path) -> Vec<String> {
    let of_test = TEST_MOUNTED.map(|kind| dir.join(kind).to_str().unwrap().to_owned());
    of_test.into_iter().chain(["/proc", "/sys", "/dev"].map(String::from)).collect()
}

/// Runs a container and returns one line for each access that it has to a host-only file system. The container mounts
/// the node's root once for each element of `options`.
fn inspect(case: &Case, dir: &Path, options: &[&str], flags: &[&str]) -> String {
    let (mounts, places) = (host_only_mounts(), places(dir));
    let data = dir.join("data/file");
    let hosts: Vec<String> = (0..options.len()).map(|number| format!("/host{number}")).collect();
    let program = format!(
        "HOSTS = {}\nMOUNTS = {}\nPLACES = {}\nDATA = {data:?}\n{INSPECT}",
        json!(hosts),
        json!(mounts),
        json!(places)
    );
    let run = case.python(&program).flags(flags);
    let output = hosts
        .iter()
        .zip(options)
        .fold(run, |run, (host, options)| {
            run.flags(&["--mount", &format!("type=bind,src=/,dst={host},options={options}")])
        })
        .output()
        .expect_code(0);
    let out = output.out();
    let (read, found): (Vec<&str>, Vec<&str>) = out.lines().partition(|line| *line == "of the node");
    assert_eq!(read.len(), hosts.len(), "the container did not read the tmpfs\n{}", output.describe());
    found.join("\n")
}

#[test]
fn volume_of_node_root_has_no_host_only_file_systems() {
    case("own-file-systems", |case| {
        let dir = case.dir().join("own");
        let _mounted = Mounted::below(&dir);
        let privileged: &[&str] = &["--privileged", "--privileged-without-host-devices"];
        for flags in [&[], privileged] {
            assert_eq!(inspect(case, &dir, &["rbind:ro", "rbind:rw", "rbind:rslave:rw"], flags), "", "{flags:?}");
        }
        // On the node itself, the file systems are still mounted, and have their content.
        let mounted = mount_points(|_| true);
        let gone: Vec<String> = places(&dir).into_iter().filter(|place| !mounted.contains(place)).collect();
        assert!(gone.is_empty(), "the container has detached {gone:?} from the node");
        assert!(
            Path::new("/proc/self").exists()
                && dir.join("proc/self").exists()
                && fs::metadata(dir.join("devtmpfs/null")).unwrap().file_type().is_char_device()
        );
    });
}

#[test]
fn pod_volume_of_node_root_has_no_host_only_file_systems() {
    pods("own-file-systems-pod", |pods| {
        let dir = pods.dir().join("own");
        let _mounted = Mounted::below(&dir);
        for privileged in [false, true] {
            let mut config = pods.config();
            config["linux"]["security_context"]["privileged"] = json!(privileged);
            let pod = pods.run(config);
            for (readonly, propagation) in [(true, "PROPAGATION_PRIVATE"), (false, "PROPAGATION_HOST_TO_CONTAINER")] {
                let mut config = pod.sh("sleep 100000");
                config["metadata"]["name"] = json!(propagation.to_lowercase());
                config["linux"]["security_context"]["privileged"] = json!(privileged);
                config["mounts"] = json!([
                    { "host_path": "/", "container_path": "/host", "readonly": readonly, "propagation": propagation }
                ]);
                let container = pod.start(&config);
                let mounts: Vec<String> = host_only_mounts().into_iter().map(|at| format!("/host{at}")).collect();
                let all = "for at; do if [ -d $at ]; then ls -A $at; elif [ -e $at ]; then cat $at; fi; done";
                let mut script = vec!["sh", "-c", all, "sh"];
                script.extend(mounts.iter().map(String::as_str));
                let found = container.exec(&script);
                assert_eq!((found.code, found.out.as_str()), (0, ""), "{}", found.err);
                assert_eq!(container.sh(&format!("cat /host{}/data/file", dir.display())), "of the node");
                container.remove();
            }
            pod.remove();
        }
    });
}

#[test]
fn later_mounts_propagate_but_host_only_mounts_do_not() {
    case("own-later", |case| {
        let dir = case.dir().join("followed");
        fs::create_dir_all(dir.join("under")).unwrap();
        fs::write(dir.join("under/file"), "below it\n").unwrap();
        let mut mounted = Mounted(Vec::new());
        mounted.add("tmpfs", &dir.join("before"));
        fs::write(dir.join("before/file"), "before\n").unwrap();
        let flags = format!("type=bind,src={},dst=/v,options=rbind:rslave:rw", dir.display());
        let container = case.container(case.sh("echo up; exec sleep 1000").flags(&["--mount", &flags]));
        for (kind, name) in [("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev"), ("tmpfs", "under")] {
            mounted.add(kind, &dir.join(name));
        }
        fs::write(dir.join("under/file"), "over it\n").unwrap();
        let seen = container.exec("seen", &["sh", "-c", "cat /v/before/file /v/under/file; ls /v/proc /v/sys /v/dev"]);
        let seen = seen.expect_code(0).out();
        assert_eq!(seen.trim(), "before\nover it\n/v/dev:\n\n/v/proc:\n\n/v/sys:");
        // The node can unmount file systems, although the container has read from them.
        for name in ["before", "under"] {
            umount(&dir.join(name)).unwrap();
        }
        let mut next = 0;
        let gone = node::eventually(Duration::from_secs(10), || {
            next += 1;
            let command = ["sh", "-c", "cat /v/under/file; ls /v/before"];
            (container.exec(&format!("gone-{next}"), &command).out() == "below it\n").then_some(())
        });
        assert!(gone.is_some(), "the container still sees the unmounted file systems");
        container.kill();
    });
}

#[test]
fn mirrored_volume_does_not_follow_symlink_that_replaces_parent() {
    pods("mirror-symlink", |pods| {
        let pod = pods.pod();
        let (outside, volume) = (pods.dir().join("outside/settings"), pods.volume(&pod, "configmap", "settings"));
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        fs::write(volume.join("key"), "first").unwrap();
        // With a hostPath volume, an administrator can make the parent directory writable for the container. Even then,
        // the mirrored volume must not follow the container's symbolic link.
        let kinds = volume.parent().unwrap().parent().unwrap();
        let mut config = pod.sh("sleep 100000");
        config["mounts"] = json!([
            { "host_path": volume.to_string_lossy(), "container_path": "/config", "readonly": true },
            { "host_path": kinds.to_string_lossy(), "container_path": "/kinds" },
        ]);
        let container = pod.start(&config);
        assert_eq!(container.sh("cat /config/key"), "first");
        let script = format!(
            "cd /kinds && mv kubernetes.io~configmap moved && ln -s {} kubernetes.io~configmap
             echo second > moved/settings/key; until [ \"$(cat /config/key)\" = second ]; do sleep 0.1; done; ls /config",
            outside.parent().unwrap().display()
        );
        assert_eq!(container.sh(&script), "key");
        container.remove();
    });
}
