//! Joins the mounts of one file system of the host, so that the guest has one node for one file.
//!
//! virtiofsd has a node for each file of each mount (`InodeIds` in its inode_store.rs). If several containers of a pod
//! mount parts of one volume, or mount it read-only and writable, a file can have several of these nodes. The shim marks
//! such mounts in their names ([`crate::config::joined_mount`]). The mounts with the same group become one file system
//! in the guest (guest/kernel/patches), and the guest knows a file by the node that was found first.
//!
//! As long as a group has one mount, this module only counts the nodes of the mount. From the second mount on, each node
//! of the guest stands for one of virtiofsd's nodes, the inner node. The inner node is on the best mount on which the
//! guest has found the file: a writable mount rather than a read-only mount, and then a mount that contains the other.
//! A mount that the shim has unmounted is worse than all others.
//! The host's kernel checks each request on this mount. The guest gets no access that it does not have by another name.

use std::collections::{BTreeSet, HashMap, HashSet};

use virtiofsd::filesystem::Entry;

use super::cache::Area;
use super::ids::{Handle, Inode};
use crate::config::JoinedMount;

/// A node that the guest has looked up and not forgotten.
pub struct Node {
    /// The mount of the inner node.
    pub mount: u32,
    /// Number of lookups that the guest has not forgotten.
    pub lookups: u32,
    /// The inode number of the file, or 0 if the file has no name.
    pub file: u64,
    /// Where the node is.
    pub area: Area,
}

/// References of one of virtiofsd's nodes that are to be dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Surplus {
    /// virtiofsd's node.
    pub inner: Inode,
    /// The number of references.
    pub count: u64,
}

/// The mount of an inner node.
#[derive(Debug, PartialEq, Eq)]
pub struct Origin {
    /// Where the guest looks the mount up.
    pub point: MountPoint,
    /// The guest's node of the mount's root.
    pub root: Inode,
    /// Whether the inner node of the root is on a better mount.
    pub is_stale: bool,
}

/// Where the guest looks a mount up.
#[derive(Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// The mount.
    pub mount: u32,
    /// The directory of the share in which the mount is.
    pub directory: Inode,
    /// Name of the mount.
    pub name: String,
}

/// The mounts that can be joined, and the nodes of joined mounts.
#[derive(Default)]
pub struct Joins {
    groups: HashMap<String, u32>,
    last_group: u32,
    /// The mounts that have nodes or a root, or whose root is being looked up.
    mounts: HashMap<u32, Mount>,
    /// The number of each mount, by its name. The shim uses a name once.
    numbers: HashMap<String, u32>,
    /// The mounts of each root.
    roots: HashMap<Inode, BTreeSet<u32>>,
    /// The groups with several mounts.
    joined: HashSet<u32>,
    /// The guest's node of each file of a joined group, by the inode number.
    by_file: HashMap<(u32, u64), Inode>,
    /// The inner nodes of the guest's nodes that have been found on several mounts.
    inner: HashMap<Inode, Inner>,
    /// The guest's node and the inner node of each handle for which they differ.
    handles: HashMap<Handle, (Inode, Inode)>,
    /// Number of requests that are changing the attributes of each node, and must not be repeated.
    changing: HashMap<Inode, usize>,
}

struct Mount {
    group: u32,
    writable: bool,
    /// The directory of the share in which the mount is.
    directory: Inode,
    name: String,
    /// Whether the shim has unmounted the mount. The VMM's jail then denies access to its files.
    gone: bool,
    /// The guest's node of the root.
    root: Option<Inode>,
    /// The mounts that contain the root of this mount.
    wider: BTreeSet<u32>,
    /// Number of the guest's nodes whose inner nodes are on this mount.
    nodes: usize,
}

impl Mount {
    fn point(&self, mount: u32) -> MountPoint {
        MountPoint { mount, directory: self.directory, name: self.name.clone() }
    }
}

struct Inner {
    inode: Inode,
    /// Number of references to the inner node.
    count: u64,
    /// The mount of the first inner node, whose number is the guest's node.
    first_mount: u32,
    /// The earlier inner nodes of a directory, or of a file whose attributes are being changed. The request may still
    /// use them, and must not fail after it has created a file or changed the attributes.
    earlier: Vec<Surplus>,
}

impl Inner {
    /// Keeps an earlier inner node.
    fn keep(&mut self, dropped: Surplus) {
        // A file that moves back and forth has one inner node for each mount.
        match self.earlier.iter_mut().find(|kept| kept.inner == dropped.inner) {
            Some(kept) => kept.count = kept.count.saturating_add(dropped.count),
            None => self.earlier.push(dropped),
        }
    }
}

impl Joins {
    /// Returns the number of the mount with a name.
    pub fn number_of(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// Records a mount, whose root has been looked up. Returns the number of its group.
    pub fn mount(
        &mut self,
        mount: u32,
        found: &JoinedMount<'_>,
        (directory, name): (Inode, &str),
        nodes: &HashMap<Inode, Node>,
    ) -> u32 {
        let group = match self.groups.get(found.group) {
            Some(&group) => group,
            None => {
                self.last_group = self.last_group.wrapping_add(1).max(1);
                self.groups.insert(found.group.to_owned(), self.last_group);
                self.last_group
            }
        };
        let known = self.mounts.entry(mount).or_insert_with(|| Mount {
            group,
            writable: found.writable,
            directory,
            name: name.to_owned(),
            gone: false,
            root: None,
            wider: BTreeSet::new(),
            nodes: 0,
        });
        (known.directory, known.gone) = (directory, false);
        self.numbers.entry(name.to_owned()).or_insert(mount);
        let has_others = self.mounts.iter().any(|(number, other)| *number != mount && other.group == group);
        if has_others && self.joined.insert(group) {
            let of_group = |node: &Node| self.mounts.get(&node.mount).is_some_and(|mount| mount.group == group);
            let known = nodes.iter().filter(|(_, node)| node.file != 0 && of_group(node));
            self.by_file.extend(known.map(|(inode, node)| ((group, node.file), *inode)));
        }
        group
    }

    /// Removes the record of a mount if no node is on it, and the guest does not know its root.
    pub fn remove_unused(&mut self, mount: u32) {
        let is_unused = |mount: &&Mount| mount.nodes == 0 && mount.root.is_none();
        let Some(group) = self.mounts.get(&mount).filter(is_unused).map(|mount| mount.group) else { return };
        if let Some(removed) = self.mounts.remove(&mount) {
            self.numbers.remove(&removed.name);
        }
        for other in self.mounts.values_mut() {
            other.wider.remove(&mount);
        }
        if !self.mounts.values().any(|other| other.group == group) {
            self.joined.remove(&group);
            self.groups.retain(|_, number| *number != group);
        }
    }

    /// Returns whether a group has several mounts.
    pub fn is_active(&self) -> bool {
        !self.joined.is_empty()
    }

    /// Returns the number of the group of a mount.
    pub fn group_of(&self, mount: u32) -> Option<u32> {
        self.mounts.get(&mount).map(|mount| mount.group)
    }

    /// Returns the number of the group of a mount if the group has several mounts.
    pub fn joined_group_of(&self, mount: u32) -> Option<u32> {
        self.group_of(mount).filter(|group| self.joined.contains(group))
    }

    /// Sets the root of a mount. The root must be a known node.
    pub fn set_root(&mut self, mount: u32, root: Inode) {
        let Some(known) = self.mounts.get_mut(&mount) else { return };
        let old = known.root.replace(root);
        if let Some(mounts) = old.and_then(|old| self.roots.get_mut(&old)) {
            mounts.remove(&mount);
        }
        self.roots.entry(root).or_default().insert(mount);
    }

    /// Records a new node of the guest.
    pub fn added(&mut self, inode: Inode, node: &Node) {
        if let Some(mount) = self.mounts.get_mut(&node.mount) {
            mount.nodes += 1;
        }
        if let Some(group) = self.joined_group_of(node.mount).filter(|_| node.file != 0) {
            self.by_file.insert((group, node.file), inode);
        }
    }

    /// Records that the guest has dropped its last reference of a node. `count` is the number of references that it has
    /// dropped now. Returns the references to drop.
    pub fn removed(&mut self, inode: Inode, node: &Node, count: u64) -> Vec<Surplus> {
        if let Some(group) = self.joined_group_of(node.mount)
            && self.by_file.get(&(group, node.file)) == Some(&inode)
        {
            self.by_file.remove(&(group, node.file));
        }
        for mount in self.roots.remove(&inode).unwrap_or_default() {
            if let Some(mount) = self.mounts.get_mut(&mount) {
                mount.root = None;
            }
            self.remove_unused(mount);
        }
        if let Some(mount) = self.mounts.get_mut(&node.mount) {
            mount.nodes = mount.nodes.saturating_sub(1);
            self.remove_unused(node.mount);
        }
        match self.inner.remove(&inode) {
            None => vec![Surplus { inner: inode, count }],
            Some(Inner { inode, count, mut earlier, .. }) => {
                earlier.push(Surplus { inner: inode, count });
                earlier
            }
        }
    }

    /// Returns whether the references of a node are counted here, and are dropped only with the last one.
    pub fn counts(&self, inode: Inode) -> bool {
        self.inner.contains_key(&inode)
    }

    /// Returns the inner node of a node.
    pub fn inner_of(&self, inode: Inode) -> Inode {
        self.inner.get(&inode).map_or(inode, |inner| inner.inode)
    }

    /// Returns the mount of the first inner node, if the node has been found on several mounts.
    pub fn first_mount_of(&self, inode: Inode) -> Option<u32> {
        self.inner.get(&inode).map(|inner| inner.first_mount)
    }

    /// Finds the guest's node of a file that was found on a mount of a joined group. If there is one, replaces the node
    /// in the answer, counts the answer, and returns the references to drop, if any. Otherwise returns `Err`.
    pub fn find(
        &mut self,
        (group, mount, is_root): (u32, u32, bool),
        entry: &mut Entry,
        nodes: &mut HashMap<Inode, Node>,
    ) -> Result<Option<Surplus>, ()> {
        let (inode, found) = (*self.by_file.get(&(group, entry.attr.ino)).ok_or(())?, entry.inode);
        let node = nodes.get_mut(&inode).ok_or(())?;
        let count = u64::from(node.lookups);
        node.lookups = node.lookups.saturating_add(1);
        entry.inode = inode;
        if is_root {
            self.set_root(mount, inode);
        }
        let current = self.inner_of(inode);
        if current == found {
            if let Some(inner) = self.inner.get_mut(&inode) {
                inner.count = inner.count.saturating_add(1);
            }
            return Ok(None);
        }
        let first_mount = node.mount;
        let inner = self.inner.entry(inode).or_insert_with(|| Inner { inode, count, first_mount, earlier: Vec::new() });
        let dropped = Surplus { inner: inner.inode, count: inner.count };
        self.compare(inode, node.mount, mount);
        // If virtiofsd has two nodes of one mount, the earlier node is no longer valid.
        if mount != node.mount && !self.is_better(mount, node.mount) {
            return Ok(Some(Surplus { inner: found, count: 1 }));
        }
        let is_kept = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR || self.changing.contains_key(&inode);
        let mut dropped = Some(dropped);
        if let Some(inner) = self.inner.get_mut(&inode) {
            (inner.inode, inner.count) = (found, 1);
            if is_kept {
                dropped.take().into_iter().for_each(|dropped| inner.keep(dropped));
            }
        }
        let old = std::mem::replace(&mut node.mount, mount);
        if let Some(mount) = self.mounts.get_mut(&mount) {
            mount.nodes += 1;
        }
        if let Some(mount) = self.mounts.get_mut(&old) {
            mount.nodes = mount.nodes.saturating_sub(1);
            self.remove_unused(old);
        }
        Ok(dropped)
    }

    /// Records which of two mounts contains the other, if both have a file that is the root of one of them.
    fn compare(&mut self, inode: Inode, first: u32, second: u32) {
        let is_root = |mount: u32| self.mounts.get(&mount).is_some_and(|mount| mount.root == Some(inode));
        let (part, wider) = match (is_root(first), is_root(second)) {
            (true, false) => (first, second),
            (false, true) => (second, first),
            _ => return,
        };
        // If the host moves directories, each of two mounts can have contained the other.
        if self.mounts.get(&wider).is_none_or(|mount| mount.wider.contains(&part)) {
            return;
        }
        if let Some(part) = self.mounts.get_mut(&part) {
            part.wider.insert(wider);
        }
    }

    fn is_better(&self, new: u32, old: u32) -> bool {
        let (Some(of_new), Some(of_old)) = (self.mounts.get(&new), self.mounts.get(&old)) else { return false };
        match (of_new.gone, of_old.gone, of_new.writable, of_old.writable) {
            (true, ..) | (false, false, false, true) => false,
            (false, true, ..) | (false, false, true, false) => true,
            _ => of_old.wider.contains(&new),
        }
    }

    /// Returns the mount of the inner node of a node, if the mount is joined with others.
    pub fn origin(&self, inode: Inode, nodes: &HashMap<Inode, Node>) -> Option<Origin> {
        let current = nodes.get(&inode)?.mount;
        self.joined_group_of(current)?;
        let mount = self.mounts.get(&current)?;
        let root = mount.root?;
        let is_stale = self.is_better(nodes.get(&root)?.mount, current);
        Some(Origin { point: mount.point(current), root, is_stale })
    }

    /// Records that the shim has unmounted a mount.
    pub fn set_gone(&mut self, mount: u32) {
        if let Some(mount) = self.mounts.get_mut(&mount) {
            mount.gone = true;
        }
    }

    /// If the mount of an inner node is gone, returns the best of the other mounts that have this root.
    pub fn other_mount_of_root(&self, inode: Inode, nodes: &HashMap<Inode, Node>) -> Option<MountPoint> {
        let current = self.mounts.get(&nodes.get(&inode)?.mount).filter(|mount| mount.gone)?;
        let is_other = |mount: &Mount| mount.group == current.group && !mount.gone;
        let others = self.roots.get(&inode)?.iter().copied();
        let others = others.filter(|mount| self.mounts.get(mount).is_some_and(is_other));
        let mount = others.reduce(|best, other| if self.is_better(other, best) { other } else { best })?;
        Some(self.mounts.get(&mount)?.point(mount))
    }

    /// Records the begin of a request that changes the attributes of a node.
    pub fn begin_change(&mut self, inode: Inode) {
        *self.changing.entry(inode).or_default() += 1;
    }

    /// Records the end of such a request.
    pub fn end_change(&mut self, inode: Inode) {
        if let Some(requests) = self.changing.get_mut(&inode) {
            *requests -= 1;
            if *requests == 0 {
                self.changing.remove(&inode);
            }
        }
    }

    /// Records a handle whose inner node is not the guest's node.
    pub fn opened(&mut self, handle: Handle, inode: Inode, inner: Inode) {
        self.handles.insert(handle, (inode, inner));
    }

    /// Removes the record of a handle.
    pub fn closed(&mut self, handle: Handle) {
        self.handles.remove(&handle);
    }

    /// Returns the inner node with which a handle was opened. Returns `None` if the handle belongs to another node.
    pub fn inner_of_handle(&self, inode: Inode, handle: Handle) -> Option<Inode> {
        match self.handles.get(&handle) {
            None => Some(inode),
            Some(&(of, inner)) => (of == inode).then_some(inner),
        }
    }
}
