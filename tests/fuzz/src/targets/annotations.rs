//! Fuzzes a pod's annotations: annotations of Husk, of containerd's CRI plugin and of CRI-O.

use std::collections::BTreeMap;

use husk_config::{Config, annotation};
use husk_proto::annotations;
use husk_shim::oci::Spec;
use husk_shim::oci::annotations::Annotations;
use husk_shim::resources::boot_size;
use husk_shim::sandbox::PodPolicies;

use crate::input::input;

const KEYS: [&str; 20] = [
    annotation::VCPUS,
    annotation::MEMORY_MIB,
    annotation::KERNEL_PARAMS,
    annotation::POLICY,
    "io.husk.other",
    annotations::SANDBOX_ID,
    annotations::CONTAINER_TYPE,
    annotations::POD_NAMESPACE,
    annotations::POD_NAME,
    annotations::POD_UID,
    annotations::CPU_PERIOD,
    annotations::CPU_QUOTA,
    annotations::CPU_SHARES,
    annotations::MEMORY,
    annotations::CRIO_SANDBOX_ID,
    annotations::CRIO_CONTAINER_TYPE,
    annotations::CRIO_POD_NAMESPACE,
    annotations::CRIO_POD_NAME,
    annotations::CRIO_POD_UID,
    "",
];

#[derive(arbitrary::Arbitrary, Debug)]
enum Value {
    Text(String),
    Number(i64),
    Sandbox,
    /// An agent policy with a list of allowed commands and a list of allowed capabilities.
    Policy(Vec<Vec<String>>, Vec<String>),
}

impl Value {
    fn text(&self) -> String {
        match self {
            Value::Text(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            Value::Sandbox => "sandbox".to_owned(),
            Value::Policy(exec, capabilities) => {
                serde_json::json!({ "exec": exec, "capabilities": capabilities }).to_string()
            }
        }
    }
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    all_allowed: bool,
    max_guest_mib: u64,
    annotations: Vec<(u8, Value)>,
    others: Vec<(String, String)>,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    let known =
        input.annotations.iter().map(|(key, value)| (KEYS[usize::from(*key) % KEYS.len()].into(), value.text()));
    let annotations: BTreeMap<String, String> = known.chain(input.others).collect();
    let mut config = Config::default();
    if input.all_allowed {
        config.allowed_annotations = annotation::ALL.map(Into::into).into();
    }
    let spec = Spec { annotations: Annotations(annotations), ..Default::default() };
    let _ = spec.annotations.pod();
    if let Ok(group) = spec.group("id") {
        assert!(husk_shim::ids::is_name(group), "the sandbox id {group:?} is not a file name");
    }
    let _ = PodPolicies::new(&spec.annotations, &config);
    if let Ok(size) = boot_size(&spec, &config, input.max_guest_mib) {
        assert!(
            (1..=config.max_vcpus).contains(&size.vcpus),
            "the boot size has {} vCPUs, but 1 to {} are allowed",
            size.vcpus,
            config.max_vcpus
        );
        assert!(
            size.kernel_params.bytes().all(|byte| (b' '..=b'~').contains(&byte)),
            "the kernel parameters {:?} are not printable ASCII",
            size.kernel_params
        );
        for key in spec.annotations.0.keys().filter(|key| key.starts_with(annotation::PREFIX)) {
            assert!(config.allowed_annotations.contains(key), "the annotation {key} is not allowed, but was accepted");
        }
    }
}
