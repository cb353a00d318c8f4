//! The users of the pod's user namespace: which of the guest's ids its own are.

use std::fmt::Write as _;

use husk_proto::agent::{IdMapping, SetupRequest};
use libcontainer::oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

/// Lines of a map: first id inside, first id outside, how many.
type Lines = Vec<(u32, u32, u32)>;

/// Users and groups of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    uids: Lines,
    gids: Lines,
}

impl Users {
    /// Those a sandbox is set up with, if any.
    pub fn of_setup(request: &SetupRequest) -> Option<Self> {
        let lines = |mappings: &[IdMapping]| mappings.iter().map(|m| (m.container, m.host, m.size)).collect();
        Some(Self { uids: lines(&request.uid_mappings), gids: lines(&request.gid_mappings) })
            .filter(|users| !users.uids.is_empty() || !users.gids.is_empty())
    }

    /// Those of a container's specification, if it has a user namespace.
    pub fn of(linux: &Linux) -> Option<Self> {
        let mut namespaces = linux.namespaces().iter().flatten();
        let lines = |mappings: &Option<Vec<LinuxIdMapping>>| {
            mappings.iter().flatten().map(|m| (m.container_id(), m.host_id(), m.size())).collect()
        };
        namespaces
            .any(|namespace| namespace.typ() == LinuxNamespaceType::User)
            .then(|| Self { uids: lines(linux.uid_mappings()), gids: lines(linux.gid_mappings()) })
    }

    /// What the user `id` of the namespace is in the guest; one that is not mapped is nobody.
    pub fn uid(&self, id: u32) -> u32 {
        outside(&self.uids, id)
    }

    /// What the group `id` of the namespace is in the guest; one that is not mapped is nobody.
    pub fn gid(&self, id: u32) -> u32 {
        outside(&self.gids, id)
    }

    /// What to write to `uid_map` of a process in the namespace.
    pub fn uid_map(&self) -> String {
        text(&self.uids)
    }

    /// What to write to `gid_map` of a process in the namespace.
    pub fn gid_map(&self) -> String {
        text(&self.gids)
    }
}

/// What the user `id` of a container is in the guest, in a user namespace or without one.
pub fn uid_in_guest(users: Option<&Users>, id: u32) -> u32 {
    users.map_or(id, |users| users.uid(id))
}

fn outside(lines: &Lines, id: u32) -> u32 {
    const NOBODY: u32 = 65534;
    let found = lines.iter().find_map(|(container, host, size)| {
        let offset = id.checked_sub(*container).filter(|offset| offset < size)?;
        host.checked_add(offset)
    });
    found.unwrap_or(NOBODY)
}

fn text(lines: &Lines) -> String {
    lines.iter().fold(String::new(), |mut text, (container, host, size)| {
        let _ = writeln!(text, "{container} {host} {size}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(spec: &str) -> Option<Users> {
        Users::of(&serde_json::from_str(spec).unwrap())
    }

    #[test]
    fn a_specification_with_a_user_namespace_has_users() {
        let mappings = r#""uidMappings":[{"containerID":0,"hostID":65536,"size":10},{"containerID":10,"hostID":7,"size":1}],
            "gidMappings":[{"containerID":0,"hostID":131072,"size":10}]"#;
        let found = users(&format!(r#"{{"namespaces":[{{"type":"user","path":"/x"}}],{mappings}}}"#)).unwrap();
        assert_eq!((found.uid(0), found.uid(10), found.uid(11), found.gid(9)), (65536, 7, 65534, 131_081));
        assert_eq!(found.uid_map(), "0 65536 10\n10 7 1\n");
        assert_eq!(found.gid_map(), "0 131072 10\n");
        assert_eq!(uid_in_guest(Some(&found), 1), 65537);
        assert_eq!(uid_in_guest(None, 1), 1);
        assert_eq!(users(&format!(r#"{{"namespaces":[{{"type":"pid"}}],{mappings}}}"#)), None);
    }

    #[test]
    fn a_setup_without_mappings_has_no_users() {
        let mut request = SetupRequest::new();
        assert_eq!(Users::of_setup(&request), None);
        let mapping = IdMapping { container: 0, host: 65536, size: 1, ..Default::default() };
        request.uid_mappings.push(mapping.clone());
        request.gid_mappings.push(mapping);
        assert_eq!(Users::of_setup(&request).unwrap().uid(0), 65536);
    }
}
