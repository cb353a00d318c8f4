//! Id mappings of the pod's user namespace: its uids and gids, and the guest's ids that they map to.

use std::fmt::Write as _;

use husk_proto::agent::{IdMapping, SetupRequest};
use libcontainer::oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

/// Lines of `uid_map` or `gid_map`: first id in the container, first id in the guest, number of ids.
type MapLines = Vec<(u32, u32, u32)>;

/// Id mappings of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMappings {
    uids: MapLines,
    gids: MapLines,
}

impl IdMappings {
    /// Returns the mappings of a Setup request, or `None` if the request has no mappings.
    pub fn from_setup(request: &SetupRequest) -> Option<Self> {
        let lines = |mappings: &[IdMapping]| mappings.iter().map(|m| (m.container, m.host, m.size)).collect();
        Some(Self { uids: lines(&request.uid_mappings), gids: lines(&request.gid_mappings) })
            .filter(|id_mappings| !id_mappings.uids.is_empty() || !id_mappings.gids.is_empty())
    }

    /// Returns the mappings of a container's specification, or `None` if the container has no user namespace.
    pub fn from_spec(linux: &Linux) -> Option<Self> {
        let mut namespaces = linux.namespaces().iter().flatten();
        let lines = |mappings: &Option<Vec<LinuxIdMapping>>| {
            mappings.iter().flatten().map(|m| (m.container_id(), m.host_id(), m.size())).collect()
        };
        namespaces
            .any(|namespace| namespace.typ() == LinuxNamespaceType::User)
            .then(|| Self { uids: lines(linux.uid_mappings()), gids: lines(linux.gid_mappings()) })
    }

    /// Maps a uid of the namespace to the guest's uid. An unmapped uid becomes `nobody`.
    pub fn uid(&self, id: u32) -> u32 {
        map_id(&self.uids, id)
    }

    /// Maps a gid of the namespace to the guest's gid. An unmapped gid becomes `nobody`.
    pub fn gid(&self, id: u32) -> u32 {
        map_id(&self.gids, id)
    }

    /// Content of `uid_map` for a process in the namespace.
    pub fn uid_map(&self) -> String {
        format_map(&self.uids)
    }

    /// Content of `gid_map` for a process in the namespace.
    pub fn gid_map(&self) -> String {
        format_map(&self.gids)
    }
}

/// Maps a container's uid to the guest's uid. Without a user namespace, both uids are equal.
pub fn uid_in_guest(id_mappings: Option<&IdMappings>, id: u32) -> u32 {
    id_mappings.map_or(id, |id_mappings| id_mappings.uid(id))
}

fn map_id(lines: &MapLines, id: u32) -> u32 {
    const NOBODY: u32 = 65534;
    let found = lines.iter().find_map(|(container, host, size)| {
        let offset = id.checked_sub(*container).filter(|offset| offset < size)?;
        host.checked_add(offset)
    });
    found.unwrap_or(NOBODY)
}

fn format_map(lines: &MapLines) -> String {
    lines.iter().fold(String::new(), |mut text, (container, host, size)| {
        let _ = writeln!(text, "{container} {host} {size}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(spec: &str) -> Option<IdMappings> {
        IdMappings::from_spec(&serde_json::from_str(spec).unwrap())
    }

    #[test]
    fn from_spec_reads_mappings_of_a_user_namespace() {
        let mappings = r#""uidMappings":[{"containerID":0,"hostID":65536,"size":10},{"containerID":10,"hostID":7,"size":1}],
            "gidMappings":[{"containerID":0,"hostID":131072,"size":10}]"#;
        let found = parse(&format!(r#"{{"namespaces":[{{"type":"user","path":"/x"}}],{mappings}}}"#)).unwrap();
        assert_eq!((found.uid(0), found.uid(10), found.uid(11), found.gid(9)), (65536, 7, 65534, 131_081));
        assert_eq!(found.uid_map(), "0 65536 10\n10 7 1\n");
        assert_eq!(found.gid_map(), "0 131072 10\n");
        assert_eq!(uid_in_guest(Some(&found), 1), 65537);
        assert_eq!(uid_in_guest(None, 1), 1);
        assert_eq!(parse(&format!(r#"{{"namespaces":[{{"type":"pid"}}],{mappings}}}"#)), None);
    }

    #[test]
    fn from_setup_returns_none_without_mappings() {
        let mut request = SetupRequest::new();
        assert_eq!(IdMappings::from_setup(&request), None);
        let mapping = IdMapping { container: 0, host: 65536, size: 1, ..Default::default() };
        request.uid_mappings.push(mapping.clone());
        request.gid_mappings.push(mapping);
        assert_eq!(IdMappings::from_setup(&request).unwrap().uid(0), 65536);
    }
}
