//! The nodes that the guest has looked up: the mount of each node, and the references that the guest has dropped.
//! virtiofsd's node for a node of the guest is the inner node ([`joins`](super::joins)).
//!
//! The mounts decide which requests share the worker threads of one host file system. A hostile guest can make a
//! request count for another mount. This only changes how the guest's own requests wait for each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait_timeout};
use virtiofsd::filesystem::Entry;

use super::cache::{Area, Cache};
use super::ids::{Handle, Inode};
use super::joins::{Joins, MountPoint, Node, Origin, Surplus};
use super::tmpfile::is_temporary;
use crate::config::joined_mount;

/// Node of the share's directory (include/uapi/linux/fuse.h).
const ROOT: Inode = 1;
/// Flag of an entry that is the root of a mount (FUSE_ATTR_SUBMOUNT in include/uapi/linux/fuse.h).
pub const SUBMOUNT: u32 = 1;
/// Mount of the share's directory, and of nodes that are not known.
const SHARE: u32 = 0;
/// Bit of the group of a lookup whose mount is not known.
const NAME: u64 = 1 << 63;
/// Maximum number of mount points whose mounts are known.
const MAX_MOUNT_POINTS: usize = 4096;

/// How long a request waits for the space of removed files. A job that runs for this time hangs, and no request waits
/// for it.
const FREE_TIMEOUT: Duration = Duration::from_secs(1);
/// A request does not wait if its mount has more jobs than this. The guest then drops its cache, and removes no files.
/// A request also runs at most this number of jobs.
const MAX_AWAITED_JOBS: usize = 64;

/// The nodes of a file system.
pub struct Nodes {
    state: Mutex<State>,
    /// Notified when a job has ended.
    job_ended: Condvar,
    /// Maximum number of known nodes. The guest cannot have more open files.
    max: usize,
    /// How long the guest caches names and attributes.
    pub cache: Cache,
    hasher: RandomState,
    /// Whether inner nodes can differ from the guest's nodes. Stays true until the end of the connection.
    joined: AtomicBool,
}

#[derive(Default)]
struct State {
    nodes: HashMap<Inode, Node>,
    /// The mount at each name, by the hash of the parent's node and the name.
    mount_points: HashMap<u64, u32>,
    last_mount: u32,
    joins: Joins,
    /// The nodes for which a job is queued. Each is a known node. Therefore, `max` also limits the queued jobs.
    forgotten: HashMap<Inode, Forgotten>,
    /// The jobs of each mount.
    jobs: HashMap<u32, Jobs>,
    /// Number of the last job that was taken.
    last_job: u64,
}

/// The dropped references of a node whose job is queued.
struct Forgotten {
    count: u64,
    mount: u32,
}

/// A job that was taken: the dropped references of a node.
#[derive(Debug)]
pub struct Job {
    /// The node.
    pub node: Inode,
    /// The number of references.
    pub count: u64,
    mount: u32,
    number: u64,
}

/// The jobs of a mount.
#[derive(Default)]
struct Jobs {
    queued: BTreeSet<Inode>,
    /// Number of calls of [`Nodes::take_job`] that the workers still have to make. If a request runs a job, or a job is
    /// dropped, its call stays, and the next job of the mount uses it. Therefore, the workers' queue cannot grow
    /// without new nodes.
    calls: usize,
    /// The start of each running job, by the job's number.
    running: BTreeMap<u64, Instant>,
}

/// The limits of a request that waits for space.
pub struct SpaceWait {
    end: Instant,
    /// Number of jobs that the request may still run.
    jobs: usize,
}

impl SpaceWait {
    /// Begins to wait.
    pub fn begin() -> Self {
        Self { end: Instant::now() + FREE_TIMEOUT, jobs: MAX_AWAITED_JOBS }
    }
}

impl Jobs {
    /// Returns whether a job runs for so long that a request must not wait for it.
    fn hang(&self, now: Instant) -> bool {
        self.running.values().any(|&start| now.saturating_duration_since(start) >= FREE_TIMEOUT)
    }

    /// Returns the time until which a request waits for the running jobs, or `None` if it need not wait.
    fn awaited_until(&self, wait: &SpaceWait, now: Instant) -> Option<Instant> {
        if self.queued.len() > MAX_AWAITED_JOBS {
            return None;
        }
        // Job numbers increase with time. Therefore, the last job is the newest.
        let (_, &newest) = self.running.last_key_value()?;
        Some((newest + FREE_TIMEOUT).min(wait.end)).filter(|&until| until > now)
    }
}

/// Where a node of the guest is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The inner node.
    pub inner: Inode,
    /// The mount of the inner node. `None` if no node has been joined, so that it need not be looked up.
    mount: Option<u32>,
}

/// A request that changes the attributes of a node.
pub struct Change<'a> {
    nodes: &'a Nodes,
    inode: Inode,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.nodes.lock().joins.end_change(self.inode);
    }
}

/// The references of inner nodes that the guest has dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The references.
    pub references: Vec<Surplus>,
    /// Whether the guest has no more references.
    pub is_last: bool,
}

impl Nodes {
    /// Creates the nodes of a file system with at most `max` open files.
    pub fn new(max: u64, cache: Cache) -> Self {
        let (state, job_ended) = (Mutex::default(), Condvar::new());
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        Self { state, job_ended, max, cache, hasher: RandomState::new(), joined: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn hash(&self, parent: Inode, name: &[u8]) -> u64 {
        self.hasher.hash_one((parent, name)) & !NAME
    }

    /// Returns where a node is. Fails with EBADF if the guest does not know the node.
    pub fn place(&self, inode: Inode) -> io::Result<Place> {
        // virtiofsd checks the nodes that are not joined.
        if !self.joined.load(Ordering::Acquire) || inode == ROOT || is_temporary(inode) {
            return Ok(Place { inner: inode, mount: None });
        }
        let state = self.lock();
        let node = state.nodes.get(&inode).ok_or_else(bad_node)?;
        Ok(Place { inner: state.joins.inner_of(inode), mount: Some(node.mount) })
    }

    /// Returns where a node is.
    pub fn area(&self, inode: Inode) -> Area {
        area_of(&self.lock(), inode)
    }

    /// Records a lookup of a name in a directory, which was at a place during the lookup. Changes the answer to what the
    /// guest gets: its node of the file, how long it caches the answer and, for the root of a mount that can be joined,
    /// the number of the file system (`fs_id` in guest/kernel/patches). Returns references of inner nodes that the
    /// caller has to drop.
    pub fn add(&self, directory: Inode, place: Place, name: &CStr, entry: &mut Entry) -> Option<Surplus> {
        let state = &mut *self.lock();
        let first_mount = || state.joins.first_mount_of(directory);
        let inherited = place.mount.or_else(first_mount).unwrap_or_else(|| mount_of(state, directory));
        let is_directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let is_root = entry.attr.flags & SUBMOUNT != 0;
        let parent = area_of(state, directory);
        let area = match directory {
            ROOT => Area::below_root(),
            _ => parent.child(name.to_bytes(), is_root),
        };
        self.cache.set_timeouts(parent, area, entry);
        let mut joined = None;
        if is_root {
            entry.attr.rdev = 0;
            if inherited == SHARE
                && let Ok(name) = name.to_str()
                && let Some(found) = joined_mount(name)
            {
                let point = self.hash(directory, name.as_bytes());
                let known = state.joins.number_of(name);
                let mount = known.unwrap_or_else(|| new_number(state));
                set_mount(state, point, mount);
                entry.attr.rdev = state.joins.mount(mount, &found, (directory, name), &state.nodes);
                self.joined.fetch_or(state.joins.is_active(), Ordering::AcqRel);
                joined = Some(mount);
            }
        }
        let mount = joined.or_else(|| (!is_root).then_some(inherited));
        if let Some(mount) = mount.filter(|_| !is_temporary(entry.inode))
            && let Some(group) = state.joins.joined_group_of(mount)
            && let Ok(surplus) = state.joins.find((group, mount, is_root), entry, &mut state.nodes)
        {
            state.joins.remove_unused(mount);
            return surplus;
        }
        if let Some(node) = state.nodes.get_mut(&entry.inode) {
            node.lookups = node.lookups.saturating_add(1);
            mount.into_iter().for_each(|mount| state.joins.remove_unused(mount));
            return None;
        }
        // virtiofsd marks the roots of mounts, but only directories. A file in the share's own directories can also be
        // a mount, because volumes can be files.
        let is_file_of_share = inherited == SHARE && !is_directory;
        let mount = match mount.filter(|_| !is_file_of_share) {
            Some(mount) => mount,
            None => new_mount(state, self.hash(directory, name.to_bytes())),
        };
        if entry.inode != ROOT && state.nodes.len() < self.max {
            let file = if is_temporary(entry.inode) { 0 } else { entry.attr.ino };
            insert(state, entry.inode, Node { mount, lookups: 1, file, area });
            if joined.is_some() {
                state.joins.set_root(mount, entry.inode);
            }
        }
        state.joins.remove_unused(mount);
        None
    }

    /// Records a node that has no name, on the mount of its directory.
    pub fn add_unnamed(&self, directory: Inode, node: Inode) {
        let state = &mut *self.lock();
        if state.nodes.len() < self.max {
            let (mount, area) = (mount_of(state, directory), area_of(state, directory));
            insert(state, node, Node { mount, lookups: 1, file: 0, area });
        }
    }

    /// Returns the mount of the inner node of a node, if the mount is joined with others.
    pub fn origin(&self, inode: Inode) -> Option<Origin> {
        let state = self.lock();
        state.joins.origin(inode, &state.nodes)
    }

    /// Records that the shim has unmounted a mount that can be joined.
    pub fn set_gone(&self, mount: u32) {
        self.lock().joins.set_gone(mount);
    }

    /// If the mount of an inner node is gone, returns the best of the other mounts that have this root.
    pub fn other_mount_of_root(&self, inode: Inode) -> Option<MountPoint> {
        let state = self.lock();
        state.joins.other_mount_of_root(inode, &state.nodes)
    }

    /// Records a handle that was opened with an inner node.
    pub fn opened(&self, handle: Handle, inode: Inode, inner: Inode) {
        self.lock().joins.opened(handle, inode, inner);
    }

    /// Records that a request begins to change the attributes of a node, if nodes have been joined. The inner node stays
    /// valid until the result is dropped.
    pub fn begin_change(&self, inode: Inode) -> Option<Change<'_>> {
        if !self.joined.load(Ordering::Acquire) {
            return None;
        }
        self.lock().joins.begin_change(inode);
        Some(Change { nodes: self, inode })
    }

    /// Records that a handle was closed.
    pub fn closed(&self, handle: Handle) {
        if self.joined.load(Ordering::Acquire) {
            self.lock().joins.closed(handle);
        }
    }

    /// Returns the inner node with which a handle was opened.
    pub fn inner_of_handle(&self, inode: Inode, handle: Handle) -> io::Result<Inode> {
        if !self.joined.load(Ordering::Acquire) {
            return Ok(inode);
        }
        self.lock().joins.inner_of_handle(inode, handle).ok_or_else(bad_node)
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

    /// Adds to the dropped references of a node. Returns the group of a call of [`Nodes::take_job`] that has to be
    /// queued, or `None` if enough calls are already queued, or the node is not known.
    pub fn queue_forget(&self, node: Inode, count: u64) -> Option<u64> {
        let state = &mut *self.lock();
        let mount = state.nodes.get(&node)?.mount;
        if count == 0 {
            return None;
        }
        let forgotten = state.forgotten.entry(node).or_insert(Forgotten { count: 0, mount });
        forgotten.count = forgotten.count.saturating_add(count);
        let jobs = state.jobs.entry(forgotten.mount).or_default();
        jobs.queued.insert(node);
        if jobs.calls >= jobs.queued.len() {
            return None;
        }
        jobs.calls += 1;
        Some(forgotten.mount.into())
    }

    /// Takes a job of a group. Returns `None` if requests have run all queued jobs. The caller has to call
    /// [`Nodes::end_job`].
    pub fn take_job(&self, group: u64) -> Option<Job> {
        let state = &mut *self.lock();
        let mount = u32::try_from(group).ok()?;
        let jobs = state.jobs.get_mut(&mount)?;
        jobs.calls = jobs.calls.saturating_sub(1);
        let job = take(state, mount);
        remove_unused(state, mount);
        job
    }

    /// Takes a queued job of the node's mount, so that a request that needs space can run it. Returns `None` if the
    /// mount has no queued job, or has many. The guest then drops its cache, and removes no files. Also returns `None`
    /// if a job of the mount hangs, or the request has waited for long enough. The caller has to call
    /// [`Nodes::end_job`].
    pub fn take_job_of_mount(&self, node: Inode, wait: &mut SpaceWait) -> Option<Job> {
        let state = &mut *self.lock();
        let mount = mount_of(state, node);
        let jobs = state.jobs.get(&mount).filter(|jobs| jobs.queued.len() <= MAX_AWAITED_JOBS)?;
        let now = Instant::now();
        if jobs.hang(now) || now >= wait.end {
            return None;
        }
        wait.jobs = wait.jobs.checked_sub(1)?;
        take(state, mount)
    }

    /// Records the end of a job.
    pub fn end_job(&self, job: &Job) {
        let state = &mut *self.lock();
        if let Some(jobs) = state.jobs.get_mut(&job.mount) {
            jobs.running.remove(&job.number);
            remove_unused(state, job.mount);
        }
        self.job_ended.notify_all();
    }

    /// Waits until the running jobs of the node's mount have ended, or hang, or the request has waited for long enough.
    pub fn wait_for_jobs(&self, node: Inode, wait: &SpaceWait) {
        let mut state = self.lock();
        let mount = mount_of(&state, node);
        loop {
            let now = Instant::now();
            let Some(until) = state.jobs.get(&mount).and_then(|jobs| jobs.awaited_until(wait, now)) else { return };
            (state, _) = wait_timeout(&self.job_ended, state, until.saturating_duration_since(now));
        }
    }

    /// Removes references of a node. Returns the references of inner nodes to drop. The last inner node is the current.
    pub fn forget(&self, inode: Inode, count: u64) -> Option<Dropped> {
        let state = &mut *self.lock();
        let Some(known) = state.nodes.get_mut(&inode) else {
            // An inner node that the guest guesses must not be dropped.
            let is_safe = inode == ROOT || is_temporary(inode) || !self.joined.load(Ordering::Acquire);
            return is_safe.then(|| Dropped { references: vec![Surplus { inner: inode, count }], is_last: false });
        };
        // The references of a lookup that is being served must stay.
        let is_joined = state.joins.joined_group_of(known.mount).is_some();
        let count = if is_joined { count.min(known.lookups.into()) } else { count };
        known.lookups = known.lookups.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        if known.lookups > 0 {
            let references = vec![Surplus { inner: inode, count }];
            return (!state.joins.counts(inode)).then_some(Dropped { references, is_last: false });
        }
        let known = state.nodes.remove(&inode)?;
        // A job that is still queued has nothing left to do.
        if let Some(forgotten) = state.forgotten.remove(&inode)
            && let Some(jobs) = state.jobs.get_mut(&forgotten.mount)
        {
            jobs.queued.remove(&inode);
        }
        Some(Dropped { references: state.joins.removed(inode, &known, count), is_last: true })
    }

    /// Drops the record of queued jobs, which end with an activation of the device.
    pub fn clear_forgotten(&self) {
        let state = &mut *self.lock();
        state.forgotten.clear();
        state.jobs.clear();
        self.job_ended.notify_all();
    }

    /// Forgets all nodes. The workers' queue still has its calls, and running jobs continue to run.
    pub fn clear(&self) {
        let state = &mut *self.lock();
        state.nodes.clear();
        state.mount_points.clear();
        state.joins = Joins::default();
        self.joined.store(false, Ordering::Release);
        state.forgotten.clear();
        state.jobs.values_mut().for_each(|jobs| jobs.queued.clear());
    }
}

fn mount_of(state: &State, node: Inode) -> u32 {
    state.nodes.get(&node).map_or(SHARE, |node| node.mount)
}

fn area_of(state: &State, node: Inode) -> Area {
    state.nodes.get(&node).map_or(Area::Share, |node| node.area)
}

fn bad_node() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

/// Records a new mount at a name.
fn new_mount(state: &mut State, point: u64) -> u32 {
    let mount = new_number(state);
    set_mount(state, point, mount);
    mount
}

fn new_number(state: &mut State) -> u32 {
    state.last_mount = state.last_mount.wrapping_add(1).max(1);
    state.last_mount
}

fn set_mount(state: &mut State, point: u64, mount: u32) {
    if state.mount_points.len() >= MAX_MOUNT_POINTS && !state.mount_points.contains_key(&point) {
        state.mount_points.clear();
    }
    state.mount_points.insert(point, mount);
}

fn insert(state: &mut State, inode: Inode, node: Node) {
    state.joins.added(inode, &node);
    state.nodes.insert(inode, node);
}

/// Takes a queued job of a mount.
fn take(state: &mut State, mount: u32) -> Option<Job> {
    let jobs = state.jobs.get_mut(&mount)?;
    let node = jobs.queued.pop_first()?;
    let Forgotten { count, mount } = state.forgotten.remove(&node)?;
    state.last_job += 1;
    jobs.running.insert(state.last_job, Instant::now());
    Some(Job { node, count, mount, number: state.last_job })
}

/// Removes the record of a mount that has no jobs.
fn remove_unused(state: &mut State, mount: u32) {
    let is_unused = |jobs: &Jobs| jobs.calls == 0 && jobs.queued.is_empty() && jobs.running.is_empty();
    if state.jobs.get(&mount).is_some_and(is_unused) {
        state.jobs.remove(&mount);
    }
}

#[cfg(test)]
mod tests;
