//! Fuzzes the configuration file, `/etc/husk/config.toml`.
#![no_main]

use husk_config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = toml::from_str::<Config>(text) {
        let _ = config.check();
    }
});
