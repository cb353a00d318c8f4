//! Takes, moves and ends the range locks of one owner of a file in the host's kernel.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use husk_base::sync::lock;
use nix::fcntl::{FcntlArg, fcntl};
use virtiofsd::filesystem::FileSystem as _;

use super::super::closing;
use super::super::ids::{Handle, Inode};
use super::change::{Change, error};
use super::file_table::{FileId, FileTable};
use super::ranges::{RangeLock, Ranges};
use super::table::{OwnerLocks, Place};
use super::waiters::Calls;
use super::{Locks, context};

/// A place with what a wait needs. A wait does not use handles, because the guest may close them.
pub struct Waiting {
    place: Place,
    /// A duplicate of the description.
    file: Option<File>,
}

impl Waiting {
    /// Waits for a lock in the kernel.
    ///
    /// # Errors
    /// The errors of fcntl(2), and those of [`FileTable::wait`].
    pub fn wait(&self, change: &Change, calls: &Calls) -> io::Result<()> {
        match (&self.place, &self.file) {
            (Place::FileTable(table, id, _), _) => table.wait(*id, change.to_kernel(), calls),
            (Place::Description(_), Some(file)) => {
                calls.call(|| Ok(fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&change.to_kernel())).map(drop)?))
            }
            (Place::Description(_), None) => Err(error(libc::EBADF)),
        }
    }

    /// Returns whether the wait was for a lock at this place.
    pub fn is_at(&self, place: &Place) -> bool {
        match (&self.place, place) {
            (Place::Description(own), Place::Description(other)) => own == other,
            (Place::FileTable(own, file, _), Place::FileTable(other, of, _)) => Arc::ptr_eq(own, other) && file == of,
            _ => false,
        }
    }
}

impl Locks {
    /// Gives the owner a place, unless the owner has one that allows the lock. If this has also tried to take the lock,
    /// returns the result.
    pub(super) fn prepare(&self, change: &Change) -> io::Result<Option<io::Result<()>>> {
        let &Change { inode, owner, handle, .. } = change;
        let access =
            self.with_file(inode, handle, |file| Ok(fcntl(file.as_fd(), FcntlArg::F_GETFL)?))? & libc::O_ACCMODE;
        let refused = if change.range.exclusive { libc::O_RDONLY } else { libc::O_WRONLY };
        if access == refused {
            return Err(error(libc::EBADF));
        }
        let writable = access != libc::O_RDONLY;
        let table = lock(&self.table);
        let existing = table.owner(inode, owner).map(|locks| (locks.place.clone(), locks.writable));
        if !table.has_room(existing.is_none()) {
            return Err(error(libc::ENOLCK));
        }
        drop(table);
        let Some((old, old_writable)) = existing else {
            let (place, tried) = self.open_place(change, writable, access)?;
            let locks = OwnerLocks {
                place,
                writable,
                guest_handle: handle,
                open_file: change.open_file,
                pid: change.pid,
                ranges: Ranges::default(),
                waits: 0,
            };
            lock(&self.table).add(inode, owner, locks);
            return Ok(tried);
        };
        if old_writable || !writable {
            return Ok(None);
        }
        let description = self.open(inode, true, access)?;
        let place = match old {
            Place::Description(old) => self.replace(change, old, description)?,
            Place::FileTable(table, id, old) => {
                let attached = self.attach(change, description, &table, Some(id));
                self.close(inode, if attached.is_ok() { old } else { description });
                attached.map(drop)?;
                Place::FileTable(table, id, description)
            }
        };
        if let Some(locks) = lock(&self.table).owner_mut(inode, owner) {
            (locks.place, locks.writable) = (place, true);
        }
        Ok(None)
    }

    /// Changes locks without waiting.
    pub(super) fn set_at(&self, place: &Place, change: &Change) -> io::Result<()> {
        match place {
            Place::Description(handle) => self.with_file(change.inode, *handle, |file| set(file, change)),
            Place::FileTable(table, id, _) => table.set(*id, change.to_kernel()),
        }
    }

    /// Returns a lock that conflicts with a lock of the owner at `place`.
    pub(super) fn get_at(&self, place: &Place, change: &Change) -> io::Result<libc::flock> {
        let mut answer = change.to_kernel();
        match place {
            Place::Description(handle) => self.with_file(change.inode, *handle, |file| {
                fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut answer))?;
                Ok(answer)
            }),
            Place::FileTable(table, id, _) => table.get(*id, answer),
        }
    }

    /// Returns what a wait at `place` needs.
    pub(super) fn waiting_at(&self, place: Place, change: &Change) -> io::Result<Waiting> {
        let file = match place {
            Place::Description(handle) => Some(self.with_file(change.inode, handle, File::try_clone)?),
            Place::FileTable(..) => None,
        };
        Ok(Waiting { place, file })
    }

    /// Closes the place of an owner that does not wait. If `change` unlocks the owner's last range in a file table,
    /// this also unlocks the range. Otherwise the owner has no locks.
    pub(super) fn close_place(&self, change: &Change, place: &Place) {
        match place {
            Place::Description(handle) => self.close(change.inode, *handle),
            Place::FileTable(table, id, handle) => {
                table.detach(*id, change.unlock.then(|| change.to_kernel()));
                self.close(change.inode, *handle);
                self.owners.leave(change.owner, table);
            }
        }
    }

    /// Opens a place for an owner. If this has also tried to take the lock, returns the result.
    fn open_place(&self, change: &Change, writable: bool, access: i32) -> io::Result<(Place, Option<io::Result<()>>)> {
        let description = self.open(change.inode, writable, access)?;
        let table = if change.open_file { None } else { self.owners.enter(change.owner) };
        let Some(table) = table else { return Ok((Place::Description(description), None)) };
        match self.attach(change, description, &table, None) {
            Ok((id, tried)) => Ok((Place::FileTable(table, id, description), Some(tried))),
            Err(error) => {
                log::warn!("failed to open a file for the locks of a process: {error}");
                self.owners.leave(change.owner, &table);
                Ok((Place::Description(description), None))
            }
        }
    }

    /// Opens a description's file in a table. Unless the node already uses the file `used` there, also tries to take
    /// the lock.
    fn attach(
        &self,
        change: &Change,
        description: Handle,
        table: &FileTable,
        used: Option<FileId>,
    ) -> io::Result<(FileId, io::Result<()>)> {
        self.with_file(change.inode, description, |file| {
            let access = fcntl(file.as_fd(), FcntlArg::F_GETFL)? & libc::O_ACCMODE;
            let id = used.map_or_else(|| FileId::of(file), Ok)?;
            Ok((id, table.attach(id, file, access, used.is_none().then(|| change.to_kernel()))?))
        })
    }

    /// Moves the locks of a description that is not open for writing to another description. It has only shared locks.
    /// Therefore, the new one can take the same locks before the old one is closed.
    fn replace(&self, change: &Change, old: Handle, new: Handle) -> io::Result<Place> {
        let inode = change.inode;
        let held: Vec<RangeLock> = match lock(&self.table).owner(inode, change.owner) {
            Some(locks) => locks.ranges.iter().copied().collect(),
            None => Vec::new(),
        };
        let copied = self.with_file(inode, new, |file| {
            held.iter().try_for_each(|range| set(file, &Change { range: *range, unlock: false, ..*change }))
        });
        if let Err(error) = copied {
            self.close(inode, new);
            return Err(error);
        }
        self.close(inode, old);
        Ok(Place::Description(new))
    }

    /// Opens a file of the guest.
    fn open(&self, inode: Inode, writable: bool, access: i32) -> io::Result<Handle> {
        let open = |flags: i32| self.fs.open(context(), inode, false, flags.cast_unsigned());
        let opened = match open(if writable { libc::O_RDWR } else { libc::O_RDONLY }) {
            // The guest's user may write the file, but not read it, on a file system that does not trust root.
            Err(error) if writable && error.raw_os_error() == Some(libc::EACCES) => open(access),
            opened => opened,
        };
        opened?.0.ok_or_else(|| error(libc::EBADF))
    }

    fn close(&self, inode: Inode, description: Handle) {
        let release = || self.fs.release(context(), inode, 0, description, false, false, None);
        if let Err(error) = closing::while_open(&*self.fs, context(), inode, description, release) {
            log::error!("failed to close a file that had locks: {error}");
        }
    }
}

fn set(file: &File, change: &Change) -> io::Result<()> {
    Ok(fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&change.to_kernel())).map(drop)?)
}
