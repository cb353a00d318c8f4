//! Fuzzes virtio-fs with FUSE requests. No request may change a file outside the shared directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use husk_vmm::config::{RateLimit, ShareConfig};
use husk_vmm::virtio::device::VirtioDevice;
use husk_vmm::virtio::fs::Fs;
use husk_vmm::virtio::testing::Bench;
use husk_vmm::virtio::testing::fuse::*;

use crate::input::input;
use crate::jail::{Jail, OF_THE_HOST, Only};

const SHARE: &str = "/top/share";
/// Maximum duration of a request. A request must not block, for example to wait for the other end of a FIFO.
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REQUESTS: usize = 48;

const WITH_NAME: [u32; 10] = [LOOKUP, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, CREATE, RENAME2];
const WITH_NODE: [u32; 13] = [
    GETATTR,
    SETATTR,
    READLINK,
    OPEN,
    STATFS,
    SETXATTR,
    GETXATTR,
    LISTXATTR,
    REMOVEXATTR,
    OPENDIR,
    ACCESS,
    SYNCFS,
    TMPFILE,
];
const WITH_HANDLE: [u32; 15] = [
    READ,
    WRITE,
    RELEASE,
    FSYNC,
    FLUSH,
    READDIR,
    RELEASEDIR,
    FSYNCDIR,
    FALLOCATE,
    READDIRPLUS,
    LSEEK,
    COPY_FILE_RANGE,
    GETLK,
    SETLK,
    SETLKW,
];

const TYPES: [u32; 8] = [
    libc::S_IFREG,
    libc::S_IFIFO,
    libc::S_IFSOCK,
    libc::S_IFCHR,
    libc::S_IFBLK,
    libc::S_IFDIR,
    libc::S_IFLNK,
    libc::S_IFMT,
];
/// Names of files that exist in the share, and of files that a request could create there.
const VALID: [&str; 13] =
    ["file", "dir", "hollow", "inner", "fifo", "out", "outfile", "absolute", "new", "other", "...", "outside", "empty"];
/// Absolute paths, all within the jail.
const ABSOLUTE: [&str; 6] = ["/far", "/x", "/top/outside", "/top/empty", "/top/new", "/dev/x"];

#[derive(Arbitrary, Debug)]
enum Name {
    Valid(u8),
    Hostile(u8),
    Absolute(u8),
    Any(Vec<u8>),
}

impl Name {
    fn bytes(&self) -> Vec<u8> {
        let of = |names: &[&str], at: &u8| names[usize::from(*at) % names.len()].as_bytes().to_vec();
        let mut bytes = match self {
            Name::Valid(at) => of(&VALID, at),
            Name::Hostile(at) => of(&HOSTILE_NAMES, at),
            Name::Absolute(at) => of(&ABSOLUTE, at),
            Name::Any(bytes) => bytes.clone(),
        };
        bytes.push(0);
        bytes
    }
}

#[derive(Arbitrary, Debug)]
enum Node {
    Known(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Handle {
    /// A known handle, with the node that was opened.
    Known(u8),
    /// A known handle, with any node.
    Foreign(u8, Node),
    Any(u64, Node),
}

#[derive(Arbitrary, Debug)]
enum Operation {
    WithName {
        which: u8,
        parent: Node,
        names: [Name; 2],
        node: Node,
        mode: (u8, u16),
        word: u32,
        flags: u32,
        extensions: Vec<u8>,
    },
    WithNode {
        which: u8,
        node: Node,
        name: Name,
        flags: u32,
        size: u16,
        owner: (u16, u16),
        handle: Handle,
    },
    WithHandle {
        which: u8,
        handles: [Handle; 2],
        offset: u64,
        size: u16,
        flags: u32,
        data: Vec<u8>,
    },
    Forget(Node, u8),
    BatchForget(Vec<(Node, u8)>),
    Init(u64),
    Destroy,
    Raw {
        opcode: u32,
        node: Node,
        body: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
struct Request {
    operation: Operation,
    user: (u16, u16),
    /// Difference between the length in the header and the correct length.
    len: i8,
    /// Sizes of the buffers for the answer. If `None`, the buffers are large enough for any answer.
    writable: Option<Vec<u16>>,
    /// Whether the request is sent on the high-priority queue, which is for FORGET.
    high_priority: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    two_workers: bool,
    without_init: bool,
    requests: Vec<Request>,
}

/// Returns a 64-bit field of an answer, or 0 if the answer is too short.
fn long_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().expect("convert 8 bytes")))
}

/// Maps the path of each file around the share to the file's metadata, without the access time, and to the file's
/// content.
type Around = BTreeMap<PathBuf, (String, Vec<u8>)>;

fn read_around(path: &Path, around: &mut Around, inodes: &mut BTreeSet<u64>) {
    if path == Path::new(SHARE) || OF_THE_HOST.iter().any(|host| path == Path::new(host)) {
        return;
    }
    let meta = fs::symlink_metadata(path).expect("read the metadata of a file around the share");
    inodes.insert(meta.ino());
    let content = if meta.is_file() { fs::read(path).expect("read a file around the share") } else { Vec::new() };
    let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
    let (mode, owner, links) = (meta.mode(), (meta.uid(), meta.gid()), meta.nlink());
    around.insert(path.into(), (format!("{mode:o} {owner:?} {links} {times:?} {}", meta.len()), content));
    if meta.is_dir() {
        for entry in fs::read_dir(path).expect("read a directory around the share") {
            read_around(&entry.expect("read an entry of a directory around the share").path(), around, inodes);
        }
    }
}

/// Creates the files around the share, once for all inputs.
fn make_surroundings() {
    for directory in ["/top/full", "/top/empty"] {
        fs::create_dir_all(directory).expect("create a directory around the share");
    }
    for file in ["/far", "/top/outside", "/top/full/inner"] {
        fs::write(file, "content").expect("create a file around the share");
    }
}

fn make_share() {
    let share = Path::new(SHARE);
    if share.exists() {
        fs::remove_dir_all(share).expect("remove the share of the previous input");
    }
    for directory in ["dir", "hollow"] {
        fs::create_dir_all(share.join(directory)).expect("create a directory in the share");
    }
    for file in ["file", "dir/inner"] {
        fs::write(share.join(file), "content").expect("create a file in the share");
    }
    for (target, name) in [("..", "out"), ("../outside", "outfile"), ("/top/full", "absolute")] {
        symlink(target, share.join(name)).expect("create a symlink in the share");
    }
}

struct Guest {
    bench: Bench<Fs>,
    unique: u64,
    nodes: Vec<u64>,
    modes: HashMap<u64, u32>,
    handles: Vec<(u64, u64)>,
    inodes: BTreeSet<u64>,
}

impl Guest {
    fn node(&self, node: &Node) -> u64 {
        match node {
            Node::Known(at) => self.nodes[usize::from(*at) % self.nodes.len()],
            Node::Any(node) => *node,
        }
    }

    /// Returns a node and a handle.
    fn handle(&self, handle: &Handle) -> (u64, u64) {
        let known =
            |at: &u8| self.handles.get(usize::from(*at) % self.handles.len().max(1)).copied().unwrap_or((ROOT, 0));
        match handle {
            Handle::Known(at) => known(at),
            Handle::Foreign(at, node) => (self.node(node), known(at).1),
            Handle::Any(handle, node) => (self.node(node), *handle),
        }
    }

    /// Returns the opcode, node and body of a request.
    fn encode(&self, operation: &Operation) -> (u32, u64, Vec<u8>) {
        let of = |opcodes: &[u32], which: &u8| opcodes[usize::from(*which) % opcodes.len()];
        match operation {
            Operation::WithName { which, parent, names: [name, other], node, mode, word, flags, extensions } => {
                let opcode = of(&WITH_NAME, which);
                let mode = TYPES[usize::from(mode.0) % TYPES.len()] | u32::from(mode.1 & 0o7777);
                let mut body = match opcode {
                    MKNOD => words([mode, *word, *flags, 0]),
                    MKDIR => words([mode, *flags]),
                    RENAME | LINK => longs([self.node(node)]),
                    RENAME2 => [longs([self.node(node)]), words([flags % 8, 0])].concat(),
                    CREATE => words([*flags, mode, *word, 0]),
                    _ => Vec::new(),
                };
                body.extend(name.bytes());
                if matches!(opcode, RENAME | RENAME2 | SYMLINK) {
                    body.extend(other.bytes());
                }
                body.extend(extensions);
                (opcode, self.node(parent), body)
            }
            Operation::WithNode { which, node, name, flags, size, owner, handle } => {
                let opcode = of(&WITH_NODE, which);
                let value = vec![b'v'; usize::from(size % 64)];
                let body = match opcode {
                    SETATTR => {
                        let (user, group) = (u32::from(owner.0), u32::from(owner.1));
                        let start = [words([*flags, 0]), longs([self.handle(handle).1, u64::from(*size), 0, 1, 1, 1])];
                        [start.concat(), words([1, 1, 1, u32::from(owner.0), 0, user, group, 0])].concat()
                    }
                    SETXATTR => {
                        let name = [b"user.", name.bytes().as_slice()].concat();
                        [words([value.len() as u32, flags % 4, 0, 0]), name, value].concat()
                    }
                    GETXATTR => [words([u32::from(*size), 0]), b"user.".to_vec(), name.bytes()].concat(),
                    REMOVEXATTR => [b"user.".to_vec(), name.bytes()].concat(),
                    LISTXATTR => words([u32::from(*size), 0]),
                    _ => words([*flags, 0, 0, 0]),
                };
                (opcode, self.node(node), body)
            }
            Operation::WithHandle { which, handles: [handle, other], offset, size, flags, data } => {
                let opcode = of(&WITH_HANDLE, which);
                let (node, handle) = self.handle(handle);
                let other = self.handle(other);
                let size = u32::from(*size);
                let body = match opcode {
                    READ | READDIR | READDIRPLUS => {
                        [longs([handle, *offset]), words([size, 0, 0, 0, *flags, 0])].concat()
                    }
                    WRITE => {
                        let start = [longs([handle, *offset]), words([data.len() as u32, flags % 8, 0, 0, *flags, 0])];
                        [start.concat(), data.clone()].concat()
                    }
                    FALLOCATE => [longs([handle, *offset, u64::from(size)]), words([flags % 128, 0])].concat(),
                    LSEEK => [longs([handle, *offset]), words([flags % 8, 0])].concat(),
                    GETLK | SETLK | SETLKW => {
                        // Few owners and short ranges, so that locks conflict.
                        let range =
                            longs([u64::from(flags >> 8 & 3), *offset, offset.saturating_add(u64::from(size % 16))]);
                        let open_file = (flags & 8) << 28;
                        [longs([handle]), range, words([flags & 3, 1, flags >> 2 & 1 | open_file, 0])].concat()
                    }
                    COPY_FILE_RANGE => longs([handle, *offset, other.0, other.1, u64::from(size), u64::from(size), 0]),
                    _ => longs([handle, u64::from(*flags), *offset]),
                };
                (opcode, node, body)
            }
            Operation::Forget(node, count) => (FORGET, self.node(node), longs([u64::from(*count)])),
            Operation::BatchForget(nodes) => {
                let mut body = words([nodes.len() as u32, 0]);
                body.extend(nodes.iter().flat_map(|(node, count)| longs([self.node(node), u64::from(*count)])));
                (BATCH_FORGET, 0, body)
            }
            Operation::Init(flags) => (INIT, 0, init(*flags)),
            Operation::Destroy => (DESTROY, 0, Vec::new()),
            Operation::Raw { opcode, node, body } => (*opcode, self.node(node), body.clone()),
        }
    }

    fn send(&mut self, request: &Request) {
        let (opcode, node, mut body) = self.encode(&request.operation);
        body.truncate(64 * 1024);
        self.unique += 1;
        let len = (40 + body.len() as u32).wrapping_add_signed(i32::from(request.len));
        let ids = words([u32::from(request.user.0), u32::from(request.user.1), 1, 0]);
        let header = [words([len, opcode]), longs([self.unique, node]), ids].concat();
        let unanswered = matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | DESTROY);
        let writable: Vec<usize> = match &request.writable {
            Some(lengths) => lengths.iter().take(4).map(|&len| usize::from(len)).collect(),
            None if unanswered => Vec::new(),
            None => vec![16, 66_000],
        };
        let queue = usize::from(!request.high_priority);
        self.bench.queues[queue].add(&[&header, &body], &writable);
        if request.high_priority {
            self.bench.run();
        }
        // Nothing releases the conflicting lock. Therefore the request would wait forever.
        if opcode == SETLKW && !request.high_priority {
            self.interrupt();
        }
        let answer = self.answer(queue, opcode);
        assert!(
            !request.high_priority || answer.len() <= 16,
            "the high-priority queue returned data for request {opcode}"
        );
        if unanswered || long_at(&answer, 4) as u32 != 0 || answer.len() < 24 {
            return;
        }
        self.learn(opcode, node, &answer[16..]);
    }

    /// Sends INTERRUPT for the last request.
    fn interrupt(&mut self) {
        let header = [words([48, INTERRUPT]), longs([self.unique | 1 << 63, 0]), words([0, 0, 0, 0])].concat();
        self.bench.queues[0].add(&[&header, &self.unique.to_le_bytes()], &[]);
        self.bench.run();
        self.answer(0, INTERRUPT);
    }

    fn answer(&mut self, queue: usize, opcode: u32) -> Vec<u8> {
        let start = Instant::now();
        loop {
            if let Some((_, answer)) = self.bench.queues[queue].poll() {
                return answer;
            }
            assert!(start.elapsed() < TIMEOUT, "request {opcode} was not answered within {TIMEOUT:?}");
            std::thread::yield_now();
        }
    }

    /// Remembers the nodes and handles of an answer.
    fn learn(&mut self, opcode: u32, node: u64, answer: &[u8]) {
        let entry = matches!(opcode, LOOKUP | SYMLINK | MKNOD | MKDIR | LINK | CREATE | TMPFILE) && answer.len() >= 128;
        let mut opened = matches!(opcode, OPEN | OPENDIR).then(|| (node, long_at(answer, 0)));
        if entry {
            // In a `struct fuse_entry_out`, the `struct fuse_attr` begins at byte 40.
            let (node, inode, mode) = (long_at(answer, 0), long_at(answer, 40), long_at(answer, 100) as u32);
            assert!(!self.inodes.contains(&inode), "request {opcode} returned node {node}, which is outside the share");
            self.nodes.push(node);
            self.modes.insert(node, mode & libc::S_IFMT);
            opened = (matches!(opcode, CREATE | TMPFILE) && answer.len() >= 136).then(|| (node, long_at(answer, 128)));
        }
        if let Some((node, handle)) = opened {
            let mode = self.modes.get(&node).copied().unwrap_or(libc::S_IFDIR);
            assert!(matches!(mode, libc::S_IFREG | libc::S_IFDIR), "request {opcode} opened a file of type {mode:o}");
            self.handles.push((node, handle));
        }
    }
}

fn init(flags: u64) -> Vec<u8> {
    // The virtio-fs server rejects clients that do not offer FUSE_SUBMOUNTS (bit 27).
    let mut body = words([7, 36, 65536, flags as u32 | 1 << 27, (flags >> 32) as u32]);
    body.resize(64, 0);
    body
}

fn serve(input: Input) {
    make_share();
    let (mut before, mut inodes) = Default::default();
    read_around(Path::new("/"), &mut before, &mut inodes);
    let workers = 1 + u8::from(input.two_workers);
    let share = ShareConfig {
        tag: "fuzz".into(),
        root: SHARE.into(),
        workers,
        volume_cache_ms: 1000,
        rate_limit: RateLimit::default(),
    };
    let mut bench = Bench::new(
        Fs::new(&share, husk_vmm::jail::Belongings::without_jail().expect("open /proc/self/fd and /dev/null"), || {})
            .expect("create the device"),
    );
    bench.activate(0);
    let mut guest = Guest { bench, unique: 0, nodes: vec![ROOT], modes: HashMap::new(), handles: Vec::new(), inodes };
    if !input.without_init {
        let operation = Operation::Init(u64::MAX);
        guest.send(&Request { operation, user: (0, 0), len: 0, writable: None, high_priority: false });
    }
    for request in input.requests.iter().take(MAX_REQUESTS) {
        guest.send(request);
    }
    guest.bench.lock().reset();
    let (mut after, mut inodes) = Default::default();
    read_around(Path::new("/"), &mut after, &mut inodes);
    if before != after {
        let old = before.iter().filter(|(path, old)| after.get(*path) != Some(old)).collect::<Vec<_>>();
        let new = after.iter().filter(|(path, new)| before.get(*path) != Some(new)).collect::<Vec<_>>();
        panic!("files around the share changed from {old:?} to {new:?}");
    }
}

static JAIL: Only<Input> = Only::new();

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    JAIL.get_or_init(|| Jail::new(make_surroundings, |(), input| serve(input))).run(input);
}
