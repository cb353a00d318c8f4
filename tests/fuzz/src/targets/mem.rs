//! Fuzzes virtio-mem with descriptor chains, after the VMM has requested that the guest plug memory.

use husk_vmm::memory::hotplug::{self, Backing};
use husk_vmm::memory::map;
use husk_vmm::virtio::mem::Mem;
use husk_vmm::virtio::testing::Bench;

use crate::driver::{Step, drive};
use crate::input::input;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<(u32, Vec<Step>)>(bytes) else { return };
    let (requested, steps) = input;
    let ram = map(64 << 20).expect("map guest memory");
    let (_, range) = hotplug::reserve(&ram, (4 << 30, 1 << 30), Backing::Ordinary).expect("reserve an address range");
    let mut bench = Bench::new(Mem::new(range).expect("create the device"));
    let activate = |bench: &mut Bench<Mem>| bench.activate(0);
    activate(&mut bench);
    bench.lock().request(u64::from(requested), Box::new(|_| {})).expect("request a size");
    drive(&mut bench, &steps, activate);
    assert!(bench.lock().plugged() <= 1 << 30);
}
