//! The nodes that the guest has looked up: the mount of each node, and the references that the guest has dropped.
//!
//! The mounts decide which requests share the worker threads of one host file system. A hostile guest can make a
//! request count for another mount. This only changes how the guest's own requests wait for each other.

use std::collections::HashMap;
use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard};

use husk_base::sync::lock;
use virtiofsd::filesystem::Entry;

use super::ids::Inode;

/// Node of the share's directory (include/uapi/linux/fuse.h).
const ROOT: Inode = 1;
/// Flag of an entry that is the root of a mount (FUSE_ATTR_SUBMOUNT in include/uapi/linux/fuse.h).
const SUBMOUNT: u32 = 1;
/// Mount of the share's directory, and of nodes that are not known.
const SHARE: u32 = 0;
/// Bit of the group of a lookup whose mount is not known.
const NAME: u64 = 1 << 63;
/// Maximum number of mount points whose mounts are known.
const MAX_MOUNT_POINTS: usize = 4096;

/// The nodes of a file system.
pub struct Nodes {
    state: Mutex<State>,
    /// Maximum number of known nodes. The guest cannot have more open files.
    max: usize,
    hasher: RandomState,
}

#[derive(Default)]
struct State {
    nodes: HashMap<Inode, Node>,
    /// The mount at each name, by the hash of the parent's node and the name.
    mount_points: HashMap<u64, u32>,
    last_mount: u32,
    /// The dropped references of nodes for which a job is queued.
    forgotten: HashMap<Inode, u64>,
}

/// A node that the guest has looked up and not forgotten.
struct Node {
    mount: u32,
    /// Number of lookups that the guest has not forgotten.
    lookups: u32,
}

impl Nodes {
    /// Creates the nodes of a file system with at most `max` open files.
    pub fn new(max: u64) -> Self {
        Self { state: Mutex::default(), max: usize::try_from(max).unwrap_or(usize::MAX), hasher: RandomState::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn hash(&self, parent: Inode, name: &[u8]) -> u64 {
        self.hasher.hash_one((parent, name)) & !NAME
    }

    /// Records a lookup of a name.
    pub fn add(&self, parent: Inode, name: &CStr, entry: &Entry) {
        let state = &mut *self.lock();
        if let Some(node) = state.nodes.get_mut(&entry.inode) {
            node.lookups = node.lookups.saturating_add(1);
            return;
        }
        let inherited = state.nodes.get(&parent).map_or(SHARE, |parent| parent.mount);
        let is_directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        // virtiofsd marks the roots of mounts, but only directories. A file in the share's own directories can also be
        // a mount, because volumes can be files.
        let mount = if entry.attr.flags & SUBMOUNT != 0 || inherited == SHARE && !is_directory {
            state.last_mount = state.last_mount.wrapping_add(1).max(1);
            if state.mount_points.len() >= MAX_MOUNT_POINTS {
                state.mount_points.clear();
            }
            state.mount_points.insert(self.hash(parent, name.to_bytes()), state.last_mount);
            state.last_mount
        } else {
            inherited
        };
        if entry.inode != ROOT && state.nodes.len() < self.max {
            state.nodes.insert(entry.inode, Node { mount, lookups: 1 });
        }
    }

    /// Returns the group of a request for a node.
    pub fn group(&self, node: Inode) -> u64 {
        self.lock().nodes.get(&node).map_or(SHARE, |node| node.mount).into()
    }

    /// Returns the group of a lookup. The lookup of a mount point reads the attributes of the mount.
    pub fn lookup_group(&self, parent: Inode, name: &[u8]) -> u64 {
        let hash = self.hash(parent, name);
        let state = self.lock();
        if let Some(&mount) = state.mount_points.get(&hash) {
            return mount.into();
        }
        match state.nodes.get(&parent).map_or(SHARE, |parent| parent.mount) {
            SHARE => hash | NAME,
            mount => mount.into(),
        }
    }

    /// Adds to the dropped references of a node. Returns the group of the job that the caller has to queue for the
    /// node. Returns `None` if a job is already queued, or if the node is not known.
    pub fn queue_forget(&self, node: Inode, count: u64) -> Option<u64> {
        let state = &mut *self.lock();
        let mount = state.nodes.get(&node)?.mount;
        let dropped = state.forgotten.entry(node).or_default();
        let queued = *dropped > 0;
        *dropped = dropped.saturating_add(count);
        (!queued && *dropped > 0).then_some(mount.into())
    }

    /// Takes the dropped references of a node whose job runs.
    pub fn take_forgotten(&self, node: Inode) -> u64 {
        self.lock().forgotten.remove(&node).unwrap_or(0)
    }

    /// Removes references of a node. Returns whether the guest has dropped its last reference.
    pub fn forget(&self, node: Inode, count: u64) -> bool {
        let state = &mut *self.lock();
        let Some(known) = state.nodes.get_mut(&node) else { return false };
        known.lookups = known.lookups.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        if known.lookups > 0 {
            return false;
        }
        state.nodes.remove(&node).is_some()
    }

    /// Drops the record of queued jobs, which end with an activation of the device.
    pub fn clear_forgotten(&self) {
        self.lock().forgotten.clear();
    }

    /// Forgets all nodes.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }
}
