//! A pod's volumes in memory and of huge pages: the guest's own, counted and limited as under runc.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_e2e::cri::Pods;
use husk_e2e::cri::pod::{need_image, pods, text};
use husk_e2e::{PYTHON, case, node, spec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// An emptyDir as the kubelet mounts it, for as long as this lives.
struct Volume(PathBuf);

impl Volume {
    fn new(pods: &Pods, name: &str, kind: &str, data: &str) -> Self {
        let path = pods.dir().join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        mount(Some(kind), &path, Some(kind), MsFlags::empty(), Some(data)).unwrap();
        // A pod with an fsGroup.
        chown(&path, None, Some(2000)).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o2777)).unwrap();
        Self(path)
    }

    /// A container's mount of it, or of whatever else is at `path`.
    fn at(&self, path: Option<&Path>) -> Value {
        json!([{ "host_path": path.unwrap_or(&self.0).to_string_lossy(), "container_path": "/data" }])
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_volume_in_memory_is_the_pods_own() {
    pods("cri-in-memory", |pods| {
        let volume = Volume::new(pods, "cache", "tmpfs", "size=96m");
        // A subPath, as the kubelet makes it: a directory of the volume, bound aside.
        let part = volume.0.join("part");
        fs::create_dir(&part).unwrap();
        chown(&part, Some(1234), Some(2000)).unwrap();
        let aside = pods.dir().join("volume-subpaths/cache/web/0");
        fs::create_dir_all(&aside).unwrap();
        mount(Some(&part), &aside, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let pod = pods.pod();
        let with = |mounts: Value, limit: u64| {
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["mounts"] = mounts;
            config["linux"]["resources"] = json!({ "memory_limit_in_bytes": limit * MIB });
            pod.start(&config)
        };
        let (whole, sub) = (with(volume.at(None), 256), with(volume.at(Some(&aside)), 32));
        assert_eq!(whole.sh("stat -c '%a %u:%g' /data; stat -f -c %T /data"), "2777 0:2000\ntmpfs");
        assert_eq!(whole.sh("df -m /data | awk 'END {print $2}'"), "96");
        // One volume for both, with what the host's directory is like.
        assert_eq!(sub.sh("stat -c '%u:%g' /data; echo one > /data/file"), "1234:2000");
        assert_eq!(whole.sh("cat /data/part/file; ln -s / /data/out"), "one");
        let memory = |file: &str| format!("awk '/^{file} / {{print int($2 / 1048576)}}' /sys/fs/cgroup/memory.stat");
        whole.sh("dd if=/dev/zero of=/data/large bs=1M count=64 2> /dev/null");
        let counted = whole.sh(&memory("shmem"));
        assert!((64..70).contains(&counted.parse::<u64>().unwrap()), "{counted} MiB are the container's");
        let full = whole.exec(&["sh", "-c", "dd if=/dev/zero of=/data/more bs=1M count=64; rm /data/more"]);
        assert!(full.err.contains("No space left"), "{full:?}");
        // The limit is the container's: at its end it is killed, and neither the pod nor its machine.
        sub.exec(&["sh", "-c", "dd if=/dev/zero of=/data/mine bs=1M count=40"]);
        let ended = sub.try_exec(&["true"]);
        let killed = whole.sh("cat /data/part/mine | wc -c").parse::<u64>().unwrap();
        assert!(killed < 33 * MIB, "{killed} bytes of a container with 32 MiB");
        assert!(pod.is_ready(), "{ended:?}");
        // What is there stays for the next container, and nothing of it is on the node.
        whole.stop(0);
        whole.remove();
        let next = with(volume.at(None), 256);
        assert_eq!(next.sh("cat /data/part/file; wc -c < /data/large"), "one\n67108864");
        assert!(!volume.0.join("large").exists());
        pod.stop();
        umount2(&aside, MntFlags::MNT_DETACH).unwrap();
    });
}

/// Uses 8 MiB of huge pages by a file and 4 without one, and tells; then it waits.
const USE: &str = r#"
import mmap, os, time
fd = os.open("/data/file", os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 8 << 20)
shared = mmap.mmap(fd, 8 << 20)
shared[:] = b"x" * (8 << 20)
MAP_HUGETLB = 0x40000
anonymous = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
anonymous[:] = b"y" * (4 << 20)
print("used", open("/sys/fs/cgroup/hugetlb.2MB.current").read(), flush=True)
try:
    mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    print("more than there are")
except OSError as error:
    print("no more", error.errno, flush=True)
print("ready", flush=True)
time.sleep(100000)
"#;

/// Sees what the other container wrote, and gets none of its own.
const LOOK: &str = r#"
import mmap, os
fd = os.open("/data/file", os.O_RDWR)
print("seen", mmap.mmap(fd, 8 << 20)[(8 << 20) - 1:], flush=True)
own = mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
own[:1] = b"z"
print("taken", flush=True)
"#;

fn free() -> u64 {
    fs::read_to_string(format!("{POOL}/free_hugepages")).unwrap().trim().parse().unwrap()
}

/// The node's pool, as long as this lives.
struct Pool;

impl Pool {
    fn of(pages: u64) -> Self {
        fs::write(format!("{POOL}/nr_hugepages"), pages.to_string()).unwrap();
        assert_eq!(free(), pages, "the node has no {pages} huge pages");
        Self
    }

    /// Everybody has given back what he had.
    #[track_caller]
    fn wait_for(&self, pages: u64) {
        let back = node::eventually(Duration::from_secs(20), || (free() == pages).then_some(()));
        assert!(back.is_some(), "{} huge pages are free", free());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(format!("{POOL}/nr_hugepages"), "0");
    }
}

#[test]
fn huge_pages_of_a_pod_are_the_nodes() {
    need_image(PYTHON);
    let pool = Pool::of(16);
    pods("cri-huge", |pods| {
        let volume = Volume::new(pods, "huge", "hugetlbfs", "pagesize=2M");
        // The pod's cgroup, as the kubelet makes it before the pod: containerd drops the containers' limits by default.
        let config = pods.config();
        let above =
            PathBuf::from("/sys/fs/cgroup").join(text(&config["linux"]["cgroup_parent"]).trim_start_matches('/'));
        fs::create_dir_all(&above).unwrap();
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+hugetlb").unwrap();
        fs::write("/sys/fs/cgroup/kubepods/cgroup.subtree_control", "+hugetlb").unwrap();
        fs::write(above.join("hugetlb.2MB.max"), (16 * MIB).to_string()).unwrap();
        let pod = pods.run(config);
        let config = |program: &str| {
            let mut config = pod.python(program);
            config["mounts"] = volume.at(None);
            config["linux"]["resources"] = json!({
                "memory_limit_in_bytes": 128 * MIB, "hugepage_limits": [{ "page_size": "2MB", "limit": 16 * MIB }],
            });
            config
        };
        let using = pod.start(&config(USE));
        using.wait_for("ready");
        assert!(using.log().contains(&format!("used {}", 12 * MIB)), "{}", using.log());
        assert!(using.log().contains("no more 12"), "{}", using.log());
        // The node's own pages, as many as were asked for.
        assert_eq!(free(), 8);
        let looking = pod.start(&config(LOOK));
        assert_eq!(looking.wait().0, 0, "{}", looking.log());
        assert!(looking.log().contains("seen b'x'"), "{}", looking.log());
        pod.stop();
        pool.wait_for(16);
    });
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn huge_pages_of_a_container_are_limited() {
    node::need_image(PYTHON);
    let pool = Pool::of(8);
    case("huge", |case| {
        let run = |script: &str, size: &str, mib: u64| {
            case.with_spec(script, |spec| {
                spec["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": size, "limit": mib * MIB }]);
                let options = json!(["pagesize=2M"]);
                let mount =
                    json!({ "destination": "/huge", "type": "hugetlbfs", "source": "none", "options": options });
                spec::push(spec, "", "mounts", mount);
                spec::show_cgroup(spec);
            })
            .output()
        };
        let seen = "cat /sys/fs/cgroup/hugetlb.2MB.max; awk '/HugePages_Total/ {print $2}' /proc/meminfo";
        run(seen, "2MB", 8).expect_clean().expect_out("8388608\n4\n");
        run(seen, "2MB", 0).expect_clean().expect_out("0\n0\n");
        run("true", "2MB", 64).expect_error(&["64 MiB of huge pages of 2 MiB: the node has 16 MiB available"]);
        run("true", "1GB", 1024).expect_error(&["huge pages of 1GB"]);
    });
    pool.wait_for(8);
}
