//! Parses the rules in deny.toml. An unknown key is an error, because xtask would otherwise ignore what the key
//! demands.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    pub graph: Graph,
    pub licenses: Licenses,
    pub bans: Bans,
    /// Only cargo-deny reads this section.
    #[serde(rename = "advisories")]
    _advisories: IgnoredAny,
    pub sources: Sources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// The targets whose dependencies are checked.
    pub targets: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Licenses {
    pub allow: Vec<String>,
    #[serde(default)]
    pub exceptions: Vec<Exception>,
    #[serde(default)]
    pub clarify: Vec<Clarification>,
    unused_allowed_license: Level,
}

/// Licences that are accepted for one crate only.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    #[serde(rename = "crate")]
    pub spec: String,
    pub allow: Vec<String>,
}

/// The licence of a crate whose manifest names no licence.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Clarification {
    #[serde(rename = "crate")]
    pub spec: String,
    pub expression: String,
    /// The files that state the licence.
    pub license_files: Vec<LicenseFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LicenseFile {
    pub path: String,
    /// The XXH32 hash of the file.
    pub hash: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Bans {
    multiple_versions: Level,
    wildcards: Level,
    pub allow_wildcard_paths: bool,
    #[serde(default)]
    pub skip: Vec<Skip>,
}

/// A version of a crate that is accepted in addition to another version of the crate.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skip {
    #[serde(rename = "crate")]
    pub spec: String,
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Sources {
    unknown_registry: Level,
    unknown_git: Level,
    pub allow_registry: Vec<String>,
    pub allow_git: Vec<String>,
}

/// What cargo-deny does about a finding. In xtask, every finding is an error. Therefore `deny` is the only accepted
/// value.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    Deny,
}

impl Rules {
    /// Parses deny.toml.
    pub fn parse(text: &str) -> Result<Self> {
        let rules: Self = toml::from_str(text).context("failed to parse deny.toml")?;
        let Licenses { unused_allowed_license: Level::Deny, .. } = rules.licenses;
        let Bans { multiple_versions: Level::Deny, wildcards: Level::Deny, .. } = rules.bans;
        let Sources { unknown_registry: Level::Deny, unknown_git: Level::Deny, .. } = rules.sources;
        unexplained(text)?;
        Ok(rules)
    }
}

/// Fails if an exception or a clarification does not begin with a comment. The comment has to state the reason, because
/// cargo-deny has no key `reason` for these entries.
fn unexplained(text: &str) -> Result<()> {
    let mut lines = text.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        let reason_is_due = matches!(line.trim(), "[[licenses.exceptions]]" | "[[licenses.clarify]]");
        if reason_is_due && !lines.next().is_some_and(|(next, _)| next.starts_with('#')) {
            bail!("deny.toml:{number}: no comment below {} states the reason; add one", line.trim());
        }
    }
    Ok(())
}

/// The name of a crate in deny.toml: `NAME`, or `NAME@VERSION`. VERSION is one or more numbers, separated by dots.
pub struct Spec<'a> {
    name: &'a str,
    version: Option<&'a str>,
}

impl<'a> Spec<'a> {
    pub fn parse(text: &'a str) -> Result<Self> {
        let (name, version) = text.split_once('@').map_or((text, None), |(name, version)| (name, Some(version)));
        let numbers = |version: &str| version.split('.').all(|part| part.parse::<u64>().is_ok());
        if name.is_empty() || version.is_some_and(|version| !numbers(version)) {
            bail!("deny.toml: `{text}` is neither NAME nor NAME@VERSION");
        }
        Ok(Self { name, version })
    }

    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Whether this spec matches version `version` of the crate `name`. The version of a spec matches all versions that
    /// begin with its numbers.
    pub fn matches(&self, name: &str, version: &str) -> bool {
        let begins = |prefix: &str| {
            version.strip_prefix(prefix).is_some_and(|rest| matches!(rest.get(..1), None | Some("." | "+" | "-")))
        };
        self.name == name && self.version.is_none_or(begins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_version_matches_only_whole_version_components() {
        let matches = |spec: &str, version: &str| Spec::parse(spec).unwrap().matches("nix", version);
        assert!(matches("nix", "0.26.4"));
        assert!(matches("nix@0.26", "0.26.4"));
        assert!(matches("nix@0.26.4", "0.26.4"));
        assert!(matches("nix@1.2.1", "1.2.1+spec-1.1.0"));
        assert!(!matches("nix@0.2", "0.26.4"));
        assert!(!matches("nix@0.26.4", "0.26.41"));
        assert!(!matches("mix", "0.26.4"));
        assert!(Spec::parse("nix@^0.26").is_err());
        assert!(Spec::parse("@1").is_err());
    }

    #[test]
    fn exception_without_a_comment_is_an_error() {
        let error = unexplained("[licenses]\n[[licenses.exceptions]]\ncrate = \"a\"\n").unwrap_err().to_string();
        assert!(error.contains("deny.toml:2: no comment"), "{error}");
        unexplained("[[licenses.exceptions]]\n# Because.\ncrate = \"a\"\n").unwrap();
    }

    #[test]
    fn unknown_key_is_an_error() {
        let text = std::fs::read_to_string(crate::paths::root().join("deny.toml")).unwrap();
        Rules::parse(&text).unwrap();
        let unknown = text.replace("[bans]", "[bans]\nhighlight = \"all\"");
        assert!(format!("{:#}", Rules::parse(&unknown).err().unwrap()).contains("highlight"));
        let lenient = text.replace("wildcards = \"deny\"", "wildcards = \"warn\"");
        assert!(Rules::parse(&lenient).is_err());
    }
}
