//! Finds out whether a container that got SIGKILL is still exiting, or hangs.
//!
//! The kernel needs seconds to free tens of GiB, and to write what a process has to wait for on a slow disk. This is no
//! hang, and the pod must not end. A process that waits for a file system of the host that hangs makes no progress.

use std::sync::Arc;
use std::time::Duration;

use husk_proto::containerd::api::StatsRequest;
use husk_proto::containerd::cgroups_v2::metrics::Metrics;
use protobuf::Message;
use tokio::time::{Instant, sleep_until};

use crate::container::Shim;
use crate::container::containers::Container;

/// How long a container may take to exit after SIGKILL while its exit makes progress.
pub const KILL_PROGRESS_TIMEOUT: Duration = Duration::from_secs(20);
/// Time between two queries.
const INTERVAL: Duration = Duration::from_secs(1);
/// By how many bytes the memory has to decrease in this time. The kernel reclaims small amounts without an exit.
const MIN_FREED: u64 = 1 << 20;
/// Maximum size of an answer of the agent, in bytes.
const MAX_METRICS: usize = 1 << 20;

/// What a container has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Footprint {
    processes: u64,
    /// Memory that only an exit frees, in bytes.
    memory: u64,
    /// Data that has to be written to a disk, in bytes.
    unwritten: u64,
}

impl Footprint {
    fn read(metrics: &Metrics) -> Self {
        let memory = &metrics.memory;
        Self {
            processes: metrics.pids.current,
            memory: memory.anon.saturating_add(memory.shmem),
            unwritten: memory.file_dirty.saturating_add(memory.file_writeback),
        }
    }

    /// Returns whether this is clearly less than `before`.
    fn is_less_than(&self, before: &Self) -> bool {
        let freed = |now: u64, before: u64| before.saturating_sub(now) >= MIN_FREED;
        self.processes < before.processes
            || freed(self.memory, before.memory)
            || freed(self.unwritten, before.unwritten)
    }
}

impl Shim {
    /// Waits for `limit`, and then until the container's footprint no longer decreases, or until the agent does not
    /// tell it. Ends at the latest after [`KILL_PROGRESS_TIMEOUT`], or `limit` if that is longer. Returns how long it
    /// has waited.
    ///
    /// The agent is not trusted. It can only delay the end of its own pod up to this time.
    pub(super) async fn wait_exit_stalls(self: &Arc<Self>, container: &Container, limit: Duration) -> Duration {
        let begin = Instant::now();
        let mut due = begin + limit;
        // The first query ends before `limit`. Therefore it costs no time.
        sleep_until(due.checked_sub(INTERVAL).unwrap_or(begin)).await;
        let mut before = self.footprint(container).await;
        loop {
            sleep_until(due).await;
            let Some(last) = before.filter(|_| due - begin < KILL_PROGRESS_TIMEOUT) else { return begin.elapsed() };
            before = self.footprint(container).await;
            if !before.is_some_and(|now| now.is_less_than(&last)) {
                return begin.elapsed();
            }
            tracing::debug!(container = container.id, ?before, "the container is still exiting after SIGKILL");
            due += INTERVAL;
        }
    }

    async fn footprint(&self, container: &Container) -> Option<Footprint> {
        let agent = self.agent().await.ok()?;
        let request = StatsRequest { id: container.id.clone(), ..Default::default() };
        let answer = agent.query(|context| agent.task.stats(context, &request)).await.ok()?;
        let value = answer.stats.into_option()?.value;
        let metrics = Metrics::parse_from_bytes(Some(&value[..]).filter(|value| value.len() <= MAX_METRICS)?).ok()?;
        Some(Footprint::read(&metrics))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_changes_are_no_progress() {
        let before = Footprint { processes: 2, memory: 8 << 20, unwritten: 4 << 20 };
        for (now, expected) in [
            (before, false),
            (Footprint { processes: 1, ..before }, true),
            (Footprint { processes: 3, ..before }, false),
            (Footprint { memory: (8 << 20) - 4096, ..before }, false),
            (Footprint { memory: 7 << 20, ..before }, true),
            (Footprint { unwritten: 3 << 20, memory: 9 << 20, ..before }, true),
        ] {
            assert_eq!(now.is_less_than(&before), expected, "{now:?}");
        }
    }
}
