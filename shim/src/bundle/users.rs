//! The users of a user namespace: which of the host's ids a container's are, and mounts that show files so.

use super::spec::Linux;
use serde::Deserialize;
use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
};

/// Who owns what belongs to nobody that is mapped (the kernel's `overflowuid`).
const NOBODY: u32 = 65534;
/// Most lines the kernel takes (user_namespaces(7)).
const MAX_LINES: usize = 340;

/// Ids of a user namespace and what they are outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct IdMapping {
    /// The first id inside.
    #[serde(rename = "containerID", default)]
    pub container: u32,
    /// The same outside.
    #[serde(rename = "hostID", default)]
    pub host: u32,
    /// How many.
    #[serde(default)]
    pub size: u32,
}

impl IdMapping {
    /// `id` outside, if it is one of these.
    fn outside(&self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.container).filter(|offset| *offset < self.size)?;
        self.host.checked_add(offset)
    }
}

/// Why mappings cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// There are none of one kind, or of either.
    #[error("a user namespace needs mappings: {0} is empty")]
    Empty(&'static str),
    /// Mappings of a namespace that is not asked for.
    #[error("{0} without a user namespace")]
    Unasked(&'static str),
    /// A line that says nothing or too much.
    #[error("{kind}: {size} ids from {container}, which are {host} and up, cannot be")]
    Range {
        /// Which mappings.
        kind: &'static str,
        /// First id inside.
        container: u32,
        /// First id outside.
        host: u32,
        /// How many.
        size: u32,
    },
    /// Two lines speak of the same ids.
    #[error("{0}: two mappings overlap")]
    Overlap(&'static str),
    /// More lines than the kernel takes.
    #[error("{0}: more than {MAX_LINES} mappings")]
    Many(&'static str),
    /// Nobody could set the container up.
    #[error("{0}: root of the user namespace (id 0) is not mapped")]
    NoRoot(&'static str),
}

/// Users and groups of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl Users {
    /// Those of a specification, none where it asks for no user namespace.
    ///
    /// # Errors
    /// [`UsersError`].
    pub fn of(linux: &Linux) -> Result<Option<Self>, UsersError> {
        let kinds = [("linux.uidMappings", &linux.uid_mappings), ("linux.gidMappings", &linux.gid_mappings)];
        if !linux.namespaces.iter().any(|namespace| namespace.kind == "user") {
            return match kinds.iter().find(|(_, mappings)| !mappings.is_empty()) {
                Some((kind, _)) => Err(UsersError::Unasked(kind)),
                None => Ok(None),
            };
        }
        for (kind, mappings) in kinds {
            check(kind, mappings)?;
            if !mappings.iter().any(|mapping| mapping.container == 0) {
                return Err(UsersError::NoRoot(kind));
            }
        }
        Ok(Some(Self { uids: linux.uid_mappings.clone(), gids: linux.gid_mappings.clone() }))
    }

    /// Those of a mount of the specification, none where its files belong to whom they say.
    ///
    /// # Errors
    /// [`UsersError`].
    pub fn of_mount(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Option<Self>, UsersError> {
        if uids.is_empty() && gids.is_empty() {
            return Ok(None);
        }
        check("uidMappings", uids)?;
        check("gidMappings", gids)?;
        Ok(Some(Self { uids: uids.to_vec(), gids: gids.to_vec() }))
    }

    /// Those of a root file system's mount options `uidmap=` and `gidmap=` (containerd, core/mount: lines of
    /// `container:host:size` with commas between them); none where there is neither.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of_options<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Option<Self>, String> {
        let (mut uids, mut gids) = (Vec::new(), Vec::new());
        for option in options {
            if let Some(text) = option.strip_prefix("uidmap=") {
                uids = parse(text).ok_or_else(|| format!("{option:?} is no mapping"))?;
            } else if let Some(text) = option.strip_prefix("gidmap=") {
                gids = parse(text).ok_or_else(|| format!("{option:?} is no mapping"))?;
            }
        }
        Self::of_mount(&uids, &gids).map_err(|error| error.to_string())
    }

    /// What the user `id` of the namespace is outside of it, if it is anybody.
    pub fn uid(&self, id: u32) -> Option<u32> {
        self.uids.iter().find_map(|mapping| mapping.outside(id))
    }

    /// What the group `id` of the namespace is outside of it, if it is any.
    pub fn gid(&self, id: u32) -> Option<u32> {
        self.gids.iter().find_map(|mapping| mapping.outside(id))
    }

    /// Whom a mount with these mappings shows a file of `uid` and `gid` to belong to.
    pub fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        (self.uid(uid).unwrap_or(NOBODY), self.gid(gid).unwrap_or(NOBODY))
    }

    /// The mappings of users and of groups.
    pub fn mappings(&self) -> (&[IdMapping], &[IdMapping]) {
        (&self.uids, &self.gids)
    }

    /// What tells mounts of these users from mounts of others, as part of a file's name.
    pub fn tag(&self) -> String {
        let all = |mappings: &[IdMapping]| {
            let one = |m: &IdMapping| format!("{:x}-{:x}-{:x}", m.container, m.host, m.size);
            mappings.iter().map(one).collect::<Vec<_>>().join("-")
        };
        format!("u{}-g{}", all(&self.uids), all(&self.gids))
    }

    /// A user namespace with these users, to mount by; blocks for the life of a process that does nothing else.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let holder = Holder::new()?;
        let proc = format!("/proc/{}", holder.0);
        let lines = |mappings: &[IdMapping]| {
            mappings.iter().map(|m| format!("{} {} {}\n", m.container, m.host, m.size)).collect::<String>()
        };
        fs::write(format!("{proc}/uid_map"), lines(&self.uids))?;
        fs::write(format!("{proc}/gid_map"), lines(&self.gids))?;
        Ok(File::open(format!("{proc}/ns/user"))?.into())
    }
}

fn parse(text: &str) -> Option<Vec<IdMapping>> {
    let one = |line: &str| {
        let mut numbers = line.split(':').map(|number| number.parse::<u32>().ok());
        let mapping = IdMapping { container: numbers.next()??, host: numbers.next()??, size: numbers.next()?? };
        numbers.next().is_none().then_some(mapping)
    };
    text.split(',').map(one).collect()
}

fn check(kind: &'static str, mappings: &[IdMapping]) -> Result<(), UsersError> {
    if mappings.is_empty() {
        return Err(UsersError::Empty(kind));
    }
    if mappings.len() > MAX_LINES {
        return Err(UsersError::Many(kind));
    }
    for (index, mapping) in mappings.iter().enumerate() {
        let IdMapping { container, host, size } = *mapping;
        // The last id there could be is nobody's: it means "none" (chown(2)).
        if size == 0 || container.checked_add(size).is_none() || host.checked_add(size).is_none() {
            return Err(UsersError::Range { kind, container, host, size });
        }
        let meet = |a: u32, b: u32, of: u32| a < b.saturating_add(of) && b < a.saturating_add(size);
        let before = mappings.iter().take(index);
        for other in before {
            if meet(container, other.container, other.size) || meet(host, other.host, other.size) {
                return Err(UsersError::Overlap(kind));
            }
        }
    }
    Ok(())
}

/// A process in a new user namespace, which ends with this.
struct Holder(libc::pid_t);

impl Holder {
    fn new() -> io::Result<Self> {
        // Without an exit signal nobody who waits for any child of the shim's meets this one.
        // SAFETY: without a stack and CLONE_VM this is fork(2). The child has one thread and calls only pause(2), which
        // takes no lock that another thread may have held.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER, 0, 0, 0, 0) };
        match libc::pid_t::try_from(pid) {
            Ok(0) => loop {
                // SAFETY: see above; prctl takes plain numbers.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            Ok(pid) if pid > 0 => Ok(Self(pid)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: the child is not reaped before the second call, so the number is its own; both take no memory but a
        // null status.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container: u32, host: u32, size: u32) -> IdMapping {
        IdMapping { container, host, size }
    }

    #[test]
    fn options_are_mappings() {
        let users = Users::of_options(["index=off", "uidmap=0:1000:10,10:5000:5", "gidmap=0:7:1"]).unwrap().unwrap();
        assert_eq!((users.uid(9), users.uid(14), users.uid(15)), (Some(1009), Some(5004), None));
        assert_eq!((users.gid(0), users.gid(1)), (Some(7), None));
        assert_eq!(users.tag(), "u0-3e8-a-a-1388-5-g0-7-1");
        assert_eq!(Users::of_options(["index=off"]), Ok(None));
        for broken in ["uidmap=0:1", "uidmap=a:b:c", "uidmap=0:1:1:1", "uidmap="] {
            assert!(Users::of_options([broken, "gidmap=0:7:1"]).unwrap_err().contains("no mapping"));
        }
        assert!(Users::of_options(["uidmap=0:1:1"]).unwrap_err().contains("gidMappings is empty"));
    }

    #[test]
    fn mappings_that_cannot_be() {
        let of = |all: &[IdMapping]| check("x", all).unwrap_err();
        assert!(matches!(of(&[mapping(0, 1, 0)]), UsersError::Range { .. }));
        assert!(matches!(of(&[mapping(0, u32::MAX, 1)]), UsersError::Range { .. }));
        assert_eq!(of(&[mapping(0, 100, 10), mapping(9, 200, 10)]), UsersError::Overlap("x"));
        assert_eq!(of(&[mapping(0, 100, 10), mapping(10, 109, 10)]), UsersError::Overlap("x"));
        assert_eq!(of(&[]), UsersError::Empty("x"));
        let many: Vec<_> = (0..341).map(|id| mapping(id, id, 1)).collect();
        assert_eq!(of(&many), UsersError::Many("x"));
        assert_eq!(check("x", &[mapping(0, 100, 10), mapping(10, 110, 10)]), Ok(()));
    }

    #[test]
    fn a_namespace_has_its_users() {
        let users = Users { uids: vec![mapping(0, 70_000, 10)], gids: vec![mapping(0, 80_000, 10)] };
        // Root may do this, and nobody else need.
        // SAFETY: geteuid takes nothing.
        if unsafe { libc::geteuid() } == 0 {
            users.namespace().unwrap();
        }
    }
}
