//! Fuzzes the configuration file, `/etc/husk/config.toml`.

use husk_config::Config;

use crate::input::input;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(text) = input::<&str>(bytes) else { return };
    if let Ok(config) = toml::from_str::<Config>(text) {
        let _ = config.check();
    }
}
