//! Limits, in a specification and in an update request: those of the guest's cgroups pass, the host's do not.

use super::translate::{TranslateError, object, present, unsupported};
use serde_json::{Map, Value};

/// Rewrites the resources of an update request (OCI `LinuxResources` as JSON) for the guest.
///
/// # Errors
/// [`TranslateError`] when they are none or limit something of the host.
pub fn resources_update(raw: &[u8]) -> Result<Vec<u8>, TranslateError> {
    let parse = |source| TranslateError::Parse { what: "resources to update", source };
    let mut value: Value = serde_json::from_slice(raw).map_err(parse)?;
    resources(value.as_object_mut().ok_or(TranslateError::Type("resources"))?, &mut Vec::new())?;
    serde_json::to_vec(&value).map_err(parse)
}

/// The size of the huge pages there are, as the specification writes 2 MiB.
pub const HUGE_PAGE: &str = "2MB";
/// Most of what a container reads and writes goes to the host by virtio-fs, which no group of the guest's accounts.
const NO_BLOCK_IO: &str =
    "the guest has neither the host's block devices, which are named by number, nor a weight for them";

/// Limits of block devices by number.
const THROTTLES: [&str; 5] = [
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

pub(super) fn resources(resources: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), TranslateError> {
    if let Some(cpu) = object(resources, "cpu")? {
        // The list of CPUs stays: the agent makes it one of the guest's. NUMA nodes the guest has none.
        if cpu.remove("mems").is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty())) {
            notes.push("resources.cpu.mems left out: the host's numbers mean nothing in the guest".into());
        }
        // Realtime groups are cgroup v1's; the guest has v2 only.
        cpu.remove("realtimeRuntime");
        cpu.remove("realtimePeriod");
    }
    if let Some(unified) = object(resources, "unified")? {
        unified.retain(|key, _| !key.starts_with("cpuset."));
        if let Some(key) = unified.keys().find(|key| key.starts_with("io.")) {
            return Err(unsupported(format!("resources.unified.{key}"), NO_BLOCK_IO));
        }
    }
    if let Some(block) = object(resources, "blockIO")? {
        if let Some(key) = THROTTLES.iter().find(|key| present(block, key)) {
            return Err(unsupported(format!("resources.blockIO.{key}"), NO_BLOCK_IO));
        }
        // None is 0, as some clients write it.
        let weight = |key: &&&str| block.get(**key).and_then(Value::as_u64).is_some_and(|weight| weight > 0);
        if let Some(key) = ["weight", "leafWeight"].iter().find(weight) {
            return Err(unsupported(format!("resources.blockIO.{key}"), NO_BLOCK_IO));
        }
        resources.remove("blockIO");
    }
    if let Some(limits) = resources.get("hugepageLimits").and_then(Value::as_array) {
        // Kubernetes sends a limit of 0 for each page size that the host has.
        let some = |limit: &&Value| limit.get("limit").and_then(Value::as_u64) != Some(0);
        let size = |limit: &Value| limit.get("pageSize").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(size) = limits.iter().filter(some).map(size).find(|size| size != HUGE_PAGE) {
            let message = format!("huge pages of {size}: a virtual machine has those of 2MB (2 MiB) only");
            return Err(unsupported("resources.hugepageLimits", message));
        }
    }
    if present(resources, "rdma") {
        return Err(unsupported("resources.rdma", "the guest has no RDMA devices"));
    }
    if resources.remove("network").is_some() {
        notes.push("resources.network left out: it is cgroup v1's, the guest has cgroup v2".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn update(value: &Value) -> Result<Value, String> {
        let bytes = resources_update(value.to_string().as_bytes()).map_err(|error| error.to_string())?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn what_the_guest_can_limit_stays() {
        let from = json!({
            "cpu": {"shares": 10, "quota": 5, "period": 10, "cpus": "2-3", "mems": "0"},
            "memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3}, "blockIO": {"weight": 0},
            "devices": [{"allow": false, "access": "rwm"}], "network": {"classID": 1},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}, {"pageSize": "1GB", "limit": 0}],
            "unified": {"cpuset.cpus": "1", "memory.high": "9"}, "new": 1
        });
        let to = json!({
            "cpu": {"shares": 10, "quota": 5, "period": 10, "cpus": "2-3"},
            "memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}, {"pageSize": "1GB", "limit": 0}],
            "devices": [{"allow": false, "access": "rwm"}], "unified": {"memory.high": "9"}, "new": 1
        });
        assert_eq!(update(&from), Ok(to));
    }

    #[test]
    fn what_limits_the_host_is_refused() {
        let throttle = json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}});
        assert!(update(&throttle).unwrap_err().starts_with("resources.blockIO.throttleReadBpsDevice"));
        assert!(update(&json!({"blockIO": {"weight": 4}})).unwrap_err().starts_with("resources.blockIO.weight"));
        assert!(update(&json!({"unified": {"io.max": "8:0 rbps=1"}})).unwrap_err().contains("unified.io.max"));
        let gigantic = update(&json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 1u64 << 30}]})).unwrap_err();
        assert!(gigantic.starts_with("resources.hugepageLimits: huge pages of 1GB"), "{gigantic}");
        assert!(update(&json!({"rdma": {"mlx5": {"hcaHandles": 1}}})).is_err());
        assert!(update(&json!([])).is_err());
        assert!(update(&json!({"cpu": 1})).unwrap_err().contains("wrong type"));
    }
}
