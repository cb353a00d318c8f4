//! `cargo xtask setup`: lists the packages that this machine lacks, and installs them.

use std::collections::HashMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::pins::KERNEL_SOURCE;
use crate::{cmd, disk_space, ui};

/// The packages that xtask needs on every distribution, each with its purpose.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "kernel, programs"),
    ("libc6-dev", "programs"),
    ("make", "kernel"),
    ("flex", "kernel"),
    ("bison", "kernel"),
    ("bc", "kernel"),
    ("patch", "kernel"),
    ("libelf-dev", "kernel"),
    ("libssl-dev", "kernel"),
    ("pahole", "kernel: BTF"),
    ("rsync", "kernel"),
    ("python3", "kernel"),
    ("xz-utils", "kernel, test node"),
    ("zstd", "images"),
    ("cpio", "tests of the initramfs"),
    ("e2fsprogs", "test node"),
    ("mmdebstrap", "test node, images"),
    ("debian-archive-keyring", "test node"),
    ("libseccomp-dev", "agent"),
    ("libcap-ng-dev", "VMM: virtiofsd"),
    ("qemu-system-x86", "test node"),
    ("busybox-static", "images"),
];
/// The first major version of QEMU whose emulated SVM runs a node reliably. For Debian bookworm, only the backports
/// have this version.
const QEMU: u32 = 10;

/// Installs the missing packages.
pub fn setup() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("Husk can be built on x86_64 only");
    }
    disk_space::check();
    let release = os_release()?;
    let installed = installed()?;
    let backports = release.codename == "bookworm";
    let old_qemu = installed.get("qemu-system-x86").is_none_or(|v| major(v) < QEMU);
    let mut missing: Vec<&str> =
        PACKAGES.iter().map(|(name, _)| *name).filter(|name| !installed.contains_key(*name)).collect();
    if old_qemu && backports && !missing.contains(&"qemu-system-x86") {
        missing.push("qemu-system-x86");
    }
    // Ubuntu lacks this package. On Ubuntu, `cargo xtask kernel` fetches Debian's package.
    if !installed.contains_key(KERNEL_SOURCE) && release.id == "debian" {
        missing.push(KERNEL_SOURCE);
    }
    if missing.is_empty() {
        ui::say("setup", "all packages are installed");
        return Ok(());
    }
    ui::say("setup", format!("installing packages that this machine ({}) lacks:", release.name));
    for name in &missing {
        let purpose = PACKAGES.iter().find(|(known, _)| known == name).map_or("kernel", |(_, purpose)| purpose);
        eprintln!("             {name} ({purpose})");
    }
    if !release.debian_like {
        bail!("setup supports only Debian and Ubuntu, not {}; install the packages above by hand", release.name);
    }
    let from_backports = backports && missing.contains(&"qemu-system-x86");
    if from_backports {
        add_backports(&release.codename)?;
    }
    if !missing.iter().all(|name| available(name))
        || (from_backports && candidate_in_backports(&release.codename).is_none())
    {
        ui::say("setup", "apt-get update");
        cmd::logged("setup", "apt-update", apt().arg("update"))?;
    }
    let unknown: Vec<&str> = missing.iter().copied().filter(|name| !available(name)).collect();
    if !unknown.is_empty() {
        bail!("failed to find a package source for {}; add one to apt's configuration", unknown.join(", "));
    }
    let wanted: Vec<String> = missing
        .iter()
        .map(|name| match *name {
            "qemu-system-x86" if backports => format!("{name}/{}-backports", release.codename),
            name => name.to_owned(),
        })
        .collect();
    if install(&wanted, backports.then_some(release.codename.as_str())).is_err() {
        // apt's package lists may name versions that the mirror no longer has.
        ui::say("setup", "failed to install the packages; retrying after apt-get update");
        cmd::logged("setup", "apt-update", apt().arg("update"))?;
        install(&wanted, backports.then_some(release.codename.as_str()))?;
    }
    ui::say("setup", "installed");
    Ok(())
}

fn install(packages: &[String], backports: Option<&str>) -> Result<()> {
    let mut command = apt();
    command.args(["install", "--yes", "--no-install-recommends"]);
    if let (Some(codename), true) = (backports, packages.iter().any(|p| p.contains('/'))) {
        // QEMU's dependencies have to come from backports too.
        command.arg(format!("--target-release={codename}-backports"));
        let (from, other): (Vec<_>, Vec<_>) = packages.iter().partition(|p| p.contains('/'));
        if !other.is_empty() {
            let mut plain = apt();
            plain.args(["install", "--yes", "--no-install-recommends"]).args(other);
            cmd::logged("setup", "apt-install", &mut plain)?;
        }
        return cmd::logged("setup", "apt-install-backports", command.args(from));
    }
    cmd::logged("setup", "apt-install", command.args(packages))
}

/// Returns a non-interactive apt-get command, with sudo unless this process is root.
fn apt() -> Command {
    let mut command = if cmd::is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["--non-interactive", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "Dpkg::Use-Pty=0"]);
    command
}

/// Whether apt can install a version of the package.
fn available(name: &str) -> bool {
    cmd::output(Command::new("apt-cache").args(["policy", name]).env("LC_ALL", "C"))
        .is_ok_and(|text| text.contains("Candidate:") && !text.contains("Candidate: (none)"))
}

fn candidate_in_backports(codename: &str) -> Option<String> {
    let text = cmd::output(Command::new("apt-cache").args(["madison", "qemu-system-x86"])).ok()?;
    text.lines().find(|line| line.contains(&format!("{codename}-backports/"))).map(str::to_owned)
}

/// Returns the installed packages with their versions.
fn installed() -> Result<HashMap<String, String>> {
    let text = cmd::output(Command::new("dpkg-query").args(["-W", "-f=${Package} ${Version} ${db:Status-Status}\n"]))
        .context("failed to list the installed packages; use a distribution with dpkg")?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (name, version) = (words.next()?, words.next()?);
            (words.next() == Some("installed")).then(|| (name.to_owned(), version.to_owned()))
        })
        .collect())
}

/// Returns the upstream major version in a version like `1:10.0.2+ds-2`.
fn major(version: &str) -> u32 {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

struct Release {
    name: String,
    codename: String,
    id: String,
    debian_like: bool,
}

fn os_release() -> Result<Release> {
    let text = fs::read_to_string("/etc/os-release").context("failed to read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let family = format!("{} {}", field("ID"), field("ID_LIKE"));
    Ok(Release {
        name: field("PRETTY_NAME"),
        codename: field("VERSION_CODENAME"),
        id: field("ID"),
        debian_like: family.split(' ').any(|word| word == "debian" || word == "ubuntu"),
    })
}

/// Returns the Debian mirror of this machine's release, from apt's configuration. `None` if the machine does not run
/// Debian, or if apt's configuration has no such mirror.
pub fn debian_mirror() -> Result<Option<String>> {
    let release = os_release()?;
    let text = cmd::output(Command::new("apt-get").args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)",
    ]))?;
    // Ubuntu's mirrors do not have Debian's packages.
    Ok(mirror_of(&text, &release.codename).filter(|_| release.id == "debian"))
}

fn mirror_of(targets: &str, codename: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["Packages", release, "main", uri] if *release == codename || *release == "stable" => {
                Some(uri.trim_end_matches('/').to_owned())
            }
            _ => None,
        }
    })
}

/// Adds the release's backports to apt's sources, from the mirror of the release.
fn add_backports(codename: &str) -> Result<()> {
    if candidate_in_backports(codename).is_some() {
        return Ok(());
    }
    let targets =
        cmd::output(Command::new("apt-get").args(["indextargets", "--no-release-info", "--format", "$(RELEASE)"]))?;
    let suite = format!("{codename}-backports");
    if targets.lines().any(|line| line == suite) {
        return Ok(());
    }
    let mirror =
        debian_mirror()?.with_context(|| format!("failed to find a mirror for {codename} in apt's configuration"))?;
    let path = "/etc/apt/sources.list.d/husk-backports.sources";
    ui::say("setup", format!("adding {suite} to apt's sources ({path}), for QEMU {QEMU}"));
    let text = format!(
        "Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    if cmd::is_root() {
        return fs::write(path, text).with_context(|| format!("failed to write {path}"));
    }
    let mut tee = Command::new("sudo");
    tee.args(["--non-interactive", "sh", "-c", "printf %s \"$1\" > \"$2\"", "sh", &text, path]);
    cmd::logged("setup", "apt-backports", &mut tee)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_skips_the_epoch() {
        assert_eq!(major("1:10.0.2+ds-2+deb13u1~bpo12+1"), 10);
        assert_eq!(major("6.12.117-1~deb12u1"), 6);
        assert_eq!(major(""), 0);
    }

    #[test]
    fn mirror_of_ignores_other_releases() {
        let targets = "Translations bookworm main http://a/x/\nPackages bookworm-security main http://b/security/\n\
                       Packages bookworm main http://a/debian/\n";
        assert_eq!(mirror_of(targets, "bookworm").as_deref(), Some("http://a/debian"));
        assert_eq!(mirror_of(targets, "noble"), None);
    }
}
