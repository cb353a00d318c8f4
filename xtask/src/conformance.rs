//! `cargo xtask conformance`: runs the conformance suite with runc and with Husk, on each containerd line, and writes
//! the results to docs/conformance.md.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, bail};

use crate::build::{self, Profile, Program};
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Run, Seat};
use crate::{dist, files, paths, setup, side, ui};

/// The suite that tests what the CRI promises.
const SUITE: &str = "conformance";
/// A column of the table: a containerd line, a runtime, and a handler that the node's containerd has for the runtime.
struct Column {
    name: &'static str,
    line: Line,
    runtime: &'static str,
    handler: &'static str,
}

const RUNC: &str = "io.containerd.runc.v2";
const HUSK: &str = "io.containerd.husk.v2";
/// The columns of the table.
const COLUMNS: [Column; 5] = [
    Column { name: "runc", line: Line::One, runtime: RUNC, handler: "runc" },
    Column { name: "husk", line: Line::One, runtime: HUSK, handler: "husk" },
    Column { name: "runc", line: Line::Two, runtime: RUNC, handler: "runc" },
    Column { name: "husk", line: Line::Two, runtime: HUSK, handler: "husk" },
    Column { name: "husk-sandbox", line: Line::Two, runtime: HUSK, handler: "husk-sandbox" },
];
/// Time limits for a column. The limit on the time without output applies to the test of one behaviour.
const LIMITS: Limits = Limits::secs(2400, 400);
/// Maximum number of attempts for a column if the node crashes.
const TRIES: u32 = 3;

/// A behaviour, and its result in each column.
struct Row {
    group: String,
    behaviour: String,
    results: BTreeMap<usize, String>,
}

/// Runs the suite for all columns and writes the page. Returns the exit code, which is 1 if Husk fails a behaviour that
/// runc passes.
pub fn conformance() -> Result<u8> {
    setup::setup()?;
    dist::dist(Profile::Node)?;
    let suites = build::tests("husk-e2e")?;
    let suite = build::find(&suites, &[SUITE])?;
    let columns: Vec<(usize, &Column)> = COLUMNS.iter().enumerate().collect();
    let work = (columns.into_iter(), Vec::new());
    let (_, mut done) = side::side_by_side(
        work,
        |(columns, _)| columns.next(),
        |seat, (number, column)| {
            ui::say("conformance", format!("column {} of {}: {}", number + 1, COLUMNS.len(), column.name));
            run(seat, suite, column)?;
            Ok([read(seat, "containerd")?, read(seat, "results")?, read(seat, "runc")?])
        },
        |(_, done), (number, column), files| done.push((number, column, files)),
    )?;
    done.sort_by_key(|(number, ..)| *number);
    let (mut rows, mut titles, mut runc) = (Vec::new(), Vec::new(), String::new());
    for (number, column, [containerd, results, runc_version]) in done {
        let version = containerd.split_whitespace().nth(2).unwrap_or_default();
        titles.push(format!("{}, {}", column.name, version.split(['~', '+']).next().unwrap_or_default()));
        collect(&mut rows, number, &results)?;
        runc = runc_version;
    }
    let text = page(&rows, &titles, runc.trim().trim_start_matches("runc version "));
    let path = paths::root().join("docs/conformance.md");
    fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
    let worse = worse(&rows);
    ui::say(
        "conformance",
        format!("tested {} behaviours; Husk fails {} of them that runc passes", rows.len(), worse.len()),
    );
    Ok(u8::from(!worse.is_empty()))
}

/// Runs the suite with one runtime. The suite runs in a separate node, so that kernel state of one runtime cannot
/// affect the results of another runtime.
fn run(seat: Seat, suite: &Program, column: &Column) -> Result<()> {
    let Column { line, runtime, handler, .. } = *column;
    let script = format!(
        "export HUSK_E2E_RUNTIME={runtime} HUSK_E2E_HANDLER={handler} HUSK_CONFORMANCE=/out/results\n\
         /husk/tests/{SUITE} --test-threads=1\n\
         containerd --version > /out/containerd; runc --version | head -n1 > /out/runc\n"
    );
    files::make_dir(&seat.dir())?;
    let path = seat.dir().join("conformance.sh");
    fs::write(&path, script).with_context(|| format!("failed to write {}", path.display()))?;
    let mut add = node::images()?;
    add.push(Add::new(&suite.path, format!("/husk/tests/{SUITE}")));
    let env = vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())];
    let machine = Machine::default();
    let run =
        Run { script: path, args: vec![], env, add, imported: true, machine, containerd: line, limits: LIMITS, seat };
    let mut end = node::run(&run);
    for _ in 1..TRIES {
        match end {
            Err(error) if error.is::<Crashed>() => {
                ui::say("conformance", format!("retrying the column after a crash of the node: {error:#}"));
            }
            end => return end.map(drop),
        }
        end = node::run(&run);
    }
    end.map(drop)
}

/// Reads a file that the node left in `/out`.
fn read(seat: Seat, name: &str) -> Result<String> {
    let path = seat.out_dir().join(name);
    fs::read_to_string(&path)
        .with_context(|| format!("failed to read {}; the node should have left it in /out", path.display()))
}

/// Adds the results of one column. Each line of `text` has a group, a behaviour and a result, separated by tabs.
fn collect(rows: &mut Vec<Row>, column: usize, text: &str) -> Result<()> {
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [group, behaviour, result] = fields[..] else {
            bail!("failed to parse the result {line:?}: expected group, behaviour and result, separated by tabs")
        };
        let found = rows.iter_mut().find(|row| row.group == group && row.behaviour == behaviour);
        match found {
            Some(row) => drop(row.results.insert(column, result.to_owned())),
            None => rows.push(Row {
                group: group.to_owned(),
                behaviour: behaviour.to_owned(),
                results: BTreeMap::from([(column, result.to_owned())]),
            }),
        }
    }
    Ok(())
}

/// Returns the behaviours that pass with runc and fail with Husk on the same containerd line.
fn worse(rows: &[Row]) -> Vec<&Row> {
    let is = |row: &Row, column: usize, result: &str| row.results.get(&column).is_some_and(|found| found == result);
    let runc = |of: &Column| COLUMNS.iter().position(|column| column.line == of.line && column.runtime == RUNC);
    let lost = |row: &&Row| {
        let fails = COLUMNS.iter().enumerate().filter(|(number, _)| is(row, *number, "fails"));
        fails.filter_map(|(_, column)| runc(column)).any(|runc| is(row, runc, "passes"))
    };
    rows.iter().filter(lost).collect()
}

fn page(rows: &[Row], titles: &[String], runc: &str) -> String {
    let mut text = format!(
        "# CRI conformance of Husk and runc\n\n\
         `cargo xtask conformance` generates this page. The command tests each behaviour through containerd's CRI in\n\
         the test node. The groups of behaviours are those of the CRI's validation suite. The columns name the\n\
         handler and containerd's version. The version of runc is {runc}.\n\n\
         - *refused*: the behaviour needs something that a VM does not share with its host. The error message names\n  \
         what it needs.\n\
         - If a behaviour fails with every runtime of a containerd version, this containerd does not implement the\n  \
         behaviour.\n\
         - husk-sandbox is the handler with `sandboxer = \"shim\"`. With this sandboxer, a pod with\n  \
         `hostNetwork: true` crashes containerd 2.1 itself ([install.md](install.md)). Therefore the host's\n  \
         network namespace is not tried.\n"
    );
    let mut group = "";
    for row in rows {
        if row.group != group {
            group = &row.group;
            let _ = writeln!(
                text,
                "\n## {group}\n\n| | {} |\n| --- |{}",
                titles.join(" | "),
                " --- |".repeat(titles.len())
            );
        }
        let cell = |column| match row.results.get(&column).map(String::as_str) {
            Some("fails") => "**fails**",
            Some(result) => result,
            None => "not tried",
        };
        let cells: Vec<&str> = (0..titles.len()).map(cell).collect();
        let _ = writeln!(text, "| {} | {} |", row.behaviour, cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_become_a_table() {
        let mut rows = Vec::new();
        collect(&mut rows, 0, "A\tone\tpasses\nA\ttwo\tfails\nB\tthree\tpasses\n").unwrap();
        collect(&mut rows, 1, "A\tone\trefused\nA\ttwo\tfails\nB\tthree\tfails\n").unwrap();
        assert_eq!(worse(&rows).iter().map(|row| row.behaviour.as_str()).collect::<Vec<_>>(), ["three"]);
        let text = page(&rows, &["runc, 1.7".into(), "husk, 1.7".into(), "runc, 2.1".into()], "1.1");
        assert!(
            text.contains("## A\n\n| | runc, 1.7 | husk, 1.7 | runc, 2.1 |\n| --- | --- | --- | --- |\n"),
            "{text}"
        );
        assert!(text.contains("| one | passes | refused | not tried |\n| two | **fails** | **fails** | not tried |\n"));
        assert!(collect(&mut rows, 1, "nonsense").is_err());
    }
}
