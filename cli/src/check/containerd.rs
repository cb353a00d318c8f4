//! Checks containerd: its version, whether it finds the shim, and whether Kubernetes pods can use Husk.

use std::{
    env, fs, io,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::Finding;

/// File name of the shim. containerd derives this name from the runtime's name.
const SHIM: &str = "containerd-shim-husk-v2";
const RUNTIME: &str = "io.containerd.husk.v2";
/// containerd's API socket, at the path that distributions use.
const SOCKET: &str = "/run/containerd/containerd.sock";
/// The oldest supported version, as in docs/install.md. The end-to-end suites do not test older versions.
const MIN_VERSION: (u32, u32) = (1, 7);
/// Timeout of a containerd command.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Search path if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs all checks of containerd.
pub fn all() -> Vec<Finding> {
    let path = env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.into());
    let mut findings = Vec::new();
    match find(&path, "containerd") {
        None => {
            findings.push(Finding::fail("containerd", format!("not found in {path}"), install()));
        }
        Some(program) => {
            findings.push(match output(&program, &["--version"]) {
                Ok(text) => version(&text),
                Err(error) => Finding::fail(
                    "containerd",
                    format!("failed to run {} --version: {error}", program.display()),
                    "repair the installation of containerd",
                ),
            });
            findings.push(match output(&program, &["config", "dump"]) {
                Ok(text) => runtime(&text),
                Err(error) => {
                    let remedy = "run `containerd config dump` and correct the reported errors";
                    Finding::warn("runtime", format!("failed to read containerd's configuration: {error}"), remedy)
                }
            });
        }
    }
    findings.push(match std::os::unix::net::UnixStream::connect(SOCKET) {
        Ok(_) => Finding::ok("daemon", format!("answers at {SOCKET}")),
        Err(error) => Finding::warn(
            "daemon",
            format!("failed to connect to {SOCKET}: {error}"),
            "start containerd (systemctl start containerd)",
        ),
    });
    findings.push(shim(&daemon_search_path().unwrap_or(path)));
    findings
}

fn shim(path: &str) -> Finding {
    match find(path, SHIM) {
        Some(program) => Finding::ok("shim", program.display().to_string()),
        None => {
            let detail = format!("{SHIM} not found in {path}");
            Finding::fail("shim", detail, "copy Husk's dist/root to /, and add /usr/local/bin to containerd's PATH")
        }
    }
}

/// Returns the PATH of the running containerd. containerd searches for the shim in this PATH.
fn daemon_search_path() -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let name = |path: &Path| fs::read_to_string(path.join("comm")).unwrap_or_default();
    let daemon = processes.into_iter().find(|path| name(path).trim() == "containerd")?;
    let environment = fs::read(daemon.join("environ")).ok()?;
    let path = environment.split(|byte| *byte == 0).find_map(|pair| pair.strip_prefix(b"PATH="))?;
    String::from_utf8(path.to_vec()).ok()
}

/// Returns the first executable named `name` in the search path `path`.
fn find(path: &str, name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let executable =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    env::split_paths(path).map(|dir| dir.join(name)).find(executable)
}

/// Runs a program and returns its stdout. Fails if the program fails or exceeds the timeout.
fn output(program: &Path, arguments: &[&str]) -> io::Result<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let stdout = child.stdout.take();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let result = stdout.map_or(Ok(0), |mut stdout| stdout.read_to_string(&mut text));
        let _ = sender.send(result.map(|_| text));
    });
    let stop = |child: &mut Child| {
        let _ = child.kill();
        let _ = child.wait();
    };
    match receiver.recv_timeout(TIMEOUT) {
        Ok(Ok(text)) => match child.wait()? {
            status if status.success() => Ok(text),
            status => Err(io::Error::other(status.to_string())),
        },
        Ok(Err(error)) => {
            stop(&mut child);
            Err(error)
        }
        Err(_) => {
            stop(&mut child);
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

fn required() -> String {
    let (major, minor) = MIN_VERSION;
    format!("containerd {major}.{minor} or later")
}

fn install() -> String {
    format!("install {}", required())
}

/// Checks the version in `containerd github.com/containerd/containerd/v2 v2.1.9 …` or `… 1.7.24~ds1 …`.
fn version(text: &str) -> Finding {
    let name = "containerd";
    let numbers = |word: &str| -> Option<(u32, u32)> {
        let mut parts = word.strip_prefix('v').unwrap_or(word).split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?))
    };
    match text.split_whitespace().find_map(|word| Some((word, numbers(word)?))) {
        Some((word, found)) if found >= MIN_VERSION => Finding::ok(name, format!("version {word}")),
        Some((word, _)) => Finding::fail(name, format!("version {word}"), install()),
        None => Finding::warn(
            name,
            format!("unknown version: {}", text.trim()),
            format!("check `containerd --version`: Husk needs {}", required()),
        ),
    }
}

/// Checks whether containerd's CRI plugin has a Husk runtime. `ctr` and `nerdctl` do not need such a runtime.
fn runtime(dump: &str) -> Finding {
    let name = "runtime";
    let Ok(dump) = dump.parse::<toml::Table>() else {
        return Finding::warn(name, "containerd's configuration is not valid TOML", "check `containerd config dump`");
    };
    // The CRI plugin has the first name before containerd 2.0, and the second name since containerd 2.0.
    let found = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"].iter().find_map(|plugin| {
        let runtimes = dump.get("plugins")?.get(plugin)?.get("containerd")?.get("runtimes")?.as_table()?;
        let is_husk = |value: &toml::Value| value.get("runtime_type").and_then(toml::Value::as_str) == Some(RUNTIME);
        runtimes.iter().find(|(_, value)| is_husk(value)).map(|(handler, _)| handler)
    });
    match found {
        None => Finding::warn(
            name,
            format!("containerd's CRI plugin has no runtime {RUNTIME}: Kubernetes cannot use Husk, but ctr can"),
            "import /etc/containerd/conf.d/husk.toml in containerd's configuration and restart containerd",
        ),
        Some(handler) => Finding::ok(name, format!("RuntimeClass handler {handler:?} runs {RUNTIME}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn version_parses_the_version_formats_of_distributions() {
        for (text, status) in [
            ("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6", Status::Ok),
            ("containerd github.com/containerd/containerd/v2 v2.1.9 abc", Status::Ok),
            ("containerd containerd.io 1.7.0 1fbd70374134b891f97ce19c70b6e50c7b9f4e0d", Status::Ok),
            ("containerd containerd.io 1.6.33 d2d58213f83a351ca8f528a95fbd145f5654e957", Status::Fail),
            ("something else", Status::Warn),
            ("", Status::Warn),
        ] {
            assert_eq!(version(text).status, status, "{text}");
        }
    }

    #[test]
    fn required_version_matches_install_documentation() {
        assert!(include_str!("../../../docs/install.md").contains(&format!("- {}.\n", required())));
        assert_eq!(version("containerd containerd.io 1.6.33 abc").remedy, "install containerd 1.7 or later");
    }

    #[test]
    fn runtime_is_found_in_configurations_of_containerd_1_and_2() {
        for plugin in ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"] {
            let finding =
                runtime(&format!("[plugins.\"{plugin}\".containerd.runtimes.vm]\nruntime_type = \"{RUNTIME}\""));
            assert!(finding.status == Status::Ok && finding.detail.contains("\"vm\""), "{finding:?}");
        }
        assert!(runtime("version = 2").detail.contains("Kubernetes cannot use Husk"));
        assert_eq!(runtime("[").status, Status::Warn);
    }

    #[test]
    fn find_skips_files_that_are_not_executable() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SHIM), "").unwrap();
        assert_eq!(find(dir.path().to_str().unwrap(), SHIM), None, "found a file that is not executable");
        assert_eq!(shim(dir.path().to_str().unwrap()).status, Status::Fail);
    }

    #[test]
    fn failed_command_is_an_error() {
        assert_eq!(output(Path::new("/bin/echo"), &["a b"]).unwrap(), "a b\n");
        assert!(output(Path::new("/bin/false"), &[]).is_err());
        assert!(output(Path::new("/nowhere"), &[]).is_err());
    }
}
