//! The entries of a policy's lists: commands, digests, capabilities and paths.

use std::fmt;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

/// Maximum number of a command's arguments, including the program.
const MAX_ARGUMENTS: usize = 32;
/// Maximum length of an argument or of a path, in bytes.
const MAX_TEXT: usize = 4096;

/// Prefix of the names of capabilities.
const CAPABILITY_PREFIX: &str = "CAP_";
/// All capabilities of Linux 6.12 (include/uapi/linux/capability.h), without the prefix.
const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Reason why an entry of a list is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEntry {
    /// A command is empty or too long.
    #[error("invalid command {0:?}: {1}")]
    Command(Vec<String>, &'static str),
    /// A digest does not have the form `sha256:<64 lower-case hexadecimal digits>`.
    #[error("invalid digest {0:?}: must be \"sha256:\" followed by 64 lower-case hexadecimal digits")]
    Digest(String),
    /// A capability does not exist.
    #[error("unknown capability {0:?}: must be the name of a Linux capability, for example CAP_NET_RAW")]
    Capability(String),
    /// A path is not absolute, not normalized or too long.
    #[error("invalid path {0:?}: must be absolute and normalized, and have at most {MAX_TEXT} bytes")]
    Path(String),
}

/// A command: a program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Command(Vec<String>);

impl Command {
    /// Returns the program and its arguments.
    pub fn arguments(&self) -> &[String] {
        &self.0
    }
}

impl TryFrom<Vec<String>> for Command {
    type Error = InvalidEntry;

    fn try_from(arguments: Vec<String>) -> Result<Self, Self::Error> {
        let reason = if arguments.first().is_none_or(String::is_empty) {
            "it has no program"
        } else if arguments.len() > MAX_ARGUMENTS {
            "it has more than 32 arguments"
        } else if arguments.iter().any(|argument| argument.len() > MAX_TEXT) {
            "an argument has more than 4096 bytes"
        } else {
            return Ok(Self(arguments));
        };
        // The error quotes only a part of the command, because the error has to fit into a log line.
        let quoted = arguments.iter().take(4).map(|argument| argument.chars().take(64).collect()).collect();
        Err(InvalidEntry::Command(quoted, reason))
    }
}

/// A SHA-256 digest in the form `sha256:<64 lower-case hexadecimal digits>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl Digest {
    /// Returns the digest in an image reference of the form `name@sha256:…`, or in an image id of the form `sha256:…`.
    /// Returns `None` if the reference has no valid digest.
    pub fn of_reference(reference: &str) -> Option<Self> {
        let digest = reference.rsplit_once('@').map_or(reference, |(_, digest)| digest);
        Self::try_from(digest.to_owned()).ok()
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidEntry;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.strip_prefix("sha256:") {
            Some(digits) if digits.len() == 64 && digits.bytes().all(hexadecimal) => Ok(Self(text)),
            _ => Err(InvalidEntry::Digest(text.chars().take(256).collect())),
        }
    }
}

/// A capability of Linux. Its name is in upper case and has the prefix `CAP_`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Capability(String);

impl Capability {
    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Capability {
    type Error = InvalidEntry;

    /// Accepts names in lower case, and names without the prefix.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix(CAPABILITY_PREFIX).unwrap_or(&upper);
        if CAPABILITIES.contains(&name) {
            Ok(Self(format!("{CAPABILITY_PREFIX}{name}")))
        } else {
            Err(InvalidEntry::Capability(text.chars().take(64).collect()))
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// An absolute, normalized path in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct ContainerPath(String);

impl ContainerPath {
    /// Returns whether `path` is equal to or below this path. Returns false if `path` is relative or contains `..`.
    pub fn covers(&self, path: &Path) -> bool {
        let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        path.is_absolute() && path.components().all(plain) && path.starts_with(&self.0)
    }
}

impl TryFrom<String> for ContainerPath {
    type Error = InvalidEntry;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let parts = || text.strip_prefix('/').into_iter().flat_map(|rest| rest.split('/'));
        let normalized = text == "/" || parts().all(|part| !matches!(part, "" | "." | ".."));
        if text.starts_with('/') && normalized && text.len() <= MAX_TEXT && !text.contains('\0') {
            Ok(Self(text))
        } else {
            Err(InvalidEntry::Path(text.chars().take(256).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Result<ContainerPath, InvalidEntry> {
        text.to_owned().try_into()
    }

    #[test]
    fn command_rejects_missing_program_and_exceeded_limits() {
        let command = |arguments: Vec<String>| Command::try_from(arguments).map_err(|error| error.to_string());
        assert!(command(vec!["a".into(); 32]).is_ok());
        assert!(command(vec!["a".into(); 33]).unwrap_err().contains("more than 32 arguments"));
        assert!(command(vec!["a".into(), String::new()]).is_ok());
        assert!(command(vec![String::new()]).unwrap_err().contains("no program"));
        let error = command(vec!["ä".repeat(4096)]).unwrap_err();
        assert!(error.contains("more than 4096 bytes") && error.len() < 256, "{error}");
    }

    #[test]
    fn digest_is_found_in_references() {
        let digits = "0123456789abcdef".repeat(4);
        let digest = Digest(format!("sha256:{digits}"));
        for reference in [format!("sha256:{digits}"), format!("a/b:1@sha256:{digits}"), format!("a@sha256:{digits}")] {
            assert_eq!(Digest::of_reference(&reference), Some(digest.clone()), "{reference}");
        }
        let upper = digits.to_uppercase();
        let more = format!("sha256:{digits}0");
        for reference in ["", "busybox", "busybox:latest", "a@sha256:00", &format!("a@sha256:{upper}"), &more, &digits]
        {
            assert_eq!(Digest::of_reference(reference), None, "{reference}");
        }
    }

    #[test]
    fn capability_names_are_normalized() {
        let name = |text: &str| Capability::try_from(text.to_owned()).map(|capability| capability.name().to_owned());
        for text in ["CAP_NET_RAW", "NET_RAW", "cap_net_raw", "net_raw"] {
            assert_eq!(name(text).unwrap(), "CAP_NET_RAW");
        }
        for text in ["", "ALL", "CAP_", "CAP_CAP_KILL", "CAP_KILL "] {
            assert!(name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn container_path_is_absolute_and_normalized() {
        for text in ["/", "/a", "/a/b", "/..a"] {
            assert!(path(text).is_ok(), "{text}");
        }
        for text in ["", "a", "//", "/a/", "/a//b", "/a/..", "/../a", "/./a", "/a\0"] {
            assert!(path(text).is_err(), "{text}");
        }
    }

    #[test]
    fn container_path_covers_itself_and_paths_below() {
        let data = path("/data").unwrap();
        for inside in ["/data", "/data/", "/data/a/b", "/data//a"] {
            assert!(data.covers(Path::new(inside)), "{inside}");
        }
        for outside in ["/", "/dat", "/data2", "data", "/data/../etc", "/x/../data", ""] {
            assert!(!data.covers(Path::new(outside)), "{outside}");
        }
        assert!(path("/").unwrap().covers(Path::new("/any/thing")));
    }
}
