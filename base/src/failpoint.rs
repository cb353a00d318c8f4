//! Failpoints: named places in shim, VMM and agent at which the chaos test makes the program wait, fail, abort or hang.
//! Only programs that are built with the feature `failpoints` have failpoints. In all other programs, the macro
//! [`failpoint!`](crate::failpoint!) is an `Ok` that the compiler removes.
//!
//! A rule has the form `NAME=ACTION`. On the node, the rule is the content of [`RULE_FILE`]. In the guest, the rule is
//! the kernel parameter [`PARAMETER`], which the shim sets. A process reads the rule once, and acts on it once.
//!
//! The crate `fail` was considered. Its delay blocks the thread, which would stop a whole async runtime. It reads rules
//! only from the environment, which the launcher clears. It would also add a second version of `rand`.

/// The file on the node that has the rule.
#[cfg(feature = "failpoints")]
pub const RULE_FILE: &str = "/run/husk-failpoint";
/// The file on the node to which a process writes the name of a failpoint before it takes the action. The chaos test
/// fails if the failpoint of a life was not reached.
#[cfg(feature = "failpoints")]
pub const REACHED_FILE: &str = "/run/husk-failpoint-reached";
/// The kernel parameter in the guest that has the rule.
#[cfg(feature = "failpoints")]
pub const PARAMETER: &str = "husk.failpoint";

/// A failpoint. Its value is an `std::io::Result<()>`, which is an error only if the rule says so. With `async`, a
/// delay does not block the thread.
#[cfg(not(feature = "failpoints"))]
#[macro_export]
macro_rules! failpoint {
    ($(async)? $name:literal) => {
        ::std::result::Result::<(), ::std::io::Error>::Ok(())
    };
}

/// A failpoint. Its value is an `std::io::Result<()>`, which is an error only if the rule says so. With `async`, a
/// delay does not block the thread.
#[cfg(feature = "failpoints")]
#[macro_export]
macro_rules! failpoint {
    (async $name:literal) => {
        $crate::failpoint::hit_async($name).await
    };
    ($name:literal) => {
        $crate::failpoint::hit($name)
    };
}

#[cfg(feature = "failpoints")]
#[cfg(feature = "async")]
pub use active::hit_async;
#[cfg(feature = "failpoints")]
pub use active::{hit, load, note_guest_line, rule};

#[cfg(feature = "failpoints")]
mod active {
    use std::fs::{self, File};
    use std::io::{self, Write};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, raise};

    use super::{PARAMETER, REACHED_FILE, RULE_FILE};

    /// Duration of a delay.
    const DELAY: Duration = Duration::from_secs(3);

    /// What a failpoint does.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Action {
        Delay,
        Error,
        Abort,
        Hang,
    }

    /// Prefix of the guest's line that names a reached failpoint.
    const GUEST_PREFIX: &str = "husk-failpoint-reached: ";

    /// The rule of this process.
    struct Rule {
        name: String,
        action: Action,
        /// Receives the name of the failpoint: [`REACHED_FILE`], or the guest's kernel log. A VMM that is confined to
        /// its share can still write to an open file.
        reached: Option<File>,
        /// What precedes the name.
        prefix: String,
    }

    static RULE: OnceLock<Option<Rule>> = OnceLock::new();
    static DONE: AtomicBool = AtomicBool::new(false);

    fn parse(text: &str) -> Option<(String, Action)> {
        let (name, action) = text.trim().split_once('=')?;
        let action = match action {
            "delay" => Action::Delay,
            "error" => Action::Error,
            "abort" => Action::Abort,
            "hang" => Action::Hang,
            _ => return None,
        };
        Some((name.to_owned(), action))
    }

    /// Returns the rule's text on the node, so that the shim can pass it to the guest. The text is empty if there is no
    /// rule.
    pub fn rule() -> String {
        fs::read_to_string(RULE_FILE).unwrap_or_default().trim().to_owned()
    }

    fn append(path: &str) -> Option<File> {
        File::options().append(true).create(true).open(path).ok()
    }

    /// Reads the rule. A process that loses access to the node's files calls this function before.
    pub fn load() {
        RULE.get_or_init(|| {
            if let Some((name, action)) = parse(&rule()) {
                return Some(Rule { name, action, reached: append(REACHED_FILE), prefix: String::new() });
            }
            let line = fs::read_to_string("/proc/cmdline").ok()?;
            let mut words = line.split_whitespace();
            let (name, action) = words.find_map(|word| parse(word.strip_prefix(PARAMETER)?.strip_prefix('=')?))?;
            // The guest's kernel prints errors, level 3, to the console, which the shim reads.
            let reached = File::options().write(true).open("/dev/kmsg").ok();
            Some(Rule { name, action, reached, prefix: format!("<3>{GUEST_PREFIX}") })
        });
    }

    /// Returns the action if this is the place that the rule names. Returns it only once. Records that the failpoint
    /// was reached. If this fails, the chaos test reports that the failpoint was not reached.
    fn action(name: &str) -> Option<Action> {
        load();
        let rule = RULE.get()?.as_ref()?;
        if rule.name != name || DONE.swap(true, Ordering::Relaxed) {
            return None;
        }
        if let Some(mut reached) = rule.reached.as_ref() {
            let _ = reached.write_all(format!("{}{name}\n", rule.prefix).as_bytes());
        }
        Some(rule.action)
    }

    /// Returns the name of the failpoint that a line of the guest's console says was reached.
    fn guest_name(line: &str) -> Option<&str> {
        line.split_once(GUEST_PREFIX)?.1.split_whitespace().next()
    }

    /// Records the failpoint that a line of the guest's console says was reached. The shim passes each line.
    pub fn note_guest_line(line: &str) {
        if let (Some(name), Some(mut file)) = (guest_name(line), append(REACHED_FILE)) {
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
    }

    fn act(name: &str, action: Action) -> io::Result<()> {
        match action {
            Action::Delay => Ok(()),
            Action::Error => Err(io::Error::other(format!("failpoint {name}"))),
            Action::Abort => std::process::abort(),
            // The test sends SIGCONT to the shim. A VMM or an agent hangs forever, as in a deadlock.
            Action::Hang if name.starts_with("shim.") => raise(Signal::SIGSTOP).map_err(io::Error::from),
            Action::Hang => loop {
                std::thread::park();
            },
        }
    }

    /// Blocks the thread. The seccomp filters of the VMM's threads do not allow clock_nanosleep(2), but futex(2).
    fn delay() {
        let begin = Instant::now();
        while let Some(rest) = DELAY.checked_sub(begin.elapsed()) {
            std::thread::park_timeout(rest);
        }
    }

    /// Reaches a failpoint.
    ///
    /// # Errors
    /// Fails if the rule says so.
    pub fn hit(name: &str) -> io::Result<()> {
        let Some(action) = action(name) else { return Ok(()) };
        if action == Action::Delay {
            delay();
        }
        act(name, action)
    }

    /// Like [`hit`], in an async runtime.
    ///
    /// # Errors
    /// Fails if the rule says so.
    #[cfg(feature = "async")]
    pub async fn hit_async(name: &str) -> io::Result<()> {
        let Some(action) = action(name) else { return Ok(()) };
        if action == Action::Delay {
            tokio::time::sleep(DELAY).await;
        }
        act(name, action)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn rules_are_parsed() {
            assert_eq!(parse("shim.create.reserved=abort\n"), Some(("shim.create.reserved".to_owned(), Action::Abort)));
            assert_eq!(parse("a=explode"), None);
            assert_eq!(parse(""), None);
        }

        #[test]
        fn reached_failpoint_of_the_guest_is_found_in_a_line_of_its_console() {
            let line = format!("[    1.234567] {GUEST_PREFIX}agent.create\r");
            assert_eq!(guest_name(&line), Some("agent.create"));
            assert_eq!(guest_name("[    1.2] husk-agent: failed"), None);
        }
    }
}
