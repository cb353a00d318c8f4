//! Attaches files to loop devices, because a rootfs may be an image file.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use husk_base::sys::loop_device;

/// Maximum number of attempts. An attempt fails if another process takes the free loop device first.
const ATTEMPTS: usize = 64;

/// Attaches `file` to a free loop device. Returns the device's path and the open device.
///
/// The kernel detaches the file when the device is closed and not mounted (LO_FLAGS_AUTOCLEAR).
pub fn attach(file: &Path, read_only: bool) -> io::Result<(PathBuf, File)> {
    let backing = OpenOptions::new().read(true).write(!read_only).open(file)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        let number = loop_device::free_number(&control)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(&path)?;
        match loop_device::configure(&device, &backing, read_only) {
            Ok(()) => return Ok((path, device)),
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error),
            Err(_) => {}
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}
