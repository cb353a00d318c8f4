//! Fits slopes to the samples of a soak: does a resource grow with the number of lives?

/// A slope, and the lower end of its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slope {
    /// Growth for each life.
    pub slope: f64,
    /// The growth is larger than this with a probability of 99.9 %.
    pub least: f64,
}

/// Number of standard errors of the lower end.
const ERRORS: f64 = 3.1;

/// Fits a line by least squares. For numbers that have little noise.
pub fn least_squares(values: &[f64]) -> Slope {
    let count = values.len() as f64;
    if values.len() < 3 {
        return Slope { slope: 0.0, least: 0.0 };
    }
    let (x_mean, y_mean) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let deviations = || values.iter().enumerate().map(|(x, y)| (x as f64 - x_mean, y - y_mean));
    let squares: f64 = deviations().map(|(x, _)| x * x).sum();
    let slope = deviations().map(|(x, y)| x * y).sum::<f64>() / squares;
    let residuals: f64 = deviations().map(|(x, y)| (y - slope * x).powi(2)).sum();
    let error = (residuals / (count - 2.0) / squares).sqrt();
    Slope { slope, least: slope - ERRORS * error }
}

/// Returns the median of the slopes between all pairs of samples (Theil and Sen). For memory: single outliers do not
/// change the result.
pub fn theil_sen(values: &[f64]) -> Slope {
    let mut slopes = Vec::new();
    for (first, from) in values.iter().enumerate() {
        for (number, to) in values.iter().enumerate().skip(first + 1) {
            slopes.push((to - from) / (number - first) as f64);
        }
    }
    if slopes.is_empty() {
        return Slope { slope: 0.0, least: 0.0 };
    }
    slopes.sort_by(f64::total_cmp);
    // The interval's ends are slopes whose ranks follow from the variance of Kendall's statistic (Sen 1968).
    let (count, pairs) = (values.len() as f64, slopes.len() as f64);
    let deviation = (count * (count - 1.0) * (2.0 * count + 5.0) / 18.0).sqrt();
    let rank = ((pairs - ERRORS * deviation) / 2.0).max(0.0) as usize;
    Slope { slope: slopes[slopes.len() / 2], least: slopes[rank] }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    fn noisy(slope: f64, noise: f64, count: usize) -> Vec<f64> {
        let mut random = Rng::with_seed(5);
        (0..count).map(|x| 100.0 + slope * x as f64 + noise * (random.f64() - 0.5)).collect()
    }

    #[test]
    fn leak_of_one_in_fifty_lives_is_found() {
        let leak: Vec<f64> = (0..250).map(|life| f64::from(10 + life / 50)).collect();
        let Slope { slope, least } = least_squares(&leak);
        assert!((0.015..0.025).contains(&slope) && least > 0.0, "{slope} {least}");
    }

    #[test]
    fn noise_is_no_leak() {
        assert!(least_squares(&noisy(0.0, 3.0, 250)).least <= 0.0);
        assert!(theil_sen(&noisy(0.0, 5000.0, 250)).least <= 0.0);
        assert_eq!(least_squares(&[7.0; 200]), Slope { slope: 0.0, least: 0.0 });
        // One step, such as a cache that has been filled.
        let step: Vec<f64> = (0..200).map(|life| if life < 3 { 5.0 } else { 6.0 }).collect();
        assert_eq!(theil_sen(&step).slope, 0.0);
    }

    #[test]
    fn memory_leak_is_found_beside_outliers() {
        let mut leak = noisy(2.0, 200.0, 250);
        for at in [10, 100, 240] {
            leak[at] += 50_000.0;
        }
        let Slope { slope, least } = theil_sen(&leak);
        assert!((1.7..2.3).contains(&slope) && least > 1.0, "{slope} {least}");
    }

    #[test]
    fn few_samples_have_no_slope() {
        for values in [&[][..], &[1.0], &[1.0, 2.0]] {
            assert!(least_squares(values).least <= 0.0);
        }
        assert_eq!(theil_sen(&[]).slope, 0.0);
    }
}
