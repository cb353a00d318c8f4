//! What the driver of virtio-mem asks and is told (`struct virtio_mem_req` and `virtio_mem_resp`, virtio 1.2, 5.15.6),
//! and which blocks it has.

use std::ops::Range;

use super::BLOCK;

/// Length of a request: type, padding, address, number of blocks, padding.
pub const REQUEST_LEN: usize = 24;
/// Length of an answer: type, padding, state.
pub const ANSWER_LEN: usize = 10;

/// A request, of which only the form was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Make blocks usable.
    Plug {
        /// Guest-physical.
        address: u64,
        /// Blocks.
        count: u16,
    },
    /// Take blocks back.
    Unplug {
        /// Guest-physical.
        address: u64,
        /// Blocks.
        count: u16,
    },
    /// Take all blocks back.
    UnplugAll,
    /// Tell whether blocks are plugged.
    State {
        /// Guest-physical.
        address: u64,
        /// Blocks.
        count: u16,
    },
}

impl Request {
    /// Reads a request; none when it is of no known type.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let number = |at: usize, len: usize| -> Option<u64> {
            let mut word = [0; 8];
            word.get_mut(..len)?.copy_from_slice(bytes.get(at..at + len)?);
            Some(u64::from_le_bytes(word))
        };
        let (address, count) = (number(8, 8)?, number(16, 2)? as u16);
        Some(match number(0, 2)? {
            0 => Self::Plug { address, count },
            1 => Self::Unplug { address, count },
            2 => Self::UnplugAll,
            3 => Self::State { address, count },
            _ => return None,
        })
    }
}

/// What the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Not now: more is plugged than was asked for, or would be.
    Nack,
    /// The host cannot do it at present.
    Busy,
    /// The request is wrong.
    Error,
    /// Done, and this is how the blocks are.
    State(State),
}

/// How a range of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All plugged.
    Plugged,
    /// None plugged.
    Unplugged,
    /// Some plugged.
    Mixed,
}

impl Answer {
    /// The bytes of `struct virtio_mem_resp`.
    pub fn encode(self) -> [u8; ANSWER_LEN] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// Which blocks are plugged.
#[derive(Debug)]
pub struct Blocks {
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    /// So many blocks, none plugged.
    pub fn new(count: u64) -> Self {
        Self { plugged: vec![false; usize::try_from(count).unwrap_or(0)], count: 0 }
    }

    /// How many are plugged.
    pub fn plugged(&self) -> u64 {
        self.count
    }

    /// The numbers of the blocks that a request means: none unless it is aligned, not empty, and within the first
    /// `usable` bytes from `start`.
    pub fn find(address: u64, count: u16, start: u64, usable: u64) -> Option<Range<u64>> {
        let offset = address.checked_sub(start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let len = u64::from(count) * BLOCK;
        let end = offset.checked_add(len).filter(|&end| len > 0 && end <= usable)?;
        Some(offset / BLOCK..end / BLOCK)
    }

    /// How the blocks of a range are; blocks that are not there are not plugged.
    pub fn state(&self, range: Range<u64>) -> State {
        let wanted = range.end.saturating_sub(range.start);
        match self.slice(range).map_or(0, |blocks| blocks.iter().filter(|plugged| **plugged).count()) as u64 {
            0 => State::Unplugged,
            plugged if plugged == wanted => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Notes what became of a range.
    pub fn set(&mut self, range: Range<u64>, plugged: bool) {
        let Some(blocks) = usize::try_from(range.start)
            .ok()
            .zip(usize::try_from(range.end).ok())
            .and_then(|(start, end)| self.plugged.get_mut(start..end))
        else {
            return;
        };
        for block in blocks {
            match (std::mem::replace(block, plugged), plugged) {
                (false, true) => self.count += 1,
                (true, false) => self.count -= 1,
                _ => {}
            }
        }
    }

    fn slice(&self, range: Range<u64>) -> Option<&[bool]> {
        self.plugged.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
    }
}
