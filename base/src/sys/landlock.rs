//! The version of landlock(7) that this kernel has.

use std::io;

/// LANDLOCK_CREATE_RULESET_VERSION (include/uapi/linux/landlock.h).
const VERSION: libc::c_uint = 1;

/// Returns the ABI version of landlock, 1 or more.
///
/// # Errors
/// ENOSYS if the kernel was built without landlock, and EOPNOTSUPP if landlock is not enabled.
pub fn abi() -> io::Result<u32> {
    // SAFETY: with this flag and no attributes, the call only returns a number.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0, VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no landlock_create_ruleset")]
    fn abi_is_a_version_or_a_known_error() {
        match abi() {
            Ok(version) => assert!(version >= 1),
            Err(error) => assert!([libc::ENOSYS, libc::EOPNOTSUPP].contains(&error.raw_os_error().unwrap())),
        }
    }
}
