//! Id mappings of user namespaces and id-mapped mounts.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
};

use husk_base::sys::user_namespace::Holder;
use serde::Deserialize;

/// Id that the kernel shows in place of every unmapped id (`overflowuid`).
const OVERFLOW_ID: u32 = 65534;
/// Maximum number of mappings that the kernel accepts (user_namespaces(7)).
const MAX_LINES: usize = 340;

/// Maps a range of ids in a user namespace to a range of ids outside the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct IdMapping {
    /// First id inside the namespace.
    #[serde(rename = "containerID", default)]
    pub container: u32,
    /// First id outside the namespace.
    #[serde(rename = "hostID", default)]
    pub host: u32,
    /// Number of ids.
    #[serde(default)]
    pub size: u32,
}

impl IdMapping {
    /// Returns the id to which `id` maps outside the namespace, or `None` if this range does not contain `id`.
    fn map_id(&self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.container).filter(|offset| *offset < self.size)?;
        self.host.checked_add(offset)
    }

    /// Returns whether an id of this range maps to `id`.
    fn has_host_id(&self, id: u32) -> bool {
        id.checked_sub(self.host).is_some_and(|offset| offset < self.size)
    }
}

/// Why id mappings are invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdMappingError {
    /// The mappings of users or groups are missing.
    #[error("missing id mappings: {0} is empty")]
    Empty(&'static str),
    /// The specification has mappings, but no user namespace.
    #[error("{0} needs a user namespace, but the specification does not have one")]
    NoNamespace(&'static str),
    /// A mapping is empty or exceeds the range of ids.
    #[error(
        "invalid {kind} mapping {container}:{host}:{size}: the size must not be 0, and the largest id is 4294967294"
    )]
    Range {
        /// Field of the specification that contains the mapping.
        kind: &'static str,
        /// First id inside the namespace.
        container: u32,
        /// First id outside the namespace.
        host: u32,
        /// Number of ids.
        size: u32,
    },
    /// Two mappings have ids in common.
    #[error("invalid {0}: two mappings overlap")]
    Overlap(&'static str),
    /// The number of mappings exceeds the kernel's limit.
    #[error("invalid {0}: more than {MAX_LINES} mappings")]
    Many(&'static str),
    /// Id 0 is not mapped. Without root, no process could set up the container.
    #[error("invalid {0}: root of the user namespace (id 0) is not mapped")]
    NoRoot(&'static str),
}

/// Mappings of user and group ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMappings {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl IdMappings {
    /// Returns the mappings of a specification's user namespace, or `None` if `has_namespace` is false.
    ///
    /// # Errors
    /// [`IdMappingError`].
    pub fn from_namespace(
        has_namespace: bool,
        uids: &[IdMapping],
        gids: &[IdMapping],
    ) -> Result<Option<Self>, IdMappingError> {
        let kinds = [("linux.uidMappings", uids), ("linux.gidMappings", gids)];
        if !has_namespace {
            return match kinds.iter().find(|(_, mappings)| !mappings.is_empty()) {
                Some((kind, _)) => Err(IdMappingError::NoNamespace(kind)),
                None => Ok(None),
            };
        }
        for (kind, mappings) in kinds {
            check(kind, mappings)?;
            if !mappings.iter().any(|mapping| mapping.container == 0) {
                return Err(IdMappingError::NoRoot(kind));
            }
        }
        Ok(Some(Self { uids: uids.to_vec(), gids: gids.to_vec() }))
    }

    /// Returns the mappings of an id-mapped mount, or `None` if the mount is not id-mapped.
    ///
    /// # Errors
    /// [`IdMappingError`].
    pub fn from_mount(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Option<Self>, IdMappingError> {
        if uids.is_empty() && gids.is_empty() {
            return Ok(None);
        }
        check("uidMappings", uids)?;
        check("gidMappings", gids)?;
        Ok(Some(Self { uids: uids.to_vec(), gids: gids.to_vec() }))
    }

    /// Returns the mappings in the mount options `uidmap=` and `gidmap=` of a rootfs, or `None` without these options.
    ///
    /// containerd writes each mapping as `container:host:size`, and separates mappings by commas (core/mount).
    ///
    /// # Errors
    /// The reason why the options are invalid.
    pub fn from_options<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Option<Self>, String> {
        let (mut uids, mut gids) = (Vec::new(), Vec::new());
        for option in options {
            if let Some(text) = option.strip_prefix("uidmap=") {
                uids = parse(text).ok_or_else(|| format!("invalid id mapping {option:?}"))?;
            } else if let Some(text) = option.strip_prefix("gidmap=") {
                gids = parse(text).ok_or_else(|| format!("invalid id mapping {option:?}"))?;
            }
        }
        Self::from_mount(&uids, &gids).map_err(|error| error.to_string())
    }

    /// Returns whether a user id of the namespace maps to `id`.
    pub fn has_host_uid(&self, id: u32) -> bool {
        self.uids.iter().any(|mapping| mapping.has_host_id(id))
    }

    /// Returns whether a group id of the namespace maps to `id`.
    pub fn has_host_gid(&self, id: u32) -> bool {
        self.gids.iter().any(|mapping| mapping.has_host_id(id))
    }

    /// Returns the user id to which `id` maps outside the namespace, or `None` if `id` is not mapped.
    pub fn uid(&self, id: u32) -> Option<u32> {
        self.uids.iter().find_map(|mapping| mapping.map_id(id))
    }

    /// Returns the group id to which `id` maps outside the namespace, or `None` if `id` is not mapped.
    pub fn gid(&self, id: u32) -> Option<u32> {
        self.gids.iter().find_map(|mapping| mapping.map_id(id))
    }

    /// Returns the owner that an id-mapped mount with these mappings shows for a file with the owner `uid` and `gid`.
    pub fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        (self.uid(uid).unwrap_or(OVERFLOW_ID), self.gid(gid).unwrap_or(OVERFLOW_ID))
    }

    /// Returns the user id mappings and the group id mappings.
    pub fn mappings(&self) -> (&[IdMapping], &[IdMapping]) {
        (&self.uids, &self.gids)
    }

    /// Returns a text that identifies the mappings, for use in a file name.
    pub fn tag(&self) -> String {
        let all = |mappings: &[IdMapping]| {
            let one = |m: &IdMapping| format!("{:x}-{:x}-{:x}", m.container, m.host, m.size);
            mappings.iter().map(one).collect::<Vec<_>>().join("-")
        };
        format!("u{}-g{}", all(&self.uids), all(&self.gids))
    }

    /// Creates a user namespace with these mappings, for an id-mapped mount. Blocks while a child process starts and
    /// ends.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let holder = Holder::new()?;
        let proc = format!("/proc/{}", holder.pid());
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

fn check(kind: &'static str, mappings: &[IdMapping]) -> Result<(), IdMappingError> {
    if mappings.is_empty() {
        return Err(IdMappingError::Empty(kind));
    }
    if mappings.len() > MAX_LINES {
        return Err(IdMappingError::Many(kind));
    }
    for (index, mapping) in mappings.iter().enumerate() {
        let IdMapping { container, host, size } = *mapping;
        // The id 2^32-1 cannot be mapped, because this id means "no id" (chown(2)).
        if size == 0 || container.checked_add(size).is_none() || host.checked_add(size).is_none() {
            return Err(IdMappingError::Range { kind, container, host, size });
        }
        let overlap = |a: u32, b: u32, of: u32| a < b.saturating_add(of) && b < a.saturating_add(size);
        let before = mappings.iter().take(index);
        for other in before {
            if overlap(container, other.container, other.size) || overlap(host, other.host, other.size) {
                return Err(IdMappingError::Overlap(kind));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container: u32, host: u32, size: u32) -> IdMapping {
        IdMapping { container, host, size }
    }

    #[test]
    fn from_options_parses_mappings() {
        let id_mappings =
            IdMappings::from_options(["index=off", "uidmap=0:1000:10,10:5000:5", "gidmap=0:7:1"]).unwrap().unwrap();
        assert_eq!((id_mappings.uid(9), id_mappings.uid(14), id_mappings.uid(15)), (Some(1009), Some(5004), None));
        assert_eq!((id_mappings.gid(0), id_mappings.gid(1)), (Some(7), None));
        assert_eq!(id_mappings.tag(), "u0-3e8-a-a-1388-5-g0-7-1");
        assert_eq!(IdMappings::from_options(["index=off"]), Ok(None));
        for broken in ["uidmap=0:1", "uidmap=a:b:c", "uidmap=0:1:1:1", "uidmap="] {
            assert!(IdMappings::from_options([broken, "gidmap=0:7:1"]).unwrap_err().contains("invalid id mapping"));
        }
        assert!(IdMappings::from_options(["uidmap=0:1:1"]).unwrap_err().contains("gidMappings is empty"));
    }

    #[test]
    fn check_rejects_invalid_mappings() {
        let of = |all: &[IdMapping]| check("x", all).unwrap_err();
        assert!(matches!(of(&[mapping(0, 1, 0)]), IdMappingError::Range { .. }));
        assert!(matches!(of(&[mapping(0, u32::MAX, 1)]), IdMappingError::Range { .. }));
        assert_eq!(of(&[mapping(0, 100, 10), mapping(9, 200, 10)]), IdMappingError::Overlap("x"));
        assert_eq!(of(&[mapping(0, 100, 10), mapping(10, 109, 10)]), IdMappingError::Overlap("x"));
        assert_eq!(of(&[]), IdMappingError::Empty("x"));
        let many: Vec<_> = (0..341).map(|id| mapping(id, id, 1)).collect();
        assert_eq!(of(&many), IdMappingError::Many("x"));
        assert_eq!(check("x", &[mapping(0, 100, 10), mapping(10, 110, 10)]), Ok(()));
    }

    #[test]
    fn namespace_is_created_with_its_mappings() {
        let id_mappings = IdMappings { uids: vec![mapping(0, 70_000, 10)], gids: vec![mapping(0, 80_000, 10)] };
        id_mappings.namespace().expect("this test needs root, because it maps ranges of ids");
    }
}
