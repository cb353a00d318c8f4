//! The files that the guest has created without a name (O_TMPFILE). virtiofsd finds a file only by a name in a
//! directory. Therefore, these files have nodes and handles of their own, whose numbers virtiofsd never reaches.
//!
//! A file can get a name later (linkat(2)). virtiofsd then has a node for the file, too, but the guest must have one
//! node for one file: the kernel caches data and locks by node, and overlayfs in the guest reports ESTALE if a name
//! leads to another node. Therefore, the file keeps its own node until the guest forgets the node, and virtiofsd's node
//! is its `alias`, which the guest never sees.

mod file;

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_base::sync::lock;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::linkat;
use virtiofsd::filesystem::{Context, Entry, OpenOptions};
use virtiofsd::oslib::ScopedUmask;
use virtiofsd::passthrough::credentials::{UnixCredentials, drop_effective_cap};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::soft_idmap::{HostGid, HostUid, Id};

use super::fd_budget::{CountedFile, FdBudget};
use super::ids::{Handle, Inode};

/// Bit of the numbers of these nodes and handles. virtiofsd counts its own numbers up from 1.
const BIT: u64 = 1 << 63;
/// The flags of open(2) that a new file can have. O_APPEND comes with each WRITE, and O_DIRECT is ignored, as in
/// virtiofsd.
const CREATE_FLAGS: i32 = libc::O_ACCMODE | libc::O_EXCL | libc::O_SYNC;
/// The flags of open(2) that are ignored, as in virtiofsd.
const IGNORED_FLAGS: i32 = libc::O_APPEND | libc::O_NOATIME | libc::O_DIRECT | libc::O_NOFOLLOW;

/// Returns whether a number is the node or handle of a temporary file.
pub fn is_temporary(number: u64) -> bool {
    number & BIT != 0
}

/// The temporary files of a share.
pub struct TemporaryFiles {
    state: Mutex<State>,
    /// Number of aliases.
    aliases: AtomicUsize,
    last_number: AtomicU64,
    budget: Arc<FdBudget>,
    /// The open directory /proc/self/fd.
    fd_directory: File,
    xattrs: XattrMap,
    /// Whether the guest uses POSIX ACLs. The guest then leaves the umask to the host.
    posix_acl: AtomicBool,
}

#[derive(Default)]
struct State {
    nodes: HashMap<Inode, Known>,
    handles: HashMap<Handle, Arc<OpenFile>>,
    /// The nodes of the files that have got a name, by virtiofsd's nodes.
    by_alias: HashMap<Inode, Inode>,
}

/// A node that the guest has not forgotten.
struct Known {
    node: Arc<Node>,
    /// Number of answers with this node that the guest has not forgotten.
    lookups: u64,
    /// virtiofsd's node, with one reference.
    alias: Option<Inode>,
}

/// A node on the file system of a temporary file.
pub enum Relative {
    /// virtiofsd's node of the file.
    Alias(Inode),
    /// The guest's node of the directory in which it has created the file. The guest's kernel keeps this directory as
    /// long as the file has no name.
    Parent(Inode),
}

/// A temporary file.
pub struct Node {
    /// An O_PATH fd, which permits no access to the data, and does not count as a writer.
    path: CountedFile,
    /// The guest's node of the directory in which it has created the file.
    parent: Inode,
}

/// An open temporary file.
pub struct OpenFile {
    inode: Inode,
    file: CountedFile,
}

impl Node {
    /// Returns whether a file of virtiofsd's is this file.
    pub fn is(&self, other: &File) -> io::Result<bool> {
        let (own, other) = (self.path.metadata()?, other.metadata()?);
        Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
    }
}

impl OpenFile {
    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn bad_number() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

impl TemporaryFiles {
    /// Creates an empty table. `fd_directory` is /proc/self/fd.
    pub fn new(budget: Arc<FdBudget>, fd_directory: File, xattrs: XattrMap) -> Self {
        Self {
            state: Mutex::default(),
            aliases: AtomicUsize::new(0),
            last_number: AtomicU64::new(0),
            budget,
            fd_directory,
            xattrs,
            posix_acl: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn new_number(&self) -> u64 {
        BIT | self.last_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Begins a connection of a guest.
    pub fn init(&self, posix_acl: bool) {
        self.clear();
        self.posix_acl.store(posix_acl, Ordering::Relaxed);
    }

    /// Forgets all nodes and closes all files. The caller has dropped all of virtiofsd's nodes.
    pub fn clear(&self) {
        let files = {
            let mut state = self.lock();
            self.aliases.store(0, Ordering::Release);
            std::mem::take(&mut *state)
        };
        // Close the files without the lock.
        drop(files);
    }

    /// Creates a file without a name in a directory, as the user of the request. As in virtiofsd's CREATE, the thread
    /// keeps its capabilities. Therefore, the groups of the user need not be set.
    pub fn create(
        &self,
        ctx: Context,
        parent: Inode,
        directory: &File,
        mode: u32,
        flags: u32,
        umask: u32,
    ) -> io::Result<(Entry, Handle)> {
        let flags = flags.cast_signed() & CREATE_FLAGS | libc::O_TMPFILE | libc::O_CLOEXEC;
        let file = {
            let (uid, gid) = (HostUid::from(ctx.uid.into_inner()), HostGid::from(ctx.gid.into_inner()));
            let _user = UnixCredentials::new(uid, gid).set()?;
            let _umask = self.posix_acl.load(Ordering::Relaxed).then(|| ScopedUmask::new(umask));
            openat(directory, c".", OFlag::from_bits_retain(flags), Mode::from_bits_truncate(mode))?
        };
        let file = self.budget.count(file)?;
        let path = self.reopen(&file, libc::O_PATH)?;
        let node = Node { path, parent };
        let (inode, handle) = (self.new_number(), self.new_number());
        let entry = self.entry(inode, &node)?;
        let mut state = self.lock();
        state.nodes.insert(inode, Known { node: Arc::new(node), lookups: 1, alias: None });
        state.handles.insert(handle, Arc::new(OpenFile { inode, file }));
        Ok((entry, handle))
    }

    /// Returns the node with a number.
    pub fn node(&self, inode: Inode) -> io::Result<Arc<Node>> {
        self.lock().nodes.get(&inode).map(|known| Arc::clone(&known.node)).ok_or_else(bad_number)
    }

    /// Returns the open file with a handle.
    pub fn open_file(&self, inode: Inode, handle: Handle) -> io::Result<Arc<OpenFile>> {
        let state = self.lock();
        state.handles.get(&handle).filter(|open| open.inode == inode).cloned().ok_or_else(bad_number)
    }

    /// Returns a node on the file system of a file that virtiofsd knows.
    pub fn relative(&self, inode: Inode) -> io::Result<Relative> {
        let state = self.lock();
        let known = state.nodes.get(&inode).ok_or_else(bad_number)?;
        Ok(known.alias.map_or(Relative::Parent(known.node.parent), Relative::Alias))
    }

    /// Gives a file a name. Fails with ENOENT if the guest has created the file with O_EXCL.
    pub fn link(&self, node: &Node, directory: &File, name: &CStr) -> io::Result<()> {
        Ok(linkat(&self.fd_directory, fd_name(&node.path).as_str(), directory, name, AtFlags::AT_SYMLINK_FOLLOW)?)
    }

    /// Returns the answer for a file that has got a name, and counts the answer.
    pub fn linked(&self, inode: Inode) -> io::Result<Entry> {
        let node = self.node(inode)?;
        let entry = self.entry(inode, &node)?;
        let mut state = self.lock();
        let known = state.nodes.get_mut(&inode).ok_or_else(bad_number)?;
        known.lookups = known.lookups.saturating_add(1);
        Ok(entry)
    }

    /// Makes a node of virtiofsd's the alias of a file, and takes over a reference of this node. Returns `false`, and
    /// leaves the reference to the caller, if the file has an alias, or is not known.
    pub fn set_alias(&self, inode: Inode, alias: Inode) -> bool {
        let state = &mut *self.lock();
        let Some(known) = state.nodes.get_mut(&inode).filter(|known| known.alias.is_none()) else { return false };
        if state.by_alias.contains_key(&alias) {
            return false;
        }
        known.alias = Some(alias);
        state.by_alias.insert(alias, inode);
        self.aliases.store(state.by_alias.len(), Ordering::Release);
        true
    }

    /// If a node of virtiofsd's is an alias, returns the file's own node for an answer, and counts the answer.
    pub fn by_alias(&self, alias: Inode) -> Option<(Inode, Arc<Node>)> {
        if self.aliases.load(Ordering::Acquire) == 0 {
            return None;
        }
        let state = &mut *self.lock();
        let inode = *state.by_alias.get(&alias)?;
        let known = state.nodes.get_mut(&inode)?;
        known.lookups = known.lookups.saturating_add(1);
        Some((inode, Arc::clone(&known.node)))
    }

    /// Removes references of a node. If these were the last, returns the node and its alias. The caller drops the
    /// alias's reference, and then the node.
    pub fn forget(&self, inode: Inode, count: u64) -> Option<(Arc<Node>, Option<Inode>)> {
        let state = &mut *self.lock();
        let known = state.nodes.get_mut(&inode)?;
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return None;
        }
        let known = state.nodes.remove(&inode)?;
        if let Some(alias) = known.alias {
            state.by_alias.remove(&alias);
            self.aliases.store(state.by_alias.len(), Ordering::Release);
        }
        Some((known.node, known.alias))
    }

    /// Opens a file once more. Returns the handle.
    pub fn open(
        &self,
        _ctx: Context,
        inode: Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let node = self.node(inode)?;
        let file = {
            let _without_fsetid = if kill_priv { drop_effective_cap("FSETID")? } else { None };
            self.reopen(&node.path, flags.cast_signed() & !IGNORED_FLAGS)?
        };
        let handle = self.new_number();
        self.lock().handles.insert(handle, Arc::new(OpenFile { inode, file }));
        Ok((Some(handle), OpenOptions::KEEP_CACHE))
    }

    /// Closes a handle.
    pub fn release(&self, inode: Inode, handle: Handle) -> io::Result<()> {
        self.open_file(inode, handle)?;
        let closed = self.lock().handles.remove(&handle);
        // Close the file without the lock.
        drop(closed);
        Ok(())
    }

    fn entry(&self, inode: Inode, node: &Node) -> io::Result<Entry> {
        let attr = file::attributes(&node.path)?;
        // The caller sets the timeouts.
        Ok(Entry { inode, generation: 0, attr, attr_timeout: Duration::ZERO, entry_timeout: Duration::ZERO })
    }

    /// Opens a file by its path in /proc/self/fd.
    fn reopen(&self, file: &CountedFile, flags: i32) -> io::Result<CountedFile> {
        let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
        self.budget.count(openat(&self.fd_directory, fd_name(file).as_str(), flags, Mode::empty())?)
    }
}

/// Returns the name of a file in /proc/self/fd.
fn fd_name(file: &CountedFile) -> String {
    file.as_raw_fd().to_string()
}
