//! Work for several nodes side by side, on machines that are large enough.

use crate::node::Seat;
use anyhow::{Context, Result};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a node and its QEMU may take of the machine's memory, in MiB.
const MEMORY: u64 = 8 * 1024;
/// More than this many write faster than a disk takes it.
const MOST: usize = 4;

/// Work that is still to be given out, and how much of it is being done.
struct Desk<W> {
    work: W,
    running: usize,
    /// Why no more is given out.
    error: Option<anyhow::Error>,
}

/// How many nodes run well on this machine. One keeps two processors busy, also where they are emulated: two nodes on two
/// processors are done after 0.88 of the time that they take one after the other, and what they test is as much slower.
fn seats() -> usize {
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text)).unwrap_or_default();
    let room = usize::try_from(memory / MEMORY).unwrap_or(MOST);
    (crate::cmd::processors() / 2).min(room).clamp(1, MOST)
}

/// The machine's memory in MiB.
fn total(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split_whitespace().next()?;
    Some(kib.parse::<u64>().ok()? / 1024)
}

/// Does `work` to its end, as many pieces at a time as this machine runs nodes: `next` takes one from it, `done` does it
/// in a node, `ended` says what came of it, after which `next` may have more. The first error ends it, once what is
/// being done is over.
pub fn by_side<W: Send, P, D>(
    work: W,
    next: impl Fn(&mut W) -> Option<P> + Sync,
    done: impl Fn(Seat, &P) -> Result<D> + Sync,
    ended: impl Fn(&mut W, P, D) + Sync,
) -> Result<W> {
    let desk = Mutex::new(Desk { work, running: 0, error: None });
    let changed = Condvar::new();
    let sit = |seat: Seat| {
        while let Some(piece) = take(&desk, &changed, &next) {
            let result = done(seat, &piece);
            let mut desk = lock(&desk);
            desk.running -= 1;
            match result {
                Ok(result) => ended(&mut desk.work, piece, result),
                Err(error) => drop(desk.error.get_or_insert(error)),
            }
            drop(desk);
            changed.notify_all();
        }
    };
    let seats = seats();
    std::thread::scope(|scope| {
        for number in 0..seats {
            let seat = if seats == 1 { Seat::default() } else { Seat::beside(number) };
            scope.spawn({
                let sit = &sit;
                move || sit(seat)
            });
        }
    });
    let desk = desk.into_inner().unwrap_or_else(PoisonError::into_inner);
    desk.error.map_or(Ok(desk.work), Err).context("cannot run the test node")
}

/// A piece of the work, waiting while there is none but what is being done may bring more.
fn take<W, P>(desk: &Mutex<Desk<W>>, changed: &Condvar, next: impl Fn(&mut W) -> Option<P>) -> Option<P> {
    let mut desk = lock(desk);
    loop {
        if desk.error.is_some() {
            return None;
        }
        if let Some(piece) = next(&mut desk.work) {
            desk.running += 1;
            return Some(piece);
        }
        if desk.running == 0 {
            return None;
        }
        desk = changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_brings_more_is_done_to_its_end() {
        let next = |work: &mut (Vec<u32>, u32)| work.0.pop();
        let ended = |work: &mut (Vec<u32>, u32), piece: u32, twice: u32| {
            work.1 += twice;
            work.0.extend((piece > 1).then_some(piece - 1));
        };
        let (rest, sum) = by_side((vec![3, 1], 0), next, |_, piece| Ok(piece * 2), ended).unwrap();
        assert_eq!((rest.len(), sum), (0, 2 * (3 + 2 + 1 + 1)));
    }

    #[test]
    fn an_error_ends_it() {
        let next = |work: &mut Vec<u32>| work.pop();
        let done = |_, piece: &u32| if *piece == 7 { anyhow::bail!("seven") } else { Ok(()) };
        // The endless rest is not done.
        let ended = |work: &mut Vec<u32>, _, ()| work.push(1);
        let error = by_side(vec![1, 7], next, done, ended).unwrap_err();
        assert_eq!(format!("{error:#}"), "cannot run the test node: seven");
    }

    #[test]
    fn memory_is_read() {
        assert_eq!(total("MemTotal:       16384000 kB\nMemFree: 1 kB\n"), Some(16000));
        assert_eq!(total("nothing"), None);
    }
}
