//! Rate limits of a pod's devices, in the configuration and in annotations.

use serde::{Deserialize, Serialize};

/// Limits of a device, or of one direction of a device. A rate of 0 limits nothing. A burst of 0 means a tenth of the
/// rate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Number of bytes per second.
    pub bytes_per_sec: u64,
    /// Number of bytes that may exceed the rate at once.
    pub burst_bytes: u64,
    /// Number of operations per second.
    pub ops_per_sec: u64,
    /// Number of operations that may exceed the rate at once.
    pub burst_ops: u64,
}

/// A rate and its burst, both at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Amount per second.
    pub per_second: u64,
    /// Amount that may exceed the rate at once.
    pub burst: u64,
}

impl Rate {
    /// Returns `None` if `per_second` is 0.
    fn new(per_second: u64, burst: u64) -> Option<Self> {
        let burst = if burst == 0 { (per_second / 10).max(1) } else { burst };
        (per_second > 0).then_some(Self { per_second, burst })
    }

    /// Applies the values of an annotation to a configured rate. The annotation may only lower configured values.
    /// `names` are the names of the rate and of the burst.
    ///
    /// # Errors
    /// The error says what is wrong with the annotation.
    fn lowered(
        configured: Option<Self>,
        names: (&str, &str),
        (per_second, burst): (Option<u64>, Option<u64>),
    ) -> Result<Option<Self>, String> {
        let Some(configured) = configured else {
            return match (per_second, burst) {
                (None, Some(_)) => Err(without_rate(names)),
                (per_second, burst) => Ok(Self::new(per_second.unwrap_or(0), burst.unwrap_or(0))),
            };
        };
        let check = |name: &str, value: Option<u64>, most: u64| match value {
            Some(value) if value > most => {
                Err(format!("{name} is {value}, but the configuration allows at most {most}"))
            }
            _ => Ok(()),
        };
        check(names.0, per_second, configured.per_second)?;
        check(names.1, burst, configured.burst)?;
        // If the annotation has a rate but no burst, the burst is a tenth of the annotation's rate.
        let default = per_second.and_then(|per_second| Self::new(per_second, 0)).map_or(u64::MAX, |rate| rate.burst);
        Ok(Some(Self {
            per_second: per_second.unwrap_or(configured.per_second),
            burst: burst.unwrap_or(default).min(configured.burst),
        }))
    }
}

impl RateLimit {
    /// Returns the rate limit in bytes, or `None` if bytes are not limited.
    pub fn bytes(&self) -> Option<Rate> {
        Rate::new(self.bytes_per_sec, self.burst_bytes)
    }

    /// Returns the rate limit in operations, or `None` if operations are not limited.
    pub fn ops(&self) -> Option<Rate> {
        Rate::new(self.ops_per_sec, self.burst_ops)
    }

    /// Validates the values.
    ///
    /// # Errors
    /// If a burst is set without its rate.
    pub fn check(&self) -> Result<(), String> {
        for (rate, burst, names) in
            [(self.bytes_per_sec, self.burst_bytes, BYTES), (self.ops_per_sec, self.burst_ops, OPS)]
        {
            if rate == 0 && burst != 0 {
                return Err(without_rate(names));
            }
        }
        Ok(())
    }

    /// Applies an annotation, for example `bytes_per_sec=10000000,ops_per_sec=500`. The annotation may only lower
    /// configured limits.
    ///
    /// # Errors
    /// The error says what is wrong with the annotation.
    pub fn lowered_by(&self, annotation: &str) -> Result<Self, String> {
        let mut values = [None; 4];
        let names = [BYTES.0, BYTES.1, OPS.0, OPS.1];
        for entry in annotation.split(',') {
            let (name, number) = entry.split_once('=').unwrap_or((entry, ""));
            let position = names.iter().position(|known| *known == name.trim());
            let Some(value) = position.and_then(|position| values.get_mut(position)) else {
                return Err(format!("unknown name {:?}: must be one of {}", name.trim(), names.join(", ")));
            };
            let number = number.trim().parse().ok().filter(|number| (1..=i64::MAX.unsigned_abs()).contains(number));
            let number =
                number.ok_or_else(|| format!("{} must be a whole number from 1 to {}", name.trim(), i64::MAX))?;
            if value.replace(number).is_some() {
                return Err(format!("{} occurs twice", name.trim()));
            }
        }
        let [bytes_per_sec, burst_bytes, ops_per_sec, burst_ops] = values;
        let bytes = Rate::lowered(self.bytes(), BYTES, (bytes_per_sec, burst_bytes))?;
        let ops = Rate::lowered(self.ops(), OPS, (ops_per_sec, burst_ops))?;
        Ok(Self {
            bytes_per_sec: bytes.map_or(0, |rate| rate.per_second),
            burst_bytes: bytes.map_or(0, |rate| rate.burst),
            ops_per_sec: ops.map_or(0, |rate| rate.per_second),
            burst_ops: ops.map_or(0, |rate| rate.burst),
        })
    }
}

/// The names of a rate and of its burst.
const BYTES: (&str, &str) = ("bytes_per_sec", "burst_bytes");
const OPS: (&str, &str) = ("ops_per_sec", "burst_ops");

fn without_rate((rate, burst): (&str, &str)) -> String {
    format!("{burst} has no effect without {rate}: set {rate}, or remove {burst}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes_per_sec: u64, burst_bytes: u64) -> RateLimit {
        RateLimit { bytes_per_sec, burst_bytes, ..RateLimit::default() }
    }

    #[test]
    fn burst_is_a_tenth_of_the_rate_by_default() {
        assert_eq!(limit(1000, 0).bytes(), Some(Rate { per_second: 1000, burst: 100 }));
        assert_eq!(limit(5, 0).bytes(), Some(Rate { per_second: 5, burst: 1 }));
        assert_eq!(limit(5, 7).bytes(), Some(Rate { per_second: 5, burst: 7 }));
        assert_eq!((limit(0, 0).bytes(), limit(5, 7).ops()), (None, None));
    }

    #[test]
    fn annotation_sets_what_is_not_configured() {
        let lowered = RateLimit::default().lowered_by("ops_per_sec = 50, bytes_per_sec=1000 ,burst_bytes=5").unwrap();
        assert_eq!(lowered.bytes(), Some(Rate { per_second: 1000, burst: 5 }));
        assert_eq!(lowered.ops(), Some(Rate { per_second: 50, burst: 5 }));
        let lowered = limit(1000, 300).lowered_by("ops_per_sec=7").unwrap();
        assert_eq!((lowered.bytes_per_sec, lowered.burst_bytes, lowered.ops_per_sec), (1000, 300, 7));
    }

    #[test]
    fn annotation_only_lowers_what_is_configured() {
        let lowered =
            |text: &str| limit(1000, 300).lowered_by(text).map(|limit| (limit.bytes_per_sec, limit.burst_bytes));
        assert_eq!(lowered("bytes_per_sec=1000,burst_bytes=300"), Ok((1000, 300)));
        assert_eq!(lowered("bytes_per_sec=500,burst_bytes=200"), Ok((500, 200)));
        assert_eq!(lowered("burst_bytes=200"), Ok((1000, 200)));
        // If the annotation has no burst, the burst is a tenth of the annotation's rate, but at most the configured
        // burst.
        assert_eq!(lowered("bytes_per_sec=500"), Ok((500, 50)));
        let high = RateLimit { burst_bytes: 20, ..limit(1000, 0) };
        assert_eq!(high.lowered_by("bytes_per_sec=500").unwrap().burst_bytes, 20);
        let error = lowered("bytes_per_sec=1001").unwrap_err();
        assert_eq!(error, "bytes_per_sec is 1001, but the configuration allows at most 1000");
        assert!(lowered("burst_bytes=301").is_err());
    }

    #[test]
    fn annotation_with_unknown_repeated_or_invalid_values_is_rejected() {
        for text in [
            "",
            "bytes_per_sec",
            "bytes_per_sec=",
            "bytes_per_sec=0",
            "bytes_per_sec=-1",
            "bytes_per_sec=1k",
            "bytes_per_sec=9223372036854775808",
            "bytes_per_sec=1,",
            "bytes_per_sec=1,bytes_per_sec=1",
            "bytes=1",
            "burst_ops=1",
        ] {
            assert!(RateLimit::default().lowered_by(text).is_err(), "{text:?} is accepted");
        }
    }
}
