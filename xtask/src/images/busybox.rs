//! Builds the busybox image: Debian's busybox-static with all applets, some users and groups, and a second layer.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::layer::{Layer, Owner};
use super::{hash_of, oci};

/// Increase this number whenever the content of the image changes.
const VERSION: &str = "1";

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
tester:x:1000:1000:A user:/home/tester:/bin/sh
other:x:1001:1001:Another user:/:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
";

const GROUP: &str = "\
root:x:0:
daemon:x:1:
audio:x:29:tester
video:x:44:tester,other
tester:x:1000:
other:x:1001:
extra:x:2000:tester
nogroup:x:65534:
";

/// A script for tests of the PATH look-up. The script's directory, `/opt/tools`, is in the PATH of this image's
/// configuration. The directory is not in the PATH of the other images.
const GREET: &str = "#!/bin/sh\necho \"greetings from $0\"\n";

/// The inputs of the image.
pub struct Inputs {
    binary: Vec<u8>,
    applets: Vec<String>,
}

impl Inputs {
    /// Reads this machine's busybox.
    pub fn find() -> Result<Self> {
        let path = Path::new("/bin/busybox");
        let binary = fs::read(path)
            .with_context(|| format!("failed to read {}; install package busybox-static", path.display()))?;
        let output = Command::new(path).arg("--list-full").output().context("failed to run busybox")?;
        let list = String::from_utf8(output.stdout).context("failed to decode busybox's list of applets as UTF-8")?;
        let applets: Vec<String> = list.lines().map(str::to_owned).collect();
        if !output.status.success() || applets.is_empty() {
            bail!("failed to get a list of applets from `{} --list-full`", path.display());
        }
        if has_interpreter(&binary) {
            bail!("{} is dynamically linked; install package busybox-static", path.display());
        }
        Ok(Self { binary, applets })
    }

    /// Returns the busybox program.
    pub fn binary(&self) -> &[u8] {
        &self.binary
    }

    /// Returns a hash of the inputs of the image.
    pub fn hash(&self) -> String {
        hash_of(&[VERSION.as_bytes(), &self.binary, self.applets.join("\n").as_bytes()])
    }

    /// Writes the image's tar.
    pub fn build(&self, out: &Path) -> Result<()> {
        let work = tempfile::tempdir()?;
        let (base, upper) = (work.path().join("base.tar"), work.path().join("upper.tar"));
        self.base(&base)?;
        upper_layer(&upper)?;
        let config = oci::Config {
            env: &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/tools", "IMAGE=busybox"],
            cmd: &["sh"],
            working_dir: "/",
        };
        oci::write(out, super::BUSYBOX, &config, &[&base, &upper])
    }

    fn base(&self, path: &Path) -> Result<()> {
        let mut layer = Layer::new(BufWriter::new(File::create(path)?));
        let dirs = [
            "bin",
            "dev",
            "etc",
            "home",
            "opt",
            "opt/tools",
            "proc",
            "run",
            "sbin",
            "sys",
            "usr",
            "usr/bin",
            "usr/sbin",
            "var",
            "var/log",
            "srv",
        ];
        for dir in dirs {
            layer.dir(dir, Owner::root(0o755))?;
        }
        layer.dir("tmp", Owner::root(0o1777))?;
        layer.dir("root", Owner::root(0o700))?;
        layer.dir("home/tester", Owner::user(1000, 0o750))?;
        layer.file("bin/busybox", Owner::root(0o755), &self.binary)?;
        for applet in self.applets.iter().filter(|applet| *applet != "bin/busybox") {
            layer.symlink(applet, "/bin/busybox")?;
        }
        layer.file("etc/passwd", Owner::root(0o644), PASSWD.as_bytes())?;
        layer.file("etc/group", Owner::root(0o644), GROUP.as_bytes())?;
        layer.file("etc/removed-above", Owner::root(0o644), b"the second layer removes this\n")?;
        layer.file("etc/replaced-above", Owner::root(0o644), b"first layer\n")?;
        layer.file("etc/not-executable", Owner::root(0o644), b"#!/bin/sh\nexit 0\n")?;
        layer.file("home/tester/mine", Owner::user(1000, 0o600), b"tester's own\n")?;
        layer.finish()?.flush()?;
        Ok(())
    }
}

/// Writes the second layer, which removes a file, replaces a second file and adds a third file.
fn upper_layer(path: &Path) -> Result<()> {
    let mut layer = Layer::new(BufWriter::new(File::create(path)?));
    layer.dir("etc", Owner::root(0o755))?;
    layer.whiteout("etc/removed-above")?;
    layer.file("etc/replaced-above", Owner::root(0o644), b"second layer\n")?;
    layer.dir("opt", Owner::root(0o755))?;
    layer.dir("opt/tools", Owner::root(0o755))?;
    layer.file("opt/tools/greet", Owner::root(0o755), GREET.as_bytes())?;
    layer.finish()?.flush()?;
    Ok(())
}

/// Whether an ELF file names an interpreter, as dynamically linked programs do.
fn has_interpreter(binary: &[u8]) -> bool {
    binary.windows(8).take(4096).any(|bytes| bytes == b"/lib64/l" || bytes == b"/lib/ld-")
}
