//! Capability sets of a thread (capget(2), capset(2)).

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`. This version uses two structures. Each structure has 32 bits of each set.
const VERSION: u32 = 0x2008_0522;

/// Capability sets of a thread. Bit n is capability n of linux/capability.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Capabilities that permission checks use.
    pub effective: u64,
    /// Capabilities that the thread can make effective.
    pub permitted: u64,
    /// Capabilities that the thread can keep across execve.
    pub inheritable: u64,
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Returns the sets of this thread.
///
/// # Errors
/// The errors of capget(2).
pub fn get() -> io::Result<Capabilities> {
    let mut data = [Data::default(); 2];
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: the kernel reads the header, and fills the two structures that version 3 has. All outlive the call.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [low, high] = data;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(Capabilities {
        effective: join(low.effective, high.effective),
        permitted: join(low.permitted, high.permitted),
        inheritable: join(low.inheritable, high.inheritable),
    })
}

/// Changes the capability sets of this thread. Other threads keep their sets.
///
/// # Errors
/// EPERM if the thread may not have these capabilities, and the other errors of capset(2).
pub fn set(sets: Capabilities) -> io::Result<()> {
    // Each structure has 32 of the 64 bits.
    let part = |set: u64, shift: u32| (set >> shift & 0xffff_ffff) as u32;
    let data = [0, 32].map(|shift| Data {
        effective: part(sets.effective, shift),
        permitted: part(sets.permitted, shift),
        inheritable: part(sets.inheritable, shift),
    });
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: the kernel reads the header and the two structures that version 3 has. All outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the number of capabilities that the kernel knows, which is one more than the highest capability number.
///
/// # Errors
/// The errors of prctl(2), except EINVAL. EINVAL only means that the number that was tried is above the highest
/// capability.
pub fn count() -> io::Result<u32> {
    for number in 0..64 {
        // SAFETY: PR_CAPBSET_READ takes a number and no pointer.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number)) } < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(number) } else { Err(error) };
        }
    }
    Ok(64)
}

/// Removes a capability from the bounding set of this thread. Other threads keep their bounding sets.
///
/// # Errors
/// EPERM without CAP_SETPCAP, and EINVAL if there is no such capability.
pub fn drop_from_bounding_set(number: u32) -> io::Result<()> {
    // SAFETY: PR_CAPBSET_DROP takes a number and no pointer.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no capget")]
    fn get_agrees_with_proc() {
        let capabilities = get().unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap();
        assert_eq!(u64::from_str_radix(permitted.trim(), 16).unwrap(), capabilities.permitted);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no capget")]
    fn set_drops_capabilities_of_only_this_thread() {
        let before = get().unwrap();
        let none = Capabilities { effective: 0, permitted: before.permitted & 1, inheritable: 0 };
        let limited = std::thread::spawn(move || {
            set(none).unwrap();
            get().unwrap()
        });
        assert_eq!(limited.join().unwrap(), none);
        assert_eq!(get().unwrap(), before);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no prctl")]
    fn drop_from_bounding_set_affects_only_this_thread() {
        let bounding = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let set = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
            u64::from_str_radix(set.trim(), 16).unwrap()
        };
        let before = bounding();
        let last = count().unwrap() - 1;
        assert_eq!(before >> last, 1);
        std::thread::spawn(move || {
            drop_from_bounding_set(last).unwrap();
            assert_eq!(bounding(), before & !(1 << last));
            assert!(drop_from_bounding_set(last + 1).is_err());
        })
        .join()
        .unwrap();
        assert_eq!(bounding(), before);
    }
}
