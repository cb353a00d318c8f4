//! The shim's command line as containerd uses it: Go's flag syntax and the actions `start` and `delete`.

pub mod bootstrap;
pub mod delete;
pub mod info;
pub mod start;

use std::path::PathBuf;

/// The parsed command line.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Args {
    /// containerd namespace.
    pub namespace: String,
    /// Container id.
    pub id: String,
    /// Address of containerd's gRPC socket.
    pub address: String,
    /// Path of the containerd binary, which publishes events.
    pub publish_binary: String,
    /// The bundle directory. Empty if the bundle is the working directory.
    pub bundle: PathBuf,
    /// Socket on which the shim is to serve. The shim ignores this value, because it chooses its own socket.
    pub socket: String,
    /// Whether to log at debug level.
    pub debug: bool,
    /// Whether to print the version.
    pub version: bool,
    /// Whether to print the RuntimeInfo message.
    pub info: bool,
    /// The action, such as `start` or `delete`. Empty if the command line does not name an action.
    pub action: String,
}

/// An invalid command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An unknown flag.
    #[error("flag provided but not defined: -{0}")]
    UnknownFlag(String),
    /// A flag without the value that it needs.
    #[error("flag needs an argument: -{0}")]
    MissingValue(String),
    /// A boolean flag with a value that is not a boolean.
    #[error("invalid boolean value {value:?} for -{flag}")]
    InvalidBool {
        /// The flag.
        flag: String,
        /// The value.
        value: String,
    },
    /// An argument that is not UTF-8.
    #[error("a command-line argument is not valid UTF-8")]
    NotUtf8,
    /// An id or namespace that is not valid as a path component.
    #[error("invalid {what} {value:?}: must be 1 to 255 characters of [A-Za-z0-9_.-] and begin with a letter or digit")]
    InvalidName {
        /// `id` or `namespace`.
        what: &'static str,
        /// The value.
        value: String,
    },
}

impl Args {
    /// Parses the arguments after the program name, as Go's `flag` package does.
    ///
    /// A flag has one or two dashes and the form `-flag value` or `-flag=value`. A boolean flag has the form `-flag` or
    /// `-flag=value`. The first argument that is not a flag is the action. The arguments after the action are ignored.
    ///
    /// # Errors
    /// [`ArgsError`] for an unknown flag, a flag without its value, or an invalid boolean.
    pub fn parse<I: IntoIterator<Item = String>>(args: I) -> Result<Self, ArgsError> {
        let mut out = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-').filter(|f| !f.is_empty()) else {
                out.action = arg;
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            if flag.is_empty() {
                out.action = args.next().unwrap_or_default();
                break;
            }
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            match name.as_str() {
                "debug" => out.debug = parse_bool(&name, value)?,
                "v" | "version" => out.version = parse_bool(&name, value)?,
                "info" => out.info = parse_bool(&name, value)?,
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                    let value = value.or_else(|| args.next()).ok_or_else(|| ArgsError::MissingValue(name.clone()))?;
                    match name.as_str() {
                        "namespace" => out.namespace = value,
                        "id" => out.id = value,
                        "address" => out.address = value,
                        "publish-binary" => out.publish_binary = value,
                        "bundle" => out.bundle = value.into(),
                        _ => out.socket = value,
                    }
                }
                _ => return Err(ArgsError::UnknownFlag(name)),
            }
        }
        Ok(out)
    }

    /// Checks the names that become path components.
    ///
    /// # Errors
    /// [`ArgsError::InvalidName`] if the namespace or the id is not valid ([`crate::ids::is_name`]).
    pub fn check_names(&self) -> Result<(), ArgsError> {
        for (what, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if !crate::ids::is_name(value) {
                return Err(ArgsError::InvalidName { what, value: value.clone() });
            }
        }
        Ok(())
    }
}

fn parse_bool(flag: &str, value: Option<String>) -> Result<bool, ArgsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(ArgsError::InvalidBool { flag: flag.to_owned(), value: other.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(args: &[&str]) -> Result<Args, ArgsError> {
        Args::parse(args.iter().map(|s| (*s).to_owned()))
    }

    #[test]
    fn parse_accepts_the_start_command_of_containerd() {
        let args = parse(&[
            "-namespace",
            "default",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "c1",
            "-debug",
            "start",
        ])
        .unwrap();
        assert_eq!((args.namespace.as_str(), args.id.as_str(), args.action.as_str()), ("default", "c1", "start"));
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert!(args.debug && !args.version);
        args.check_names().unwrap();
    }

    #[test]
    fn parse_accepts_every_go_flag_form() {
        let args = parse(&["--id=x", "-debug=false", "-bundle", "/b", "delete", "-ignored"]).unwrap();
        assert_eq!((args.id.as_str(), args.debug, args.action.as_str()), ("x", false, "delete"));
        assert_eq!(args.bundle, PathBuf::from("/b"));
        assert!(parse(&["-v"]).unwrap().version);
        assert!(parse(&["-info"]).unwrap().info);
    }

    #[test]
    fn parse_rejects_invalid_input() {
        assert_eq!(parse(&["-nonsense"]), Err(ArgsError::UnknownFlag("nonsense".into())));
        assert_eq!(parse(&["-id"]), Err(ArgsError::MissingValue("id".into())));
        assert!(matches!(parse(&["-debug=maybe"]), Err(ArgsError::InvalidBool { .. })));
    }

    proptest! {
        #[test]
        fn parse_never_panics(args: Vec<String>) {
            let _ = Args::parse(args);
        }
    }
}
