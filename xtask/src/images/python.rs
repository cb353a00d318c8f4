//! Builds the Debian-based image with Python: the essential packages and python3.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::debian::{EXCLUDED, Packages};
use super::{hash_of, oci};

/// Increase this number whenever the content of the image changes.
const VERSION: &str = "2";

/// The inputs of the image.
pub struct Inputs {
    mirror: String,
    suite: String,
}

impl Inputs {
    /// Reads the release from /etc/os-release, and the mirror from apt's configuration.
    pub fn find() -> Result<Self> {
        let suite = std::fs::read_to_string("/etc/os-release")
            .context("failed to read /etc/os-release")?
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .map(|name| name.trim_matches('"').to_owned())
            .context("failed to find VERSION_CODENAME in /etc/os-release; Debian or Ubuntu is needed")?;
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", "$(CODENAME) $(COMPONENT) $(SITE)", "Created-By: Packages"])
            .output()
            .context("failed to run apt-get")?;
        let targets = String::from_utf8(output.stdout).context("failed to decode apt-get's index targets as UTF-8")?;
        let mirror = mirror_of(&targets, &suite)
            .with_context(|| format!("failed to find a mirror of {suite} main in apt's lists; run `apt-get update`"))?;
        Ok(Self { mirror, suite })
    }

    /// Returns a hash of the inputs of the image. Updates of Debian's packages do not change the hash.
    pub fn hash(&self) -> String {
        let excluded = EXCLUDED.join(" ");
        hash_of(&[VERSION.as_bytes(), self.mirror.as_bytes(), self.suite.as_bytes(), excluded.as_bytes()])
    }

    /// Writes the image's tar.
    pub fn build(&self, out: &Path) -> Result<()> {
        let work = tempfile::tempdir()?;
        let layer = work.path().join("layer.tar");
        Packages {
            suite: &self.suite,
            mirror: Some(&self.mirror),
            include: "python3",
            // The hooks make the image smaller, because an emulated node unpacks slowly. They remove Python's byte
            // code, which is generated at installation and is a third of Python's size. They also remove files that no
            // Python program needs, which are another third of the image.
            hooks: &[
                "find \"$1/usr\" -xdev -name __pycache__ -prune -exec rm -rf {} +",
                "rm -rf \"$1\"/usr/share/perl/* \"$1\"/usr/lib/*/perl/* \"$1\"/usr/lib/*/libperl.* \"$1\"/usr/lib/*/gconv",
            ],
        }
        .unpack(&layer)?;
        let config = oci::Config {
            env: &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            cmd: &["python3"],
            working_dir: "/",
        };
        oci::write(out, super::PYTHON, &config, &[&layer])
    }
}

/// Returns the site (a mirror's URL) that has the component main of `suite`. Each line of `targets` has a codename, a
/// component and a site.
fn mirror_of(targets: &str, suite: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (codename, component, site) = (words.next()?, words.next()?, words.next()?);
        (codename == suite && component == "main").then(|| site.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_of_ignores_other_releases() {
        let targets = "bookworm-updates main http://one.example/debian\nbookworm main http://two.example/debian\n";
        assert_eq!(mirror_of(targets, "bookworm").as_deref(), Some("http://two.example/debian"));
        assert_eq!(mirror_of(targets, "trixie"), None);
    }
}
