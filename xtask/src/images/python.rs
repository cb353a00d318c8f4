//! The Debian-based image with Python: the essential packages and python3, unpacked by mmdebstrap.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::debian::{EXCLUDED, Packages};
use super::{hash_of, oci};

/// Raised whenever what this file builds changes.
const VERSION: &str = "2";

/// What the image is made of.
pub struct Inputs {
    mirror: String,
    suite: String,
}

impl Inputs {
    /// Takes the suite and the mirror from the machine's own apt configuration.
    pub fn find() -> Result<Self> {
        let suite = std::fs::read_to_string("/etc/os-release")
            .context("cannot read /etc/os-release")?
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .map(|name| name.trim_matches('"').to_owned())
            .context("/etc/os-release names no VERSION_CODENAME: Debian or Ubuntu is needed")?;
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", "$(CODENAME) $(COMPONENT) $(SITE)", "Created-By: Packages"])
            .output()
            .context("cannot run apt-get")?;
        let targets = String::from_utf8(output.stdout).context("apt-get's index targets are not text")?;
        let mirror = mirror_of(&targets, &suite)
            .with_context(|| format!("apt knows no source of {suite} main: run apt-get update"))?;
        Ok(Self { mirror, suite })
    }

    /// Identifies the image's content, but for the archive's own updates.
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
            // Byte code is made at installation and is a third of Python's size. What else is not for a program in Python
            // is another third of the image, which an emulated node takes its time to unpack.
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

/// The site that serves component main of `suite`, out of lines of codename, component and site.
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
    fn mirror_is_the_one_of_the_suite_itself() {
        let targets = "bookworm-updates main http://one.example/debian\nbookworm main http://two.example/debian\n";
        assert_eq!(mirror_of(targets, "bookworm").as_deref(), Some("http://two.example/debian"));
        assert_eq!(mirror_of(targets, "trixie"), None);
    }
}
