//! Fuzzes virtio-rng with descriptor chains.

use husk_vmm::virtio::rng::Rng;
use husk_vmm::virtio::testing::Bench;

use crate::driver::{Step, drive};
use crate::input::input;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(steps) = input::<Vec<Step>>(bytes) else { return };
    let mut bench = Bench::new(Rng::new().expect("create the device"));
    let activate = |bench: &mut Bench<Rng>| bench.activate(0);
    activate(&mut bench);
    drive(&mut bench, &steps, activate);
}
