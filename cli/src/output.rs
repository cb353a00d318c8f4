//! The output of all subcommands.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Writes to stdout. Unlike `print!`, does not panic if stdout is closed.
pub fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Returns a table whose columns are as wide as their longest cells.
pub fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let row = |line: &[String; N]| {
        let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(row).collect()
}

/// Formats a duration in the largest unit for which the number is at least 2.
pub fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_uses_the_largest_fitting_unit() {
        let format = |seconds| age(Duration::from_secs(seconds));
        assert_eq!([format(3), format(130), format(7300), format(200_000)], ["3s", "2m", "2h", "2d"]);
    }
}
