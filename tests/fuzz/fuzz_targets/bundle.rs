//! Fuzzes a bundle's `config.json`, as the shim reads it at `start` and at Create.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use husk_config::Config;
use husk_shim::oci::{Bundle, resources_update};
use husk_shim::resources::boot_size;
use libfuzzer_sys::fuzz_target;

/// Returns this process's bundle directory. The directory is not removed at exit.
fn bundle_dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("husk-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("create the bundle directory");
        dir
    })
}

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(bundle_dir().join("config.json"), bytes).expect("write config.json");
    if let Ok(bundle) = Bundle::read(bundle_dir()) {
        let _ = bundle.spec.group("id");
        let _ = bundle.check();
        let _ = boot_size(&bundle.spec, &Config::default(), u64::MAX);
    }
    let _ = resources_update(bytes);
});
