//! The output of all subcommands.

use std::io::{self, Write};
use std::process::ExitCode;

/// Writes to stdout. Unlike `print!`, does not panic if stdout is closed.
pub fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
