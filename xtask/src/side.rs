//! Runs several test nodes side by side on large machines.

use std::sync::{Condvar, Mutex};

use anyhow::{Context, Result};
use husk_base::sync::{into_inner, lock, wait};

use crate::node::Seat;

/// Memory that a node needs, including its QEMU, in MiB.
const NODE_MEMORY: u64 = 8 * 1024;
/// Maximum number of nodes. More nodes would write more data than a disk can take.
const MAX_NODES: usize = 4;

/// The remaining work, and the number of pieces that are running.
struct Queue<W> {
    work: W,
    running: usize,
    /// The first error of a piece. After an error, no further piece starts.
    error: Option<anyhow::Error>,
}

/// Returns the number of nodes that can run side by side on this machine. A node keeps two processors busy, even if it
/// is emulated. Therefore each node gets two processors. If two nodes share two processors, they take 0.88 of the time
/// that they take one after the other. But each node and each of its tests then takes 1.76 times as long.
pub fn seats() -> usize {
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text)).unwrap_or_default();
    let by_memory = usize::try_from(memory / NODE_MEMORY).unwrap_or(MAX_NODES);
    (crate::cmd::processors() / 2).min(by_memory).clamp(1, MAX_NODES)
}

/// Returns the machine's memory in MiB, from the text of /proc/meminfo.
fn total_memory(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split_whitespace().next()?;
    Some(kib.parse::<u64>().ok()? / 1024)
}

/// Like [`side_by_side_in`], in as many nodes at a time as [`seats()`] returns.
pub fn side_by_side<W: Send, P, D>(
    work: W,
    next: impl Fn(&mut W) -> Option<P> + Sync,
    done: impl Fn(Seat, &P) -> Result<D> + Sync,
    ended: impl Fn(&mut W, P, D) + Sync,
) -> Result<W> {
    side_by_side_in(seats(), work, next, done, ended)
}

/// Does all of `work`, in `seats` nodes at a time. `next` takes a piece from the work, `done`
/// runs the piece in a node, and `ended` adds the piece's result to the work. After `ended`, `next` may return further
/// pieces. After an error, the running pieces are finished, but no further piece starts, and the first error is
/// returned.
pub fn side_by_side_in<W: Send, P, D>(
    seats: usize,
    work: W,
    next: impl Fn(&mut W) -> Option<P> + Sync,
    done: impl Fn(Seat, &P) -> Result<D> + Sync,
    ended: impl Fn(&mut W, P, D) + Sync,
) -> Result<W> {
    let queue = Mutex::new(Queue { work, running: 0, error: None });
    let changed = Condvar::new();
    let run = |seat: Seat| {
        while let Some(piece) = take(&queue, &changed, &next) {
            let result = done(seat, &piece);
            let mut queue = lock(&queue);
            queue.running -= 1;
            match result {
                Ok(result) => ended(&mut queue.work, piece, result),
                Err(error) => drop(queue.error.get_or_insert(error)),
            }
            drop(queue);
            changed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for number in 0..seats {
            let seat = if seats == 1 { Seat::default() } else { Seat::beside(number) };
            scope.spawn({
                let run = &run;
                move || run(seat)
            });
        }
    });
    let queue = into_inner(queue);
    queue.error.map_or(Ok(queue.work), Err).context("failed to run the test node")
}

/// Takes a piece of the work. If no piece is left but some pieces are running, waits, because a running piece may add
/// work. Returns `None` after an error, or if no piece is left and no piece is running.
fn take<W, P>(queue: &Mutex<Queue<W>>, changed: &Condvar, next: impl Fn(&mut W) -> Option<P>) -> Option<P> {
    let mut queue = lock(queue);
    loop {
        if queue.error.is_some() {
            return None;
        }
        if let Some(piece) = next(&mut queue.work) {
            queue.running += 1;
            return Some(piece);
        }
        if queue.running == 0 {
            return None;
        }
        queue = wait(changed, queue);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_a_result_adds_are_run() {
        let next = |work: &mut (Vec<u32>, u32)| work.0.pop();
        let ended = |work: &mut (Vec<u32>, u32), piece: u32, twice: u32| {
            work.1 += twice;
            work.0.extend((piece > 1).then_some(piece - 1));
        };
        let (rest, sum) = side_by_side((vec![3, 1], 0), next, |_, piece| Ok(piece * 2), ended).unwrap();
        assert_eq!((rest.len(), sum), (0, 2 * (3 + 2 + 1 + 1)));
    }

    #[test]
    fn an_error_stops_further_work() {
        let next = |work: &mut Vec<u32>| work.pop();
        let done = |_, piece: &u32| if *piece == 7 { anyhow::bail!("seven") } else { Ok(()) };
        // Each piece adds another piece, so only the error ends this work.
        let ended = |work: &mut Vec<u32>, _, ()| work.push(1);
        let error = side_by_side(vec![1, 7], next, done, ended).unwrap_err();
        assert_eq!(format!("{error:#}"), "failed to run the test node: seven");
    }

    #[test]
    fn total_memory_is_in_mib() {
        assert_eq!(total_memory("MemTotal:       16384000 kB\nMemFree: 1 kB\n"), Some(16000));
        assert_eq!(total_memory("nothing"), None);
    }
}
