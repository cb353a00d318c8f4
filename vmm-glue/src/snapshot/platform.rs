//! The state of what KVM emulates for the whole VM: the interrupt controllers, the timer and the clock.

use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// The interrupt controllers of KVM_CREATE_IRQCHIP.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Error from saving or restoring the platform.
#[derive(Debug, thiserror::Error)]
#[error("ioctl {0} failed")]
pub struct PlatformError(&'static str, #[source] kvm_ioctls::Error);

/// The state of the platform.
#[derive(Serialize, Deserialize)]
pub struct PlatformState {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// Saves the state of the platform. No vCPU may run.
///
/// # Errors
/// [`PlatformError`].
pub fn save(vm: &VmFd) -> Result<PlatformState, PlatformError> {
    let failed = |what| move |error| PlatformError(what, error);
    let irqchip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map(|()| chip)
    };
    let irqchips = IRQCHIPS.iter().map(|&chip| irqchip(chip)).collect::<Result<_, _>>();
    Ok(PlatformState {
        irqchips: irqchips.map_err(failed("KVM_GET_IRQCHIP"))?,
        pit: vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?,
        clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?,
    })
}

/// Sets the state of the platform, after the vCPUs have been restored. From now on, the guest's clock runs.
///
/// # Errors
/// [`PlatformError`]. The VM must not run after an error.
pub fn restore(vm: &VmFd, state: &PlatformState) -> Result<(), PlatformError> {
    let failed = |what| move |error| PlatformError(what, error);
    vm.set_pit2(&state.pit).map_err(failed("KVM_SET_PIT2"))?;
    // Without KVM_CLOCK_REALTIME, monotonic time goes on from the saved value, and does not jump by the time since then.
    // KVM refuses the flags that KVM_GET_CLOCK sets.
    let clock = kvm_clock_data { clock: state.clock.clock, flags: state.clock.flags & !FLAGS, ..Default::default() };
    vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?;
    for irqchip in &state.irqchips {
        vm.set_irqchip(irqchip).map_err(failed("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

/// KVM_CLOCK_TSC_STABLE, KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC (include/uapi/linux/kvm.h).
const FLAGS: u32 = KVM_CLOCK_TSC_STABLE | 1 << 2 | 1 << 3;
