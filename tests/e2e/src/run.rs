//! Builds and starts a `ctr run`.

use std::path::Path;
use std::process::Command;

use crate::NAMESPACE;
use crate::command::{Input, Output, Running};

/// A builder for `ctr run`.
#[derive(Debug, Clone)]
pub struct Run {
    runtime: String,
    id: String,
    /// The image; `None` if the specification names the rootfs.
    image: Option<String>,
    flags: Vec<String>,
    command: Vec<String>,
    remove: bool,
}

impl Run {
    /// Creates a run of an image.
    pub fn new<S: AsRef<str>>(runtime: &str, id: String, image: &str, command: &[S]) -> Self {
        Self {
            runtime: runtime.to_owned(),
            id,
            image: Some(image.to_owned()),
            flags: Vec::new(),
            command: command.iter().map(|word| word.as_ref().to_owned()).collect(),
            remove: true,
        }
    }

    /// Creates a run of a specification.
    pub fn from_config(runtime: &str, id: String, config: &Path) -> Self {
        Self {
            runtime: runtime.to_owned(),
            id,
            image: None,
            flags: vec!["--config".to_owned(), config.to_string_lossy().into_owned()],
            command: Vec::new(),
            remove: true,
        }
    }

    /// Returns the container id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Adds options of `ctr run`.
    #[must_use]
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
        self
    }

    /// Keeps the container when its task exits: omits `--rm`.
    #[must_use]
    pub fn keep_container(mut self) -> Self {
        self.remove = false;
        self
    }

    /// Returns the command line.
    pub fn command(&self) -> Command {
        let mut command = Command::new("ctr");
        command.args(["-n", NAMESPACE, "run", "--runtime", &self.runtime]);
        if self.remove {
            command.arg("--rm");
        }
        command.args(&self.flags).args(&self.image).arg(&self.id).args(&self.command);
        command
    }

    /// Starts the command in the background.
    #[track_caller]
    pub fn start(&self, input: Input) -> Running {
        Running::start(self.command(), input)
    }

    /// Runs the command without input and waits for its end.
    #[track_caller]
    pub fn output(&self) -> Output {
        self.start(Input::Null).wait()
    }
}
