//! Serves FUSE requests. This module itself decodes the requests that have no answer, the requests for locks, and
//! TMPFILE. virtiofsd's `Server` serves all other requests of the request queue. This module extends the answers to
//! WRITE.
//!
//! A vCPU can change guest memory while a request is served. If this module checked a value in guest memory and then
//! read the value again, the second value could be unchecked. Therefore, this module follows three rules:
//!
//! * The device walks each chain once. `Server` gets a copy of the checked descriptors ([`DescriptorTable`]).
//! * `Server` reads the request's header again, and can then find another opcode than this module. Therefore, no check
//!   of a request for `Server` depends on the opcode. Whatever its opcode, a request for `Server` must have space
//!   for the header of an answer, and runs on a worker thread.
//! * `Server` gets no request of the high-priority queue, because the device loop serves this queue. The device loop
//!   must not block, and does not have the capabilities that `Server` needs.

use std::io;
use std::sync::Mutex;

use husk_base::sync::lock;
use virtiofsd::filesystem::{Context, FileSystem as _};
use virtiofsd::fuse::{
    AttrOut, BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, InHeader, InterruptIn, LkIn, LkOut, OpenOut,
};
use virtiofsd::server::Server;
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

use super::checked_fs::CheckedFs;
use super::descriptor_table::{DescriptorTable, guest_address};
use super::ids::Inode;
use super::locks::Answer;
use crate::guest_memory::GuestMemory;
use crate::virtio::queue::{Chain, Iov, log_guest_fault};
use crate::virtio::rate_limit::SharedLimiter;
use crate::virtio::workers::Later;

/// FUSE operation that looks up a name (include/uapi/linux/fuse.h, `enum fuse_opcode`).
const LOOKUP: u32 = 1;
/// Maximum length of a name, with the byte that ends it.
const MAX_NAME: usize = 256;
// FUSE operations without an answer (include/uapi/linux/fuse.h, `enum fuse_opcode`).
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
// FUSE operations for locks.
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
/// FUSE operation that writes to a file.
const WRITE: u32 = 16;
/// FUSE operation that creates and opens a file without a name (O_TMPFILE).
const TMPFILE: u32 = 51;
/// Size of `struct fuse_out_header`, in bytes.
const OUT_HEADER: usize = OUT_HEADER_LEN as usize;
/// The same size in the type that virtqueues use.
const OUT_HEADER_LEN: u32 = 16;
/// Total size of `struct fuse_in_header` and `struct fuse_write_in`, in bytes. These structures precede the data of a
/// WRITE request. A READ request has the same size, but no data.
const WRITE_HEADERS: usize = 80;
/// Total size of `struct fuse_out_header` and `struct fuse_write_out`, in bytes.
const WRITE_ANSWER: usize = 24;
/// Size of `struct fuse_write_attr` (guest/kernel/patches), in bytes.
const WRITE_ATTRIBUTES: usize = size_of::<AttrOut>() + 16;
/// Maximum number of nodes in one BATCH_FORGET. The guest's kernel sends at most 64 (guest/kernel/patches).
const MAX_BATCH: usize = 4096;

/// Index of the queue for FORGET.
pub const HIGH_PRIORITY_QUEUE: u16 = 0;
/// Index of the queue for all other requests.
pub const REQUEST_QUEUE: u16 = 1;

/// Serves the requests of one device.
pub struct FuseServer {
    server: Server<CheckedFs>,
    /// The file system. `server` has a clone of this file system.
    fs: CheckedFs,
    table: Mutex<DescriptorTable>,
}

impl FuseServer {
    /// Creates a server. Fails if memory for the descriptor table cannot be mapped.
    pub fn new(fs: CheckedFs) -> io::Result<Self> {
        Ok(Self { server: Server::new(fs.clone()), fs, table: Mutex::new(DescriptorTable::new()?) })
    }

    /// Returns the limiter of the request queue.
    pub fn limiter(&self) -> &SharedLimiter {
        self.fs.limiter()
    }

    /// Returns whether the guest has mounted the file system.
    pub fn is_mounted(&self) -> bool {
        self.fs.is_mounted()
    }

    /// Lets requests wait for locks, or interrupts all waits and lets no request begin one.
    pub fn allow_lock_waits(&self, allowed: bool) {
        self.fs.locks().allow_waits(allowed);
    }

    /// Returns the locks of files.
    #[cfg(test)]
    pub fn locks(&self) -> &std::sync::Arc<super::locks::Locks> {
        self.fs.locks()
    }

    /// Returns the number of requests that wait for a lock.
    #[cfg(test)]
    pub fn lock_waits(&self) -> usize {
        self.fs.locks().waits()
    }

    /// Serves a request of the request queue. The request may block the calling thread. Returns the number of bytes
    /// written to the chain, or `None` if the request waits for a lock and is answered later.
    pub fn serve(&self, memory: &GuestMemory, mut chain: Chain<'_>, later: Later<'_>) -> Option<u32> {
        match peek::<InHeader>(&chain.readable) {
            Some(header) if matches!(header.opcode, GETLK | SETLK | SETLKW) => {
                chain.readable.skip(size_of::<InHeader>());
                self.serve_lock(header, memory, chain, later)
            }
            Some(header) if header.opcode == TMPFILE => {
                chain.readable.skip(size_of::<InHeader>());
                Some(self.serve_tmpfile(header, chain))
            }
            Some(header) if header.opcode == WRITE => Some(self.serve_write(header, memory, chain)),
            header => Some(self.serve_now(header, memory, chain)),
        }
    }

    /// Serves a request for a lock. `header` is a private copy, which the guest cannot change.
    fn serve_lock(
        &self,
        header: InHeader,
        memory: &GuestMemory,
        mut chain: Chain<'_>,
        later: Later<'_>,
    ) -> Option<u32> {
        let InHeader { opcode, nodeid, unique, .. } = header;
        let Some(request) = take::<LkIn>(&mut chain.readable) else {
            let fault = format_args!("the FUSE request with opcode {opcode} has incomplete arguments");
            log_guest_fault(REQUEST_QUEUE, &fault);
            return Some(reply_error(&chain, unique, libc::EINVAL));
        };
        // The request may open the file once more.
        self.fs.wait_for_fd_of(nodeid);
        let locks = self.fs.locks();
        if opcode == GETLK {
            return Some(match locks.get(nodeid, &request) {
                Ok(lk) => reply(&chain, unique, 0, LkOut { lk }.as_slice()),
                Err(error) => reply_error(&chain, unique, errno(&error)),
            });
        }
        let later = (opcode == SETLKW).then_some(|| -> Answer {
            let (space, kept) = (AnswerSpace::new(memory, &chain.writable), later.keep());
            Box::new(move |result| {
                kept.end(|memory| space.reply(memory, unique, result.as_ref().map_or_else(errno, |()| 0)));
            })
        });
        let result = locks.set(nodeid, unique, &request, later)?;
        Some(reply_error(&chain, unique, result.as_ref().map_or_else(errno, |()| 0)))
    }

    /// Serves a TMPFILE request. `header` is a private copy. The name after the arguments has no meaning. The
    /// extensions after the name would add a group to the thread that creates the file, which needs none because of
    /// its capabilities.
    fn serve_tmpfile(&self, header: InHeader, mut chain: Chain<'_>) -> u32 {
        let fits = chain.writable.len() >= OUT_HEADER + size_of::<EntryOut>() + size_of::<OpenOut>();
        let Some(request) = take::<CreateIn>(&mut chain.readable).filter(|_| fits) else {
            log_guest_fault(REQUEST_QUEUE, &"the TMPFILE request is incomplete, or has no space for its answer");
            return reply_error(&chain, header.unique, libc::EINVAL);
        };
        let CreateIn { flags, mode, umask, .. } = request;
        match self.fs.create_temporary(Context::from(header), header.nodeid, mode, flags, umask) {
            Ok((entry, fh, options)) => {
                let opened = OpenOut { fh, open_flags: options.bits(), padding: 0 };
                let data = [EntryOut::from(entry).as_slice(), opened.as_slice()].concat();
                reply(&chain, header.unique, 0, &data)
            }
            Err(error) => reply_error(&chain, header.unique, errno(&error)),
        }
    }

    /// Serves a WRITE request. If there is space, appends the attributes after the write, and the mtime before the write
    /// (guest/kernel/patches). `header` is a private copy. If the guest changes the request meanwhile, it only gets the
    /// attributes of a file that it could ask for.
    fn serve_write(&self, header: InHeader, memory: &GuestMemory, mut chain: Chain<'_>) -> u32 {
        let fits = chain.writable.len() >= WRITE_ANSWER + WRITE_ATTRIBUTES;
        let attributes = || self.fs.getattr(Context::from(header), header.nodeid, None).ok();
        let is_cheap = || self.fs.nodes().area(header.nodeid).has_cheap_attributes();
        let before = if fits && is_cheap() { attributes() } else { None };
        let used = self.serve_by_virtiofsd(&header, memory, &chain);
        if used as usize != WRITE_ANSWER {
            return used;
        }
        let (Some((before, _)), Some((attr, timeout))) = (before, before.and_then(|_| attributes())) else {
            return used;
        };
        let (attr_valid, attr_valid_nsec) = (timeout.as_secs(), timeout.subsec_nanos());
        let after = AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr };
        let before = [&before.mtime.to_le_bytes()[..], &before.mtimensec.to_le_bytes(), &[0; 4]].concat();
        let appended = [after.as_slice(), &before].concat();
        let length = u32::try_from(WRITE_ANSWER + appended.len()).unwrap_or(0);
        chain.writable.copy_from(&length.to_le_bytes());
        chain.writable.skip(WRITE_ANSWER);
        chain.writable.copy_from(&appended);
        length
    }

    fn serve_now(&self, header: Option<InHeader>, memory: &GuestMemory, mut chain: Chain<'_>) -> u32 {
        let Some(header) = header else {
            log_guest_fault(REQUEST_QUEUE, &"the FUSE request is shorter than its header");
            return 0;
        };
        if matches!(header.opcode, FORGET | BATCH_FORGET | INTERRUPT | DESTROY) {
            chain.readable.skip(size_of::<InHeader>());
            self.serve_unanswered(REQUEST_QUEUE, header, chain.readable, |node, count| {
                self.fs.forget(Context::from(header), node, count);
            });
            return 0;
        }
        self.serve_by_virtiofsd(&header, memory, &chain)
    }

    fn serve_by_virtiofsd(&self, header: &InHeader, memory: &GuestMemory, chain: &Chain<'_>) -> u32 {
        // virtiofsd splits the writer after the answer's header, and panics if the writer is shorter than this header.
        if chain.writable.len() < OUT_HEADER {
            log_guest_fault(REQUEST_QUEUE, &"the answer buffer of the FUSE request is too small");
            return 0;
        }
        let opened = lock(&self.table).open(memory, chain);
        let result = match opened {
            Ok((reader, writer)) => {
                self.server.handle_message(reader, writer, None::<&mut ()>).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match result {
            // The length of an answer fits in a u32, because an answer has at most 1 MiB of data.
            Ok(written) => u32::try_from(written.min(chain.writable.len())).unwrap_or(0),
            Err(error) => {
                let fault = format_args!("failed to serve a FUSE request with opcode {}: {error}", header.opcode);
                log_guest_fault(REQUEST_QUEUE, &fault);
                reply_error(chain, header.unique, libc::EINVAL)
            }
        }
    }

    /// Serves a request of the high-priority queue: FORGET, BATCH_FORGET or INTERRUPT. Answers any other request with
    /// EOPNOTSUPP. Returns the number of bytes written to the chain.
    ///
    /// The device loop calls this function. When the guest has no more references to a node, FORGET closes the node's
    /// O_PATH fd. Closing the fd can block if the file is already unlinked, because the close then causes the last
    /// iput() of the file's inode, which returns only after the host's file system has freed the file. Therefore, this
    /// function only records the dropped references. It adds to `jobs` the groups for which a worker has to call
    /// [`Self::run_job`].
    pub fn serve_high_priority(&self, mut chain: Chain<'_>, jobs: &mut Vec<(u64, u64)>) -> u32 {
        match take::<InHeader>(&mut chain.readable) {
            Some(header) if matches!(header.opcode, FORGET | BATCH_FORGET | INTERRUPT) => {
                self.serve_unanswered(HIGH_PRIORITY_QUEUE, header, chain.readable, |node, count| {
                    jobs.extend(self.fs.nodes().queue_forget(node, count).map(|group| (group, group)));
                });
                0
            }
            Some(header) => reply_error(&chain, header.unique, libc::EOPNOTSUPP),
            None => {
                log_guest_fault(HIGH_PRIORITY_QUEUE, &"the FUSE request is shorter than its header");
                0
            }
        }
    }

    /// Drops the references that [`Self::serve_high_priority`] has recorded for one node of a group.
    pub fn run_job(&self, group: u64) {
        if let Some(job) = self.fs.nodes().take_job(group) {
            self.fs.run_job(&job);
        }
    }

    /// Returns the group of a request: the mount of its node. The guest can change the request afterwards. Then the
    /// request only counts for another mount.
    pub fn group(&self, chain: &Chain<'_>) -> u64 {
        let Some(header) = peek::<InHeader>(&chain.readable) else { return 0 };
        let nodes = self.fs.nodes();
        if header.opcode != LOOKUP {
            return nodes.group(header.nodeid);
        }
        let mut request = [0; size_of::<InHeader>() + MAX_NAME];
        let length = chain.readable.copy_to(&mut request);
        let name = request.get(size_of::<InHeader>()..length).unwrap_or_default();
        nodes.lookup_group(header.nodeid, name.split(|&byte| byte == 0).next().unwrap_or_default())
    }

    /// Answers a request with EIO. Returns the number of bytes written to the chain.
    pub fn refuse(&self, chain: &Chain<'_>) -> u32 {
        let header = peek::<InHeader>(&chain.readable);
        header.map_or(0, |header| reply_error(chain, header.unique, libc::EIO))
    }

    /// Ends an activation of the device, whose jobs were dropped.
    pub fn forget_jobs(&self) {
        self.fs.nodes().clear_forgotten();
    }

    /// Serves a request that has no answer. `header` and the decoded arguments are private copies, which the guest
    /// cannot change. Calls `forget` with each node to forget, and the number of references.
    fn serve_unanswered(
        &self,
        queue: u16,
        header: InHeader,
        mut arguments: Iov<'_>,
        mut forget: impl FnMut(Inode, u64),
    ) {
        let decoded = match header.opcode {
            FORGET => take::<ForgetIn>(&mut arguments).map(|ForgetIn { nlookup }| forget(header.nodeid, nlookup)),
            BATCH_FORGET => {
                take_batch(&mut arguments).map(|nodes| nodes.into_iter().for_each(|(node, count)| forget(node, count)))
            }
            DESTROY => {
                self.server.destroy();
                Some(())
            }
            // Only the waits for locks can be interrupted. The guest's kernel sends INTERRUPT for no other request
            // (guest/kernel/patches).
            _ => take::<InterruptIn>(&mut arguments).map(|InterruptIn { unique }| self.fs.locks().interrupt(unique)),
        };
        if decoded.is_none() {
            let fault = format_args!("the FUSE request with opcode {} has incomplete arguments", header.opcode);
            log_guest_fault(queue, &fault);
        }
    }
}

/// Returns the maximum number of data bytes that a request and its answer can have: the bytes after the headers of a
/// WRITE request, and the bytes after the header of an answer. For requests without file data, this number is small.
pub fn data_len(chain: &Chain<'_>) -> usize {
    chain.readable.len().saturating_sub(WRITE_HEADERS) + chain.writable.len().saturating_sub(OUT_HEADER)
}

/// Copies a value out of guest memory. Returns `None` if the chain is too short.
fn peek<T: ByteValued + Default>(from: &Iov<'_>) -> Option<T> {
    let mut value = T::default();
    (from.copy_to(value.as_mut_slice()) == size_of::<T>()).then_some(value)
}

/// Copies a value out of guest memory, and skips the value in `from`. Therefore, no later call reads this value again.
/// Returns `None` if the chain is too short.
fn take<T: ByteValued + Default>(from: &mut Iov<'_>) -> Option<T> {
    let value = peek(from)?;
    from.skip(size_of::<T>());
    Some(value)
}

/// Copies the arguments of a BATCH_FORGET: nodes, and the number of references that the guest drops for each node.
/// Returns `None` if the chain contains fewer nodes than the count says, or if the count is above [`MAX_BATCH`].
fn take_batch(arguments: &mut Iov<'_>) -> Option<Vec<(Inode, u64)>> {
    let BatchForgetIn { count, .. } = take(arguments)?;
    let count = usize::try_from(count).ok().filter(|&count| count <= MAX_BATCH)?;
    if count * size_of::<ForgetOne>() > arguments.len() {
        return None;
    }
    (0..count).map(|_| take(arguments).map(|ForgetOne { nodeid, nlookup }| (nodeid, nlookup))).collect()
}

/// Returns the error number of an answer.
fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Returns the header of an answer, followed by the answer's data.
fn answer(unique: u64, errno: i32, data: &[u8]) -> Vec<u8> {
    let len = OUT_HEADER_LEN + u32::try_from(data.len()).unwrap_or(0);
    [&len.to_le_bytes(), &(-errno).to_le_bytes(), &unique.to_le_bytes()[..], data].concat()
}

/// Writes an answer. Returns the number of bytes written to the chain, which is 0 if the chain is too short.
fn reply(chain: &Chain<'_>, unique: u64, errno: i32, data: &[u8]) -> u32 {
    let answer = answer(unique, errno, data);
    if chain.writable.copy_from(&answer) < answer.len() {
        return 0;
    }
    u32::try_from(answer.len()).unwrap_or(0)
}

/// Writes an answer that contains only an error. Returns the number of bytes written to the chain.
fn reply_error(chain: &Chain<'_>, unique: u64, errno: i32) -> u32 {
    reply(chain, unique, errno, &[])
}

/// The guest memory for the header of an answer that is sent later. The addresses are private copies of those in the
/// guest's descriptors.
struct AnswerSpace(Vec<(GuestAddress, usize)>);

impl AnswerSpace {
    fn new(memory: &GuestMemory, writable: &Iov<'_>) -> Self {
        let mut left = OUT_HEADER;
        let mut parts = Vec::new();
        for part in writable.as_slice() {
            let Some(address) = guest_address(memory, part).filter(|_| left > 0) else { break };
            let len = part.iov_len.min(left);
            left -= len;
            parts.push((GuestAddress(address), len));
        }
        Self(parts)
    }

    /// Writes an answer that contains only an error. Returns the number of bytes written to the chain.
    fn reply(&self, memory: &GuestMemory, unique: u64, errno: i32) -> u32 {
        let answer = answer(unique, errno, &[]);
        let mut left = answer.as_slice();
        for &(address, len) in &self.0 {
            let Some((part, rest)) = left.split_at_checked(len) else { return 0 };
            if memory.write_slice(part, address).is_err() {
                return 0;
            }
            left = rest;
        }
        if left.is_empty() { OUT_HEADER_LEN } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::queue_without_device;

    #[test]
    fn batch_is_decoded_if_all_its_nodes_are_in_the_chain() {
        let batch = |count: u32, nodes: &[[u64; 2]]| {
            let (memory, mut driver, mut queue) = queue_without_device(4);
            let mut bytes = vec![9; size_of::<InHeader>()];
            bytes.extend(count.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(nodes.iter().flatten().flat_map(|number| number.to_le_bytes()));
            // No structure of the request is aligned in guest memory.
            driver.add(&[&bytes[..3], &bytes[3..43], &bytes[43..]], &[]);
            let mut chain = queue.pop(&memory).unwrap().unwrap();
            let header: InHeader = take(&mut chain.readable).unwrap();
            assert_eq!((header.opcode, header.unique), (0x0909_0909, 0x0909_0909_0909_0909));
            take_batch(&mut chain.readable)
        };
        assert_eq!(batch(0, &[]), Some(vec![]));
        assert_eq!(batch(2, &[[5, 6], [7, 8]]), Some(vec![(5, 6), (7, 8)]));
        assert_eq!(batch(1, &[[5, 6], [7, 8]]), Some(vec![(5, 6)]));
        assert_eq!(batch(3, &[[5, 6], [7, 8]]), None);
        assert_eq!(batch(u32::MAX, &[[5, 6]]), None);
    }

    #[test]
    fn error_is_written_only_if_its_header_fits() {
        let (memory, mut driver, mut queue) = queue_without_device(8);
        for (writable, expected) in [(&[7, 9][..], 16), (&[15], 0), (&[], 0), (&[1, 20], 16)] {
            driver.add(&[b"request"], writable);
            let chain = queue.pop(&memory).unwrap().unwrap();
            assert_eq!(reply_error(&chain, 77, libc::EIO), expected);
            let head = chain.head;
            queue.push(&memory, head, expected).unwrap();
            let answer = driver.poll().unwrap().1;
            let bytes = [&16u32.to_le_bytes()[..], &(-libc::EIO).to_le_bytes(), &77u64.to_le_bytes()].concat();
            assert!(answer == bytes || expected == 0 && answer.is_empty());
        }
    }
}
