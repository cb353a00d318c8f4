//! Fuzzes the pod's configuration. If the shim is the sandbox controller, containerd passes this configuration to the
//! shim. Each input is parsed as a `PodSandboxConfig`.

use std::collections::HashMap;
use std::path::Path;

use husk_config::Config;
use husk_shim::oci::{Bundle, translate};
use husk_shim::pod;
use husk_shim::resources::boot_size;
use protobuf::well_known_types::any::Any;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let any = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value: bytes.to_vec(), ..Default::default() };
    let Ok(config) = pod::config(Some(&any)) else { return };
    let specification = pod::specification("id", &config, "/proc/self/ns/ipc");
    let mut bundle = Bundle::from_value(Path::new("/"), specification).expect("parse the sandbox's specification");
    assert!(bundle.spec.annotations.is_sandbox());
    assert_eq!(bundle.spec.group("id").expect("read the sandbox id"), "id");
    let _ = boot_size(&bundle.spec, &Config::default(), u64::MAX);
    pod::add_mounts(&mut bundle, Path::new("/dir"));
    if bundle.check().is_ok() {
        translate::spec(&mut bundle.raw, ("id", "/rootfs"), &HashMap::new(), &mut Vec::new())
            .expect("translate the specification");
    }
}
