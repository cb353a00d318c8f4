//! The command line of `cargo xtask`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::build::Profile;
use crate::node::{Add, Limits, Line, Machine, Run, Seat};
use crate::{
    bench, chaos, conformance, demo, deny, dist, fuzz, image, imports, kernel, miri, modules, node, scale, setup, test,
    user_cache,
};

/// Builds, runs and tests Husk.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the packages that the build and the tests need and that this machine lacks (Debian and Ubuntu only).
    Setup,
    /// Build the guest kernel.
    Kernel,
    /// Build the agent and the guest's initramfs.
    Image(Quick),
    /// Build Husk and place its files in dist/root. To install Husk on a node, copy the content of dist/root to /.
    Dist(Quick),
    /// Build the OCI images that the demo and the tests use.
    Images,
    /// List the entries of the user's cache: the kernel, the images and the files of the test node.
    Cache {
        /// First remove the entries that have not been used for 30 days. Of each kind, keep only the three entries that
        /// were used last.
        #[arg(long)]
        prune: bool,
    },
    /// Prepare or boot the test node, a Debian VM with KVM and containerd.
    Node {
        #[command(subcommand)]
        command: NodeTask,
    },
    /// Run a container under Husk, and show its output and the timeline of its start.
    Demo(demo::Options),
    /// Run all checks and tests.
    Test(test::Options),
    /// Run the fuzz targets. Exit with 1 if a target found a defect.
    Fuzz(fuzz::Options),
    /// Run unit tests of unsafe code and of parsers under Miri. Exit with 1 if a test failed.
    Miri(miri::Options),
    /// Check licences, duplicate versions and sources of the dependencies against deny.toml.
    Deny,
    /// Check that imports are grouped: the standard library, other crates, this crate.
    Imports {
        /// Group the imports. Imports with attributes or comments are not changed.
        #[arg(long)]
        fix: bool,
    },
    /// Show cycles among the modules of each crate, and compare them with xtask/known-cycles.toml.
    Modules {
        /// First remove from xtask/known-cycles.toml the uses that are no longer part of a cycle.
        #[arg(long)]
        shrink: bool,
    },
    /// Run the CRI conformance suite with runc and with Husk, and write the results to docs/conformance.md.
    Conformance,
    /// Run pods in the test node, and inject 500 faults that a seed determines. Exit with 1 if something is left, hangs
    /// or runs twice.
    Chaos(chaos::Chaos),
    /// Create and remove many pods in the test node. Exit with 1 if a resource of the node grows with the number of
    /// pods.
    Soak(chaos::Soak),
    /// Run hundreds of pods at once in the test node. Exit with 1 if what they take from the node does not grow linearly,
    /// or if Husk reaches a limit of the node with fewer than 1000 pods.
    Scale(scale::Options),
    /// Run benchmarks in the test node.
    Bench(bench::Options),
}

#[derive(Args, Clone, Copy)]
struct Quick {
    /// Build in the quick profile, which optimises less and builds faster.
    #[arg(long)]
    quick: bool,
}

#[derive(Subcommand)]
enum NodeTask {
    /// Build the node's disk, kernel and initramfs without booting the node.
    Prepare,
    /// Boot the node, run SCRIPT when containerd answers, and exit with SCRIPT's exit code. Files that SCRIPT leaves
    /// in /out are copied to target/husk/node/out.
    Run {
        #[command(flatten)]
        place: Place,
        /// Stop the node after this many seconds.
        #[arg(long, default_value_t = 2700)]
        time_limit: u64,
        /// Boot a node whose containerd already has the OCI images of the tests.
        #[arg(long)]
        images: bool,
        /// Set a variable in the script's environment.
        #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
        env: Vec<(String, String)>,
        /// The shell script to run.
        script: PathBuf,
        /// The arguments of SCRIPT.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Boot the node, and open a shell in it on this terminal.
    Shell {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
struct Place {
    /// Copy a file or directory into the node.
    #[arg(long, value_name = "HOSTPATH:NODEPATH")]
    add: Vec<Add>,
    /// The number of the node's vCPUs.
    #[arg(long, default_value_t = Machine::default().cpus)]
    cpus: u32,
    /// The node's memory in MiB.
    #[arg(long, default_value_t = Machine::default().memory)]
    memory: u32,
    /// The node's containerd line.
    #[arg(long, value_enum, default_value_t)]
    containerd: Line,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(format!("`{name}` is not a variable name; use letters, digits and underscores"));
    }
    Ok((name.into(), value.into()))
}

/// Runs the command. Returns the exit code.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Task::Setup => setup::setup()?,
        Task::Kernel => drop(kernel::kernel()?),
        Task::Image(Quick { quick }) => drop(image::image(Profile::quick(quick))?),
        Task::Dist(Quick { quick }) => drop(dist::dist(Profile::quick(quick))?),
        Task::Images => {
            for image in [node::images()?, node::builder_images()?, node::fsx_image()?].concat() {
                println!("{}", image.from.display());
            }
        }
        Task::Cache { prune } => user_cache::list_entries(prune)?,
        Task::Node { command: NodeTask::Prepare } => node::prepare()?,
        Task::Node { command: NodeTask::Run { place, time_limit, images, env, script, args } } => {
            let machine = Machine { cpus: place.cpus, memory: place.memory };
            let limits = Limits::secs(time_limit, time_limit);
            let Place { add, containerd, .. } = place;
            let seat = Seat::default();
            return node::run(&Run { script, args, env, add, imported: images, machine, containerd, limits, seat });
        }
        Task::Node { command: NodeTask::Shell { place } } => {
            node::shell(place.containerd, &place.add, Machine { cpus: place.cpus, memory: place.memory })?;
        }
        Task::Demo(options) => return demo::demo(&options),
        Task::Test(options) => return test::test(&options),
        Task::Fuzz(options) => return fuzz::fuzz(&options),
        Task::Miri(options) => return miri::miri(&options),
        Task::Deny => deny::deny()?,
        Task::Imports { fix } => imports::imports(fix)?,
        Task::Modules { shrink } => modules::modules(shrink)?,
        Task::Conformance => return conformance::conformance(),
        Task::Chaos(options) => return chaos::chaos(&options),
        Task::Soak(options) => return chaos::soak(&options),
        Task::Scale(options) => return scale::scale(&options),
        Task::Bench(options) => return bench::bench(&options),
    }
    Ok(0)
}
