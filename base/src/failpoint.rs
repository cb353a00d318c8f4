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
pub use active::{hit, hit_async, load, rule};

#[cfg(feature = "failpoints")]
mod active {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use super::{PARAMETER, RULE_FILE};

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

    static RULE: OnceLock<Option<(String, Action)>> = OnceLock::new();
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
        std::fs::read_to_string(RULE_FILE).unwrap_or_default().trim().to_owned()
    }

    /// Reads the rule. A process that loses access to the node's files calls this function before.
    pub fn load() {
        RULE.get_or_init(|| {
            let parameter = || {
                let line = std::fs::read_to_string("/proc/cmdline").ok()?;
                let mut words = line.split_whitespace();
                words.find_map(|word| parse(word.strip_prefix(PARAMETER)?.strip_prefix('=')?))
            };
            parse(&rule()).or_else(parameter)
        });
    }

    /// Returns the action if this is the place that the rule names. Returns it only once.
    fn action(name: &str) -> Option<Action> {
        load();
        let (place, action) = RULE.get()?.as_ref()?;
        (place == name && !DONE.swap(true, Ordering::Relaxed)).then_some(*action)
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

    /// Reaches a failpoint.
    ///
    /// # Errors
    /// Fails if the rule says so.
    pub fn hit(name: &str) -> io::Result<()> {
        let Some(action) = action(name) else { return Ok(()) };
        if action == Action::Delay {
            std::thread::sleep(DELAY);
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
    }
}
