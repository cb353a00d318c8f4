//! Fuzzes a bundle's `config.json`, which the shim reads in its action `start` and for each Create request. The target
//! also parses each input as the JSON of an Exec request and of an Update request.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use husk_config::Config;
use husk_shim::oci::{
    Bundle, IdMappings, Spec, disks, exec_process, replace_disk_numbers, resources_update, translate,
};
use husk_shim::pod;
use husk_shim::resources::growth::{Limits, host_bytes};
use husk_shim::resources::{BootSize, boot_size};

/// Returns this process's bundle directory. The first call creates this directory, and no code removes it.
fn bundle_dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        // /dev/shm is a tmpfs. On a disk, writing `config.json` would take most of the run time.
        let dir = PathBuf::from(format!("/dev/shm/husk-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("create the bundle directory");
        dir
    })
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let path = bundle_dir().join("config.json");
    std::fs::write(&path, bytes).expect("write config.json");
    let bundle = Bundle::read(bundle_dir());
    std::fs::remove_file(path).expect("remove config.json");
    if let Ok(mut bundle) = bundle {
        let _ = bundle.spec.group("id");
        let _ = bundle.check();
        check_sizes(&bundle.spec, bytes);
        check_id_mappings(&bundle);
        let disks: Vec<_> = disks::find(&bundle.raw);
        let numbers = |disk| (disk, husk_shim::oci::DeviceNumbers { major: 254, minor: 16 });
        replace_disk_numbers(&mut bundle.raw.clone(), &disks.into_iter().map(numbers).collect::<Vec<_>>());
        pod::add_mounts(&mut bundle, bundle_dir());
        let pids = HashMap::from([(7, "other".to_owned())]);
        if translate::spec(&mut bundle.raw, ("id", "/rootfs"), &pids, &mut Vec::new()).is_ok() {
            assert_no_host_namespace(&bundle);
        }
    }
    let _ = resources_update(bytes);
    let _ = exec_process(bytes);
}

/// Checks that the VM's vCPUs and memory do not exceed their maximum values. The sandbox has two containers. The first
/// container has the limits of `spec`. The Update request `update` has changed the limits of the second container.
fn check_sizes(spec: &Spec, update: &[u8]) {
    let limits = Limits::from_resources(&spec.linux.resources);
    let updated = limits.clone().with_update(update).unwrap_or_default();
    let containers = [limits, updated];
    if let Ok(BootSize { growth, .. }) = boot_size(spec, &Config::default(), u64::MAX) {
        for start in [false, true] {
            let size = growth.size(containers.iter(), start);
            assert!((1..=growth.max.vcpus).contains(&size.vcpus), "the number of vCPUs is out of range: {size:?}");
            assert!(size.memory_mib <= growth.max.memory_mib, "the memory exceeds its maximum: {size:?}");
            let _ = host_bytes(size.memory_mib);
        }
        let _ = growth.huge_mib(containers.iter());
        if let Some(cpus) = growth.host_limits(containers.iter()).cpus {
            assert_eq!(cpus.to_string().parse().as_ref(), Ok(&cpus));
            assert!(!cpus.mask().is_empty());
        }
    }
}

fn check_id_mappings(bundle: &Bundle) {
    let of_mounts = bundle.spec.mounts.iter().flat_map(|mount| {
        let options = IdMappings::from_options(mount.options().iter().map(String::as_str));
        [options.ok().flatten(), IdMappings::from_mount(&mount.uid_mappings, &mount.gid_mappings).ok().flatten()]
    });
    for mappings in of_mounts.chain([bundle.id_mappings().ok().flatten()]).flatten() {
        let _ = (mappings.owner(0, u32::MAX), mappings.tag());
        for mapping in mappings.mappings().0 {
            assert!(
                mappings.uid(mapping.container).is_some(),
                "the first uid of a mapping has no host uid: {mappings:?}"
            );
        }
    }
}

/// Checks that each namespace path in the translated specification is a path in the guest.
fn assert_no_host_namespace(bundle: &Bundle) {
    let namespaces = bundle.raw.pointer("/linux/namespaces").and_then(|list| list.as_array());
    for namespace in namespaces.into_iter().flatten() {
        let path = namespace.get("path").and_then(|path| path.as_str()).unwrap_or_default();
        let of_guest = [husk_proto::GUEST_NAMESPACES, husk_proto::GUEST_PID_NAMESPACES];
        assert!(
            path.is_empty() || of_guest.iter().any(|of_guest| path.starts_with(of_guest)),
            "{path} is not a namespace path of the guest"
        );
    }
}
