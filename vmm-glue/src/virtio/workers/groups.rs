//! The requests of a device by group. The requests of one group can hang together, for example because they use one
//! host file system. A group never has more than a limited number of workers. Its other requests are held without a
//! worker.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::virtio::queue::HeldChain;

/// A group is stuck if it has held requests and none of its requests has ended for this time.
const STUCK_TIME: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// Something for a worker to do.
pub enum Work {
    /// A request that was held.
    Request(HeldChain),
    /// A job that [`super::Workers::submit`] has queued.
    Job(u64),
}

/// The groups that have requests or jobs.
pub struct Groups {
    groups: HashMap<u64, Group>,
    /// Maximum number of workers of one group.
    max_busy: usize,
    /// Maximum number of held requests of a group that is stuck.
    max_held: usize,
    /// Number of requests and jobs that are held.
    held: usize,
    /// Number of held requests above `max_held`, of all groups together.
    excess: usize,
}

struct Group {
    /// Number of workers that serve requests or jobs of the group.
    busy: usize,
    requests: VecDeque<HeldChain>,
    jobs: VecDeque<u64>,
    /// Time at which a request of the group has ended, or at which the group was created.
    last_end: Instant,
}

impl Group {
    fn is_held(&self) -> bool {
        !self.requests.is_empty() || !self.jobs.is_empty()
    }
}

impl Groups {
    /// Creates the groups of an activation.
    pub fn new(max_busy: usize, max_held: usize) -> Self {
        Self { groups: HashMap::new(), max_busy, max_held, held: 0, excess: 0 }
    }

    fn group(&mut self, group: u64) -> &mut Group {
        self.groups.entry(group).or_insert_with(|| Group {
            busy: 0,
            requests: VecDeque::new(),
            jobs: VecDeque::new(),
            last_end: Instant::now(),
        })
    }

    /// Takes a worker for the group, if the group may have another one. `max_busy` is a lower limit than the usual one.
    pub fn enter(&mut self, group: u64, max_busy: usize) -> bool {
        let max_busy = self.max_busy.min(max_busy);
        let group = self.group(group);
        let free = group.busy < max_busy && !group.is_held();
        group.busy += usize::from(free);
        free
    }

    /// Returns the worker of a group.
    pub fn leave(&mut self, id: u64) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.busy = group.busy.saturating_sub(1);
        group.last_end = Instant::now();
        if group.busy == 0 && !group.is_held() {
            self.groups.remove(&id);
        }
    }

    /// Holds a request until the group has a worker for it.
    pub fn hold(&mut self, group: u64, request: HeldChain) {
        let max_held = self.max_held;
        let group = self.group(group);
        group.requests.push_back(request);
        let excess = group.requests.len() > max_held;
        self.held += 1;
        self.excess += usize::from(excess);
    }

    /// Queues a job until the group has a worker for it.
    pub fn queue(&mut self, group: u64, job: u64) {
        self.group(group).jobs.push_back(job);
        self.held += 1;
    }

    /// Takes a worker for a held request or job whose group may have another worker.
    pub fn next(&mut self, max_busy: usize) -> Option<(u64, Work)> {
        if self.held == 0 {
            return None;
        }
        let (max_busy, max_held) = (self.max_busy.min(max_busy), self.max_held);
        let waiting = self.groups.iter_mut().filter(|(_, group)| group.is_held() && group.busy < max_busy);
        let (&id, group) = waiting.min_by_key(|(_, group)| group.busy)?;
        let (work, excess) = match group.jobs.pop_front() {
            Some(job) => (Work::Job(job), false),
            None => {
                let excess = group.requests.len() > max_held;
                (Work::Request(group.requests.pop_front()?), excess)
            }
        };
        group.busy += 1;
        self.held -= 1;
        self.excess -= usize::from(excess);
        Some((id, work))
    }

    /// Returns whether requests or jobs are held.
    pub fn is_held(&self) -> bool {
        self.held > 0
    }

    /// Returns whether a group has too many held requests.
    pub fn has_excess(&self) -> bool {
        self.excess > 0
    }

    /// Takes the newest request of a stuck group that has too many held requests.
    pub fn take_excess(&mut self) -> Option<HeldChain> {
        if self.excess == 0 {
            return None;
        }
        let max_held = self.max_held;
        let is_stuck = |group: &&mut Group| group.requests.len() > max_held && group.last_end.elapsed() >= STUCK_TIME;
        let request = self.groups.values_mut().find(is_stuck)?.requests.pop_back()?;
        self.held -= 1;
        self.excess -= 1;
        Some(request)
    }
}
