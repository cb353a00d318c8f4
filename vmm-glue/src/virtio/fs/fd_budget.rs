//! Limits the number of fds for the files that virtiofsd does not open. virtiofsd limits its own fds.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Fds are scarce if less than 1/`SPARE_FRACTION` of them is free.
const SPARE_FRACTION: u64 = 8;

/// A limited number of fds.
pub struct FdBudget {
    max: u64,
    open: AtomicU64,
}

/// An open file that counts against a budget until it is dropped.
pub struct CountedFile {
    file: File,
    budget: Arc<FdBudget>,
}

impl FdBudget {
    /// Creates a budget of `max` fds.
    pub fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { max, open: AtomicU64::new(0) })
    }

    /// If few fds are left, returns the number of open ones.
    pub fn open_if_scarce(&self) -> Option<u64> {
        let open = self.open.load(Ordering::Relaxed);
        (open >= self.max - self.max / SPARE_FRACTION).then_some(open)
    }

    /// Counts an open file. Closes the file and returns ENFILE if the budget is used up.
    pub fn count(self: &Arc<Self>, file: impl Into<File>) -> io::Result<CountedFile> {
        let next = |open: u64| (open < self.max).then_some(open + 1);
        match self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Ok(CountedFile { file: file.into(), budget: Arc::clone(self) }),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ENFILE)),
        }
    }
}

impl Deref for CountedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for CountedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for CountedFile {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budget_is_refused_when_used_up_and_is_free_again_after_a_close() {
        let budget = FdBudget::new(8);
        let open = || budget.count(File::open("/dev/null").unwrap());
        let mut held: Vec<CountedFile> = (0..6).map(|_| open().unwrap()).collect();
        assert_eq!(budget.open_if_scarce(), None);
        held.extend([open().unwrap(), open().unwrap()]);
        assert_eq!(budget.open_if_scarce(), Some(8));
        assert_eq!(open().err().unwrap().raw_os_error(), Some(libc::ENFILE));
        held.truncate(6);
        assert!(budget.open_if_scarce().is_none() && open().is_ok());
    }
}
