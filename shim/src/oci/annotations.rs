//! Annotations of a specification, and what the annotations of containerd's CRI plugin and CRI-O say. The keys are in
//! [`husk_proto::annotations`]. Husk's own annotations are in [`husk_config::annotation`].

use std::collections::BTreeMap;

use husk_proto::annotations::{CONTAINER_TYPE, POD_NAME, POD_NAMESPACE, STOP_SIGNAL, crio_key};
use nix::sys::signal::Signal;

/// The first and the last real-time signal (signal(7)). glibc uses the two signals below the first one itself.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Annotations of a specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(transparent)]
pub struct Annotations(pub BTreeMap<String, String>);

impl Annotations {
    /// Returns the value of `key`, which is a key of containerd in [`husk_proto::annotations`]. If `key` is absent,
    /// returns the value of the key that CRI-O uses in place of `key`.
    pub fn cri(&self, key: &str) -> Option<&str> {
        self.get(key).or_else(|| self.get(crio_key(key)?))
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Returns whether the specification has no annotations.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a CRI implementation made the specification.
    pub fn is_cri(&self) -> bool {
        self.cri(CONTAINER_TYPE).is_some()
    }

    /// Returns whether the container is a pod's sandbox container, which represents the pod and runs no program.
    pub fn is_sandbox(&self) -> bool {
        self.cri(CONTAINER_TYPE) == Some("sandbox")
    }

    /// Returns the Kubernetes pod as `namespace/name`. The result is empty for a container without a pod.
    pub fn pod(&self) -> String {
        match (self.cri(POD_NAMESPACE), self.cri(POD_NAME)) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => String::new(),
        }
    }

    /// Returns the signal that asks the container to end. This is SIGTERM unless the annotation with the image's stop
    /// signal has a valid value.
    pub fn stop_signal(&self) -> u32 {
        self.get(STOP_SIGNAL).and_then(parse_signal).unwrap_or(libc::SIGTERM.unsigned_abs())
    }
}

/// Parses a signal's number or name, such as `15`, `SIGTERM` or `SIGRTMIN+3`.
fn parse_signal(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let offset =
        |text: &str, sign| if text.is_empty() { Some(0) } else { text.strip_prefix(sign)?.parse::<u32>().ok() };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        RTMIN.checked_add(offset(rest, '+')?)?
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        RTMAX.checked_sub(offset(rest, '-')?)?
    } else {
        return Some((format!("SIG{name}").parse::<Signal>().ok()? as i32).unsigned_abs());
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use husk_proto::annotations::{
        CRIO_CONTAINER_TYPE, CRIO_POD_NAME, CRIO_POD_NAMESPACE, CRIO_POD_UID, POD_UID, SANDBOX_ID,
    };

    use super::*;

    #[test]
    fn annotations_of_both_cri_implementations_are_read() {
        let of = |pairs: &[(&str, &str)]| {
            Annotations(pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
        };
        let containerd = of(&[(CONTAINER_TYPE, "sandbox"), (POD_NAMESPACE, "n"), (POD_NAME, "p"), (POD_UID, "u")]);
        let crio = of(&[
            (CRIO_CONTAINER_TYPE, "sandbox"),
            (CRIO_POD_NAMESPACE, "n"),
            (CRIO_POD_NAME, "p"),
            (CRIO_POD_UID, "u"),
        ]);
        for annotations in [containerd, crio] {
            assert!(annotations.is_cri() && annotations.is_sandbox());
            assert_eq!((annotations.pod().as_str(), annotations.cri(POD_UID)), ("n/p", Some("u")));
            assert_eq!(annotations.cri(SANDBOX_ID), None);
        }
        let container = of(&[(CRIO_CONTAINER_TYPE, "container")]);
        assert!(container.is_cri() && !container.is_sandbox());
        assert!(!of(&[]).is_cri() && of(&[]).pod().is_empty());
    }

    #[test]
    fn stop_signal_is_sigterm_unless_the_annotation_names_a_signal() {
        let of = |text: &str| Annotations([(STOP_SIGNAL.to_owned(), text.to_owned())].into()).stop_signal();
        let cases = [("SIGINT", 2), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("SIGRTMIN", 34)];
        for (text, number) in cases {
            assert_eq!(of(text), number, "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "RTMIN+31", "RTMIN+4294967295", "RTMAX-65", "RTMIN3"] {
            assert_eq!(of(text), 15, "{text}");
        }
        assert_eq!(Annotations::default().stop_signal(), 15);
    }
}
