//! The format of the file with a saved VM's state, without its memory.
//!
//! ```text
//! header:  magic (8), version (4), number of sections (4), build id (32), CRC-32 of the preceding bytes (4), zero (4)
//! section: kind (4), version (4), length in bytes (4), CRC-32 of kind, version, length and content (4), content,
//!          zeros up to a multiple of 8
//! ```
//!
//! All numbers are little-endian. A reader refuses whatever it does not know: another magic or version, another build
//! of the VMM, a section of an unknown kind or version, a kind that is missing or occurs twice, a wrong checksum, and
//! bytes after the last section. The checksums find damage, not forgery: only root can write the file.

use crate::config::BuildId;

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"HUSKSNAP";
/// Version of the header and of the sections' layout.
const VERSION: u32 = 1;
/// Length of the header.
const HEADER: usize = 56;
/// Length of the fields before the content of a section.
const SECTION: usize = 16;
/// Alignment of sections.
const ALIGN: usize = 8;
/// Maximum number of sections.
const MAX_SECTIONS: u32 = 64;

/// What a section contains. New kinds get new numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What the VM was built from.
    Machine,
    /// The vCPUs.
    Vcpus,
    /// KVM's interrupt controllers, timer and clock.
    Platform,
    /// The virtio devices.
    Devices,
    /// Where each part of guest memory is in the memory file.
    Memory,
    /// Which pages the guest will read and write soon.
    Touched,
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section<'a> {
    /// What the section contains.
    pub kind: Kind,
    /// The content.
    pub content: &'a [u8],
}

/// Error from reading a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The file is shorter than its header or its sections.
    #[error("the file is too short")]
    Short,
    /// The file does not begin with the magic number.
    #[error("the file is not a saved VM")]
    Magic,
    /// The file has another version.
    #[error("the file has version {0} of the format, and the VMM has version {VERSION}")]
    Version(u32),
    /// The file was written by another build of the VMM.
    #[error("the file was written by another build of the VMM")]
    Build,
    /// A checksum is wrong.
    #[error("the file is damaged: a checksum is wrong")]
    Checksum,
    /// A section has an unknown kind or version.
    #[error("the file has a section of the unknown kind {kind} with version {version}")]
    Unknown {
        /// The kind.
        kind: u32,
        /// The version.
        version: u32,
    },
    /// A kind of section does not occur exactly once.
    #[error("the section {0:?} is missing, or occurs twice")]
    Count(Kind),
    /// The file has bytes after its last section, or padding that is not zero.
    #[error("the file has unexpected bytes")]
    Trailing,
}

impl Kind {
    /// Number of kinds.
    pub const COUNT: usize = 6;
    /// All kinds, with their numbers and versions. The version changes with the content's type.
    const ALL: [(Self, u32, u32); Self::COUNT] = [
        (Self::Machine, 1, 1),
        (Self::Vcpus, 2, 1),
        (Self::Platform, 3, 1),
        (Self::Devices, 4, 1),
        (Self::Memory, 5, 1),
        (Self::Touched, 6, 2),
    ];

    /// Returns all kinds.
    pub fn all() -> [Self; Self::COUNT] {
        Self::ALL.map(|(kind, ..)| kind)
    }

    fn numbers(self) -> (u32, u32) {
        let mut all = Self::ALL.iter().filter(|(kind, ..)| *kind == self);
        all.next().map_or((0, 0), |(_, number, version)| (*number, *version))
    }

    fn of(number: u32, version: u32) -> Result<Self, FormatError> {
        let mut all = Self::ALL.iter().filter(|(_, known, current)| (*known, *current) == (number, version));
        all.next().map(|(kind, ..)| *kind).ok_or(FormatError::Unknown { kind: number, version })
    }
}

/// Returns the bytes of a file with these sections. Each kind must occur exactly once.
///
/// # Errors
/// [`FormatError::Count`]. [`FormatError::Short`] if a content is longer than 4 GiB.
pub fn write(build: &BuildId, sections: &[Section<'_>]) -> Result<Vec<u8>, FormatError> {
    check_kinds(sections.iter().map(|section| section.kind))?;
    let count = u32::try_from(sections.len()).map_err(|_| FormatError::Short)?;
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(build);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend([0; 4]);
    for Section { kind, content } in sections {
        let (number, version) = kind.numbers();
        let len = u32::try_from(content.len()).map_err(|_| FormatError::Short)?;
        let fields = [number, version, len].map(u32::to_le_bytes).concat();
        let checksum = checksum(&fields, content);
        bytes.extend(fields);
        bytes.extend(checksum.to_le_bytes());
        bytes.extend(*content);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    }
    Ok(bytes)
}

/// Returns the sections of a file, in the order of the file.
///
/// # Errors
/// [`FormatError`].
pub fn read<'a>(build: &BuildId, bytes: &'a [u8]) -> Result<Vec<Section<'a>>, FormatError> {
    let (header, mut rest) = bytes.split_at_checked(HEADER).ok_or(FormatError::Short)?;
    if !header.starts_with(&MAGIC) {
        return Err(FormatError::Magic);
    }
    let [version, count, sum, zero] = [8, 12, 48, 52].map(|at| number(header, at));
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    if header.get(..48).map(crc32fast::hash) != Some(sum) || zero != 0 || count > MAX_SECTIONS {
        return Err(FormatError::Checksum);
    }
    if header.get(16..48) != Some(build.as_slice()) {
        return Err(FormatError::Build);
    }
    let mut sections = Vec::new();
    for _ in 0..count {
        let (fields, after) = rest.split_at_checked(SECTION).ok_or(FormatError::Short)?;
        let [kind, version, len, sum] = [0, 4, 8, 12].map(|at| number(fields, at));
        let len = usize::try_from(len).map_err(|_| FormatError::Short)?;
        let (content, after) = after.split_at_checked(len).ok_or(FormatError::Short)?;
        if fields.get(..12).map(|fields| checksum(fields, content)) != Some(sum) {
            return Err(FormatError::Checksum);
        }
        sections.push(Section { kind: Kind::of(kind, version)?, content });
        let padding = len.next_multiple_of(ALIGN) - len;
        let (zeros, after) = after.split_at_checked(padding).ok_or(FormatError::Short)?;
        if zeros.iter().any(|&byte| byte != 0) {
            return Err(FormatError::Trailing);
        }
        rest = after;
    }
    if !rest.is_empty() {
        return Err(FormatError::Trailing);
    }
    check_kinds(sections.iter().map(|section| section.kind))?;
    Ok(sections)
}

fn check_kinds(kinds: impl Iterator<Item = Kind> + Clone) -> Result<(), FormatError> {
    let count = |kind: Kind| kinds.clone().filter(|other| *other == kind).count();
    match Kind::ALL.iter().find(|(kind, ..)| count(*kind) != 1) {
        Some((kind, ..)) => Err(FormatError::Count(*kind)),
        None => Ok(()),
    }
}

fn checksum(fields: &[u8], content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fields);
    hasher.update(content);
    hasher.finalize()
}

/// Returns the number at an offset, or 0 if the offset is outside of the bytes.
fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUILD: BuildId = [7; 32];

    fn sections<'a>(contents: &'a [Vec<u8>]) -> Vec<Section<'a>> {
        Kind::all().into_iter().zip(contents).map(|(kind, content)| Section { kind, content }).collect()
    }

    fn file() -> Vec<u8> {
        let contents: Vec<Vec<u8>> = (0u8..).take(Kind::COUNT).map(|len| vec![len; len.into()]).collect();
        write(&BUILD, &sections(&contents)).unwrap()
    }

    #[test]
    fn each_changed_byte_is_refused() {
        let file = file();
        assert!(read(&BUILD, &file).is_ok());
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut changed = file.clone();
                changed[at] ^= 1 << bit;
                assert!(read(&BUILD, &changed).is_err(), "byte {at}, bit {bit}");
            }
            assert!(read(&BUILD, &file[..at]).is_err(), "{at} bytes");
        }
        assert_eq!(read(&BUILD, &[file, vec![0]].concat()), Err(FormatError::Trailing));
    }

    #[test]
    fn other_builds_versions_and_kinds_are_refused() {
        let file = file();
        assert_eq!(read(&[8; 32], &file), Err(FormatError::Build));
        let with_version = |version: u32| {
            let mut file = file.clone();
            file[8..12].copy_from_slice(&version.to_le_bytes());
            file
        };
        assert_eq!(read(&BUILD, &with_version(2)), Err(FormatError::Version(2)));
        assert_eq!(Kind::of(7, 1), Err(FormatError::Unknown { kind: 7, version: 1 }));
        assert_eq!(Kind::of(1, 2), Err(FormatError::Unknown { kind: 1, version: 2 }));
        let contents = vec![Vec::new(); Kind::COUNT];
        let mut twice = sections(&contents);
        twice[1].kind = Kind::Machine;
        assert_eq!(write(&BUILD, &twice), Err(FormatError::Count(Kind::Machine)));
        assert_eq!(write(&BUILD, &twice[..1]), Err(FormatError::Count(Kind::Vcpus)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), Kind::COUNT)
        ) {
            let file = write(&BUILD, &sections(&contents)).unwrap();
            prop_assert_eq!(read(&BUILD, &file).unwrap(), sections(&contents));
        }

        #[test]
        fn read_never_panics(bytes: Vec<u8>, at: usize, value: u8) {
            let _ = read(&BUILD, &bytes);
            let mut file = file();
            let at = at % file.len();
            file[at] = value;
            let _ = read(&BUILD, &file);
        }
    }
}
