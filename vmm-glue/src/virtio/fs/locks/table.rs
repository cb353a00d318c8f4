//! What the VMM knows about the locks of its guest: who has which ranges, and who waits for which.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use super::super::ids::{Handle, Inode};
use super::file_table::{FileId, FileTable};
use super::ranges::{RangeLock, Ranges};

/// Maximum number of owners with locks, over all files.
const MAX_OWNERS: usize = 4096;
/// Maximum number of locked ranges, over all owners.
const MAX_RANGES: usize = 16384;

/// An owner of range locks of one file: a process of the guest, or an open file of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

/// The locks of all files.
#[derive(Default)]
pub struct Table {
    files: HashMap<Inode, FileLocks>,
    /// Waits of processes, by the request's unique id.
    waiting: HashMap<u64, Waiting>,
    owners: usize,
    ranges: usize,
}

/// The locks of one file.
#[derive(Default)]
struct FileLocks {
    owners: HashMap<Owner, OwnerLocks>,
    /// Serializes the calls for this file, so that the table has the same locks as the kernel. A call may block. It
    /// then does not block calls for other files.
    order: Arc<Mutex<()>>,
    /// Number of requests that use `order`.
    users: usize,
}

/// Where the range locks of one owner of a file are.
#[derive(Clone)]
pub enum Place {
    /// On an open file description (F_OFD_SETLK). No other owner uses this handle.
    Description(Handle),
    /// In the owner's file table (F_SETLK), which has an fd of an open file description. No other owner uses the
    /// description's handle. The handle stays open, because a close makes a request to a network file system.
    FileTable(Arc<FileTable>, FileId, Handle),
}

/// The locks of one owner of a file.
pub struct OwnerLocks {
    /// Where the locks are in the host's kernel.
    pub place: Place,
    /// Whether the file is open for writing at this place.
    pub writable: bool,
    /// The guest's handle in the owner's last request.
    pub guest_handle: Handle,
    /// Whether the owner is an open file, and not a process.
    pub open_file: bool,
    /// The guest's PID of the process that set the last lock.
    pub pid: u32,
    pub ranges: Ranges,
    /// Number of threads that wait for a lock of this owner.
    pub waits: usize,
}

struct Waiting {
    inode: Inode,
    owner: Owner,
    lock: RangeLock,
}

impl Table {
    /// Returns the mutex that serializes the calls for a file. [`Table::leave`] must follow.
    pub fn enter(&mut self, inode: Inode) -> Arc<Mutex<()>> {
        let file = self.files.entry(inode).or_default();
        file.users += 1;
        Arc::clone(&file.order)
    }

    /// Removes a file that has no locks and that no request uses.
    pub fn leave(&mut self, inode: Inode) {
        let Some(file) = self.files.get_mut(&inode) else { return };
        file.users = file.users.saturating_sub(1);
        if file.users == 0 && file.owners.is_empty() {
            self.files.remove(&inode);
        }
    }

    /// Returns whether a file can have locks. Most files have none.
    pub fn has_file(&self, inode: Inode) -> bool {
        self.files.contains_key(&inode)
    }

    /// Returns the locks of an owner.
    pub fn owner(&self, inode: Inode, owner: Owner) -> Option<&OwnerLocks> {
        self.files.get(&inode)?.owners.get(&owner)
    }

    /// Returns the locks of an owner. The number of ranges must not be changed.
    pub fn owner_mut(&mut self, inode: Inode, owner: Owner) -> Option<&mut OwnerLocks> {
        self.files.get_mut(&inode)?.owners.get_mut(&owner)
    }

    /// Returns the owners of a file whose last request had the handle `handle`.
    pub fn owners_by_handle(&self, inode: Inode, handle: Handle) -> Vec<Owner> {
        let owners = self.files.get(&inode).into_iter().flat_map(|file| &file.owners);
        owners.filter(|(_, locks)| locks.guest_handle == handle).map(|(&owner, _)| owner).collect()
    }

    /// Returns whether there is room for another owner, and for two more ranges. A lock in the middle of a range makes
    /// three ranges of one.
    pub fn has_room(&self, new_owner: bool) -> bool {
        self.ranges + 2 <= MAX_RANGES && (!new_owner || self.owners < MAX_OWNERS)
    }

    /// Adds an owner. The owner must be new, and its file must be in use.
    pub fn add(&mut self, inode: Inode, owner: Owner, locks: OwnerLocks) {
        if self.files.entry(inode).or_default().owners.insert(owner, locks).is_none() {
            self.owners += 1;
        }
    }

    /// Changes the ranges of an owner.
    pub fn change(&mut self, inode: Inode, owner: Owner, change: impl FnOnce(&mut Ranges)) {
        let Some(locks) = self.files.get_mut(&inode).and_then(|file| file.owners.get_mut(&owner)) else { return };
        let before = locks.ranges.len();
        change(&mut locks.ranges);
        self.ranges = (self.ranges + locks.ranges.len()).saturating_sub(before);
    }

    /// Returns whether an owner does not wait, and has no locks outside of a range.
    pub fn has_only(&self, inode: Inode, owner: Owner, range: &RangeLock) -> bool {
        let is_in = |held: &RangeLock| range.start <= held.start && held.end <= range.end;
        self.owner(inode, owner).is_some_and(|locks| locks.waits == 0 && locks.ranges.iter().all(is_in))
    }

    /// Removes an owner that has no locks and does not wait. Returns the owner's place, which the caller closes.
    pub fn remove_unused(&mut self, inode: Inode, owner: Owner) -> Option<Place> {
        let file = self.files.get_mut(&inode)?;
        if !file.owners.get(&owner).is_some_and(|locks| locks.ranges.is_empty() && locks.waits == 0) {
            return None;
        }
        let removed = file.owners.remove(&owner)?;
        self.owners = self.owners.saturating_sub(1);
        Some(removed.place)
    }

    /// Returns the PID of the process that has a lock which the kernel has reported. Returns 0 if no process of the
    /// guest has this lock.
    pub fn pid(&self, inode: Inode, asking: Owner, lock: &RangeLock) -> u32 {
        let owners = self.files.get(&inode).into_iter().flat_map(|file| &file.owners);
        let mut holders =
            owners.filter(|&(&owner, locks)| owner != asking && locks.ranges.iter().any(|held| held == lock));
        holders.find(|(_, locks)| !locks.open_file).map_or(0, |(_, locks)| locks.pid)
    }

    /// Records that a process waits for a lock.
    pub fn add_wait(&mut self, unique: u64, inode: Inode, owner: Owner, lock: RangeLock) {
        self.waiting.insert(unique, Waiting { inode, owner, lock });
    }

    /// Removes the record of a wait.
    pub fn remove_wait(&mut self, unique: u64) {
        self.waiting.remove(&unique);
    }

    /// Returns whether a process would wait for itself if it waited for a lock. Like the kernel's function
    /// (`posix_locks_deadlock` in fs/locks.c), this function knows only locks and waits of processes.
    pub fn deadlock(&self, inode: Inode, owner: Owner, lock: &RangeLock) -> bool {
        let mut seen = HashSet::from([owner]);
        let mut next = vec![(inode, owner, *lock)];
        while let Some((inode, waiting, lock)) = next.pop() {
            let owners = self.files.get(&inode).into_iter().flat_map(|file| &file.owners);
            for (&holder, locks) in owners {
                if holder == waiting || locks.open_file || !locks.ranges.iter().any(|held| held.conflicts(&lock)) {
                    continue;
                }
                if holder == owner {
                    return true;
                }
                if seen.insert(holder) {
                    let waits = self.waiting.values().filter(|wait| wait.owner == holder);
                    next.extend(waits.map(|wait| (wait.inode, wait.owner, wait.lock)));
                }
            }
        }
        false
    }

    /// Forgets everything. The file system has closed all descriptions.
    pub fn clear(&mut self) {
        // Requests that are being served keep their entries in use. `leave` accepts that an entry is gone.
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: RangeLock = RangeLock { start: 0, end: 9, exclusive: true };

    fn owner(table: &mut Table, inode: Inode, owner: u64, open_file: bool) {
        let locks = OwnerLocks {
            place: Place::Description(0),
            writable: true,
            guest_handle: 0,
            open_file,
            pid: 0,
            ranges: Ranges::default(),
            waits: 0,
        };
        table.add(inode, Owner(owner), locks);
        table.change(inode, Owner(owner), |ranges| ranges.lock(LOCK));
    }

    #[test]
    fn cycle_of_waiting_processes_is_a_deadlock() {
        let mut table = Table::default();
        for number in 1..=3 {
            owner(&mut table, number, number, false);
        }
        assert!(!table.deadlock(2, Owner(1), &LOCK));
        table.add_wait(1, 2, Owner(1), LOCK);
        assert!(!table.deadlock(3, Owner(2), &LOCK));
        table.add_wait(2, 3, Owner(2), LOCK);
        assert!(table.deadlock(1, Owner(3), &LOCK));
        // Another range, and the wait of another owner, do not conflict.
        assert!(!table.deadlock(1, Owner(3), &RangeLock { start: 10, end: 19, exclusive: true }));
        assert!(!table.deadlock(1, Owner(4), &LOCK));
        table.remove_wait(1);
        assert!(!table.deadlock(1, Owner(3), &LOCK));
    }

    #[test]
    fn open_files_take_no_part_in_deadlocks() {
        let mut table = Table::default();
        owner(&mut table, 1, 1, true);
        owner(&mut table, 2, 2, false);
        table.add_wait(1, 2, Owner(1), LOCK);
        assert!(!table.deadlock(1, Owner(2), &LOCK));
    }

    #[test]
    fn owners_and_ranges_are_bounded() {
        let mut table = Table::default();
        for number in 0..MAX_OWNERS as u64 {
            assert!(table.has_room(true));
            owner(&mut table, number, number, false);
        }
        assert!(!table.has_room(true) && table.has_room(false));
        let mut start = 100;
        while table.has_room(false) {
            table.change(0, Owner(0), |ranges| ranges.lock(RangeLock { start, end: start, exclusive: true }));
            start += 2;
        }
        assert_eq!(table.ranges, MAX_RANGES - 1);
        table.change(0, Owner(0), |ranges| ranges.unlock(0, u64::MAX));
        assert!(table.has_room(false));
        assert!(table.remove_unused(0, Owner(0)).is_some());
        assert!(table.has_room(true));
    }
}
