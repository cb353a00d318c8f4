//! The byte ranges of one file that one owner has locked. The kernel does not tell the VMM which ranges a description
//! has locked. Therefore, the VMM keeps its own list.

/// A lock of a byte range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLock {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// Whether the lock excludes all other locks, and not only exclusive locks.
    pub exclusive: bool,
}

impl RangeLock {
    /// Returns whether two locks of different owners exclude each other.
    pub fn conflicts(&self, other: &Self) -> bool {
        self.overlaps(other) && (self.exclusive || other.exclusive)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// The locks of one owner: sorted, without overlaps, and without neighbours that could be one lock.
#[derive(Debug, Default)]
pub struct Ranges(Vec<RangeLock>);

impl Ranges {
    /// Returns the locks.
    pub fn iter(&self) -> impl Iterator<Item = &RangeLock> {
        self.0.iter()
    }

    /// Returns the number of locks.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether the owner has no lock.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Replaces the part of the existing locks that is in the range of `lock` by `lock`.
    pub fn lock(&mut self, lock: RangeLock) {
        self.replace(&lock, true);
    }

    /// Removes the part of the existing locks that is in a range.
    pub fn unlock(&mut self, start: u64, end: u64) {
        self.replace(&RangeLock { start, end, exclusive: false }, false);
    }

    fn replace(&mut self, range: &RangeLock, keep: bool) {
        let old = std::mem::take(&mut self.0);
        let mut parts = Vec::with_capacity(old.len() + 2);
        for held in old {
            if !held.overlaps(range) {
                parts.push(held);
                continue;
            }
            // Neither subtraction nor addition overflows: a byte before the start and a byte after the end exist.
            if held.start < range.start {
                parts.push(RangeLock { end: range.start - 1, ..held });
            }
            if held.end > range.end {
                parts.push(RangeLock { start: range.end + 1, ..held });
            }
        }
        if keep {
            parts.push(*range);
        }
        parts.sort_unstable_by_key(|part| part.start);
        for part in parts {
            match self.0.last_mut() {
                Some(last) if last.exclusive == part.exclusive && last.end.checked_add(1) == Some(part.start) => {
                    last.end = part.end;
                }
                _ => self.0.push(part),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::fcntl::{FcntlArg, fcntl};
    use proptest::prelude::*;

    use super::*;

    fn request(kind: i32, start: u64, end: u64) -> libc::flock {
        libc::flock {
            l_type: kind as i16,
            l_whence: 0,
            l_start: start as i64,
            l_len: (end - start + 1) as i64,
            l_pid: 0,
        }
    }

    /// Returns the kind of lock that `file` has on a byte, as another description sees it.
    fn kernel(other: &File, byte: u64) -> i32 {
        let mut lock = request(libc::F_WRLCK, byte, byte);
        fcntl(other.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
        lock.l_type.into()
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "Miri lacks locks of open file descriptions")]
        fn list_has_the_ranges_that_the_kernel_has(steps in prop::collection::vec((0..3, 0u64..24, 0u64..8), 1..40)) {
            let path = tempfile::NamedTempFile::new().unwrap();
            let open = || File::options().read(true).write(true).open(path.path()).unwrap();
            let (file, other) = (open(), open());
            let mut ranges = Ranges::default();
            for (kind, start, length) in steps {
                let (end, kind) = (start + length, [libc::F_UNLCK, libc::F_RDLCK, libc::F_WRLCK][kind as usize]);
                fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&request(kind, start, end))).unwrap();
                if kind == libc::F_UNLCK {
                    ranges.unlock(start, end);
                } else {
                    ranges.lock(RangeLock { start, end, exclusive: kind == libc::F_WRLCK });
                }
                for byte in 0..34 {
                    let held = ranges.iter().find(|held| (held.start..=held.end).contains(&byte));
                    let expected = match held {
                        None => libc::F_UNLCK,
                        Some(held) if held.exclusive => libc::F_WRLCK,
                        Some(_) => libc::F_RDLCK,
                    };
                    prop_assert_eq!(kernel(&other, byte), expected, "byte {}", byte);
                }
                let pairs = ranges.0.windows(2);
                let separate = |pair: &[RangeLock]| pair[0].end < pair[1].start
                    && (pair[0].end + 1 < pair[1].start || pair[0].exclusive != pair[1].exclusive);
                prop_assert!(pairs.into_iter().all(separate));
            }
        }
    }

    #[test]
    fn whole_file_can_be_locked_and_unlocked() {
        let mut ranges = Ranges::default();
        ranges.lock(RangeLock { start: 0, end: u64::MAX, exclusive: true });
        ranges.unlock(5, 5);
        assert_eq!(ranges.len(), 2);
        ranges.unlock(0, u64::MAX);
        assert!(ranges.is_empty());
    }
}
