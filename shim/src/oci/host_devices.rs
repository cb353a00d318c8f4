//! Removes the host's devices from a privileged container's specification.
//!
//! For a privileged container, some clients list all devices of the host (containerd, pkg/oci/utils_unix.go,
//! `HostDevices`). These clients are `ctr run --privileged`, nerdctl, and containerd's CRI without
//! `privileged_without_host_devices`. The list stands for all devices of the system on which the container runs. This
//! system is the guest. Therefore, the agent adds all devices of the guest in place of the list
//! (agent/src/task/devices.rs).
//!
//! The list can also contain devices for which the user asked. These devices stay.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use nix::sys::stat::{major, minor};
use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, array, object};

/// Devices that are below /dev on every host. If a list contains all of these devices, the client listed all devices of
/// the host. A user does not ask for these devices, because every container has them anyway.
///
/// This check does not compare the list with the devices that the host has now, because devices can appear and
/// disappear at any time.
const ON_EVERY_HOST: [(&str, Number); 6] = [
    ("/dev/null", Number::character(1, 3)),
    ("/dev/zero", Number::character(1, 5)),
    ("/dev/full", Number::character(1, 7)),
    ("/dev/random", Number::character(1, 8)),
    ("/dev/urandom", Number::character(1, 9)),
    ("/dev/tty", Number::character(5, 0)),
];

/// Type and number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Number {
    character: bool,
    major: u64,
    minor: u64,
}

impl Number {
    const fn character(major: u64, minor: u64) -> Self {
        Self { character: true, major, minor }
    }

    /// Parses an element of `linux.devices` or of the device rules. Returns `None` if the element does not contain the
    /// type and number of a single device.
    fn of(element: &Value) -> Option<Self> {
        let character = match element.get("type").and_then(Value::as_str)? {
            "c" | "u" => true,
            "b" => false,
            _ => return None,
        };
        let number = |key: &str| element.get(key).and_then(Value::as_u64);
        Some(Self { character, major: number("major")?, minor: number("minor")? })
    }
}

/// What the host has at the path of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnHost {
    Device(Number),
    Other,
    Nothing,
}

/// Removes the devices of the host from `linux.devices` if the container is privileged and the list contains all
/// devices of the host. A container is privileged if its device rules allow all devices.
///
/// A device stays if the user asked for the device. The user asked for the device if one of these statements is true:
/// - A device rule names the device.
/// - The list contains the device twice at the same path.
/// - The listed path is not below `/dev`.
/// - The host has something else at the listed path.
/// - The host has nothing at the listed path, and the list also contains the device at another path.
pub fn remove(linux: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), TranslateError> {
    remove_from(linux, notes, on_host)
}

fn remove_from(
    linux: &mut Map<String, Value>,
    notes: &mut Vec<String>,
    on_host: impl Fn(&str) -> OnHost,
) -> Result<(), TranslateError> {
    let rules = match object(linux, "resources")? {
        Some(resources) => array(resources, "devices", "linux.resources.devices")?.to_vec(),
        None => Vec::new(),
    };
    let devices = array(linux, "devices", "linux.devices")?;
    let listed: Vec<Option<(&str, Number)>> =
        devices.iter().map(|device| Some((device.get("path").and_then(Value::as_str)?, Number::of(device)?))).collect();
    let contains_all = ON_EVERY_HOST.iter().all(|device| listed.contains(&Some(*device)));
    if !contains_all || !allow_all(&rules) {
        return Ok(());
    }
    let named: HashSet<Number> = rules.iter().filter(|rule| allows(rule)).filter_map(Number::of).collect();
    let (mut of_number, mut of_path) = (HashMap::new(), HashMap::new());
    for (path, number) in listed.iter().flatten() {
        *of_number.entry(*number).or_insert(0) += 1;
        *of_path.entry((*path, *number)).or_insert(0) += 1;
    }
    let is_wanted = |(path, number): (&str, Number)| {
        let is_of_host = path.starts_with("/dev/")
            && match on_host(path) {
                OnHost::Device(found) => found == number,
                // The device may have disappeared from the host. If the list also contains the device at another path,
                // the user asked for the device at `path`.
                OnHost::Nothing => of_number.get(&number) == Some(&1),
                OnHost::Other => false,
            };
        !is_of_host || named.contains(&number) || of_path.get(&(path, number)).is_some_and(|count| *count > 1)
    };
    let mut kept_paths = HashSet::new();
    // An element without a number, such as a FIFO, is not a device of the host.
    let is_kept = |listed: &Option<(&str, Number)>| {
        listed.is_none_or(|(path, number)| is_wanted((path, number)) && kept_paths.insert(path.to_owned()))
    };
    let kept: Vec<bool> = listed.iter().map(is_kept).collect();
    let kept: Vec<Value> =
        devices.iter().zip(kept).filter(|(_, is_kept)| *is_kept).map(|(device, _)| device.clone()).collect();
    notes.push(format!(
        "the container gets the guest's devices in place of the host's devices: {} of {} listed devices were omitted",
        devices.len() - kept.len(),
        devices.len()
    ));
    linux.insert("devices".into(), kept.into());
    Ok(())
}

fn on_host(path: &str) -> OnHost {
    // Do not follow a symlink, because containerd does not list symlinks.
    let Ok(metadata) = fs::symlink_metadata(Path::new(path)) else { return OnHost::Nothing };
    let (kind, device) = (metadata.file_type(), metadata.rdev());
    if !kind.is_char_device() && !kind.is_block_device() {
        return OnHost::Other;
    }
    OnHost::Device(Number { character: kind.is_char_device(), major: major(device), minor: minor(device) })
}

/// Returns whether device rules allow all access to all devices. The last rule that matches an access decides.
fn allow_all(rules: &[Value]) -> bool {
    let is_any = |rule: &Value, key| rule.get(key).and_then(Value::as_i64).is_none_or(|number| number < 0);
    let all = |rule: &Value| {
        let access = rule.get("access").and_then(Value::as_str).unwrap_or("rwm");
        matches!(rule.get("type").and_then(Value::as_str), None | Some("" | "a"))
            && is_any(rule, "major")
            && is_any(rule, "minor")
            && ['r', 'w', 'm'].into_iter().all(|letter| access.contains(letter))
    };
    rules.iter().rev().take_while(|rule| allows(rule)).any(all)
}

fn allows(rule: &Value) -> bool {
    rule.get("allow").and_then(Value::as_bool).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn device(path: &str, kind: &str, major: u64, minor: u64) -> Value {
        json!({ "path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o660 })
    }

    /// Returns the devices of a small host, as containerd lists them.
    fn host() -> Vec<Value> {
        let mut devices: Vec<Value> =
            ON_EVERY_HOST.iter().map(|(path, at)| device(path, "c", at.major, at.minor)).collect();
        devices.push(device("/dev/kvm", "c", 10, 232));
        devices.push(device("/dev/sda", "b", 8, 0));
        devices.push(device("/dev/sdb", "b", 8, 16));
        devices
    }

    fn all_allowed() -> Value {
        json!([{ "allow": true, "access": "rwm" }])
    }

    /// Returns the paths of the devices that stay, on a host with the devices of [`host`].
    fn kept(devices: Vec<Value>, rules: Value) -> Vec<String> {
        let mut linux = json!({ "devices": devices, "resources": { "devices": rules } });
        let on_host = |path: &str| match (path, host().iter().find(|device| device["path"] == path)) {
            ("/dev/log", _) => OnHost::Other,
            (_, Some(device)) => OnHost::Device(Number::of(device).unwrap()),
            (_, None) => OnHost::Nothing,
        };
        let mut notes = Vec::new();
        remove_from(linux.as_object_mut().unwrap(), &mut notes, on_host).unwrap();
        let devices = linux["devices"].as_array().unwrap();
        devices.iter().map(|device| device["path"].as_str().unwrap().to_owned()).collect()
    }

    fn with(more: &[Value]) -> Vec<Value> {
        [&host(), more].concat()
    }

    #[test]
    fn all_devices_of_the_host_are_removed_from_a_privileged_container() {
        assert!(kept(host(), all_allowed()).is_empty());
        // The device /dev/loop7 disappeared after containerd listed the host's devices.
        assert!(kept(with(&[device("/dev/loop7", "b", 7, 7)]), all_allowed()).is_empty());
        let fifo = json!({ "path": "/dev/initctl", "type": "p" });
        assert_eq!(kept(with(&[fifo]), all_allowed()), ["/dev/initctl"]);
    }

    #[test]
    fn devices_stay_if_the_container_is_not_privileged_or_the_list_is_incomplete() {
        let deny = json!([{ "allow": false, "access": "rwm" }]);
        assert_eq!(kept(host(), deny).len(), host().len());
        let later_deny = json!([{ "allow": true, "access": "rwm" }, { "allow": false, "type": "b", "access": "w" }]);
        assert_eq!(kept(host(), later_deny).len(), host().len());
        for rule in [json!({ "type": "c" }), json!({ "major": 1 }), json!({ "minor": 1 }), json!({ "access": "rw" })] {
            let mut rule = rule;
            rule["allow"] = true.into();
            assert_eq!(kept(host(), json!([rule])).len(), host().len(), "{rule}");
        }
        for missing in 0..ON_EVERY_HOST.len() {
            let mut devices = host();
            devices.remove(missing);
            assert_eq!(kept(devices.clone(), all_allowed()).len(), devices.len());
        }
        assert_eq!(kept(vec![device("/dev/kvm", "c", 10, 232)], all_allowed()), ["/dev/kvm"]);
    }

    #[test]
    fn devices_that_the_user_asked_for_stay() {
        // A device rule names the device, as with `ctr run --privileged --device /dev/sdb`.
        let rule = json!({ "allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm" });
        let rules = json!([{ "allow": true, "access": "rwm" }, rule]);
        assert_eq!(kept(host(), rules.clone()), ["/dev/sdb"]);
        assert_eq!(kept(with(&[device("/dev/sdb", "b", 8, 16)]), rules), ["/dev/sdb"]);
        // No device rule names the device, because containerd's CRI overwrites the rules. The list contains the device
        // twice, or at another path.
        assert_eq!(kept(with(&[device("/dev/sdb", "b", 8, 16)]), all_allowed()), ["/dev/sdb"]);
        assert_eq!(kept(with(&[device("/dev/xvda", "b", 8, 16)]), all_allowed()), ["/dev/xvda"]);
        assert_eq!(kept(with(&[device("/dev/sda", "b", 8, 16)]), all_allowed()), ["/dev/sda"]);
        assert_eq!(kept(with(&[device("/dev/log", "c", 10, 232)]), all_allowed()), ["/dev/log"]);
        assert_eq!(kept(with(&[device("/disk", "b", 8, 0)]), all_allowed()), ["/disk"]);
        assert_eq!(kept(with(&[device("/dev/kvm", "c", 10, 232)]), all_allowed()), ["/dev/kvm"]);
    }

    #[test]
    fn devices_of_the_real_host_are_removed() {
        let list = fs::read_dir("/dev").unwrap().filter_map(|entry| {
            let path = entry.unwrap().path().to_str().unwrap().to_owned();
            match on_host(&path) {
                OnHost::Device(Number { character, major, minor }) if !path.ends_with("console") => {
                    Some(device(&path, if character { "c" } else { "b" }, major, minor))
                }
                _ => None,
            }
        });
        let mut linux = json!({ "devices": list.collect::<Vec<_>>(), "resources": { "devices": all_allowed() } });
        let mut notes = Vec::new();
        remove(linux.as_object_mut().unwrap(), &mut notes).unwrap();
        assert_eq!(linux["devices"], json!([]));
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn fields_of_the_wrong_type_are_rejected() {
        for linux in [json!({ "devices": 1 }), json!({ "resources": 1 }), json!({ "resources": { "devices": 1 } })] {
            let mut linux = linux;
            assert!(remove(linux.as_object_mut().unwrap(), &mut Vec::new()).is_err(), "{linux}");
        }
        remove(&mut Map::new(), &mut Vec::new()).unwrap();
    }
}
