//! Decides with which containerd lines a suite runs.

use crate::node::Line;
use crate::suites::{Lines, Needs, NodeKind};

/// The containerd lines of a run without `--containerd`.
pub const LINES: [Line; 4] = [Line::One, Line::Two, Line::Legacy, Line::Systemd];

/// Which tests the options select.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// The tests of a default run, which every change has to pass.
    Change,
    /// The tests of a default run, and the long tests.
    All,
    /// All tests, including the long ones, with one containerd line.
    Line,
}

/// Whether a suite runs with a containerd line. `filtered` is true if the options have a filter that names a test of
/// the suite.
pub fn runs(needs: &Needs, line: Line, extent: Extent, filtered: bool) -> bool {
    match (needs.node, line) {
        (NodeKind::CgroupV1, line) => return line == Line::Legacy,
        (NodeKind::Systemd, line) => return line == Line::Systemd,
        (NodeKind::Any, _) if needs.by_name_only.is_some() && !filtered => return false,
        (NodeKind::Any, _) => {}
    }
    match (line, needs.lines) {
        (Line::One, Lines::One | Lines::Both) => true,
        (Line::One, Lines::TwoInstead) => filtered || extent > Extent::Change,
        (Line::One, Lines::TwoOnly) => false,
        (Line::Two, Lines::One) => extent == Extent::Line,
        (Line::Two, Lines::Both | Lines::TwoInstead | Lines::TwoOnly) => true,
        (Line::Legacy, lines) => filtered && extent == Extent::Line && lines != Lines::TwoOnly,
        (Line::Systemd, _) => filtered && extent == Extent::Line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suites;

    #[test]
    fn suites_run_with_the_containerd_lines_that_they_declare() {
        let suites = suites::read().unwrap();
        let lines = |name: &str, extent, filtered| -> Vec<Line> {
            let suite = suites.iter().find(|suite| suite.name == name).unwrap();
            LINES.into_iter().filter(|line| runs(&suite.needs, *line, extent, filtered)).collect()
        };
        let plain = |suite| lines(suite, Extent::Change, false);
        assert_eq!(plain("process"), [Line::One]);
        assert_eq!(plain("cri_pods"), [Line::One, Line::Two]);
        assert_eq!(plain("cri_userns"), [Line::Two]);
        assert_eq!(lines("cri_userns", Extent::All, false), [Line::One, Line::Two]);
        assert_eq!(plain("cri_sandboxer"), [Line::Two]);
        assert_eq!(plain("cri_cgroup1"), [Line::Legacy]);
        assert_eq!(plain("cri_systemd"), [Line::Systemd]);
        assert!(plain("soak").is_empty() && lines("soak", Extent::All, false).is_empty());
        assert_eq!(lines("soak", Extent::Change, true), [Line::One]);
        assert_eq!(lines("process", Extent::Line, false), [Line::One, Line::Two]);
        assert_eq!(lines("process", Extent::Line, true), LINES);
    }
}
