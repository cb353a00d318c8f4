//! Reads the configuration file. Errors of the TOML syntax, unknown keys and wrong types are reported with the line.

use std::{io, path::Path, path::PathBuf};

use crate::{Config, check::InvalidValue};

/// An error in the configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file exists but is unreadable.
    #[error("failed to read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The OS error.
        #[source]
        source: io::Error,
    },
    /// The file is not valid TOML, or a key is unknown or has the wrong type.
    #[error("{}:{line}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line number. The first line is 1.
        line: usize,
        /// Description of the error.
        message: String,
    },
    /// A key's value is invalid.
    #[error("{}: {}: {}", path.display(), problem.key, problem.message)]
    Value {
        /// The file.
        path: PathBuf,
        /// The key and what is wrong with it.
        problem: InvalidValue,
    },
}

impl Config {
    /// Reads and validates the configuration. Returns the defaults if the file does not exist.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read(path) {
            Ok(bytes) => Self::parse(path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ConfigError> {
        let text = std::str::from_utf8(bytes).map_err(|error| ConfigError::Parse {
            path: path.into(),
            line: line_of(bytes, error.valid_up_to()),
            message: "not UTF-8".into(),
        })?;
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            line: line_of(bytes, error.span().map_or(0, |span| span.start)),
            message: error.message().trim().replace('\n', "; "),
        })?;
        config.check().map_err(|problem| ConfigError::Value { path: path.into(), problem })?;
        Ok(config)
    }
}

/// Returns the line number of the byte at `offset`. The first line is 1.
fn line_of(bytes: &[u8], offset: usize) -> usize {
    1 + bytes.iter().take(offset).filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("/etc/husk/config.toml"), text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn shipped_file_documents_every_key_with_its_default() {
        let text = include_str!("../config.toml");
        assert_eq!(parse(text).unwrap(), Config::default());
        // The file contains every key with its default, commented out. Uncommenting all keys must not change the
        // result.
        let uncommented: String = text
            .lines()
            .map(|line| line.strip_prefix("#").filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase())))
            .map(|line| format!("{}\n", line.unwrap_or_default()))
            .collect();
        assert_eq!(parse(&uncommented).unwrap(), Config::default());
        let written: toml::Table = toml::from_str(&uncommented).unwrap();
        let all = toml::Table::try_from(Config::default()).unwrap();
        assert_eq!(written.keys().collect::<Vec<_>>(), all.keys().collect::<Vec<_>>());
    }

    #[test]
    fn missing_file_gives_defaults_and_unreadable_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Config::load(&dir.path().join("none")).unwrap(), Config::default());
        // Reading a directory fails even for root.
        let error = Config::load(dir.path()).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
        let file = dir.path().join("config.toml");
        fs::write(&file, "default_vcpus = 2\n").unwrap();
        assert_eq!(Config::load(&file).unwrap().default_vcpus, 2);
    }

    #[test]
    fn unknown_key_error_names_key_and_line() {
        let error = parse("# one\ndefault_vcpus = 2\nkernle = \"/x\"\n").unwrap_err();
        assert!(error.starts_with("/etc/husk/config.toml:3: "), "{error}");
        assert!(error.contains("kernle") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn policy_is_part_of_the_configuration() {
        let config = parse("policy.exec = []\npolicy.mounts = [\"/data\"]\n").unwrap();
        assert_eq!(config.policy.exec.list().map(<[_]>::len), Some(0));
        assert_eq!(parse("[policy]\nexec = []\nmounts = [\"/data\"]\n").unwrap(), config);
        let error = parse("policy.exec = []\npolicy.mounts = [\"data\"]\n").unwrap_err();
        assert!(error.starts_with("/etc/husk/config.toml:2: invalid path \"data\""), "{error}");
        let error = parse("policy.exce = []\n").unwrap_err();
        assert!(error.contains("unknown field `exce`") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn type_and_syntax_errors_name_the_line() {
        for (text, line) in [("\nmax_vcpus = \"four\"\n", 2), ("max_vcpus = 300\n", 1), ("a\n", 1), ("\n\nx = [\n", 3)]
        {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("/etc/husk/config.toml:{line}: ")), "{text:?}: {error}");
        }
        let error = Config::parse(Path::new("c"), b"a\n\xff").unwrap_err().to_string();
        assert_eq!(error, "c:2: not UTF-8");
    }
}
