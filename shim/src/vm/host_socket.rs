//! A request of the agent: a process of a container connects to a Unix socket of the node.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use husk_proto::agent::HostSocket;
use husk_proto::host_socket::{MAX_GROUPS, MAX_PATH};

use crate::ids::is_name;

/// A validated request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSocketRequest {
    /// Token of the stream on which the agent expects the reply and the data. Never 0.
    pub token: u64,
    /// Name of the volume in the share. A single path component.
    pub volume: String,
    /// Path of the socket below the volume's root, with plain components only. Empty if the volume is the socket.
    pub path: PathBuf,
    /// Credentials that the process has, according to the agent.
    pub credentials: Credentials,
}

/// Credentials of a process of the guest, as ids of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Validates a request. Returns `None` if it is invalid.
pub fn check(request: HostSocket) -> Option<HostSocketRequest> {
    let HostSocket { token, volume, path, uid, gid, groups, .. } = request;
    let path = PathBuf::from(OsString::from_vec(path));
    let is_id = |id: &u32| *id != u32::MAX;
    let valid = token != 0
        && is_name(&volume)
        && is_plain(&path)
        && groups.len() <= MAX_GROUPS
        && is_id(&uid)
        && is_id(&gid)
        && groups.iter().all(is_id);
    valid.then_some(HostSocketRequest { token, volume, path, credentials: Credentials { uid, gid, groups } })
}

/// Returns whether `path` is relative, has plain components only, and is not too long.
fn is_plain(path: &Path) -> bool {
    let text = path.as_os_str();
    text.len() <= MAX_PATH
        && !text.as_encoded_bytes().contains(&0)
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> HostSocket {
        HostSocket {
            token: 1,
            volume: "3.fe-1a-7-3".into(),
            path: b"a/socket".to_vec(),
            uid: 1000,
            gid: 1000,
            groups: vec![1, 2],
            ..Default::default()
        }
    }

    #[test]
    fn check_rejects_what_an_agent_must_not_send() {
        let changed = |change: fn(&mut HostSocket)| {
            let mut request = valid();
            change(&mut request);
            check(request)
        };
        assert!(changed(|_| ()).is_some_and(|request| request.path == Path::new("a/socket")));
        assert!(changed(|r| r.path.clear()).is_some());
        let invalid: &[fn(&mut HostSocket)] = &[
            |r| r.token = 0,
            |r| r.volume = String::new(),
            |r| r.volume = "..".into(),
            |r| r.volume = "../c1".into(),
            |r| r.volume = ".volumes".into(),
            |r| r.path = b"/run/socket".to_vec(),
            |r| r.path = b"../socket".to_vec(),
            |r| r.path = b"a/../../socket".to_vec(),
            |r| r.path = b"./socket".to_vec(),
            |r| r.path = b"a\0b".to_vec(),
            |r| r.path = vec![b'a'; MAX_PATH + 1],
            |r| r.groups = vec![0; MAX_GROUPS + 1],
            |r| r.groups = vec![u32::MAX],
            |r| r.uid = u32::MAX,
            |r| r.gid = u32::MAX,
        ];
        for (number, change) in invalid.iter().enumerate() {
            assert_eq!(changed(*change), None, "change {number}");
        }
    }

    proptest::proptest! {
        #[test]
        fn is_plain_accepts_only_paths_that_stay_below(bytes: Vec<u8>) {
            let path = PathBuf::from(OsString::from_vec(bytes));
            if is_plain(&path) {
                let joined = Path::new("/volume").join(&path);
                proptest::prop_assert!(joined.starts_with("/volume"));
                proptest::prop_assert!(joined.components().all(|part| part != Component::ParentDir));
            }
        }
    }
}
