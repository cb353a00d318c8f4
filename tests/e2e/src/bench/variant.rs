//! The runtimes that the benchmarks compare, and how to run a container with each.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use clap::ValueEnum;

use super::timelines;
use crate::BUSYBOX;
use crate::command::{Input, Running, ctr};
use crate::node::Config;

/// A runtime, and how it makes guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// runc.
    Runc,
    /// runsc, gVisor's runtime. It runs with `ctr` only.
    Runsc,
    /// Husk, whose guest boots.
    #[value(name = "husk-boot")]
    Boot,
    /// Husk, whose guest is made from a template.
    #[value(name = "husk-clone")]
    Clone,
    /// A build of Husk without the jail (feature `unjailed` of the crate `husk-vmm`). The guest boots. It runs with `ctr`
    /// only.
    Unjailed,
}

/// Path of a script that runs runsc with options that containerd's shim for runc cannot set.
const RUNSC: &str = "/run/husk-bench-runsc";
/// `--network=none` is needed because the network namespace of `ctr run` is empty: with a network, runsc refuses to
/// start in an empty network namespace. `--platform=systrap` makes runsc run without KVM, which leaves the node's KVM
/// to Husk's guests.
const RUNSC_SCRIPT: &str = "#!/bin/sh\nexec runsc --network=none --platform=systrap \"$@\"\n";

impl Variant {
    /// All variants.
    pub const ALL: [Self; 5] = [Self::Runc, Self::Runsc, Self::Boot, Self::Clone, Self::Unjailed];
    /// The variants of Husk.
    pub const HUSK: [Self; 2] = [Self::Boot, Self::Clone];
    /// runc, and the variants of Husk.
    pub const COMPARED: [Self; 3] = [Self::Runc, Self::Boot, Self::Clone];

    /// Returns the name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Runsc => "runsc",
            Self::Boot => "husk boot",
            Self::Clone => "husk clone",
            Self::Unjailed => "unjailed",
        }
    }

    /// Returns the CRI's runtime handler.
    pub fn handler(self) -> &'static str {
        if self.is_husk() { "husk" } else { "runc" }
    }

    /// Returns whether the variant is a build of Husk.
    pub fn is_husk(self) -> bool {
        matches!(self, Self::Boot | Self::Clone | Self::Unjailed)
    }

    /// Configures the node for pods of this variant, until the returned value is dropped.
    pub fn configure(self) -> Config {
        self.configure_with("")
    }

    /// Like [`Variant::configure`], with more lines of configuration.
    pub fn configure_with(self, more: &str) -> Config {
        let template = if self == Self::Clone { "manual" } else { "off" };
        Config::set(&format!("template = \"{template}\"\ntimeline_log = \"{}\"\n{more}", timelines::PATH))
    }

    /// Returns a `ctr run` of the busybox image.
    pub fn ctr_run(self, id: &str, command: &[&str]) -> Command {
        if self == Self::Runsc {
            fs::write(RUNSC, RUNSC_SCRIPT).unwrap();
            fs::set_permissions(RUNSC, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let runtime: &[&str] = match self {
            Self::Runc => &["io.containerd.runc.v2"],
            // Debian's runsc has no shim. Therefore containerd's shim for runc runs runsc.
            Self::Runsc => &["io.containerd.runc.v2", "--runc-binary", RUNSC],
            Self::Boot | Self::Clone => &["io.containerd.husk.v2"],
            Self::Unjailed => &["io.containerd.husk-unjailed.v2"],
        };
        ctr(&[&["run", "--rm", "--runtime"], runtime, &[BUSYBOX, id], command].concat())
    }

    /// Runs `true` in a container, from `ctr run` to the container's removal. Returns the duration in seconds.
    pub fn run_true(self, id: &str) -> f64 {
        let _config = self.configure();
        Running::start(self.ctr_run(id, &["true"]), Input::Null).wait().expect_code(0).took.as_secs_f64()
    }
}

/// Returns the names of variants.
pub fn names(variants: &[Variant]) -> Vec<&'static str> {
    variants.iter().map(|variant| variant.name()).collect()
}
