//! Runs a fuzz target under libFuzzer. The environment variable HUSK_FUZZ_TARGET names the target. Without this
//! variable, the program lists the targets. `cargo xtask fuzz` starts this program.
#![no_main]

use std::sync::OnceLock;

use husk_fuzz::jail;
use husk_fuzz::targets::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&Target> = OnceLock::new();

/// Chooses the target that the environment variable names. The program cannot get the name as an argument, because
/// libFuzzer parses all arguments.
fn choose() {
    let Some(name) = std::env::var_os("HUSK_FUZZ_TARGET") else {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    };
    let target = TARGETS.iter().find(|target| name == target.name).expect("HUSK_FUZZ_TARGET must name a target");
    if ["fuse", "guest_files"].contains(&target.name) {
        jail::prepare();
    }
    TARGET.get_or_init(|| target);
}

fuzz_target!(init: choose(), |bytes: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(bytes);
    }
});
