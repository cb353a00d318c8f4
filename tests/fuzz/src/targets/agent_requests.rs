//! Fuzzes the requests that the agent gets from the shim. The target omits all steps that would change the guest.

use husk_agent::testing::{PreparedSandbox, sysctl_path, update};
use husk_proto::agent::{CreateOptions, IdMapping, SetupRequest};
use husk_proto::containerd::api::CreateTaskRequest;
use husk_proto::sysctls;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::input::input;

const POLICIES: [&str; 7] = [
    "",
    "{}",
    r#"{"exec": []}"#,
    r#"{"privileged": false}"#,
    r#"{"capabilities": ["CAP_CHOWN"]}"#,
    r#"{"mounts": ["/data"]}"#,
    r#"{"attach": false, "port_forward": false}"#,
];
const NAMESPACES: [&str; 8] = ["pid", "mount", "ipc", "network", "uts", "cgroup", "user", "time"];
/// Prefixes of the sysctls that belong to a namespace of the pod.
const SYSCTLS: [&str; 7] = [
    "/proc/sys/net/",
    "/proc/sys/user/",
    "/proc/sys/fs/mqueue/",
    "/proc/sys/kernel/msg",
    "/proc/sys/kernel/sem",
    "/proc/sys/kernel/shm",
    "/proc/sys/kernel/domainname",
];
const MOUNT_TYPES: [&str; 9] = ["proc", "sysfs", "tmpfs", "bind", "cgroup", "mqueue", "devpts", "ext4", ""];
const PATHS: [&str; 10] = [
    "/proc",
    "/proc/sys",
    "/data",
    "/run/husk/share/.volumes/1",
    "/run/husk/share/c/rootfs",
    "/run/husk/volumes/v",
    "/run/husk/ns-of/c",
    "/run/husk/ns/net",
    "/",
    "",
];

#[derive(arbitrary::Arbitrary, Debug)]
enum Path {
    Known(u8),
    Any(String),
}

impl Path {
    fn text(&self) -> &str {
        match self {
            Path::Known(which) => PATHS[usize::from(*which) % PATHS.len()],
            Path::Any(text) => text,
        }
    }
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Specification {
    namespaces: u8,
    pid_path: Option<Path>,
    mounts: Vec<(u8, Path, Path, Vec<String>)>,
    arguments: Vec<String>,
    capabilities: Vec<u8>,
    devices: Vec<(bool, Option<i64>, Option<i64>, String)>,
    protected: Vec<Path>,
    annotations: Vec<(String, String)>,
    propagation: Option<String>,
    mappings: Vec<(u32, u32, u32)>,
    hugepages: Vec<(String, i64)>,
    memory: Option<(i64, i64)>,
    cpus: Option<String>,
    unified: Vec<(String, String)>,
}

impl Specification {
    fn json(&self) -> Value {
        let mut namespaces: Vec<Value> = (0..8)
            .filter(|bit| self.namespaces & 1 << bit == 0)
            .map(|bit| json!({ "type": NAMESPACES[usize::from(bit as u8)] }))
            .collect();
        if let (Some(path), Some(pid)) = (&self.pid_path, namespaces.first_mut()) {
            pid["path"] = path.text().into();
        }
        let mounts = self.mounts.iter().take(8).map(|(kind, source, destination, options)| {
            let kind = MOUNT_TYPES[usize::from(*kind) % MOUNT_TYPES.len()];
            json!({ "type": kind, "source": source.text(), "destination": destination.text(), "options": options })
        });
        let capabilities = ["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_NET_RAW", "CAP_KILL"];
        let capabilities: Vec<_> = self.capabilities.iter().map(|one| capabilities[usize::from(one % 4)]).collect();
        let devices = self.devices.iter().map(|(allow, major, minor, access)| {
            json!({ "allow": allow, "type": "c", "major": major, "minor": minor, "access": access })
        });
        let protected: Vec<_> = self.protected.iter().map(Path::text).collect();
        let mappings: Vec<_> = self
            .mappings
            .iter()
            .map(|(container, host, size)| json!({ "containerID": container, "hostID": host, "size": size }))
            .collect();
        let unified = self.unified.iter().cloned().collect::<std::collections::BTreeMap<_, _>>();
        let hugepages = self.hugepages.iter().map(|(size, limit)| json!({ "pageSize": size, "limit": limit }));
        json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "annotations": self.annotations.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "process": {
                "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": self.arguments,
                "capabilities": { "bounding": capabilities, "effective": capabilities },
            },
            "mounts": mounts.collect::<Vec<_>>(),
            "linux": {
                "namespaces": namespaces,
                "readonlyPaths": protected,
                "rootfsPropagation": self.propagation,
                "uidMappings": mappings,
                "gidMappings": mappings,
                "resources": {
                    "devices": devices.collect::<Vec<_>>(),
                    "hugepageLimits": hugepages.collect::<Vec<_>>(),
                    "memory": self.memory.map(|(limit, swap)| json!({ "limit": limit, "swap": swap })),
                    "cpu": { "cpus": self.cpus },
                    "unified": unified,
                },
            },
        })
    }
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    policies: (u8, u8),
    mappings: Vec<(u32, u32, u32)>,
    mount_options: Vec<String>,
    sysctl: String,
    id: String,
    rootfs: Path,
    streams: (bool, String),
    /// JSON of the specification. If `None`, the JSON is made from `specification`.
    raw: Option<Vec<u8>>,
    specification: Specification,
    process: Option<Vec<u8>>,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    if let Ok(path) = sysctl_path(&input.sysctl) {
        assert!(
            path.components().all(|part| part.as_os_str() != "..") && path.starts_with("/proc/sys"),
            "the sysctl path {path:?} leads out of /proc/sys"
        );
    }
    if sysctls::check(&input.sysctl, true).is_ok() {
        let path = sysctl_path(&input.sysctl).expect("make the path of a sysctl that was accepted");
        let path = path.to_string_lossy().replace('.', "/");
        let is_of_namespace = SYSCTLS.iter().any(|prefix| path.starts_with(prefix));
        assert!(is_of_namespace, "the sysctl {path} belongs to no namespace of the pod");
    }
    let policy = |which: u8| POLICIES[usize::from(which) % POLICIES.len()].as_bytes().to_vec();
    let mapping = |(container, host, size): &(u32, u32, u32)| IdMapping {
        container: *container,
        host: *host,
        size: *size,
        ..Default::default()
    };
    let setup = SetupRequest {
        node_policy: policy(input.policies.0),
        pod_policy: policy(input.policies.1),
        uid_mappings: input.mappings.iter().map(mapping).collect(),
        gid_mappings: input.mappings.iter().map(mapping).collect(),
        mounts: vec![husk_proto::agent::Mount { options: input.mount_options, ..Default::default() }],
        ..Default::default()
    };
    let sandbox = PreparedSandbox::new(&setup).expect("prepare the sandbox with valid policies");
    let spec = input.raw.unwrap_or_else(|| input.specification.json().to_string().into_bytes());
    if let Some(resources) = update(&spec) {
        let mut keys = resources.unified().iter().flat_map(|files| files.keys());
        assert_eq!(keys.find(|key| key.contains('/')), None, "the agent kept a path as a key of `unified`");
    }
    let options = CreateOptions { spec: spec.clone(), rootfs: input.rootfs.text().to_owned(), ..Default::default() };
    let value = options.write_to_bytes().expect("encode the options");
    let request = CreateTaskRequest {
        id: input.id,
        terminal: input.streams.0,
        stdin: input.streams.1,
        options: Some(Any { value, ..Default::default() }).into(),
        ..Default::default()
    };
    let Ok(spec) = sandbox.create(&request) else { return };
    // The agent writes the adapted specification to `config.json`. The helper must be able to parse this file.
    let text = serde_json::to_vec(&spec).expect("encode the specification");
    let again: Value = serde_json::from_slice(&text).expect("parse the specification again");
    let host = again.pointer("/hooks/prestart").or_else(|| again.pointer("/hooks/poststop"));
    assert!(host.is_none_or(Value::is_null), "the agent kept a hook that the shim runs on the host");
    if let Some(own) = spec.process() {
        let _ = sandbox.exec(own, &serde_json::to_vec(own).expect("encode the process"));
        let _ = sandbox.exec(own, &input.process.unwrap_or_default());
    }
}
