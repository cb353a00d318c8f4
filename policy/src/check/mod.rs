//! Decides whether policies allow a request.

use std::fmt;
use std::path::Path;

use crate::{AtMost, Capability, Digest, ParseError, Policy};

/// Paths of the files that Kubernetes and containerd mount in each container. The rule `mounts` always allows these
/// paths.
const STANDARD_MOUNTS: [&str; 5] =
    ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/dev/termination-log"];

/// Maximum length, in bytes, of each text that a refusal quotes. The limit keeps a refusal short enough for a log line.
const MAX_QUOTED: usize = 200;

/// A rule of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// [`Policy::exec`].
    Exec,
    /// [`Policy::attach`].
    Attach,
    /// [`Policy::port_forward`].
    PortForward,
    /// [`Policy::privileged`].
    Privileged,
    /// [`Policy::images`].
    Images,
    /// [`Policy::capabilities`].
    Capabilities,
    /// [`Policy::mounts`].
    Mounts,
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Exec => "exec",
            Self::Attach => "attach",
            Self::PortForward => "port_forward",
            Self::Privileged => "privileged",
            Self::Images => "images",
            Self::Capabilities => "capabilities",
            Self::Mounts => "mounts",
        })
    }
}

/// Where a policy comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The node's configuration.
    Node,
    /// The pod's annotation.
    Pod,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Node => "the node's policy",
            Self::Pod => "the pod's policy",
        })
    }
}

/// Reason why a policy does not allow a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is refused by the rule \"{rule}\" of {origin}: {reason}")]
pub struct Refusal {
    /// What the rule refuses.
    pub what: String,
    /// The rule.
    pub rule: Rule,
    /// Where the policy comes from.
    pub origin: Origin,
    /// Why the rule refuses the request.
    pub reason: &'static str,
}

/// Properties of a container that is to be created.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container<'a> {
    /// Container id.
    pub id: &'a str,
    /// Reference of the image, or `None` if it is unknown.
    pub image: Option<&'a str>,
    /// The container's input: `stdin` or `a terminal`. `None` if the container has no input.
    pub input: Option<&'static str>,
    /// What makes the container privileged. `None` if the container is not privileged.
    pub privilege: Option<&'static str>,
    /// Names of the capabilities that are in any capability set of the container's process.
    pub capabilities: Vec<String>,
    /// Paths in the container at which volumes are mounted.
    pub mounts: Vec<&'a Path>,
}

/// Properties of an exec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exec<'a> {
    /// Container id.
    pub container: &'a str,
    /// The program and its arguments.
    pub arguments: &'a [String],
    /// First difference between the exec and the container's init process, as the reason of a refusal. Differences in
    /// arguments, terminal, `TERM` and OOM score do not count. `None` if there is no other difference.
    pub difference: Option<&'static str>,
    /// Names of the capabilities that are in any capability set of the exec's process.
    pub capabilities: Vec<String>,
}

/// The two policies that apply to a pod. A request is allowed if both policies allow the request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policies {
    /// The node's policy.
    pub node: Policy,
    /// The pod's policy.
    pub pod: Policy,
}

impl Policies {
    /// Parses policies in the form that [`Policy::to_json`] returns.
    ///
    /// # Errors
    /// Returns the [`ParseError`] of the first invalid policy.
    pub fn from_json(node: &[u8], pod: &[u8]) -> Result<Self, ParseError> {
        let parse = |text: &[u8]| if text.is_empty() { Ok(Policy::default()) } else { Policy::from_json(text) };
        Ok(Self { node: parse(node)?, pod: parse(pod)? })
    }

    /// Checks whether a container may be created.
    ///
    /// # Errors
    /// Returns the [`Refusal`] of the first rule that does not allow the container.
    pub fn check_container(&self, container: &Container<'_>) -> Result<(), Refusal> {
        self.check(|policy| policy.check_container(container))
    }

    /// Checks whether a command may be executed.
    ///
    /// # Errors
    /// Returns the [`Refusal`] of the first rule that does not allow the exec.
    pub fn check_exec(&self, exec: &Exec<'_>) -> Result<(), Refusal> {
        self.check(|policy| policy.check_exec(exec))
    }

    /// Checks whether a connection to `address` may be forwarded.
    ///
    /// # Errors
    /// Returns a [`Refusal`] if a policy does not allow port forwarding.
    pub fn check_port_forward(&self, address: &str) -> Result<(), Refusal> {
        self.check(|policy| match policy.port_forward {
            true => Ok(()),
            false => refuse(Rule::PortForward, format!("port forwarding to {address}"), "forwarding is not allowed"),
        })
    }

    fn check(&self, one: impl Fn(&Policy) -> Result<(), Violation>) -> Result<(), Refusal> {
        for (origin, policy) in [(Origin::Node, &self.node), (Origin::Pod, &self.pod)] {
            one(policy).map_err(|Violation { what, rule, reason }| Refusal { what, rule, origin, reason })?;
        }
        Ok(())
    }
}

/// A [`Refusal`] without the origin of the policy.
struct Violation {
    what: String,
    rule: Rule,
    reason: &'static str,
}

fn refuse(rule: Rule, what: String, reason: &'static str) -> Result<(), Violation> {
    Err(Violation { what, rule, reason })
}

impl Policy {
    fn check_container(&self, container: &Container<'_>) -> Result<(), Violation> {
        let id = quoted(container.id);
        if let Some(digests) = self.images.list() {
            let (what, reason) = match container.image {
                None => (format!("container {id} without an image reference"), "the image must be named by its digest"),
                Some(image) => {
                    let what = format!("image {} of container {id}", quoted(image));
                    match Digest::of_reference(image) {
                        Some(digest) if digests.contains(&digest) => (String::new(), ""),
                        Some(_) => (what, "the digest is not listed"),
                        None => (what, "the image must be named by its digest"),
                    }
                }
            };
            if !what.is_empty() {
                return refuse(Rule::Images, what, reason);
            }
        }
        if let Some(privilege) = container.privilege.filter(|_| !self.privileged) {
            return refuse(Rule::Privileged, format!("container {id}"), privilege);
        }
        self.check_capabilities(&container.capabilities, || format!("container {id}"))?;
        if let Some(allowed) = self.mounts.list() {
            let is_allowed = |path: &Path| {
                STANDARD_MOUNTS.iter().any(|standard| path == Path::new(standard))
                    || allowed.iter().any(|one| one.covers(path))
            };
            if let Some(path) = container.mounts.iter().find(|path| !is_allowed(path)) {
                let what = format!("the volume at {} of container {id}", quoted(&path.to_string_lossy()));
                return refuse(Rule::Mounts, what, "the path is not listed");
            }
        }
        match container.input.filter(|_| !self.attach) {
            Some(input) => {
                refuse(Rule::Attach, format!("container {id} with {input}"), "a client could attach to the input")
            }
            None => Ok(()),
        }
    }

    fn check_exec(&self, exec: &Exec<'_>) -> Result<(), Violation> {
        let what = || format!("exec of {} in container {}", quoted_list(exec.arguments), quoted(exec.container));
        if let Some(commands) = self.exec.list() {
            if commands.is_empty() {
                return refuse(Rule::Exec, what(), "no exec is allowed");
            }
            if !commands.iter().any(|command| command.arguments() == exec.arguments) {
                return refuse(Rule::Exec, what(), "the command is not listed");
            }
            if let Some(difference) = exec.difference {
                return refuse(Rule::Exec, what(), difference);
            }
        }
        self.check_capabilities(&exec.capabilities, what)
    }

    fn check_capabilities(&self, names: &[String], of: impl Fn() -> String) -> Result<(), Violation> {
        let AtMost::List(allowed) = &self.capabilities else { return Ok(()) };
        let is_allowed = |name: &str| allowed.iter().map(Capability::name).any(|one| one == name);
        match names.iter().find(|name| !is_allowed(name)) {
            Some(name) => {
                refuse(Rule::Capabilities, format!("{} for {}", quoted(name), of()), "the capability is not listed")
            }
            None => Ok(()),
        }
    }
}

/// Formats a client's text for a message. If the text is short and has only letters, digits, `_`, `-`, `.` and `+`,
/// returns the text unchanged. Quotes and escapes any other text, and shortens a long text.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    if !text.is_empty() && text.len() <= MAX_QUOTED && text.chars().all(plain) {
        return text.to_owned();
    }
    shortened(format!("{:?}", start(text)), "…\"")
}

/// Formats a list of strings from a client for a message. Quotes and escapes each text, and shortens a long list.
fn quoted_list(texts: &[String]) -> String {
    let texts: Vec<&str> = texts.iter().take(MAX_QUOTED).map(|text| start(text)).collect();
    shortened(format!("{texts:?}"), "…]")
}

/// If `text` has more than [`MAX_QUOTED`] bytes, truncates it and appends `end`. Otherwise returns `text` unchanged.
fn shortened(mut text: String, end: &str) -> String {
    if text.len() > MAX_QUOTED {
        text.truncate(start(&text).len());
        text.push_str(end);
    }
    text
}

/// Returns the longest prefix of `text` that has at most [`MAX_QUOTED`] bytes and ends at a character boundary.
fn start(text: &str) -> &str {
    let end = (0..=MAX_QUOTED.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
