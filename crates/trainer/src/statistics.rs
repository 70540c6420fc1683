//! Means with confidence intervals.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A mean with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Lower end of the interval.
    pub ci_low: f64,
    /// Upper end of the interval.
    pub ci_high: f64,
}

/// Resamples of a bootstrap: the ends of its interval are then good to a few per cent of it.
const RESAMPLES: usize = 4000;

impl Estimate {
    /// The mean of `values`, with the percentile bootstrap's 95% interval over them.
    ///
    /// Returns `None` for no values. The resampling is seeded, so that a run repeats exactly.
    pub fn bootstrap(values: &[f64], seed: u64) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64)
            .collect();
        means.sort_by(f64::total_cmp);
        Some(Self {
            mean: values.iter().sum::<f64>() / n as f64,
            ci_low: means[RESAMPLES * 25 / 1000],
            ci_high: means[RESAMPLES * 975 / 1000 - 1],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_has_the_width_that_theory_gives() {
        // 0 and 1 in equal parts: the mean's standard error is 0.5 / sqrt(400).
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let estimate = Estimate::bootstrap(&values, 1).unwrap();
        let half_width = 1.96 * 0.5 / 20.0;
        // The bootstrap's own noise is a few per cent of the width.
        assert!((estimate.mean - 0.5).abs() < 1e-12);
        assert!((estimate.ci_high - 0.5 - half_width).abs() < 0.1 * half_width);
        assert!((0.5 - estimate.ci_low - half_width).abs() < 0.1 * half_width);
        assert_eq!(Estimate::bootstrap(&[], 1), None);
    }
}
