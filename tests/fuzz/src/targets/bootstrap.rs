//! Fuzzes the bootstrap parameters that containerd writes to the stdin of the shim's action `start`.

use husk_shim::cli::Args;
use husk_shim::cli::bootstrap::{Env, Params, reply};

use crate::input::input;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<(&[u8], String, String)>(bytes) else { return };
    let (bytes, id, namespace) = input;
    let args = Args { id, namespace, ..Default::default() };
    let params = Params::new(bytes, &args, &Env::default());
    reply(&params.address, params.reply_format);
}
