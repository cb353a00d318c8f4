//! Memory volumes and huge pages. The guest charges and limits this memory as a host with runc does.

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

/// An emptyDir, mounted as the kubelet mounts it. Dropping this value unmounts the emptyDir.
struct Volume(PathBuf);

impl Volume {
    fn new(pods: &Pods, name: &str, kind: &str, data: &str) -> Self {
        let path = pods.dir().join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        mount(Some(kind), &path, Some(kind), MsFlags::empty(), Some(data)).unwrap();
        // The kubelet sets this group and mode for a pod with an fsGroup.
        chown(&path, None, Some(2000)).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o2777)).unwrap();
        Self(path)
    }

    /// Returns the CRI mounts of a container that has the volume, or `path`, at `/data`.
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
fn memory_volume_is_charged_to_the_container_and_absent_on_the_node() {
    pods("cri-in-memory", |pods| {
        let volume = Volume::new(pods, "cache", "tmpfs", "size=96m");
        // Creates a subPath as the kubelet does, by a bind mount of a directory of the volume.
        let directory = volume.0.join("part");
        fs::create_dir(&directory).unwrap();
        chown(&directory, Some(1234), Some(2000)).unwrap();
        let sub_path = pods.dir().join("volume-subpaths/cache/web/0");
        fs::create_dir_all(&sub_path).unwrap();
        mount(Some(&directory), &sub_path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let pod = pods.pod();
        let with = |mounts: Value, limit: u64| {
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["mounts"] = mounts;
            config["linux"]["resources"] = json!({ "memory_limit_in_bytes": limit * MIB });
            pod.start(&config)
        };
        let (full_volume, sub) = (with(volume.at(None), 256), with(volume.at(Some(&sub_path)), 32));
        assert_eq!(full_volume.sh("stat -c '%a %u:%g' /data; stat -f -c %T /data"), "2777 0:2000\ntmpfs");
        assert_eq!(full_volume.sh("df -m /data | awk 'END {print $2}'"), "96");
        // Both containers share one volume. The directory of the subPath has the same owner as on the node.
        assert_eq!(sub.sh("stat -c '%u:%g' /data; echo one > /data/file"), "1234:2000");
        assert_eq!(full_volume.sh("cat /data/part/file; ln -s / /data/out"), "one");
        let memory = |file: &str| format!("awk '/^{file} / {{print int($2 / 1048576)}}' /sys/fs/cgroup/memory.stat");
        full_volume.sh("dd if=/dev/zero of=/data/large bs=1M count=64 2> /dev/null");
        let counted = full_volume.sh(&memory("shmem"));
        assert!(
            (64..70).contains(&counted.parse::<u64>().unwrap()),
            "{counted} MiB of shmem are charged to the container, expected 64 to 70 MiB"
        );
        let full = full_volume.exec(&["sh", "-c", "dd if=/dev/zero of=/data/more bs=1M count=64; rm /data/more"]);
        assert!(full.err.contains("No space left"), "{full:?}");
        // A container that exceeds its memory limit is killed. The pod and its VM stay.
        sub.exec(&["sh", "-c", "dd if=/dev/zero of=/data/mine bs=1M count=40"]);
        let ended = sub.try_exec(&["true"]);
        let written = full_volume.sh("cat /data/part/mine | wc -c").parse::<u64>().unwrap();
        assert!(written < 33 * MIB, "a container with a limit of 32 MiB wrote {written} bytes");
        assert!(pod.is_ready(), "the pod is not ready after the OOM kill: {ended:?}");
        // The data stays available to the next container, and is never on the node.
        full_volume.stop(0);
        full_volume.remove();
        let next = with(volume.at(None), 256);
        assert_eq!(next.sh("cat /data/part/file; wc -c < /data/large"), "one\n67108864");
        assert!(!volume.0.join("large").exists());
        pod.stop();
        umount2(&sub_path, MntFlags::MNT_DETACH).unwrap();
    });
}

/// Uses 8 MiB of huge pages through a file and 4 MiB as anonymous memory, prints the usage, and then sleeps.
const USE_HUGE_PAGES: &str = r#"
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
    print("more than available")
except OSError as error:
    print("no more", error.errno, flush=True)
print("ready", flush=True)
time.sleep(100000)
"#;

/// Reads the data that the other container has written, and then uses an anonymous huge page.
const READ_SHARED_PAGES: &str = r#"
import mmap, os
fd = os.open("/data/file", os.O_RDWR)
print("seen", mmap.mmap(fd, 8 << 20)[(8 << 20) - 1:], flush=True)
own = mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
own[:1] = b"z"
print("taken", flush=True)
"#;

fn free_pages() -> u64 {
    fs::read_to_string(format!("{POOL}/free_hugepages")).unwrap().trim().parse().unwrap()
}

/// The node's pool of huge pages. Dropping this value empties the pool.
struct Pool;

impl Pool {
    fn reserve(pages: u64) -> Self {
        fs::write(format!("{POOL}/nr_hugepages"), pages.to_string()).unwrap();
        assert_eq!(free_pages(), pages, "the node cannot reserve {pages} huge pages");
        Self
    }

    /// Waits until the pods have returned their huge pages and `pages` huge pages are free.
    #[track_caller]
    fn wait_for(&self, pages: u64) {
        let back = node::eventually(Duration::from_secs(20), || (free_pages() == pages).then_some(()));
        assert!(back.is_some(), "{} huge pages are free, expected {pages}", free_pages());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(format!("{POOL}/nr_hugepages"), "0");
    }
}

#[test]
fn pod_takes_huge_pages_from_the_pool_of_the_node_and_returns_them() {
    need_image(PYTHON);
    let pool = Pool::reserve(16);
    pods("cri-huge", |pods| {
        let volume = Volume::new(pods, "huge", "hugetlbfs", "pagesize=2M");
        // Like the kubelet, the test creates the pod's cgroup before the pod. The test sets the huge page limit in this
        // cgroup, because containerd drops the containers' huge page limits by default.
        let config = pods.config();
        let pod_cgroup =
            PathBuf::from("/sys/fs/cgroup").join(text(&config["linux"]["cgroup_parent"]).trim_start_matches('/'));
        fs::create_dir_all(&pod_cgroup).unwrap();
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+hugetlb").unwrap();
        fs::write("/sys/fs/cgroup/kubepods/cgroup.subtree_control", "+hugetlb").unwrap();
        fs::write(pod_cgroup.join("hugetlb.2MB.max"), (16 * MIB).to_string()).unwrap();
        let pod = pods.run(config);
        let config = |program: &str| {
            let mut config = pod.python(program);
            config["mounts"] = volume.at(None);
            config["linux"]["resources"] = json!({
                "memory_limit_in_bytes": 128 * MIB, "hugepage_limits": [{ "page_size": "2MB", "limit": 16 * MIB }],
            });
            config
        };
        let user = pod.start(&config(USE_HUGE_PAGES));
        user.wait_for("ready");
        assert!(user.log().contains(&format!("used {}", 12 * MIB)), "{}", user.log());
        assert!(user.log().contains("no more 12"), "{}", user.log());
        // The pod has taken as many huge pages from the node's pool as the pod's limit allows.
        assert_eq!(free_pages(), 8);
        let reader = pod.start(&config(READ_SHARED_PAGES));
        assert_eq!(reader.wait().0, 0, "{}", reader.log());
        assert!(reader.log().contains("seen b'x'"), "{}", reader.log());
        pod.stop();
        pool.wait_for(16);
    });
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn guest_has_as_many_huge_pages_as_the_limit_of_its_container_allows() {
    node::need_image(PYTHON);
    let pool = Pool::reserve(8);
    case("huge", |case| {
        let run = |script: &str, size: &str, mib: u64| {
            case.with_spec(script, |spec| {
                spec["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": size, "limit": mib * MIB }]);
                let options = json!(["pagesize=2M"]);
                let mount =
                    json!({ "destination": "/huge", "type": "hugetlbfs", "source": "none", "options": options });
                spec::push(spec, "", "mounts", mount);
                spec::mount_cgroup(spec);
            })
            .output()
        };
        let seen = "cat /sys/fs/cgroup/hugetlb.2MB.max; awk '/HugePages_Total/ {print $2}' /proc/meminfo";
        run(seen, "2MB", 8).expect_clean().expect_out("8388608\n4\n");
        run(seen, "2MB", 0).expect_clean().expect_out("0\n0\n");
        run("true", "2MB", 64).expect_error(&["64 MiB of 2 MiB huge pages: the node has 16 MiB available"]);
        run("true", "1GB", 1024).expect_error(&["huge pages of 1GB"]);
    });
    pool.wait_for(8);
}
