//! The parts of the guest kernel's image.

use std::ops::Range;

const PAGE: u64 = 4096;
/// Type of a program header for a part of the image that is loaded (elf(5)).
const PT_LOAD: u64 = 1;
/// Type of a section that has no content in the file.
const SHT_NOBITS: u64 = 8;
/// Flags of sections.
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;

/// The names of the parts, in the order of the report.
const PARTS: [&str; 5] =
    ["kernel: text", "kernel: read-only data", "kernel: data", "kernel: BSS", "kernel: init and per-CPU sections"];

/// The kernel's image.
pub struct Kernel {
    /// Guest-physical range of the image.
    image: Range<u64>,
    /// Guest-physical ranges of each part.
    parts: [Vec<Range<u64>>; PARTS.len()],
    /// Guest-physical address and content of the banner.
    banner: (u64, Vec<u8>),
}

/// A program header of type PT_LOAD.
struct Segment {
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_len: u64,
    memory_len: u64,
}

impl Kernel {
    /// Parses a 64-bit ELF image.
    ///
    /// # Panics
    /// If the image has another format.
    pub fn parse(file: Vec<u8>) -> Self {
        let number = |at: u64, len: usize| {
            let at = usize::try_from(at).unwrap();
            file[at..at + len].iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
        };
        let table = |at, size_at, count_at| {
            let (start, size, count) = (number(at, 8), number(size_at, 2), number(count_at, 2));
            (0..count).map(move |index| start + index * size)
        };
        let segments: Vec<Segment> = table(32, 54, 56)
            .filter(|at| number(*at, 4) == PT_LOAD)
            .map(|at| Segment {
                offset: number(at + 8, 8),
                virtual_address: number(at + 16, 8),
                physical_address: number(at + 24, 8),
                file_len: number(at + 32, 8),
                memory_len: number(at + 40, 8),
            })
            .collect();
        let headers: Vec<u64> = table(40, 58, 60).collect();
        let names = number(headers[usize::try_from(number(62, 2)).unwrap()] + 24, 8);
        let mut parts: [Vec<Range<u64>>; PARTS.len()] = Default::default();
        for at in headers {
            let (flags, address, len) = (number(at + 8, 8), number(at + 16, 8), number(at + 32, 8));
            if flags & SHF_ALLOC == 0 || len == 0 {
                continue;
            }
            let name = &file[usize::try_from(names + number(at, 4)).unwrap()..];
            let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap()).into_owned();
            if let Some(start) = physical(&segments, &name, address) {
                let part = part(&name, number(at + 4, 4), flags);
                parts[part].push(start / PAGE * PAGE..(start + len).next_multiple_of(PAGE));
            }
        }
        parts.iter_mut().for_each(|ranges| *ranges = merge(ranges));
        let start = segments.iter().map(|one| one.physical_address).min().unwrap();
        let end = segments.iter().map(|one| one.physical_address + one.memory_len).max().unwrap();
        let banner = banner(&file, &segments);
        Self { image: start..end.next_multiple_of(PAGE), parts, banner }
    }

    /// Returns the guest-physical range of the image.
    pub fn image(&self) -> Range<u64> {
        self.image.clone()
    }

    /// Returns the name and the guest-physical ranges of each part.
    pub fn sections(&self) -> impl Iterator<Item = (&'static str, Vec<Range<u64>>)> {
        PARTS.into_iter().zip(self.parts.iter().cloned())
    }

    /// Returns the guest-physical address of the kernel's banner, and the banner. The kernel never changes it.
    pub fn banner(&self) -> (u64, &[u8]) {
        (self.banner.0, &self.banner.1)
    }
}

/// Returns the guest-physical address of a section. The per-CPU section may have the virtual address 0, and is in a
/// segment with this address.
fn physical(segments: &[Segment], name: &str, address: u64) -> Option<u64> {
    let inside = |one: &&Segment| {
        let is_percpu = one.virtual_address == 0;
        is_percpu == name.contains("percpu") || one.virtual_address != 0
    };
    let found = segments
        .iter()
        .filter(inside)
        .find(|one| address.checked_sub(one.virtual_address).is_some_and(|offset| offset < one.memory_len))?;
    Some(found.physical_address + (address - found.virtual_address))
}

/// Returns the index of the part to which a section belongs.
fn part(name: &str, kind: u64, flags: u64) -> usize {
    // The kernel frees the memory of these sections when it has booted (include/asm-generic/vmlinux.lds.h).
    let is_init = ["init", "percpu", ".alt", ".exit", ".smp_locks", ".apic", ".iommu", ".x86_cpu"];
    if is_init.iter().any(|part| name.contains(part)) {
        4
    } else if flags & SHF_EXECINSTR != 0 {
        0
    } else if kind == SHT_NOBITS {
        3
    } else if flags & SHF_WRITE != 0 {
        2
    } else {
        1
    }
}

/// Sorts ranges, and merges those that touch.
fn merge(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Finds `linux_banner`, which starts with the kernel's version, and which the kernel does not change.
fn banner(file: &[u8], segments: &[Segment]) -> (u64, Vec<u8>) {
    const START: &[u8] = b"Linux version ";
    let found = segments.iter().find_map(|segment| {
        let start = usize::try_from(segment.offset).unwrap();
        let content = &file[start..start + usize::try_from(segment.file_len).unwrap()];
        let at = content.windows(START.len()).position(|window| window == START)?;
        let text = content[at..].split(|byte| *byte == b'\n').next().unwrap();
        Some((segment.physical_address + at as u64, text.to_vec()))
    });
    found.expect("the kernel's image has no banner")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_belong_to_parts() {
        assert_eq!(part(".text", 1, SHF_ALLOC | SHF_EXECINSTR), 0);
        assert_eq!(part(".rodata", 1, SHF_ALLOC), 1);
        assert_eq!(part(".data", 1, SHF_ALLOC | SHF_WRITE), 2);
        assert_eq!(part(".bss", SHT_NOBITS, SHF_ALLOC | SHF_WRITE), 3);
        assert_eq!(part(".init.text", 1, SHF_ALLOC | SHF_EXECINSTR), 4);
    }

    #[test]
    fn adjacent_ranges_are_merged() {
        assert_eq!(merge(&[8..12, 0..4, 4..6, 5..7]), [0..7, 8..12]);
    }
}
