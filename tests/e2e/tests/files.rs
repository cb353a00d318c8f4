//! File system semantics of a pod's volume: attributes, locks, mmap, sparse files, fifos, sockets, and files without a
//! name.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use husk_e2e::PYTHON;
use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::disk::Disk;
use serde_json::json;

/// Tries the file operations that databases and package managers use, in `/volume`.
const FILES: &str = r#"
import fcntl, mmap, os, stat, struct, threading, time
begun = time.monotonic()
os.chdir("/volume")
def done(what): print("ok", what, round(time.monotonic() - begun, 1), flush=True)

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

/// Creates files without a name in `/volume` and in the root file system, and links them.
const UNNAMED: &str = r#"
import errno, mmap, os, time
open_files = os.open("/proc/self/fd", os.O_RDONLY)
def link(fd, name): os.link(str(fd), name, src_dir_fd=open_files, follow_symlinks=True)
os.mkdir("/own")
for place in ("/volume", "/own"):
    os.chdir(place); os.umask(0o027)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666)
    os.write(fd, b"no name" + bytes(4089)); os.fsync(fd); os.setxattr(fd, "user.husk", b"value")
    assert os.fstat(fd).st_nlink == 0 and os.listdir(".") == []
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY); assert os.pread(again, 7, 0) == b"no name"
    link(fd, "linked")
    shared = mmap.mmap(fd, 4096)
    # The guest caches a name for a second. The second check looks the name up again.
    for text in (b"cached", b"looked up"):
        shared[:len(text)] = text
        with open("linked", "rb") as f: assert f.read(len(text)) == text, (place, text)
        assert os.path.samestat(os.fstat(fd), os.stat("linked"))
        time.sleep(2)
    shared.flush()
    link(fd, "twice"); s = os.stat("twice")
    assert (s.st_nlink, s.st_mode & 0o7777, os.getxattr("twice", "user.husk")) == (2, 0o640, b"value"), s
    open("new", "w").close(); os.rename("new", "twice"); assert os.fstat(fd).st_nlink == 1
    excluded = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_EXCL, 0o600)
    try: link(excluded, "excluded"); raise SystemExit("linked in spite of O_EXCL")
    except FileNotFoundError: pass
    lost = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o600); os.write(lost, b"lost"); os.close(lost)
    assert sorted(os.listdir(".")) == ["linked", "twice"]
    print("ok", place, flush=True)
fd = os.open("/own", os.O_TMPFILE | os.O_RDWR, 0o600)
try: link(fd, "/volume/other"); raise SystemExit("linked to another file system")
except OSError as e: assert e.errno == errno.EXDEV, e
print("ok end", flush=True)
"#;

#[test]
fn files_without_a_name_are_linked() {
    need_image(PYTHON);
    pods("cri-unnamed", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(&volume).unwrap();
        let pod = pods.pod();
        let mut config = pod.python(UNNAMED);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume" }]);
        let container = pod.start(&config);
        let (code, _) = container.wait();
        assert_eq!(code, 0, "{}", container.log());
        assert_eq!(container.log().matches(" ok ").count(), 3, "{}", container.log());
        let linked = fs::read(volume.join("linked")).unwrap();
        assert!(linked.starts_with(b"looked up") && linked.len() == 4096, "{linked:?}");
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 2);
    });
}

/// Writes a sparse file in `/volume`, and prints the extents that FIEMAP reports.
const EXTENTS: &str = r#"
import fcntl, mmap, os, struct
def extents(fd, start=0, length=(1 << 64) - 1, count=32, flags=1):
    request = bytearray(struct.pack("=QQIIII", start, length, flags, 0, count, 0) + bytes(56 * count))
    fcntl.ioctl(fd, 0xc020660b, request)
    mapped = struct.unpack_from("=I", request, 20)[0]
    found = []
    for at in range(32, len(request), 56)[:mapped]:
        logical, _, size = struct.unpack_from("=QQQ", request, at)
        if found and sum(found[-1]) == logical: found[-1] = (found[-1][0], found[-1][1] + size)
        else: found.append((logical, size))
    last = mapped and count and struct.unpack_from("=I", request, 32 + 56 * (mapped - 1) + 40)[0] & 1
    return found, bool(last), mapped
fd = os.open("/volume/sparse", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4 << 20)
os.pwrite(fd, b"x" * 4096, 0); os.pwrite(fd, b"x" * 8192, 1 << 20)
m = mmap.mmap(fd, 4 << 20); m[2 << 20] = 1
found, last, mapped = extents(fd)
print("extents", found, last, flush=True)
assert extents(fd, count=0)[2] == mapped and extents(fd, start=1 << 20, length=4096)[0][0][0] == 1 << 20
assert extents(fd, start=3 << 20) == ([], False, 0) and not extents(fd, count=1)[1]
try: extents(fd, flags=1 << 30); raise SystemExit("an unknown flag is accepted")
except OSError as e: assert e.errno == 53, e
"#;

/// The header of `struct fiemap` and its extents (include/uapi/linux/fiemap.h).
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; 32],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

// The size in the number of the request does not include the extents.
nix::ioctl_readwrite_bad! {
    /// Returns the extents of a file.
    fs_ioc_fiemap, nix::request_code_readwrite!(b'f', 11, 32), Fiemap
}

/// Returns the ranges of a file that the node's file system stores.
fn extents_on_node(path: &Path) -> Vec<(u64, u64)> {
    let extents = [Extent::default(); 32];
    let mut request = Fiemap { start: 0, length: u64::MAX, flags: 1, mapped: 0, count: 32, reserved: 0, extents };
    let file = File::open(path).unwrap();
    // SAFETY: `request` has space for the number of extents that `count` says.
    unsafe { fs_ioc_fiemap(file.as_raw_fd(), &mut request) }.unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for extent in &request.extents[..request.mapped as usize] {
        match found.last_mut() {
            Some((start, length)) if *start + *length == extent.logical => *length += extent.length,
            _ => found.push((extent.logical, extent.length)),
        }
    }
    found
}

#[test]
fn extents_of_a_sparse_file_are_those_of_the_node() {
    need_image(PYTHON);
    pods("cri-extents", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 64);
        let (volume, pod) = (pods.dir().join("volume"), pods.pod());
        let _mounted = disk.format().mount(&volume, "defaults");
        let mut config = pod.python(EXTENTS);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume" }]);
        let container = pod.start(&config);
        assert_eq!(container.wait().0, 0, "{}", container.log());
        let expected = vec![(0, 4096), (1 << 20, 8192), (2 << 20, 4096)];
        assert_eq!(extents_on_node(&volume.join("sparse")), expected);
        let line = format!("extents {expected:?} True");
        assert!(container.log().contains(&line), "{line} is missing:\n{}", container.log());
    });
}

#[test]
fn volume_has_posix_file_semantics() {
    need_image(PYTHON);
    pods("cri-files", |pods| {
        let volume = pods.dir().join("volume");
        fs::create_dir_all(&volume).unwrap();
        let pod = pods.pod();
        let mut config = pod.python(FILES);
        config["mounts"] = json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume" }]);
        let container = pod.start(&config);
        let (code, _) = container.wait();
        assert_eq!(code, 0, "{}", container.log());
        assert_eq!(container.log().matches(" ok ").count(), 9, "{}", container.log());
        // The node sees the files that the pod created.
        let meta = fs::metadata(volume.join("a")).unwrap();
        assert_eq!((std::os::unix::fs::MetadataExt::uid(&meta), meta.permissions().mode() & 0o7777), (1234, 0o4751));
        assert_eq!(fs::read_to_string(volume.join("old")).unwrap(), "new");
    });
}
