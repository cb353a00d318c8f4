//! `cargo xtask chaos` and `cargo xtask soak`: long runs in the test node, in shards. Each shard has its own boot.

mod kept;
mod summary;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::build::{self, Profile};
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Progress, Run, Seat};
use crate::{dist, files, image, paths, setup, side, ui};
use kept::Kept;
use summary::Tally;

/// Number of shards of a seed (`tests/e2e/src/chaos/plan.rs`).
const SHARDS: usize = 10;
/// Number of faults of a shard (`tests/e2e/src/chaos/plan.rs`).
const STEPS: usize = 50;
/// Number of steps with failpoints: each of four actions at each failpoint (`tests/e2e/src/chaos/failpoints.rs`).
const FAILPOINTS: usize = 4 * 26;
/// Maximum number of boots of a shard. After a crash of the node, the next boot continues with the next step.
const BOOTS: usize = 4;
/// Time limits of a boot: a limit for the whole boot, and a limit for the time without output. A step prints at least
/// its name and its result, and can wait for several requests that reach their limits.
const LIMITS: Limits = Limits { total: Duration::from_secs(4 * 3600), quiet: Duration::from_secs(900) };
/// Name of the program that runs in the node.
const PROGRAM: &str = "husk-chaos";

/// The options of `cargo xtask chaos`.
#[derive(Args)]
pub struct Chaos {
    /// The seed, which determines all faults.
    #[arg(long, required_unless_present_any = ["replay", "failpoints", "summary"])]
    seed: Option<u64>,
    /// Run only this shard of the ten.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..SHARDS as u64))]
    shard: Option<u64>,
    /// Begin each shard with this step. The results of earlier steps are kept.
    #[arg(long, default_value_t = 0)]
    from: usize,
    /// Run only this many steps of each shard.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Begin each shard after its last step that has a result, and skip shards that are complete.
    #[arg(long, conflicts_with_all = ["from", "replay"])]
    resume: bool,
    /// Run only one step again.
    #[arg(long, value_name = "SEED:SHARD:STEP", value_parser = step_id)]
    #[arg(conflicts_with_all = ["seed", "shard", "from", "steps"])]
    replay: Option<String>,
    /// Instead of the faults of a seed, run each action at each failpoint of shim, VMM and agent.
    #[arg(long, conflicts_with_all = ["seed", "shard", "replay"])]
    failpoints: bool,
    /// Run nothing, and add up the results of earlier runs.
    #[arg(long, exclusive = true)]
    summary: bool,
    #[command(flatten)]
    place: Place,
}

/// The options of `cargo xtask soak`.
#[derive(Args)]
pub struct Soak {
    /// The number of pods.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    lives: u32,
    /// The maximum number of pods of each shard. The node boots once for each shard.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    shard: u32,
    /// The number of pods that live at the same time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    at_once: u32,
    /// Skip shards that have a result.
    #[arg(long)]
    resume: bool,
    /// Run the pods with runc, to see what containerd and the node's kernel take without Husk.
    #[arg(long)]
    runc: bool,
    #[command(flatten)]
    place: Place,
}

/// What is tested, and where.
#[derive(Args)]
struct Place {
    /// Build the tested programs in the profile of the shipped programs. Default: the quick profile.
    #[arg(long)]
    release: bool,
    /// The node's containerd line.
    #[arg(long, value_enum, default_value_t)]
    containerd: Line,
    /// The number of nodes that run side by side, each with another shard. An emulated node keeps half a processor busy
    /// in the chaos test, and needs 8 GiB.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    nodes: u32,
}

/// Parses the id of a step, and returns it.
fn step_id(text: &str) -> Result<String, String> {
    let parts: Vec<Option<u64>> = text.split(':').map(|part| part.parse().ok()).collect();
    match parts.as_slice() {
        [Some(_), Some(shard), Some(step)] if *shard < SHARDS as u64 && *step < STEPS as u64 => Ok(text.to_owned()),
        _ => Err(format!("expected SEED:SHARD:STEP with a shard below {SHARDS} and a step below {STEPS}")),
    }
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shard {
    /// The shard's name, which is also the name of its results.
    name: String,
    /// The arguments of the program in the node, without those for `steps`.
    args: Vec<String>,
    /// The steps, and the begin of their ids. `None` if the shard is run as a whole.
    steps: Option<(Range<usize>, String)>,
}

impl Chaos {
    /// Returns the shards to run.
    fn shards(&self) -> Result<Vec<Shard>> {
        if let Some(step) = &self.replay {
            let args = vec!["replay".to_owned(), step.clone()];
            return Ok(vec![Shard { name: step.replace(':', "-"), args, steps: None }]);
        }
        let steps = |last: usize| {
            let count = self.steps.map_or(usize::MAX, |steps| usize::try_from(steps).unwrap_or(usize::MAX));
            self.from..self.from.saturating_add(count).min(last)
        };
        if self.failpoints {
            ensure!(self.from < FAILPOINTS, "`--from {}` selects none of the {FAILPOINTS} steps", self.from);
            let steps = Some((steps(FAILPOINTS), "0:0:".to_owned()));
            return Ok(vec![Shard { name: "failpoints".to_owned(), args: vec!["failpoints".to_owned()], steps }]);
        }
        ensure!(self.from < STEPS, "`--from {}` selects no step, because a shard has {STEPS} steps", self.from);
        let seed = self.seed.context("`--seed` is missing")?;
        let chosen = match self.shard {
            Some(shard) => usize::try_from(shard).map(|shard| shard..shard + 1)?,
            None => 0..SHARDS,
        };
        let shard = |number: usize| Shard {
            name: format!("{seed}-{number}"),
            args: ["chaos", "--seed", &seed.to_string(), "--shard", &number.to_string()].map(str::to_owned).to_vec(),
            steps: Some((steps(STEPS), format!("{seed}:{number}:"))),
        };
        Ok(chosen.map(shard).collect())
    }
}

/// Runs the faults of a seed. Returns the exit code, which is 1 if a step found something, if too many faults did not
/// strike, or if a node crashed.
pub fn chaos(options: &Chaos) -> Result<u8> {
    let kept = paths::state().join("chaos");
    let summarise = || -> Result<()> {
        for line in summary::lines(&kept)? {
            ui::say("chaos", line);
        }
        Ok(())
    };
    if options.summary {
        return summarise().map(|()| 0);
    }
    let ended = run("chaos", options.shards()?, options.resume, &options.place, options.failpoints)?;
    let mut tally = Tally::default();
    ended.iter().for_each(|ended| tally.join(Tally::of(&ended.results)));
    summarise()?;
    ui::say("chaos", format!("this run: {tally}"));
    Ok(u8::from(!tally.passes() || ended.iter().any(|ended| ended.failed)))
}

/// Returns the minimum number of lives for a judgement (`tests/e2e/src/soak/mod.rs` has the same rule).
fn least_lives(at_once: u32) -> u32 {
    100 + 31 * at_once
}

impl Soak {
    /// Returns the shards to run, which have the same number of lives, or one life more.
    fn shards(&self) -> Result<Vec<Shard>> {
        let Self { lives, at_once, .. } = *self;
        let count = lives.div_ceil(self.shard);
        let least = least_lives(at_once);
        if lives / count < least {
            bail!(
                "a shard would have only {} lives, and could judge nothing; with {at_once} pods at the same time, a \
                 shard needs at least {least} lives",
                lives / count
            );
        }
        let shard = |number: u32| {
            let first = (u64::from(lives) * u64::from(number) / u64::from(count)).to_string();
            let next = u64::from(lives) * u64::from(number + 1) / u64::from(count);
            let own = (next - u64::from(lives) * u64::from(number) / u64::from(count)).to_string();
            let (at_once, handler) = (at_once.to_string(), if self.runc { "runc" } else { "husk" });
            let args = ["soak", "--first", &first, "--lives", &own, "--at-once", &at_once, "--handler", handler];
            let name = if self.runc { format!("soak-runc-{first}") } else { format!("soak-{first}") };
            Shard { name, args: args.map(str::to_owned).to_vec(), steps: None }
        };
        Ok((0..count).map(shard).collect())
    }
}

/// Creates and removes pods. Returns the exit code, which is 1 if a resource of the node grows.
pub fn soak(options: &Soak) -> Result<u8> {
    let ended = run("soak", options.shards()?, options.resume, &options.place, false)?;
    for Ended { name, results, .. } in &ended {
        ui::say("soak", format!("{name}: {}", results.last().map_or_else(|| "no result".to_owned(), outcome)));
    }
    let judged: u64 = ended.iter().filter_map(|ended| ended.results.last()?.get("lives")?.as_u64()).sum();
    ui::say("soak", format!("{judged} lives in {} shards", ended.len()));
    Ok(u8::from(ended.iter().any(|ended| ended.failed || ended.results.last().is_none_or(grows))))
}

/// Returns the names of the resources that grow.
fn growing(result: &Value) -> Vec<&str> {
    let resources = result.get("resources").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let grows = |resource: &&Value| resource.get("grows").and_then(Value::as_bool) == Some(true);
    resources.iter().filter(grows).filter_map(|resource| resource.get("name")?.as_str()).collect()
}

fn grows(result: &Value) -> bool {
    !growing(result).is_empty()
}

/// Describes the result of a shard of the soak.
fn outcome(result: &Value) -> String {
    let lives = result.get("lives").and_then(Value::as_u64).unwrap_or_default();
    let seconds = result.get("seconds").and_then(Value::as_f64).unwrap_or_default();
    let growing = if grows(result) { growing(result).join(", ") } else { "nothing".to_owned() };
    format!("{lives} lives in {seconds:.0} s, growing: {growing}")
}

/// A shard that has ended.
struct Ended {
    name: String,
    results: Vec<Value>,
    /// Whether something failed that is not a result of a step.
    failed: bool,
}

/// What the boots of a run share.
struct Setup<'a> {
    what: &'a str,
    place: &'a Place,
    resume: bool,
    add: Vec<Add>,
    /// Directory of the results.
    kept: PathBuf,
}

/// Runs the shards.
fn run(what: &str, shards: Vec<Shard>, resume: bool, place: &Place, failpoints: bool) -> Result<Vec<Ended>> {
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
    let setup = Setup { what, place, resume, add, kept };
    let work = (VecDeque::from(shards), Vec::new());
    let nodes = usize::try_from(place.nodes)?;
    let (_, ended) = side::side_by_side_in(
        nodes,
        work,
        |(shards, _)| shards.pop_front(),
        |seat, shard| setup.run_shard(seat, shard),
        |(_, ended), _, result| ended.push(result),
    )?;
    ui::say(what, format!("results are in {}", setup.kept.display()));
    Ok(ended)
}

impl Setup<'_> {
    /// Runs a shard. After a crash of the node, continues with the next step in another boot.
    fn run_shard(&self, seat: Seat, shard: &Shard) -> Result<Ended> {
        let path = self.kept.join(format!("{}.json", shard.name));
        let continues = self.resume || shard.steps.as_ref().is_some_and(|(steps, _)| steps.start > 0);
        let mut kept = if continues { Kept::open(&path)? } else { Kept::replace(&path) };
        let mut failed = false;
        let mut rest = match &shard.steps {
            Some((steps, _)) => {
                let first = if self.resume { kept.next() } else { steps.start };
                first..steps.end
            }
            None if self.resume && !kept.results().is_empty() => 0..0,
            None => 0..1,
        };
        if rest.is_empty() {
            ui::say(self.what, format!("{}: all steps have results", shard.name));
        } else {
            kept.truncate(if shard.steps.is_some() { rest.start } else { 0 })?;
        }
        for boot in 0..BOOTS {
            if rest.is_empty() {
                break;
            }
            ui::say(self.what, format!("{}: boot {}, from step {}", shard.name, boot + 1, rest.start));
            let before = kept.results().len();
            let mut begun = false;
            let ended = self.boot(seat, shard, &rest, &mut kept, &mut begun);
            match ended {
                Ok(code) => {
                    seat.keep("containerd.log", &self.kept.join(format!("{}.containerd.log", shard.name)))?;
                    let expected = if shard.steps.is_some() { rest.len() } else { 1 };
                    if let Some(why) = incomplete(code, expected, kept.results().len() - before) {
                        ui::say(self.what, format!("{}: {why}", shard.name));
                        failed = true;
                    }
                    break;
                }
                // No step has begun. A busy machine can be too slow for a boot.
                Err(error) if error.is::<Crashed>() && !begun && boot + 1 < BOOTS => {
                    ui::say(self.what, format!("{}: the node did not boot: {error:#}", shard.name));
                }
                // The cause of a crash of the node is a fault, or a defect of the emulator. A replay of the step shows
                // the cause.
                Err(error) if error.is::<Crashed>() => {
                    failed = true;
                    let text = format!("{error:#}");
                    ui::say(self.what, format!("{}: the node crashed: {text}", shard.name));
                    let Some((_, prefix)) = &shard.steps else { break };
                    rest.start += kept.results().len() - before;
                    kept.add_crash(&format!("{prefix}{}", rest.start), &text)?;
                    rest.start += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Ended { name: shard.name.clone(), results: kept.results().to_vec(), failed })
    }

    /// Runs the steps `rest` of a shard in one boot. Returns the exit code. Sets `begun` if the program has begun.
    fn boot(&self, seat: Seat, shard: &Shard, rest: &Range<usize>, kept: &mut Kept, begun: &mut bool) -> Result<u8> {
        let mut args = shard.args.clone();
        if shard.steps.is_some() {
            args.extend(["--from".to_owned(), rest.start.to_string()]);
            args.extend(["--steps".to_owned(), rest.len().to_string()]);
        }
        let run = Run {
            script: paths::root().join("tests/node/chaos.sh"),
            args,
            env: vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())],
            add: self.add.clone(),
            imported: true,
            machine: Machine::default(),
            containerd: self.place.containerd,
            limits: LIMITS,
            seat,
        };
        let mut lost = None;
        let code = node::run_observed(&run, &mut |progress| {
            *begun = true;
            if let Progress::Mark(text) = progress
                && let Some(line) = text.strip_prefix("result ")
                && let Err(error) = kept.add(line)
            {
                lost.get_or_insert(error);
            }
        });
        match lost {
            Some(error) => Err(error),
            None => code,
        }
    }
}

/// Returns why the results of a boot do not count, although the node has not crashed. The program ends with 1 if its
/// steps did not pass, which the results tell, too. A program that ends early can have the same exit code.
fn incomplete(code: u8, expected: usize, got: usize) -> Option<String> {
    if code > 1 {
        return Some(format!("the program ended with the exit code {code}"));
    }
    (got != expected).then(|| format!("the program ended with {got} results instead of {expected}"))
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct ChaosCli {
        #[command(flatten)]
        options: Chaos,
    }

    #[derive(Parser)]
    struct SoakCli {
        #[command(flatten)]
        options: Soak,
    }

    fn parsed(args: &str) -> Result<Chaos, String> {
        let args = ["chaos"].into_iter().chain(args.split_whitespace());
        ChaosCli::try_parse_from(args).map(|cli| cli.options).map_err(|error| error.to_string())
    }

    fn soak_shards(args: &str) -> Result<Vec<Shard>> {
        let args = ["soak"].into_iter().chain(args.split_whitespace());
        SoakCli::try_parse_from(args)?.options.shards()
    }

    #[test]
    fn constants_are_those_of_the_program_in_the_node() {
        for (path, line) in [
            ("chaos/plan.rs", format!("pub const SHARDS: usize = {SHARDS};")),
            ("chaos/plan.rs", format!("pub const STEPS: usize = {STEPS};")),
            ("chaos/failpoints.rs", format!("const NAMES: [&str; {}] =", FAILPOINTS / 4)),
            ("chaos/failpoints.rs", "const ACTIONS: [&str; 4] =".to_owned()),
            ("chaos/verdict.rs", format!("const STEPS_PER_MISS: usize = {};", summary::STEPS_PER_MISS)),
            ("soak/mod.rs", "const WARM_UP: u32 = 100;".to_owned()),
            ("soak/mod.rs", "const LEAST: usize = 30;".to_owned()),
        ] {
            let text = std::fs::read_to_string(paths::root().join("tests/e2e/src").join(path)).unwrap();
            assert!(text.contains(&line), "{path} has no line `{line}`");
        }
    }

    #[test]
    fn from_and_steps_select_steps_of_the_chosen_shard() {
        let shards = parsed("--seed 1 --shard 3 --from 20 --steps 40").unwrap().shards().unwrap();
        assert_eq!(shards.len(), 1);
        assert_eq!((shards[0].name.as_str(), &shards[0].steps), ("1-3", &Some((20..50, "1:3:".to_owned()))));
        let all = parsed("--seed 7").unwrap().shards().unwrap();
        assert_eq!((all.len(), &all[9].steps), (SHARDS, &Some((0..STEPS, "7:9:".to_owned()))));
        for args in ["--seed 1 --from 50", "--failpoints --from 104"] {
            let error = parsed(args).unwrap().shards().unwrap_err();
            assert!(error.to_string().contains("selects no"), "{error}");
        }
    }

    #[test]
    fn replay_takes_an_existing_step_and_no_range() {
        let shards = parsed("--replay 1:3:7").unwrap().shards().unwrap();
        assert_eq!((shards[0].name.as_str(), &shards[0].steps), ("1-3-7", &None));
        for (args, text) in [
            ("--replay 1:3:7 --from 2", "cannot be used with"),
            ("--replay 1:3:7 --resume", "cannot be used with"),
            ("--replay 1:3:50", "a step below 50"),
            ("--replay 1:10:0", "a shard below 10"),
            ("--replay 1:3", "expected SEED:SHARD:STEP"),
            ("--seed 1 --resume --from 3", "cannot be used with"),
            ("--shard 1", "--seed"),
        ] {
            let error = parsed(args).err().unwrap_or_default();
            assert!(error.contains(text), "{args}: {error}");
        }
    }

    #[test]
    fn soak_divides_the_lives_evenly_and_refuses_shards_that_judge_nothing() {
        let shards = soak_shards("--lives 2000").unwrap();
        assert_eq!(shards.len(), 4);
        assert_eq!(shards[3].args[..5], ["soak", "--first", "1500", "--lives", "500"].map(str::to_owned));
        let lives =
            |shards: &[Shard]| shards.iter().map(|shard| shard.args[4].parse::<u32>().unwrap()).collect::<Vec<_>>();
        assert_eq!(lives(&soak_shards("--lives 510").unwrap()), [255, 255]);
        assert_eq!(lives(&soak_shards("--lives 131 --at-once 1").unwrap()), [131]);
        for args in ["--lives 40", "--lives 300 --shard 250", "--lives 223", "--lives 130 --at-once 1"] {
            let error = soak_shards(args).unwrap_err().to_string();
            assert!(error.contains("could judge nothing"), "{args}: {error}");
        }
    }

    #[test]
    fn boot_without_all_results_is_an_error() {
        for (code, got) in [(0, 50), (1, 50)] {
            assert_eq!(incomplete(code, 50, got), None);
        }
        for (code, got) in [(0, 49), (1, 49), (1, 0), (1, 51), (2, 50), (101, 50)] {
            assert!(incomplete(code, 50, got).is_some(), "{code} with {got} results");
        }
    }

    #[test]
    fn growing_resources_of_a_soak_are_named() {
        let result = serde_json::json!({ "lives": 250, "seconds": 500.2, "resources": [
            { "name": "mounts", "grows": true }, { "name": "threads", "grows": false } ] });
        assert_eq!(outcome(&result), "250 lives in 500 s, growing: mounts");
        assert!(grows(&result));
    }
}
