//! Sets of host CPUs, in cgroup notation such as `0-3,7`.

use std::fmt;
use std::str::FromStr;

/// Maximum number of CPUs, which is the kernel's limit for x86 (`NR_CPUS` with `MAXSMP`).
const MAX_CPUS: usize = 8192;
const WORDS: usize = MAX_CPUS / 64;

/// A set of at least one CPU.
#[derive(Clone, PartialEq, Eq)]
pub struct CpuSet(Box<[u64; WORDS]>);

/// The text is not a valid list of CPUs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid list of CPUs {0:?}: expected a list such as 0-3,7")]
pub struct CpuSetError(String);

impl CpuSet {
    /// Returns the number of CPUs.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Returns the union of this set and `other`.
    pub fn union(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(other.0.iter()).for_each(|(word, more)| *word |= more);
        self
    }

    /// Returns the set in systemd's format: one bit for each CPU, without trailing zero bytes. The lowest bit of the
    /// first byte stands for CPU 0.
    pub fn mask(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        bytes
    }

    fn contains(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    /// Parses the kernel's list format (`Documentation/admin-guide/cgroup-v2.rst`, `cpuset.cpus`). Rejects a range that
    /// is split into groups, such as `0-9:2/4`.
    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let error = || CpuSetError(text.to_owned());
        let mut words = Box::new([0; WORDS]);
        for part in text.trim().split(',').filter(|part| !part.trim().is_empty()) {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse().ok().filter(|&cpu: &usize| cpu < MAX_CPUS).ok_or_else(error);
            let (low, high) = (number(low)?, number(high)?);
            if low > high {
                return Err(error());
            }
            for cpu in low..=high {
                if let Some(word) = words.get_mut(cpu / 64) {
                    *word |= 1 << (cpu % 64);
                }
            }
        }
        if words.iter().all(|&word| word == 0) { Err(error()) } else { Ok(Self(words)) }
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut cpu, mut comma) = (0, "");
        while cpu < MAX_CPUS {
            if !self.contains(cpu) {
                cpu += 1;
                continue;
            }
            let low = cpu;
            while self.contains(cpu) {
                cpu += 1;
            }
            match cpu - 1 {
                high if high == low => write!(f, "{comma}{low}")?,
                high => write!(f, "{comma}{low}-{high}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_parsed_and_formatted() {
        let set = |text: &str| text.parse::<CpuSet>();
        assert_eq!(set("0-3,7").unwrap().to_string(), "0-3,7");
        assert_eq!(set(" 3, 1,2 \n").unwrap().to_string(), "1-3");
        assert_eq!(set("0-2").unwrap().union(&set("2-4,8191").unwrap()).to_string(), "0-4,8191");
        assert_eq!(set("0-127").unwrap().count(), 128);
        for bad in ["", ",", "a", "1-", "3-1", "8192", "-1", "0-99999999999"] {
            assert!(set(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parse_and_display_round_trip(cpus in prop::collection::btree_set(0..MAX_CPUS, 1..40), any in ".*") {
            let list: Vec<String> = cpus.iter().map(usize::to_string).collect();
            let set: CpuSet = list.join(",").parse().unwrap();
            prop_assert_eq!(set.count(), cpus.len() as u64);
            prop_assert_eq!(set.to_string().parse::<CpuSet>().unwrap(), set);
            let _ = any.parse::<CpuSet>();
        }
    }
}
