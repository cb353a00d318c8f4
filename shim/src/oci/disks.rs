//! Finds the host's block devices in a specification, and replaces their device numbers with the guest's numbers.

use serde_json::Value;

/// A block device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Disk {
    /// Major number on the host.
    pub major: u32,
    /// Minor number on the host.
    pub minor: u32,
    /// Whether the specification's device cgroup rules forbid writing.
    pub read_only: bool,
}

/// Device numbers of a block device in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumbers {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Returns the block devices in `linux.devices`.
pub fn find(spec: &Value) -> Vec<Disk> {
    let mut disks = Vec::new();
    for device in list(spec, "/linux/devices").filter(|device| is_block(device)) {
        if let (Some(major), Some(minor)) = (number(device, "major"), number(device, "minor")) {
            let disk = Disk { major, minor, read_only: !writable(spec, major, minor) };
            if !disks.contains(&disk) {
                disks.push(disk);
            }
        }
    }
    disks
}

/// Returns whether the device cgroup rules allow writing to the device. The last matching rule decides.
fn writable(spec: &Value, major: u32, minor: u32) -> bool {
    let matches = |rule: &&Value| {
        let kind = rule.get("type").and_then(Value::as_str).unwrap_or("a");
        let is = |key, wanted: u32| {
            rule.get(key).and_then(Value::as_i64).is_none_or(|number| number < 0 || number == i64::from(wanted))
        };
        let writes = rule.get("access").and_then(Value::as_str).is_none_or(|access| access.contains('w'));
        matches!(kind, "a" | "b" | "") && is("major", major) && is("minor", minor) && writes
    };
    let last = list(spec, "/linux/resources/devices").filter(matches).last();
    last.is_some_and(|rule| rule.get("allow").and_then(Value::as_bool).unwrap_or_default())
}

/// Replaces the host's device numbers in `spec` with the guest's device numbers. `disks` contains the host's and the
/// guest's numbers of each device.
pub fn replace_disk_numbers(spec: &mut Value, disks: &[(Disk, DeviceNumbers)]) {
    for path in ["/linux/devices", "/linux/resources/devices"] {
        let Some(entries) = spec.pointer_mut(path).and_then(Value::as_array_mut) else { continue };
        for entry in entries.iter_mut().filter(|entry| is_block(entry)) {
            let numbers = (number(entry, "major"), number(entry, "minor"));
            let found = disks.iter().find(|(disk, _)| numbers == (Some(disk.major), Some(disk.minor)));
            if let (Some((_, guest)), Some(entry)) = (found, entry.as_object_mut()) {
                entry.insert("major".into(), guest.major.into());
                entry.insert("minor".into(), guest.minor.into());
            }
        }
    }
}

fn list<'a>(spec: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> {
    spec.pointer(path).and_then(Value::as_array).into_iter().flatten()
}

fn is_block(entry: &Value) -> bool {
    entry.get("type").and_then(Value::as_str) == Some("b")
}

fn number(entry: &Value, key: &str) -> Option<u32> {
    entry.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(access: &str) -> Value {
        json!({ "linux": {
            "devices": [
                { "path": "/dev/xvda", "type": "b", "major": 7, "minor": 1 },
                { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
            ],
            "resources": { "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 7, "minor": 1, "access": access },
                { "allow": true, "type": "c", "major": 7, "minor": 1, "access": "rwm" },
            ] },
        } })
    }

    #[test]
    fn disks_are_found_with_their_write_access() {
        assert_eq!(find(&spec("rwm")), [Disk { major: 7, minor: 1, read_only: false }]);
        assert_eq!(find(&spec("r")), [Disk { major: 7, minor: 1, read_only: true }]);
        let mut all = spec("r");
        all["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        assert!(!find(&all)[0].read_only);
        assert_eq!(find(&json!({})), []);
        assert_eq!(find(&json!({ "linux": { "devices": [{ "type": "b", "major": -1, "minor": 0 }] } })), []);
    }

    #[test]
    fn replace_disk_numbers_changes_only_block_devices() {
        let disk = Disk { major: 7, minor: 1, read_only: false };
        let mut replaced = spec("rwm");
        replace_disk_numbers(&mut replaced, &[(disk, DeviceNumbers { major: 254, minor: 16 })]);
        assert_eq!(replaced["linux"]["devices"][0]["major"], 254);
        assert_eq!(
            replaced["linux"]["devices"][1],
            json!({ "path": "/dev/null", "type": "c", "major": 1, "minor": 3 })
        );
        let rules = &replaced["linux"]["resources"]["devices"];
        assert_eq!((&rules[1]["major"], &rules[1]["minor"]), (&json!(254), &json!(16)));
        assert_eq!(rules[2]["major"], 7, "the rule of a character device was changed");
    }
}
