//! Serves one disk request.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{SECTOR, SERIAL_LEN};
use crate::guest_memory::GuestMemory;
use crate::jail::Kind;
use crate::virtio::queue::{Chain, Iov, iovec_count, log_guest_fault, log_host_failure};
use crate::virtio::rate_limit::SharedLimiter;
use crate::virtio::workers::{Handler, Later};

/// Length of a request's header in bytes.
const HEADER: usize = 16;
/// Length of one range in a discard or write-zeroes request, in bytes.
const RANGE: usize = 16;
/// Maximum number of ranges in a request.
pub const MAX_RANGES: usize = 16;
/// Maximum length of a range in bytes. This maximum bounds the duration of a request for which the host has to write
/// zeroes.
pub const MAX_ZEROES: u64 = 64 << 20;
/// Maximum number of bytes that a request may zero if the disk has a byte rate limit. The request takes the tokens of
/// these bytes without waiting for the tokens. Therefore, one request must not zero many more bytes than one write
/// request can write.
const MAX_LIMITED_ZEROES: u64 = 1 << 20;
/// Length of the status in bytes.
const STATUS: usize = 1;

/// The file behind the device.
pub struct Disk {
    pub file: File,
    pub sectors: u64,
    pub read_only: bool,
    pub serial: [u8; SERIAL_LEN],
    pub limiter: SharedLimiter,
}

/// Reason why a request failed.
enum Failure {
    /// The guest's request is invalid or not allowed.
    Guest(&'static str),
    /// The device does not support the request.
    Unsupported,
    /// The host failed to serve the request.
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Self::Unsupported,
            _ => Self::Host(error),
        }
    }
}

impl Handler for Disk {
    const KIND: Kind = Kind::Disk;
    const NAME: &'static str = "virtio-blk";

    fn limiter(&self) -> &SharedLimiter {
        &self.limiter
    }

    fn bytes(&self, request: &Chain<'_>) -> usize {
        request.readable.len().saturating_sub(HEADER) + request.writable.len().saturating_sub(STATUS)
    }

    fn serve(&self, _memory: &GuestMemory, chain: Chain<'_>, _later: Later<'_>) -> Option<u32> {
        Some(self.serve_now(chain))
    }
}

impl Disk {
    fn serve_now(&self, chain: Chain<'_>) -> u32 {
        let Chain { mut readable, mut writable, .. } = chain;
        // The status is the last writable byte of the chain. The driver may put the status into a separate descriptor,
        // or into the last descriptor of the data.
        let Some(data_len) = writable.len().checked_sub(STATUS) else {
            log_guest_fault(0, &"the disk request has no space for the status byte");
            return 0;
        };
        let mut status = writable.clone();
        status.skip(data_len);
        writable.truncate(data_len);
        let (written, code) = match self.request(&mut readable, &mut writable) {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(Failure::Unsupported) => (0, VIRTIO_BLK_S_UNSUPP),
            Err(Failure::Guest(reason)) => {
                log_guest_fault(0, &reason);
                (0, VIRTIO_BLK_S_IOERR)
            }
            Err(Failure::Host(error)) => {
                log_host_failure(&format_args!("failed to serve a disk request: {error}"));
                (0, VIRTIO_BLK_S_IOERR)
            }
        };
        // The status fits into a byte, because the status codes are 0, 1 and 2.
        let [code, ..] = code.to_le_bytes();
        status.copy_from(&[code]);
        u32::try_from(written + 1).unwrap_or(u32::MAX)
    }

    fn request(&self, readable: &mut Iov<'_>, writable: &mut Iov<'_>) -> Result<usize, Failure> {
        let header = readable.take::<HEADER>().map_err(|_| Failure::Guest("the disk request has no header"))?;
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let offset = self.offset(sector, writable.len() as u64)?;
                let length = writable.len();
                self.transfer(writable, offset, libc::preadv)?;
                Ok(length)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let offset = self.offset(sector, readable.len() as u64)?;
                self.transfer(readable, offset, libc::pwritev)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.file.sync_data()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(writable.copy_from(&self.serial)),
            VIRTIO_BLK_T_DISCARD => {
                self.ranges(readable, (MAX_RANGES, MAX_ZEROES), |offset, length, _| {
                    self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
                })?;
                Ok(0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.ranges(readable, self.max_write_zeroes(), |offset, length, flags| {
                    // Take tokens, because the host may have to write the zeroes, although the guest has not sent them.
                    self.limiter.charge_bytes(length);
                    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                    let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                    match self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
                        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                            self.write_zeroes(offset, length)
                        }
                        other => other,
                    }
                })?;
                Ok(0)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Returns the maximum number of ranges in a write-zeroes request, and the maximum length of a range in bytes.
    pub fn max_write_zeroes(&self) -> (usize, u64) {
        if self.limiter.limits_bytes() { (1, MAX_LIMITED_ZEROES) } else { (MAX_RANGES, MAX_ZEROES) }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Guest("the disk request writes to a read-only disk")) } else { Ok(()) }
    }

    /// Returns the byte offset of `sector`. Fails if `length` is not a multiple of the sector size, or if the range of
    /// `length` bytes from this offset goes beyond the end of the disk.
    fn offset(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        if !length.is_multiple_of(SECTOR) {
            return Err(Failure::Guest("the length of the disk request is not a multiple of the sector size"));
        }
        match sector.checked_add(length / SECTOR) {
            // The product does not overflow, because the disk's size in bytes fits into a u64.
            Some(end) if end <= self.sectors => Ok(sector * SECTOR),
            _ => Err(Failure::Guest("the disk request goes beyond the end of the disk")),
        }
    }

    /// Transfers the whole vector with preadv or pwritev.
    fn transfer(
        &self,
        iov: &mut Iov<'_>,
        mut offset: u64,
        call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> Result<(), Failure> {
        while !iov.is_empty() {
            let parts = iov.as_slice();
            let at = libc::off_t::try_from(offset)
                .map_err(|_| Failure::Guest("the offset of the disk request is too large"))?;
            // SAFETY: the buffers are checked guest memory, which stays mapped during the call. There are at most
            // MAX_SEGMENTS (IOV_MAX) buffers. preadv gets only buffers that the device may write.
            let result = unsafe { call(self.file.as_raw_fd(), parts.as_ptr(), iovec_count(parts), at) };
            match usize::try_from(result) {
                // A transfer of 0 bytes means that the file has shrunk since the device was created.
                Ok(0) => return Err(Failure::Host(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    iov.skip(count);
                    offset += count as u64;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Calls `each` for each range of a discard or write-zeroes request, with its offset in bytes, its length in bytes
    /// and its flags. Rejects more than `max_ranges` ranges, and ranges of more than `max_length` bytes.
    fn ranges(
        &self,
        list: &mut Iov<'_>,
        (max_ranges, max_length): (usize, u64),
        mut each: impl FnMut(u64, u64, u32) -> io::Result<()>,
    ) -> Result<(), Failure> {
        self.check_writable()?;
        if list.is_empty() || !list.len().is_multiple_of(RANGE) || list.len() / RANGE > max_ranges {
            return Err(Failure::Guest("the disk request has an invalid list of ranges"));
        }
        while let Ok(bytes) = list.take::<RANGE>() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let length = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
            if length > max_length {
                return Err(Failure::Guest("the disk request has a range that is too long"));
            }
            let offset = self.offset(sector, length)?;
            if length > 0 {
                each(offset, length, u32::from_le_bytes([f0, f1, f2, f3]))?;
            }
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (offset, length) = (offset.try_into().map_err(invalid)?, length.try_into().map_err(invalid)?);
        fallocate(&self.file, FallocateFlags::from_bits_retain(mode), offset, length)?;
        Ok(())
    }

    fn write_zeroes(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        let zeroes = [0; 16 * 1024];
        while length > 0 {
            let part = zeroes.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or(&zeroes);
            self.file.write_all_at(part, offset)?;
            offset += part.len() as u64;
            length -= part.len() as u64;
        }
        Ok(())
    }
}
