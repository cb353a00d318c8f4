//! Defines the requests and responses of virtio-mem (`struct virtio_mem_req` and `virtio_mem_resp`, virtio 1.2,
//! 5.15.6), and the set of plugged blocks.

use std::ops::Range;

use super::BLOCK;

/// Length of a request in bytes. A request has a type, padding, an address, a number of blocks, and padding.
pub const REQUEST_LEN: usize = 24;
/// Length of a response in bytes. A response has a type, padding, and a state.
pub const ANSWER_LEN: usize = 10;

/// A parsed request, whose values have not been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Plugs blocks.
    Plug {
        /// Guest-physical address of the first block.
        address: u64,
        /// Number of blocks.
        count: u16,
    },
    /// Unplugs blocks.
    Unplug {
        /// Guest-physical address of the first block.
        address: u64,
        /// Number of blocks.
        count: u16,
    },
    /// Unplugs all blocks.
    UnplugAll,
    /// Returns whether blocks are plugged.
    State {
        /// Guest-physical address of the first block.
        address: u64,
        /// Number of blocks.
        count: u16,
    },
}

impl Request {
    /// Parses a request. Returns `None` if its type is unknown.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let number = |at: usize, len: usize| -> Option<u64> {
            let mut word = [0; 8];
            word.get_mut(..len)?.copy_from_slice(bytes.get(at..at + len)?);
            Some(u64::from_le_bytes(word))
        };
        let (address, count) = (number(8, 8)?, (number(16, 2)? & 0xffff) as u16);
        Some(match number(0, 2)? {
            0 => Self::Plug { address, count },
            1 => Self::Unplug { address, count },
            2 => Self::UnplugAll,
            3 => Self::State { address, count },
            _ => return None,
        })
    }
}

/// The response to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The operation is complete.
    Ack,
    /// The request is refused, because more than the requested size would be plugged. The same request may succeed
    /// later, when the requested size is larger.
    Nack,
    /// The host cannot serve the request at present.
    Busy,
    /// The request is invalid.
    Error,
    /// The state of the blocks.
    State(State),
}

/// State of a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All blocks are plugged.
    Plugged,
    /// No block is plugged.
    Unplugged,
    /// Some of the blocks are plugged.
    Mixed,
}

impl Answer {
    /// Returns the bytes of `struct virtio_mem_resp`.
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

/// The set of plugged blocks.
#[derive(Debug)]
pub struct Blocks {
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    /// Creates a set of `count` blocks, none of which is plugged.
    pub fn new(count: u64) -> Self {
        Self { plugged: vec![false; usize::try_from(count).unwrap_or(0)], count: 0 }
    }

    /// Returns the number of plugged blocks.
    pub fn plugged(&self) -> u64 {
        self.count
    }

    /// Returns the block numbers of a request. Returns `None` if the request is not aligned, is empty, or is not within
    /// the first `usable` bytes from `start`.
    pub fn find(address: u64, count: u16, start: u64, usable: u64) -> Option<Range<u64>> {
        let offset = address.checked_sub(start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let len = u64::from(count) * BLOCK;
        let end = offset.checked_add(len).filter(|&end| len > 0 && end <= usable)?;
        Some(offset / BLOCK..end / BLOCK)
    }

    /// Returns the state of a range of blocks. A range that goes beyond the last block counts as unplugged.
    pub fn state(&self, range: Range<u64>) -> State {
        let wanted = range.end.saturating_sub(range.start);
        match self.slice(range).map_or(0, |blocks| blocks.iter().filter(|plugged| **plugged).count()) as u64 {
            0 => State::Unplugged,
            plugged if plugged == wanted => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Records whether a range of blocks is plugged.
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
