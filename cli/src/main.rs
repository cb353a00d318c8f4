//! `husk`: what an operator asks of Husk on a node.

mod check;
mod ps;
mod trace;

use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// Containers in microVMs of their own, run by containerd.
#[derive(Debug, Parser)]
#[command(name = "husk", version, arg_required_else_help = true)]
struct Arguments {
    /// Husk's configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = husk_config::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether this node can run Husk, and what to do if not; exits with 1 if it cannot.
    Check {
        /// How to print what was found.
        #[arg(long, short, value_enum, default_value_t = check::Output::Text)]
        output: check::Output,
    },
    /// Lists the pods of this node that run under Husk, and their virtual machines.
    Ps {
        /// How to print the list.
        #[arg(long, short, value_enum, default_value_t = ps::Output::Text)]
        output: ps::Output,
    },
    /// Shows where the time of a pod's start went.
    Trace {
        /// A pod that is running, by its name, `namespace/name`, or its sandbox's id or the beginning of it; or a file
        /// of timelines. Without it, the newest of the file that the configuration's `timeline_log` names.
        what: Option<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Check { output } => check::main(&arguments.config, output),
        Command::Ps { output } => print(&ps::main(output)),
        Command::Trace { what } => match trace::main(&arguments.config, what.as_deref()) {
            Ok(text) => print(&text),
            Err(error) => {
                eprintln!("husk: {}", chain(&error));
                ExitCode::FAILURE
            }
        },
    }
}

/// Prints to standard output; that it was closed is no reason to panic.
fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
