//! Dispatches the guest's port and memory accesses to devices. The dispatcher is a `match`, which needs neither a table
//! nor a lock.

use std::sync::Arc;

use crate::boot_mark;
use crate::control::BootStep;
use crate::serial::{self, Console};
use crate::virtio::slots::Slots;

/// Command port of the i8042 keyboard controller.
const I8042_COMMAND: u16 = 0x64;
/// Command that pulses the CPU's reset line.
const I8042_RESET: u8 = 0xfe;

/// The effect of a port access on the VM.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// The access has no further effect.
    None,
    /// The guest resets the VM.
    Reset,
    /// The guest marks a boot step.
    BootStep(BootStep),
}

/// All devices that a guest reaches through VM exits.
pub struct Bus {
    /// The console on COM1.
    pub console: Arc<Console>,
    /// The virtio-mmio slots.
    pub slots: Arc<Slots>,
}

/// Returns the register of the console that has the I/O port `port`.
fn serial_register(port: u16) -> u8 {
    u8::try_from(port - serial::PORT).unwrap_or(u8::MAX)
}

impl Bus {
    /// Fills `data` with the result of an IN instruction.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        for byte in data.iter_mut() {
            *byte = match port {
                serial::PORT..serial::PORT_END => self.console.read(serial_register(port)),
                // Zero means that the input and output buffers are empty. The kernel sends its reset command only in
                // this state.
                I8042_COMMAND => 0,
                _ => 0xff,
            };
        }
    }

    /// Serves an OUT instruction.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        match port {
            serial::PORT..serial::PORT_END => {
                for byte in data {
                    self.console.write(serial_register(port), *byte);
                }
            }
            I8042_COMMAND if data.contains(&I8042_RESET) => return Effect::Reset,
            boot_mark::PORT => {
                if let Some(step) = data.first().and_then(|byte| step(*byte)) {
                    return Effect::BootStep(step);
                }
            }
            _ => {}
        }
        Effect::None
    }
}

fn step(byte: u8) -> Option<BootStep> {
    Some(match boot_mark::BootMark::try_from(byte).ok()? {
        boot_mark::BootMark::AgentStarted => BootStep::AgentStarted,
        boot_mark::BootMark::AgentReady => BootStep::AgentReady,
        boot_mark::BootMark::TemplateReady => BootStep::TemplateReady,
    })
}
