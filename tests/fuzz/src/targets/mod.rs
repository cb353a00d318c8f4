//! The fuzz targets. Each target has its own module.

mod agent_answers;
mod agent_network;
mod agent_requests;
mod annotations;
mod balloon;
mod blk;
mod boot_data;
mod bootstrap;
mod bundle;
mod config;
mod console;
mod control_wire;
mod cri_sandbox;
mod dbus;
mod fuse;
mod guest_files;
mod kernel;
mod mem;
mod mmio;
mod net;
mod netlink;
mod policy;
mod rng;
mod saved_state;
mod stream_header;
mod vmm_answers;
mod vsock;

/// A fuzz target.
pub struct Target {
    /// Name of the target. The directory with the target's corpus has the same name.
    pub name: &'static str,
    /// Runs the target with one input. Panics if the input shows a defect.
    pub run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)*) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), run: $name::run }),*];

        #[cfg(test)]
        mod corpus {
            $(
                #[test]
                fn $name() {
                    super::replay(stringify!($name), super::$name::run);
                }
            )*
        }
    };
}

targets! {
    agent_answers agent_network agent_requests annotations balloon blk boot_data bootstrap bundle config console
    control_wire cri_sandbox dbus fuse guest_files kernel mem mmio net netlink policy rng saved_state stream_header
    vmm_answers vsock
}

/// Runs a target with each input of the target's corpus.
#[cfg(test)]
fn replay(name: &str, run: fn(&[u8])) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("failed to read {}: {error}", dir.display()));
    for entry in entries {
        let path = entry.expect("read an entry of the corpus").path();
        // Print the path first. If the target panics, the last path in the test's output names the failing input.
        println!("{}", path.display());
        run(&std::fs::read(&path).expect("read an input"));
    }
}
