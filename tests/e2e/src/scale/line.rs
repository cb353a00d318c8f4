//! Fits lines to quantities that grow with the number of pods.

/// A line: the value without pods, and the growth for each pod.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// Value at 0 pods.
    pub start: f64,
    /// Growth for each pod.
    pub slope: f64,
}

/// Number of samples below which no slope is compared.
pub const LEAST: usize = 6;
/// Samples of each end whose slopes are compared, at least.
const END: usize = 3;
/// Factor by which the last slope may exceed the first one.
const FACTOR: f64 = 1.25;

/// Fits a line to pairs of a number of pods and a value, by least squares.
pub fn fit(points: &[(f64, f64)]) -> Line {
    let count = points.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let squares: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    let products: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let slope = if squares > 0.0 { products / squares } else { 0.0 };
    Line { start: y_mean - slope * x_mean, slope }
}

/// The slopes of the first and the last quarter of the samples. `None` if there are too few samples.
pub fn ends(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    if points.len() < LEAST {
        return None;
    }
    let quarter = (points.len() / 4).max(END);
    Some((fit(&points[..quarter]).slope, fit(&points[points.len() - quarter..]).slope))
}

/// Returns whether a quantity grows faster at the end than at the beginning. Slower growth is no defect: caches fill,
/// and the first pods make what all pods share. `noise` is the difference of the slopes that counts as noise.
pub fn accelerates(points: &[(f64, f64)], noise: f64) -> bool {
    ends(points).is_some_and(|(first, last)| last > first.max(0.0) * FACTOR + noise)
}

impl Line {
    /// Returns the number of pods at which the line reaches `limit`. `None` if it does not grow.
    pub fn reaches(&self, limit: f64) -> Option<f64> {
        (self.slope > 1e-3).then(|| ((limit - self.start) / self.slope).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(of: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (1..=20).map(|batch| f64::from(batch * 25)).map(|pods| (pods, of(pods))).collect()
    }

    #[test]
    fn line_is_fitted_and_extended_to_the_limit() {
        let line = fit(&points(|pods| 28.0 + pods));
        assert!((line.slope - 1.0).abs() < 1e-9 && (line.start - 28.0).abs() < 1e-6, "{line:?}");
        assert!((line.reaches(128.0).unwrap() - 100.0).abs() < 1e-6);
        assert_eq!(fit(&points(|_| 7.0)).reaches(8.0), None);
        assert_eq!(fit(&[]), Line { start: 0.0, slope: 0.0 });
    }

    #[test]
    fn quadratic_growth_accelerates_and_linear_growth_does_not() {
        assert!(accelerates(&points(|pods| pods * pods / 100.0), 0.2));
        assert!(!accelerates(&points(|pods| 12.0 * pods), 0.2));
        assert!(!accelerates(&points(|pods| 100.0 * pods.sqrt()), 0.2));
        // A leak of the mounts of other pods begins at 0.
        assert!(accelerates(&points(|pods| (pods - 250.0).max(0.0)), 0.2));
        assert!(!accelerates(&points(|pods| pods * pods)[..5], 0.2));
    }
}
