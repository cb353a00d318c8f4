//! Descriptor chains of virtio-mem, for a guest that was asked to take some memory.
#![no_main]

use husk_fuzz::{Step, drive};
use husk_vmm::memory::hotplug::{self, Backing};
use husk_vmm::memory::map;
use husk_vmm::virtio::mem::Mem;
use husk_vmm::virtio::testing::Bench;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, Vec<Step>)| {
    let (asked, steps) = input;
    let ram = map(64 << 20).expect("memory");
    let (_, range) = hotplug::reserve(&ram, (4 << 30, 1 << 30), Backing::Ordinary).expect("addresses");
    let mut bench = Bench::new(Mem::new(range).expect("a device"));
    let activate = |bench: &mut Bench<Mem>| bench.activate(0);
    activate(&mut bench);
    bench.lock().request(u64::from(asked), Box::new(|_| {})).expect("no interrupt fails");
    drive(&mut bench, &steps, activate);
    assert!(bench.lock().plugged() <= 1 << 30);
});
