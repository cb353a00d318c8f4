//! The bootstrap protocol of the `start` action: containerd writes to the shim's stdin and reads the reply from stdout.
//!
//! | containerd | stdin | reply |
//! | --- | --- | --- |
//! | 1.6, 1.7 | nothing, or the runtime options (an `Any`) | the plain address (task API v2) |
//! | 2.0 to 2.2 | as in 1.7 | JSON with version 3 if the plugin `shim` made the bundle (see below), else as in 1.7 |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! containerd 1.7 rejects JSON with a version above 2. Every containerd since 1.6 accepts a plain address, which means
//! version 2 of the task API. Therefore, the plain address is the default.
//!
//! If the environment variable `MAX_SHIM_VERSION` is 3 or more, containerd accepts version 3. If the value is 2,
//! containerd may still accept version 3: containerd 2.0 and later accept version 3, but set the variable to 2
//! (containerd 2.1, pkg/shim/util.go). Therefore, if the value is less than 3, the shim checks the bundle's path. If
//! containerd's sandbox controller plugin made the bundle, the path contains the plugin's name. containerd 2.0 changed
//! this name from `local` to `shim`. Therefore, a path with the name `shim` shows that containerd accepts version 3.

use std::path::Path;

use husk_proto::containerd::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::Message;

use super::Args;

/// Name of the sandbox controller plugin in containerd 2.0 and later. The paths of the plugin's bundles contain this
/// name.
const SANDBOX_CONTROLLER: &str = "io.containerd.sandbox.controller.v1.shim";

/// Maximum number of bytes read from stdin, as in containerd's own shims.
pub const MAX_INPUT: u64 = 10 << 20;

/// Format of the reply to `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyFormat {
    /// Only the address, as text.
    Plain,
    /// A JSON object with the version of the task API, the address and the protocol.
    Json,
    /// An encoded `BootstrapResult` message.
    Protobuf,
}

/// Parameters of `start`, merged from stdin, flags and environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// containerd's ttrpc socket, which receives events.
    pub ttrpc_address: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// containerd's binary, which publishes events if there is no ttrpc socket.
    pub publish_binary: String,
    /// Directory for the shim's socket. `None` means the default directory.
    pub socket_dir: Option<String>,
    /// Whether to log at debug level.
    pub debug: bool,
    /// Format of the reply.
    pub reply_format: ReplyFormat,
}

/// The environment variables that containerd sets for a shim.
#[derive(Debug, Clone, Default)]
pub struct Env {
    /// `TTRPC_ADDRESS`
    pub ttrpc_address: String,
    /// `GRPC_ADDRESS`
    pub grpc_address: String,
    /// `MAX_SHIM_VERSION`
    pub max_shim_version: String,
}

impl Env {
    /// Reads the environment of this process.
    pub fn read() -> Self {
        let var = |name| std::env::var(name).unwrap_or_default();
        Self {
            ttrpc_address: var("TTRPC_ADDRESS"),
            grpc_address: var("GRPC_ADDRESS"),
            max_shim_version: var("MAX_SHIM_VERSION"),
        }
    }
}

impl Params {
    /// Merges the parameters from stdin, flags and environment.
    ///
    /// `input` counts as `BootstrapParams` only if the instance id and namespace match `args`. Without this check, the
    /// shim could take runtime options (an `Any`) for `BootstrapParams`. The type URL of the options would then become
    /// the instance id.
    pub fn new(input: &[u8], args: &Args, env: &Env) -> Self {
        if !input.is_empty()
            && let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == args.id
            && params.namespace == args.namespace
        {
            return Self {
                ttrpc_address: params.containerd_ttrpc_address,
                address: params.containerd_grpc_address,
                publish_binary: params.containerd_binary,
                socket_dir: params.socket_dir.filter(|dir| dir.starts_with('/')),
                debug: args.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32,
                reply_format: ReplyFormat::Protobuf,
            };
        }
        let address = if args.address.is_empty() { env.grpc_address.clone() } else { args.address.clone() };
        let version_3 = env.max_shim_version.parse::<u32>().is_ok_and(|version| version >= 3);
        Self {
            ttrpc_address: env.ttrpc_address.clone(),
            address,
            publish_binary: args.publish_binary.clone(),
            socket_dir: None,
            debug: args.debug,
            reply_format: if version_3 { ReplyFormat::Json } else { ReplyFormat::Plain },
        }
    }

    /// Changes a plain reply to JSON if containerd's sandbox controller plugin `shim` made the bundle.
    pub fn with_bundle(mut self, bundle: &Path) -> Self {
        if self.reply_format == ReplyFormat::Plain && is_sandbox_controller_bundle(bundle) {
            self.reply_format = ReplyFormat::Json;
        }
        self
    }
}

/// Returns whether containerd's sandbox controller plugin `shim` made the bundle. Such a bundle has no `config.json`.
pub fn is_sandbox_controller_bundle(bundle: &Path) -> bool {
    bundle.components().any(|part| part.as_os_str() == SANDBOX_CONTROLLER)
}

/// Encodes the reply to `start`.
pub fn reply(address: &str, format: ReplyFormat) -> Vec<u8> {
    match format {
        ReplyFormat::Plain => address.as_bytes().to_vec(),
        ReplyFormat::Json => {
            serde_json::json!({ "version": 3, "address": address, "protocol": "ttrpc" }).to_string().into()
        }
        ReplyFormat::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            };
            result.write_to_bytes().unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn args() -> Args {
        Args { id: "c1".into(), namespace: "default".into(), address: "/grpc".into(), ..Default::default() }
    }

    #[test]
    fn reply_is_plain_for_containerd_1_7() {
        let env = Env { ttrpc_address: "/ttrpc".into(), max_shim_version: "2".into(), ..Default::default() };
        let params = Params::new(&[], &args(), &env);
        assert_eq!(
            (params.reply_format, params.ttrpc_address.as_str(), params.address.as_str()),
            (ReplyFormat::Plain, "/ttrpc", "/grpc")
        );
        assert_eq!(reply("unix:///x", params.reply_format), b"unix:///x");
    }

    #[test]
    fn reply_is_json_for_a_sandbox_controller_bundle() {
        let env = Env { max_shim_version: "2".into(), ..Default::default() };
        let form = |bundle: &str| Params::new(&[], &args(), &env).with_bundle(Path::new(bundle)).reply_format;
        assert_eq!(form("/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io/x"), ReplyFormat::Json);
        assert_eq!(form("/run/containerd/io.containerd.sandbox.controller.v1.local/k8s.io/x"), ReplyFormat::Plain);
        assert_eq!(form("/run/containerd/io.containerd.runtime.v2.task/k8s.io/x"), ReplyFormat::Plain);
    }

    #[test]
    fn reply_is_json_if_max_shim_version_is_3() {
        let env = Env { max_shim_version: "3".into(), ..Default::default() };
        let form = Params::new(&[], &args(), &env).reply_format;
        let json: serde_json::Value = serde_json::from_slice(&reply("unix:///x", form)).unwrap();
        assert_eq!(json, serde_json::json!({"version": 3, "address": "unix:///x", "protocol": "ttrpc"}));
    }

    #[test]
    fn bootstrap_params_are_read_from_stdin() {
        let message = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/t".into(),
            socket_dir: Some("/s".into()),
            ..Default::default()
        };
        let params = Params::new(&message.write_to_bytes().unwrap(), &args(), &Env::default());
        assert_eq!((params.reply_format, params.socket_dir.as_deref()), (ReplyFormat::Protobuf, Some("/s")));
        let result = BootstrapResult::parse_from_bytes(&reply("unix:///x", params.reply_format)).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///x"));
    }

    #[test]
    fn runtime_options_are_not_taken_for_bootstrap_params() {
        let any = Any { type_url: "containerd.runc.v1.Options".into(), value: b"x".to_vec(), ..Default::default() };
        let params = Params::new(&any.write_to_bytes().unwrap(), &args(), &Env::default());
        assert_eq!(params.reply_format, ReplyFormat::Plain);
    }
}
