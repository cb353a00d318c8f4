//! Prints figures that a test has measured. libtest captures what `println!` writes, and drops the captured text when
//! the test passes. These figures are printed in every run.

use std::fmt::Display;
use std::io::Write;

/// Prints a figure on a line of its own.
pub fn print_figure(figure: impl Display) {
    // A figure that cannot be printed is not a failure of the test.
    let _ = writeln!(std::io::stdout(), "\nfigure: {figure}");
}

/// Prints a line at once, even in a test that passes, and even while the test runs.
pub fn print_line(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
