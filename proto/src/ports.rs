//! The vsock ports the agent listens on in the guest.

/// ttrpc: containerd's Task service and `husk.agent.v1.Sandbox`.
pub const AGENT: u32 = 1024;
/// Raw streams of container stdio, each opened with a [`crate::stream::Header`].
pub const STREAM: u32 = 1025;
/// TCP connections made again in the pod, each opened with a header of [`crate::forward`].
pub const FORWARD: u32 = 1027;
/// The agent's own log: it accepts one connection and writes lines of text.
pub const LOG: u32 = 1026;
