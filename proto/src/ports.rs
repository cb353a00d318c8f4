//! The vsock ports on which the agent listens.

/// ttrpc: containerd's Task service and `husk.agent.v1.Sandbox`.
pub const AGENT: u32 = 1024;
/// Raw stdio streams. Each starts with a [`crate::stream::Header`].
pub const STREAM: u32 = 1025;
/// Port forwarding: TCP connections to the pod. Each starts with a header of [`crate::port_forwarding`].
pub const PORT_FORWARDING: u32 = 1027;
/// The agent's log. The agent accepts one connection and writes lines of text to it.
pub const LOG: u32 = 1026;
/// Only in a guest that becomes a template: a connection begins the trial ([`crate::boot_mark::BootMark::TemplateReady`]
/// ends it). The agent accepts one connection, and closes it at once.
pub const TRIAL: u32 = 1028;
