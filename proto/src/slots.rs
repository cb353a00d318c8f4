//! The virtio-mmio slots of the machine: where they are, and how the guest's kernel calls them.

/// Guest-physical address of slot 0.
pub const BASE: u64 = 0xd000_0000;
/// Distance from slot to slot.
pub const SIZE: u64 = 0x1000;

/// Name of the slot's platform device under `/sys/bus/platform/devices`; writing it to the driver's `bind` makes the
/// guest look again at a slot that was empty.
pub fn device_name(slot: u32) -> String {
    format!("{:x}.virtio", BASE + u64::from(slot) * SIZE)
}
