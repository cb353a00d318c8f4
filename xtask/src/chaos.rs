//! `cargo xtask chaos` and `cargo xtask soak`: long runs in the test node, in shards. Each shard has its own boot.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::build::{self, Profile};
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Run, Seat};
use crate::{dist, files, image, paths, setup, ui};

/// Number of shards of a seed (`tests/e2e/src/chaos/plan.rs`).
const SHARDS: usize = 10;
/// Time limits of a shard: a limit for the whole shard, and a limit for the time without output. A step prints at least
/// its name and its result, and can wait for several requests that reach their limits.
const LIMITS: Limits = Limits { total: Duration::from_secs(4 * 3600), quiet: Duration::from_secs(900) };
/// Name of the program that runs in the node.
const PROGRAM: &str = "husk-chaos";

/// The options of `cargo xtask chaos`.
#[derive(Args)]
pub struct Chaos {
    /// The seed, which determines all faults.
    #[arg(long, required_unless_present_any = ["replay", "failpoints"])]
    seed: Option<u64>,
    /// Run only this shard of the ten.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..SHARDS as u64))]
    shard: Option<u64>,
    /// Begin each shard with this step.
    #[arg(long, default_value_t = 0)]
    from: usize,
    /// Run only this many steps of each shard.
    #[arg(long)]
    steps: Option<usize>,
    /// Run only one step again.
    #[arg(long, value_name = "SEED:SHARD:STEP", conflicts_with_all = ["seed", "shard", "steps"])]
    replay: Option<String>,
    /// Instead of the faults of a seed, run each action at each failpoint of shim, VMM and agent.
    #[arg(long, conflicts_with_all = ["seed", "shard", "replay"])]
    failpoints: bool,
    #[command(flatten)]
    place: Place,
}

/// The options of `cargo xtask soak`.
#[derive(Args)]
pub struct Soak {
    /// The number of pods.
    #[arg(long, default_value_t = 2000)]
    lives: usize,
    /// The number of pods of each shard. The node boots once for each shard.
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..))]
    shard: u32,
    #[command(flatten)]
    place: Place,
}

/// What is tested.
#[derive(Args)]
struct Place {
    /// Build the tested programs in the profile of the shipped programs. Default: the quick profile.
    #[arg(long)]
    release: bool,
    /// The node's containerd line.
    #[arg(long, value_enum, default_value_t)]
    containerd: Line,
}

/// A shard: its name, and the arguments of the program in the node.
struct Shard {
    name: String,
    args: Vec<String>,
    /// The file that the program leaves in /out.
    result: &'static str,
}

/// Runs the faults of a seed. Returns the exit code, which is 1 if a step found something, or if a node crashed.
pub fn chaos(options: &Chaos) -> Result<u8> {
    let range = || {
        let mut args = vec!["--from".to_owned(), options.from.to_string()];
        args.extend(options.steps.iter().flat_map(|steps| ["--steps".to_owned(), steps.to_string()]));
        args
    };
    let shards = if options.failpoints {
        let args = [vec!["failpoints".to_owned()], range()].concat();
        vec![Shard { name: "failpoints".to_owned(), args, result: "chaos.json" }]
    } else if let Some(step) = &options.replay {
        let name = step.replace(':', "-");
        vec![Shard { name, args: vec!["replay".to_owned(), step.clone()], result: "chaos.json" }]
    } else {
        let seed = options.seed.context("`--seed` is missing")?;
        let chosen = options.shard.map_or(0..SHARDS, |shard| {
            let shard = usize::try_from(shard).unwrap_or(SHARDS);
            shard..shard + 1
        });
        let shard = |number: usize| {
            let mut args = vec!["chaos".to_owned()];
            args.extend(["--seed".to_owned(), seed.to_string(), "--shard".to_owned(), number.to_string()]);
            args.extend(range());
            Shard { name: format!("{seed}-{number}"), args, result: "chaos.json" }
        };
        chosen.map(shard).collect()
    };
    run("chaos", &shards, &options.place, options.failpoints, |result| {
        let steps = result.as_array().map(Vec::as_slice).unwrap_or_default();
        let count = |key: &str| {
            let has =
                |step: &&Value| step.get(key).is_some_and(|value| !value.is_null() && *value != Value::Array(vec![]));
            steps.iter().filter(has).count()
        };
        format!("{} steps, {} could not strike, {} with findings", steps.len(), count("missed"), count("findings"))
    })
}

/// Creates and removes pods, one after the other. Returns the exit code, which is 1 if a resource of the node grows.
pub fn soak(options: &Soak) -> Result<u8> {
    let size = usize::try_from(options.shard)?;
    let shard = |first: usize| {
        let lives = size.min(options.lives - first);
        let args = ["soak", "--first", &first.to_string(), "--lives", &lives.to_string()].map(str::to_owned).to_vec();
        Shard { name: format!("soak-{first}"), args, result: "soak.json" }
    };
    let shards: Vec<Shard> = (0..options.lives).step_by(size).map(shard).collect();
    run("soak", &shards, &options.place, false, |result| {
        let resources = result.get("resources").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let growing: Vec<&str> = resources
            .iter()
            .filter(|resource| resource.get("grows").and_then(Value::as_bool) == Some(true))
            .filter_map(|resource| resource.get("name")?.as_str())
            .collect();
        let lives = result.get("lives").and_then(Value::as_u64).unwrap_or_default();
        format!(
            "{lives} lives, growing: {}",
            if growing.is_empty() { "nothing".to_owned() } else { growing.join(", ") }
        )
    })
}

/// Runs the shards one after the other. `summary` describes the result that a shard left.
fn run(
    what: &str,
    shards: &[Shard],
    place: &Place,
    failpoints: bool,
    summary: impl Fn(&Value) -> String,
) -> Result<u8> {
    setup::setup()?;
    dist::dist(Profile::quick(!place.release))?;
    let programs = build::programs(&["husk-e2e"], Profile::Node)?;
    let program = build::find(&programs, &[PROGRAM])?;
    let mut add = node::images()?;
    add.push(Add::new(&program.path, format!("/husk/{PROGRAM}")));
    if failpoints {
        add.extend(with_failpoints(Profile::quick(!place.release))?);
    }
    let kept = paths::state().join(what);
    files::make_dir(&kept)?;
    let (mut code, mut lines) = (0, Vec::new());
    for (number, shard) in shards.iter().enumerate() {
        ui::say(what, format!("shard {} of {}: {}", number + 1, shards.len(), shard.name));
        let seat = Seat::default();
        let ended = node::run(&Run {
            script: paths::root().join("tests/node/chaos.sh"),
            args: shard.args.clone(),
            env: vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())],
            add: add.clone(),
            imported: true,
            machine: Machine::default(),
            containerd: place.containerd,
            limits: LIMITS,
            seat,
        });
        let line = match ended {
            Ok(ended) => {
                code = code.max(ended);
                let result = keep(seat, shard, &kept)?;
                result.map_or_else(|| format!("no result, exit code {ended}"), |result| summary(&result))
            }
            // The cause of a crash of the node is a fault, or a defect of the emulator. A replay of the last step shows
            // the cause.
            Err(error) if error.is::<Crashed>() => {
                code = 1;
                format!("the node crashed: {error:#}")
            }
            Err(error) => return Err(error),
        };
        ui::say(what, format!("{}: {line}", shard.name));
        lines.push(format!("{}: {line}", shard.name));
    }
    ui::say(what, format!("results are in {}", kept.display()));
    for line in lines {
        ui::say(what, line.lines().next().unwrap_or_default());
    }
    Ok(code)
}

/// Builds the programs with failpoints. In the node, they replace those of `dist/root`.
fn with_failpoints(profile: Profile) -> Result<Vec<Add>> {
    let programs = build::with_failpoints(profile)?;
    let shim = build::find(&programs, &["containerd-shim-husk-v2"])?;
    let initrd = paths::state().join("failpoints/initrd.cpio");
    image::pack_other(build::find(&programs, &[image::AGENT])?, &initrd)?;
    let shim = Add::new(&shim.path, "/usr/local/bin/containerd-shim-husk-v2");
    Ok(vec![shim, Add::new(initrd, "/usr/local/share/husk/initrd.cpio")])
}

/// Copies the shard's result and containerd's log. Returns the result, or `None` if the shard left none.
fn keep(seat: Seat, shard: &Shard, kept: &std::path::Path) -> Result<Option<Value>> {
    let copy = |from: &str, to: String| -> Result<bool> {
        let (from, to) = (seat.out_dir().join(from), kept.join(to));
        if !from.exists() {
            return Ok(false);
        }
        fs::copy(&from, &to).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))?;
        Ok(true)
    };
    copy("containerd.log", format!("{}.containerd.log", shard.name))?;
    let name = format!("{}.json", shard.name);
    if !copy(shard.result, name.clone())? {
        return Ok(None);
    }
    let text = fs::read_to_string(kept.join(&name)).with_context(|| format!("failed to read {name}"))?;
    match serde_json::from_str(&text) {
        Ok(result) => Ok(Some(result)),
        Err(error) => bail!("failed to parse {name}: {error}"),
    }
}
