//! What decides whether a guest can be made from a template: the size of its VM, and what it boots from.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use husk_config::template::Class;
use husk_config::{Config, digest};
use husk_vmm::config::BuildId;
use serde::Serialize;

use crate::resources::boot_size::smallest_limited_mib;
use crate::resources::{BootSize, hugepages};
use crate::sandbox::guest_image::{GuestImages, identity};

/// Version of the templates. A change of the agent's or the shim's part that makes older templates unusable increases it.
const VERSION: u32 = 1;
/// The version of the CPU's microcode.
const MICROCODE: &str = "/sys/devices/system/cpu/cpu0/microcode/version";

/// Sizes of guest memory for which templates are made, in MiB, in addition to those that the configuration determines.
const MEMORY_MIB: [u64; 3] = [128, 256, 512];

/// Returns the sizes of guest memory for which templates are made, in MiB, without duplicates: the size of the smallest
/// pod with a limit, the default size, and sizes between them.
///
/// A template for each size of a pod would not pay. A guest that is made from a template of a smaller size gets the rest
/// of its memory as hot-plugged memory, which costs only the page metadata for this rest.
pub fn memory_sizes(config: &Config) -> BTreeSet<u64> {
    let (smallest, default) = (smallest_limited_mib(config), config.default_memory_mib);
    let between = MEMORY_MIB.into_iter().filter(|mib| (smallest..default).contains(mib));
    between.chain([smallest, default]).collect()
}

/// Returns the class from whose template the guest of a pod can be made. Returns `None` if all templates have too much
/// memory. `namespace` is the pod's Kubernetes namespace, if templates are not shared between namespaces.
pub fn class_of(size: &BootSize, config: &Config, namespace: Option<&str>) -> Option<Class> {
    let memory_mib = memory_sizes(config).range(..=size.memory_mib).next_back().copied()?;
    Some(Class {
        vcpus: size.vcpus,
        max_vcpus: size.largest.vcpus,
        memory_mib,
        max_memory_mib: size.largest.memory_mib,
        huge_mib: hugepages::pool_mib(),
        namespace: namespace.unwrap_or_default().to_owned(),
    })
}

/// Identifies a template: a class, the files from which its guest was booted, and the program that has saved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The key as the VMM stores it in the template.
    pub id: BuildId,
    /// The directory of the template.
    pub name: String,
}

/// What a key is computed from.
#[derive(Serialize)]
struct Facts<'a> {
    version: u32,
    class: &'a Class,
    kernel: &'a str,
    initrd: &'a str,
    program: String,
    kernel_params: &'a str,
    free_page_reporting: bool,
    microcode: String,
}

impl Key {
    /// Computes the key of a class with the node's present files and configuration.
    ///
    /// # Errors
    /// If this program's file cannot be examined.
    pub fn new(class: &Class, images: &GuestImages, config: &Config) -> io::Result<Self> {
        let facts = Facts {
            version: VERSION,
            class,
            kernel: &images.kernel_identity,
            initrd: &images.initrd_identity,
            program: identity(&fs::metadata("/proc/self/exe")?),
            kernel_params: &config.kernel_params,
            free_page_reporting: config.free_page_reporting,
            // Containers and VMs do not have the file.
            microcode: fs::read_to_string(MICROCODE).unwrap_or_default(),
        };
        let text = serde_json::to_vec(&facts)?;
        let name = digest::sha256(text.as_slice(), |_| Ok(()))?;
        let mut id = BuildId::default();
        for (byte, digits) in id.iter_mut().zip(name.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(io::Error::other)?;
            *byte = u8::from_str_radix(digits, 16).map_err(io::Error::other)?;
        }
        Ok(Self { id, name })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::oci::Spec;
    use crate::resources::boot_size;
    use crate::resources::growth::Growth;

    fn images(kernel: &str) -> GuestImages {
        let file = || File::open("/dev/null").unwrap();
        GuestImages {
            kernel: file(),
            initrd: file(),
            kernel_identity: kernel.to_owned(),
            initrd_identity: "initrd".to_owned(),
        }
    }

    #[test]
    fn pods_of_different_sizes_share_a_class() {
        let config =
            Config { default_memory_mib: 1024, memory_overhead_mib: 64, min_memory_mib: 8, ..Config::default() };
        assert_eq!(Vec::from_iter(memory_sizes(&config)), [74, 128, 256, 512, 1024]);
        assert_eq!(Vec::from_iter(memory_sizes(&Config { default_memory_mib: 200, ..config.clone() })), [74, 128, 200]);
        let size = boot_size(&Spec::default(), &config, u64::MAX).unwrap();
        let class = |memory_mib| class_of(&BootSize { memory_mib, ..size.clone() }, &config, None);
        for (memory_mib, expected) in
            [(74, 74), (127, 74), (128, 128), (326, 256), (1023, 512), (1024, 1024), (1 << 20, 1024)]
        {
            assert_eq!(class(memory_mib).unwrap().memory_mib, expected, "{memory_mib}");
        }
        assert_eq!(class(73), None);
        // An annotation that sets the size only limits the growth.
        let fixed = Growth::new(size.growth.boot, size.growth.boot, &config);
        assert_eq!(class_of(&BootSize { growth: fixed, ..size.clone() }, &config, None), class(size.memory_mib));
    }

    #[test]
    fn key_changes_with_the_class_the_files_and_the_configuration() {
        let class = Class {
            vcpus: 1,
            max_vcpus: 3,
            memory_mib: 1024,
            max_memory_mib: 4096,
            huge_mib: 0,
            namespace: String::new(),
        };
        let config = Config::default();
        let key = |class: &Class, kernel: &str, config: &Config| Key::new(class, &images(kernel), config).unwrap();
        let first = key(&class, "kernel", &config);
        assert_eq!(first, key(&class, "kernel", &config));
        assert!(digest::is_sha256(&first.name) && first.name.starts_with(&format!("{:02x}", first.id[0])));
        let others = [
            key(&Class { memory_mib: 512, ..class.clone() }, "kernel", &config),
            key(&Class { max_vcpus: 4, ..class.clone() }, "kernel", &config),
            key(&Class { namespace: "a".to_owned(), ..class.clone() }, "kernel", &config),
            key(&class, "other", &config),
            key(&class, "kernel", &Config { kernel_params: "x".to_owned(), ..config.clone() }),
            key(&class, "kernel", &Config { free_page_reporting: false, ..config.clone() }),
        ];
        for (number, other) in others.iter().enumerate() {
            assert_ne!(*other, first, "{number}");
        }
    }
}
