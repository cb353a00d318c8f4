//! The last step inside a container: looks up the program and executes it, with runc's rules and error messages.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::io::Write;

use husk_base::sys::process::set_default_action;
use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::Error as Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::{AccessFlags, execve, faccessat};

use super::error_log;

/// libcontainer's executor: runs the container's program.
#[derive(Clone, Default)]
pub struct HuskExecutor {
    home: RefCell<Option<String>>,
}

impl Executor for HuskExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let failed = match spec.process() {
            None => "no process in the specification".to_owned(),
            Some(process) => exec_program(process, self.home.borrow().as_deref()),
        };
        // The client's Start request has already succeeded, as with runc. Therefore the container's stderr gets the
        // reason.
        let _ = writeln!(std::io::stderr(), "{failed}");
        std::process::exit(1)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let found = spec
            .process()
            .as_ref()
            .ok_or_else(|| "no process in the specification".to_owned())
            .and_then(|process| program(process).map(|_| ()));
        found.map_err(|reason| {
            error_log::record_reason(&reason);
            ExecutorValidationError::ArgValidationError(reason)
        })
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        let home = envs.get("HOME").filter(|home| !home.is_empty()).cloned();
        *self.home.borrow_mut() = Some(home.unwrap_or_else(|| "/".to_owned()));
        Ok(())
    }
}

/// Executes the container's program in this process. Returns only on failure, with the reason.
pub fn exec_program(process: &Process, home: Option<&str>) -> String {
    let path = match program(process) {
        Ok(path) => path,
        Err(reason) => return reason,
    };
    let args = process.args().as_deref().unwrap_or_default();
    let environment = environment(process.env().as_deref().unwrap_or_default(), home);
    let (Ok(program), Some(args), Some(environment)) =
        (CString::new(path.as_str()), c_strings(args), c_strings(&environment))
    else {
        return format!("exec {path}: invalid argument");
    };
    // Rust's runtime ignores SIGPIPE. Programs expect the default action, which terminates them.
    let _ = set_default_action(Signal::SIGPIPE);
    match execve(&program, &args, &environment) {
        Ok(never) => match never {},
        Err(errno) => format!("exec {path}: {}", errno_text(errno)),
    }
}

/// Returns the home directory of `uid` according to the container's `/etc/passwd`. The fallback is `/`.
///
/// The image is untrusted. Therefore this function reads the file only if it is a regular file. The function
/// reads at most 1 MiB.
pub fn home_directory(uid: u32) -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/etc/passwd").ok();
    let file = file.filter(|f| f.metadata().is_ok_and(|m| m.is_file()));
    let mut bytes = Vec::new();
    if let Some(file) = file {
        let _ = file.take(1 << 20).read_to_end(&mut bytes);
    }
    home_in(&String::from_utf8_lossy(&bytes), uid).unwrap_or("/").to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        fields.nth(2).filter(|home| found && !home.is_empty())
    })
}

/// Returns the path of the file to execute.
fn program(process: &Process) -> Result<String, String> {
    let args = process.args().as_deref().unwrap_or_default();
    let name = args.first().ok_or("no process arguments in the specification")?;
    let path = process.env().iter().flatten().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    look_path(name, path)
}

/// Looks up a program with the rules and the error texts of Go's `exec.LookPath`, which runc uses.
fn look_path(name: &str, path: &str) -> Result<String, String> {
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(Errno::ENOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(Errno::ENOTDIR) => Err(format!("exec: {name:?}: stat {name}: not a directory")),
            Err(errno) => Err(format!("exec: {name:?}: {}", errno_text(errno))),
        };
    }
    for dir in path.split(':').filter(|_| !path.is_empty()) {
        let candidate = match dir {
            "" => name.to_owned(),
            dir => format!("{}/{name}", dir.trim_end_matches('/')),
        };
        if !name.is_empty() && executable(&candidate).is_ok() {
            return match candidate.starts_with('/') {
                true => Ok(candidate),
                false => Err(format!("exec: {name:?}: cannot run executable found relative to current directory")),
            };
        }
    }
    Err(format!("exec: {name:?}: executable file not found in $PATH"))
}

fn executable(path: &str) -> Result<(), Errno> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(path).map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    match faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // A seccomp filter may forbid faccessat(2). The fallback is to check the mode bits.
        Err(Errno::ENOSYS | Errno::EPERM) if metadata.permissions().mode() & 0o111 != 0 => Ok(()),
        Err(Errno::ENOSYS | Errno::EPERM) => Err(Errno::EACCES),
        result => result,
    }
}

/// Returns the environment in the specification's order. If a name occurs several times, the last value is kept, at
/// the position of the name's first occurrence. HOME is added if it is missing or empty.
fn environment(entries: &[String], home: Option<&str>) -> Vec<String> {
    let mut positions: HashMap<&str, usize> = HashMap::new();
    let mut result: Vec<String> = Vec::with_capacity(entries.len() + 1);
    for entry in entries {
        let Some((name, _)) = entry.split_once('=') else { continue };
        match positions.get(name).and_then(|index| result.get_mut(*index)) {
            Some(earlier) => entry.clone_into(earlier),
            None => {
                positions.insert(name, result.len());
                result.push(entry.clone());
            }
        }
    }
    let set = positions.get("HOME").and_then(|index| result.get(*index)).is_some_and(|entry| entry != "HOME=");
    if let Some(home) = home.filter(|_| !set) {
        result.retain(|entry| entry != "HOME=");
        result.push(format!("HOME={home}"));
    }
    result
}

fn c_strings(strings: &[String]) -> Option<Vec<CString>> {
    strings.iter().map(|s| CString::new(s.as_str()).ok()).collect()
}

/// Returns an error's text as Go prints it: with the first letter in lower case, and without the error number.
pub fn errno_text(errno: Errno) -> String {
    let words = errno.desc();
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_path_returns_runc_error_texts() {
        assert_eq!(look_path("nosuch", "/bin"), Err("exec: \"nosuch\": executable file not found in $PATH".into()));
        assert_eq!(
            look_path("/no/such", ""),
            Err("exec: \"/no/such\": stat /no/such: no such file or directory".into())
        );
        assert_eq!(look_path("/tmp", "").unwrap_err(), "exec: \"/tmp\": is a directory");
        assert_eq!(look_path("/etc/passwd", "").unwrap_err(), "exec: \"/etc/passwd\": permission denied");
        assert_eq!(look_path("sh", "/nosuch:/bin/").as_deref(), Ok("/bin/sh"));
        assert_eq!(look_path("", "/bin").unwrap_err(), "exec: \"\": executable file not found in $PATH");
    }

    #[test]
    fn home_in_finds_the_home_directory_of_a_uid() {
        let list = "root:x:0:0:root:/root:/bin/sh\nbad\nu:x:1000:1000::/home/u:\nn:x:5:5:::\n";
        assert_eq!(home_in(list, 1000), Some("/home/u"));
        assert_eq!(home_in(list, 0), Some("/root"));
        assert_eq!(home_in(list, 5), None);
        assert_eq!(home_in(list, 7), None);
    }

    #[test]
    fn environment_keeps_order_and_the_last_value() {
        let entries: Vec<String> = ["A=1", "B=2", "A=3", "junk"].map(str::to_owned).into();
        assert_eq!(environment(&entries, Some("/root")), ["A=3", "B=2", "HOME=/root"]);
        assert_eq!(environment(&["HOME=".to_owned()], Some("/x")), ["HOME=/x"]);
        assert_eq!(environment(&["HOME=/h".to_owned()], Some("/x")), ["HOME=/h"]);
    }
}
