//! The nodes that the guest has looked up: the mount of each node, and the references that the guest has dropped.
//!
//! The mounts decide which requests share the worker threads of one host file system. A hostile guest can make a
//! request count for another mount. This only changes how the guest's own requests wait for each other.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use husk_base::sync::{lock, wait_timeout};
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

/// How long a request waits for the space of removed files.
const FREE_TIMEOUT: Duration = Duration::from_secs(1);
/// A request does not wait if its mount has more jobs than this. The guest then drops its cache, and removes no files.
const MAX_AWAITED_JOBS: usize = 64;

/// The nodes of a file system.
pub struct Nodes {
    state: Mutex<State>,
    /// Notified when a job has ended.
    job_ended: Condvar,
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
    /// The nodes for which a job is queued.
    forgotten: HashMap<Inode, Job>,
    /// The jobs of each mount.
    jobs: HashMap<u32, Jobs>,
}

/// The dropped references of a node.
#[derive(Debug, PartialEq, Eq)]
pub struct Job {
    /// The number of references.
    pub count: u64,
    mount: u32,
}

/// The jobs of a mount.
#[derive(Default)]
struct Jobs {
    queued: HashSet<Inode>,
    running: u32,
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
        let (state, job_ended) = (Mutex::default(), Condvar::new());
        Self { state, job_ended, max: usize::try_from(max).unwrap_or(usize::MAX), hasher: RandomState::new() }
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

    /// Adds to the dropped references of a node. Returns the group of the job that has to be queued for the node, or
    /// `None` if a job is already queued or the node is not known.
    pub fn queue_forget(&self, node: Inode, count: u64) -> Option<u64> {
        let state = &mut *self.lock();
        let mount = state.nodes.get(&node)?.mount;
        if count == 0 {
            return None;
        }
        let job = state.forgotten.entry(node).or_insert(Job { count: 0, mount });
        job.count = job.count.saturating_add(count);
        state.jobs.entry(mount).or_default().queued.insert(node).then_some(mount.into())
    }

    /// Takes the job of a node. Returns `None` if another thread has taken it. The caller has to call
    /// [`Nodes::end_job`].
    pub fn take_job(&self, node: Inode) -> Option<Job> {
        take(&mut self.lock(), node)
    }

    /// Takes a queued job of the node's mount, so that a request that needs space can run it. Returns `None` if the
    /// mount has no queued job, or has many. The guest then drops its cache, and removes no files. The caller has to
    /// call [`Nodes::end_job`].
    pub fn take_job_of_mount(&self, node: Inode) -> Option<(Inode, Job)> {
        let state = &mut *self.lock();
        let mount = mount_of(state, node);
        let queued = &state.jobs.get(&mount)?.queued;
        let next = *queued.iter().next().filter(|_| queued.len() <= MAX_AWAITED_JOBS)?;
        take(state, next).map(|job| (next, job))
    }

    /// Records the end of a job.
    pub fn end_job(&self, job: &Job) {
        let state = &mut *self.lock();
        if let Some(jobs) = state.jobs.get_mut(&job.mount) {
            jobs.running = jobs.running.saturating_sub(1);
            if jobs.running == 0 && jobs.queued.is_empty() {
                state.jobs.remove(&job.mount);
            }
        }
        self.job_ended.notify_all();
    }

    /// Waits until the running jobs of the node's mount have ended, at most for [`FREE_TIMEOUT`].
    pub fn wait_for_jobs(&self, node: Inode) {
        let mut state = self.lock();
        let mount = mount_of(&state, node);
        let end = Instant::now() + FREE_TIMEOUT;
        while state.jobs.get(&mount).is_some_and(|jobs| jobs.running > 0 && jobs.queued.len() <= MAX_AWAITED_JOBS) {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else { return };
            (state, _) = wait_timeout(&self.job_ended, state, left);
        }
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
        let state = &mut *self.lock();
        state.forgotten.clear();
        state.jobs.clear();
        self.job_ended.notify_all();
    }

    /// Forgets all nodes.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }
}

fn mount_of(state: &State, node: Inode) -> u32 {
    state.nodes.get(&node).map_or(SHARE, |node| node.mount)
}

fn take(state: &mut State, node: Inode) -> Option<Job> {
    let job = state.forgotten.remove(&node)?;
    let jobs = state.jobs.entry(job.mount).or_default();
    jobs.queued.remove(&node);
    jobs.running = jobs.running.saturating_add(1);
    Some(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns `count` nodes that the guest has looked up, all of the share's mount.
    fn nodes(count: u64) -> Nodes {
        let nodes = Nodes::new(1 << 20);
        for node in 2..2 + count {
            nodes.lock().nodes.insert(node, Node { mount: SHARE, lookups: 1 });
        }
        nodes
    }

    #[test]
    fn job_is_queued_once_and_taken_once() {
        let nodes = nodes(2);
        assert_eq!((nodes.queue_forget(2, 3), nodes.queue_forget(2, 4)), (Some(0), None));
        assert_eq!((nodes.queue_forget(3, 0), nodes.queue_forget(99, 1)), (None, None));
        let (node, job) = nodes.take_job_of_mount(3).unwrap();
        assert_eq!((node, job.count), (2, 7));
        assert!(nodes.take_job(2).is_none() && nodes.take_job_of_mount(3).is_none());
        nodes.end_job(&job);
        assert!(nodes.lock().jobs.is_empty());
        nodes.wait_for_jobs(2);
    }

    #[test]
    fn request_waits_for_a_running_job_but_not_for_many() {
        let nodes = nodes(100);
        nodes.queue_forget(2, 1);
        let job = nodes.take_job(2).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| nodes.wait_for_jobs(3));
            nodes.end_job(&job);
            waiter.join().unwrap();
        });
        let queued = (3..100).filter(|&node| nodes.queue_forget(node, 1).is_some()).count();
        assert!(queued > MAX_AWAITED_JOBS);
        assert!(nodes.take_job_of_mount(3).is_none());
        let _running = nodes.take_job(3).unwrap();
        nodes.wait_for_jobs(3);
    }
}
