//! Fuzzes virtio-balloon with descriptor chains.
#![no_main]

use husk_fuzz::{Step, drive};
use husk_vmm::virtio::balloon::Balloon;
use husk_vmm::virtio::testing::Bench;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| {
    let mut bench = Bench::new(Balloon::new().expect("create the device"));
    let activate = |bench: &mut Bench<Balloon>| bench.activate(0);
    activate(&mut bench);
    drive(&mut bench, &steps, activate);
});
