//! Fits slopes to the samples of a soak: does a resource grow with the number of lives?

/// A slope, and the lower end of its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slope {
    /// Growth for each life.
    pub slope: f64,
    /// Lower end of the one-sided confidence interval of 99.9 %, for noise that is independent between the samples.
    pub least: f64,
}

/// A number of lives, and a value.
pub type Point = (f64, f64);

/// The 99.9 % quantile of the normal distribution.
const QUANTILE: f64 = 3.0902;

/// Returns the 99.9 % quantile of Student's t distribution (Abramowitz and Stegun, 26.7.5). With less than ten degrees
/// of freedom, the result is too small.
fn t_quantile(degrees: f64) -> f64 {
    let z = QUANTILE;
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + first / degrees + second / degrees.powi(2) + third / degrees.powi(3)
}

/// Fits a line by least squares. For numbers that have little noise.
pub fn least_squares(points: &[Point]) -> Slope {
    let count = points.len() as f64;
    if points.len() < 3 {
        return Slope { slope: 0.0, least: 0.0 };
    }
    let mean = |of: fn(&Point) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let deviations = || points.iter().map(|(x, y)| (x - x_mean, y - y_mean));
    let squares: f64 = deviations().map(|(x, _)| x * x).sum();
    let slope = deviations().map(|(x, y)| x * y).sum::<f64>() / squares;
    let residuals: f64 = deviations().map(|(x, y)| (y - slope * x).powi(2)).sum();
    let degrees = count - 2.0;
    let error = (residuals / degrees / squares).sqrt();
    Slope { slope, least: slope - t_quantile(degrees) * error }
}

/// Returns the median of the slopes between all pairs of samples (Theil and Sen). For memory: single outliers do not
/// change the result.
pub fn theil_sen(points: &[Point]) -> Slope {
    let mut slopes = Vec::new();
    for (first, from) in points.iter().enumerate() {
        slopes.extend(points.iter().skip(first + 1).map(|to| (to.1 - from.1) / (to.0 - from.0)));
    }
    if slopes.is_empty() {
        return Slope { slope: 0.0, least: 0.0 };
    }
    slopes.sort_by(f64::total_cmp);
    // The interval's ends are slopes whose ranks follow from the variance of Kendall's statistic (Sen 1968).
    let (count, pairs) = (points.len() as f64, slopes.len() as f64);
    let deviation = (count * (count - 1.0) * (2.0 * count + 5.0) / 18.0).sqrt();
    let rank = ((pairs - QUANTILE * deviation) / 2.0).max(0.0) as usize;
    Slope { slope: slopes[slopes.len() / 2], least: slopes[rank] }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    /// Returns points with a distance of one life.
    fn points(values: impl IntoIterator<Item = f64>) -> Vec<Point> {
        values.into_iter().enumerate().map(|(life, value)| (life as f64, value)).collect()
    }

    fn noisy(slope: f64, noise: f64, count: usize, seed: u64) -> Vec<Point> {
        let mut random = Rng::with_seed(seed);
        points((0..count).map(|x| 100.0 + slope * x as f64 + noise * (random.f64() - 0.5)))
    }

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (degrees, quantile) in [(10.0, 4.144), (28.0, 3.408), (60.0, 3.232), (1e9, 3.090)] {
            assert!((t_quantile(degrees) - quantile).abs() < 0.01, "{degrees}: {}", t_quantile(degrees));
        }
    }

    #[test]
    fn noise_alone_is_taken_for_growth_in_one_of_a_thousand_runs() {
        let wrong =
            |fit: fn(&[Point]) -> Slope| (0..4000).filter(|seed| fit(&noisy(0.0, 3.0, 30, *seed)).least > 0.0).count();
        for fit in [least_squares, theil_sen] {
            assert!((0..=10).contains(&wrong(fit)), "{} of 4000", wrong(fit));
        }
    }

    #[test]
    fn leak_of_one_in_fifty_lives_is_found() {
        let leak = points((0..250).map(|life| f64::from(10 + life / 50)));
        let Slope { slope, least } = least_squares(&leak);
        assert!((0.015..0.025).contains(&slope) && least > 0.0, "{slope} {least}");
    }

    #[test]
    fn noise_is_no_leak() {
        assert!(least_squares(&noisy(0.0, 3.0, 250, 5)).least <= 0.0);
        assert!(theil_sen(&noisy(0.0, 5000.0, 250, 5)).least <= 0.0);
        assert_eq!(least_squares(&points([7.0; 200])), Slope { slope: 0.0, least: 0.0 });
        // One step, such as a cache that has been filled.
        let step = points((0..200).map(|life| if life < 3 { 5.0 } else { 6.0 }));
        assert_eq!(theil_sen(&step).slope, 0.0);
    }

    #[test]
    fn memory_leak_is_found_beside_outliers() {
        let mut leak = noisy(2.0, 200.0, 250, 5);
        for at in [10, 100, 240] {
            leak[at].1 += 50_000.0;
        }
        let Slope { slope, least } = theil_sen(&leak);
        assert!((1.7..2.3).contains(&slope) && least > 1.0, "{slope} {least}");
    }

    #[test]
    fn few_samples_have_no_slope() {
        for values in [&[][..], &[1.0], &[1.0, 2.0]] {
            assert!(least_squares(&points(values.iter().copied())).least <= 0.0);
        }
        assert_eq!(theil_sen(&[]).slope, 0.0);
    }
}
