//! Fuzzes the file with the state of a saved VM: as it is, and with contents of its sections that have valid checksums.

use husk_vmm::snapshot::format::{Kind, Section, write};
use husk_vmm::snapshot::state::State;

use crate::input::input;

/// The key of the file.
const BUILD: [u8; 32] = [7; 32];

/// Runs one input.
pub fn run(bytes: &[u8]) {
    drop(State::from_bytes(&BUILD, bytes));
    let Some(contents) = input::<[Vec<u8>; Kind::COUNT]>(bytes) else { return };
    let sections: Vec<_> =
        Kind::all().into_iter().zip(&contents).map(|(kind, content)| Section { kind, content }).collect();
    let file = write(&BUILD, &sections).expect("write the sections");
    let Ok(state) = State::from_bytes(&BUILD, &file) else { return };
    for queue in state.devices.iter().flatten().flat_map(|device| &device.queues) {
        let _ = queue.queue(256);
    }
    let again = state.to_bytes(&BUILD).expect("write a state that was read");
    assert!(State::from_bytes(&BUILD, &again).is_ok(), "a state that was written cannot be read");
}
