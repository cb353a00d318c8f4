//! Pids of the host that stand for the pod's containers: each is a thread that does nothing.
//!
//! A container's processes are the guest's, but who asks a runtime for a task's pid looks at `/proc/PID/ns` and
//! `/proc/PID/cgroup` of it: a thread of this process has the pod's, and a number of its own.

use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::{io, thread};

/// Far more than a pod has containers.
const MOST: usize = 1024;
/// In bytes: the thread calls nothing.
const STACK: usize = 32 << 10;

/// The threads; each ends when its sender is dropped.
#[derive(Default)]
pub struct Pids(HashMap<u32, Sender<()>>);

impl Pids {
    /// A pid of its own, until it is given back.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn take(&mut self) -> io::Result<u32> {
        if self.0.len() >= MOST {
            return Err(io::Error::other("too many containers"));
        }
        let (told, pid) = channel();
        let (hold, held) = channel::<()>();
        thread::Builder::new().name("husk-task".into()).stack_size(STACK).spawn(move || {
            // SAFETY: gettid takes nothing and cannot fail.
            let _ = told.send(unsafe { libc::gettid() });
            // Ends with an error, when the sender is dropped.
            let _ = held.recv();
        })?;
        let pid = pid.recv().map_err(io::Error::other)?.cast_unsigned();
        self.0.insert(pid, hold);
        Ok(pid)
    }

    /// Gives a pid back; one that is not held is not missed.
    pub fn give_back(&mut self, pid: u32) {
        self.0.remove(&pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_a_thread_of_this_process_while_it_is_held() {
        let mut pids = Pids::default();
        let (a, b) = (pids.take().unwrap(), pids.take().unwrap());
        assert_ne!(a, b);
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_eq!(namespace(&a.to_string()), namespace("self"));
        pids.give_back(a);
        pids.give_back(a);
        while std::fs::exists(format!("/proc/{a}")).unwrap() {
            thread::yield_now();
        }
        assert!(std::fs::exists(format!("/proc/{b}")).unwrap());
    }
}
