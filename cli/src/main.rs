//! `husk`: the operator's command line tool on a node.

#![deny(clippy::indexing_slicing)]
#![cfg_attr(not(test), deny(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss))]

mod check;
mod output;
mod ps;
mod template;
mod trace;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use husk_base::error::chain;

use output::print;

/// Inspects Husk on this node. Husk runs containerd's pods in microVMs.
#[derive(Debug, Parser)]
#[command(name = "husk", version, arg_required_else_help = true)]
struct Arguments {
    /// Configuration file of Husk.
    #[arg(long, global = true, value_name = "FILE", default_value = husk_config::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Checks whether this node can run Husk and suggests remedies. Exits with status 1 if the node cannot run Husk.
    Check {
        /// Output format.
        #[arg(long, short, value_enum, default_value_t = check::Output::Text)]
        output: check::Output,
    },
    /// Lists this node's Husk pods and their VMs.
    Ps {
        /// Output format.
        #[arg(long, short, value_enum, default_value_t = ps::Output::Text)]
        output: ps::Output,
    },
    /// Shows how long each step of a pod's start took.
    Trace {
        /// A running pod (`name` or `namespace/name`), a sandbox id, a prefix of a sandbox id, or a timeline file. The
        /// default is the newest timeline in the file that the configuration key `timeline_log` names.
        target: Option<String>,
    },
    /// Lists, makes or removes templates. A template is a saved guest from which guests of pods are made.
    #[command(subcommand)]
    Template(TemplateCommand),
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Lists this node's templates.
    List {
        /// Output format.
        #[arg(long, short, value_enum, default_value_t = template::Output::Text)]
        output: template::Output,
    },
    /// Makes the template for pods without limits, and waits until it is made. Does nothing if there is one.
    Build,
    /// Removes all templates. Guests that were made from them go on.
    Clear,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Check { output } => check::main(&arguments.config, output),
        Command::Ps { output } => print(&ps::main(output)),
        Command::Trace { target } => match trace::main(&arguments.config, target.as_deref()) {
            Ok(text) => print(&text),
            Err(error) => fail(&error),
        },
        Command::Template(TemplateCommand::List { output }) => print(&template::list(output)),
        Command::Template(TemplateCommand::Build) => fail(&template::build(&arguments.config)),
        Command::Template(TemplateCommand::Clear) => match template::clear() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("husk: {}", chain(error));
    ExitCode::FAILURE
}
