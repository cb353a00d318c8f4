//! Fuzzes the bootstrap parameters that containerd writes to the stdin of the shim's `start`.
#![no_main]

use husk_shim::cli::Args;
use husk_shim::cli::bootstrap::{Env, Params, reply};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], String, String)| {
    let (bytes, id, namespace) = input;
    let args = Args { id, namespace, ..Default::default() };
    let params = Params::new(bytes, &args, &Env::default());
    reply(&params.address, params.reply_format);
});
