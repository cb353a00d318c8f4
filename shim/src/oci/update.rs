//! Translates the resource limits of a specification or an update request. Keeps limits that the guest can apply. Omits
//! or rejects all other limits.

use husk_proto::unified;
use serde_json::{Map, Value};

use crate::oci::json::{TranslateError, object, present, unsupported};

/// Translates the resources of an update request (OCI `LinuxResources` as JSON) for the guest.
///
/// # Errors
/// [`TranslateError`] if `raw` is not `LinuxResources`, or has a limit that the guest cannot apply.
pub fn resources_update(raw: &[u8]) -> Result<Vec<u8>, TranslateError> {
    let parse = |source| TranslateError::Parse { what: "resources of the update request", source };
    let mut value: Value = serde_json::from_slice(raw).map_err(parse)?;
    resources(value.as_object_mut().ok_or(TranslateError::Type("resources"))?, &mut Vec::new())?;
    serde_json::to_vec(&value).map_err(parse)
}

/// The OCI specification's notation for huge pages of 2 MiB, the only supported size.
pub const HUGE_PAGE: &str = "2MB";
/// Error text for block I/O limits. The text omits one reason: the guest's cgroups do not account for I/O through
/// virtio-fs, which is most I/O.
const NO_BLOCK_IO: &str = "block I/O limits are not supported: they use the host's device numbers, and the guest's \
                           cgroups do not have I/O weights";

/// Names of the block I/O limits that contain device numbers.
const THROTTLES: [&str; 5] = [
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

pub(super) fn resources(resources: &mut Map<String, Value>, notes: &mut Vec<String>) -> Result<(), TranslateError> {
    if let Some(cpu) = object(resources, "cpu")? {
        // Keep the list of CPUs, because the agent maps the host's CPUs to vCPUs. Remove the list of NUMA nodes,
        // because the guest has no NUMA nodes.
        if cpu.remove("mems").is_some_and(|value| value.as_str().is_some_and(|text| !text.is_empty())) {
            notes.push("omitted resources.cpu.mems, because the host's NUMA nodes have no meaning in the guest".into());
        }
        // Realtime limits need cgroup v1, but the guest has cgroup v2.
        cpu.remove("realtimeRuntime");
        cpu.remove("realtimePeriod");
    }
    if let Some(files) = object(resources, "unified")? {
        for key in files.keys() {
            unified::check(key).map_err(|error| unsupported(format!("resources.unified.{key}"), error.to_string()))?;
        }
        files.retain(|key, _| !key.starts_with("cpuset."));
        if let Some(key) = files.keys().find(|key| key.starts_with("io.")) {
            return Err(unsupported(format!("resources.unified.{key}"), NO_BLOCK_IO));
        }
    }
    if let Some(block) = object(resources, "blockIO")? {
        if let Some(key) = THROTTLES.iter().find(|key| present(block, key)) {
            return Err(unsupported(format!("resources.blockIO.{key}"), NO_BLOCK_IO));
        }
        // Some clients write 0 if no weight is set.
        let weight = |key: &&&str| block.get(**key).and_then(Value::as_u64).is_some_and(|weight| weight > 0);
        if let Some(key) = ["weight", "leafWeight"].iter().find(weight) {
            return Err(unsupported(format!("resources.blockIO.{key}"), NO_BLOCK_IO));
        }
        resources.remove("blockIO");
    }
    if let Some(limits) = resources.get("hugepageLimits").and_then(Value::as_array) {
        // Accept a limit of 0 for every page size. Kubernetes sends this limit for each page size that the host
        // supports.
        let nonzero = |limit: &&Value| limit.get("limit").and_then(Value::as_u64) != Some(0);
        let size = |limit: &Value| limit.get("pageSize").and_then(Value::as_str).unwrap_or_default().to_owned();
        if let Some(size) = limits.iter().filter(nonzero).map(size).find(|size| size != HUGE_PAGE) {
            let message = format!("huge pages of {size} are not supported; use huge pages of 2MB (2 MiB)");
            return Err(unsupported("resources.hugepageLimits", message));
        }
    }
    if present(resources, "rdma") {
        return Err(unsupported("resources.rdma", "the guest has no RDMA devices"));
    }
    if resources.remove("network").is_some() {
        notes.push("omitted resources.network, because its limits need cgroup v1, but the guest has cgroup v2".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn update(value: &Value) -> Result<Value, String> {
        let bytes = resources_update(value.to_string().as_bytes()).map_err(|error| error.to_string())?;
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn resources_update_keeps_limits_that_the_guest_can_apply() {
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
    fn resources_update_rejects_unsupported_limits_and_wrong_types() {
        let throttle = json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}});
        assert!(update(&throttle).unwrap_err().starts_with("resources.blockIO.throttleReadBpsDevice"));
        assert!(update(&json!({"blockIO": {"weight": 4}})).unwrap_err().starts_with("resources.blockIO.weight"));
        assert!(update(&json!({"unified": {"io.max": "8:0 rbps=1"}})).unwrap_err().contains("unified.io.max"));
        let path = update(&json!({"unified": {"cpuset./../../x": "1"}})).unwrap_err();
        assert_eq!(path, "resources.unified.cpuset./../../x: the key must be a file name (no slashes)");
        let gigantic = update(&json!({"hugepageLimits": [{"pageSize": "1GB", "limit": 1u64 << 30}]})).unwrap_err();
        assert!(gigantic.starts_with("resources.hugepageLimits: huge pages of 1GB"), "{gigantic}");
        assert!(update(&json!({"rdma": {"mlx5": {"hcaHandles": 1}}})).is_err());
        assert!(update(&json!([])).is_err());
        assert!(update(&json!({"cpu": 1})).unwrap_err().contains("wrong type"));
    }
}
