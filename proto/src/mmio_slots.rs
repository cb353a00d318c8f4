//! virtio-mmio slots of the VM: their addresses and their device names in the guest kernel.

/// Guest-physical address of slot 0.
pub const BASE: u64 = 0xd000_0000;
/// Size of a slot, in bytes. Slots are contiguous.
pub const SIZE: u64 = 0x1000;

/// Returns the name of the slot's platform device in `/sys/bus/platform/devices`. If the slot was empty, writing this
/// name to the driver's `bind` file makes the guest probe the slot again.
pub fn device_name(slot: u32) -> String {
    format!("{:x}.virtio", BASE + u64::from(slot) * SIZE)
}
