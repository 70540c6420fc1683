//! Figures of an experiment: ranking, correlation, intervals over seeds.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// The probability that a score of `positives` is below one of `negatives`, ties counted half: the
/// area under the ROC curve of *low* scores as an alarm.
///
/// `None` where either is empty or a score is NaN.
///
/// # Examples
///
/// ```
/// use trainer::reproduce::statistics::auroc_of_low;
///
/// assert_eq!(auroc_of_low(&[-2.0, 0.0], &[0.0, 1.0]), Some(0.875));
/// ```
pub fn auroc_of_low(positives: &[f64], negatives: &[f64]) -> Option<f64> {
    if positives.is_empty() || negatives.is_empty() {
        return None;
    }
    let labelled = |scores: &[f64], positive: bool| -> Vec<(f64, bool)> {
        scores.iter().map(|&score| (score, positive)).collect()
    };
    let mut all = labelled(positives, true);
    all.extend(labelled(negatives, false));
    if all.iter().any(|(score, _)| score.is_nan()) {
        return None;
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    // Downwards: how many negatives stand above each positive.
    let (mut above, mut wins) = (0.0, 0.0);
    // Zeros of either sign tie, though `total_cmp` tells them apart: they lie side by side.
    for tied in all.chunk_by(|a, b| a.0.partial_cmp(&b.0) == Some(Ordering::Equal)) {
        let n_positive = tied.iter().filter(|(_, positive)| *positive).count() as f64;
        let n_negative = tied.len() as f64 - n_positive;
        wins += n_positive * (above + 0.5 * n_negative);
        above += n_negative;
    }
    Some(wins / (positives.len() as f64 * negatives.len() as f64))
}

/// Points of the ROC curve of low scores: for each rate of false alarms in `rates`, the share of
/// `positives` that an alarm at that rate finds.
///
/// Empty where either is.
pub fn roc_of_low(positives: &[f64], negatives: &[f64], rates: &[f64]) -> Vec<(f64, f64)> {
    if positives.is_empty() || negatives.is_empty() {
        return Vec::new();
    }
    let mut sorted = negatives.to_vec();
    sorted.sort_by(f64::total_cmp);
    let found = |rate: f64| {
        let allowed = (rate * sorted.len() as f64).floor() as usize;
        let below = sorted.get(allowed).copied().unwrap_or(f64::INFINITY);
        let found = positives.iter().filter(|&&score| score < below).count();
        found as f64 / positives.len() as f64
    };
    rates.iter().map(|&rate| (rate, found(rate))).collect()
}

/// Pearson's correlation of two lists of the same length.
///
/// `None` for fewer than two values, or where one list does not vary.
///
/// # Panics
///
/// If the lengths differ.
pub fn correlation(xs: &[f64], ys: &[f64]) -> Option<f64> {
    assert_eq!(xs.len(), ys.len(), "two lists of one length");
    let (x_mean, y_mean) = (mean(xs)?, mean(ys)?);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in xs.iter().zip(ys) {
        let (x, y) = (x - x_mean, y - y_mean);
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

/// The mean, or `None` of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// How the rewards of tokens that a corruption left alone changed with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Leakage {
    /// Mean change at the corrupted token, reward units.
    pub at_site: f64,
    /// Mean over texts of the summed change at the later tokens, reward units.
    pub later_sum: f64,
    /// Mean over texts of the summed size of the changes at the later tokens, reward units.
    pub later_size: f64,
    /// `later_size` over the size of `at_site`: how much credit moves elsewhere for each unit that
    /// lands where it belongs.
    pub ratio: f64,
}

/// The leakage of texts given as rewards before, rewards after, and the changed token.
///
/// Tokens before it see the same text, and are left out. `None` of nothing.
///
/// # Panics
///
/// If a text's two lists differ in length or do not hold the token.
pub fn leakage(texts: &[(&[f64], &[f64], usize)]) -> Option<Leakage> {
    if texts.is_empty() {
        return None;
    }
    let mut sums = Leakage::default();
    for &(before, after, site) in texts {
        assert_eq!(before.len(), after.len(), "one text before and after");
        sums.at_site += after[site] - before[site];
        for (before, after) in before.iter().zip(after).skip(site + 1) {
            sums.later_sum += after - before;
            sums.later_size += (after - before).abs();
        }
    }
    let n = texts.len() as f64;
    Some(Leakage {
        at_site: sums.at_site / n,
        later_sum: sums.later_sum / n,
        later_size: sums.later_size / n,
        ratio: sums.later_size / sums.at_site.abs().max(f64::MIN_POSITIVE),
    })
}

/// A figure over seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OverSeeds {
    /// The mean.
    pub mean: f64,
    /// Student's 95% interval of the mean; none for a single seed.
    pub interval: Option<[f64; 2]>,
    /// The figure of each seed.
    pub values: Vec<f64>,
}

impl OverSeeds {
    /// The mean and interval of one figure for each seed; `None` of nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// use trainer::reproduce::statistics::OverSeeds;
    ///
    /// let [low, high] = OverSeeds::of(vec![1.0, 2.0, 3.0]).unwrap().interval.unwrap();
    /// // 4.303 standard errors of 1/√3 on both sides of 2.
    /// assert!((low + 0.4841).abs() < 1e-3 && (high - 4.4841).abs() < 1e-3);
    /// ```
    pub fn of(values: Vec<f64>) -> Option<Self> {
        let mean = mean(&values)?;
        let n = values.len() as f64;
        let interval = StudentsT::new(0.0, 1.0, n - 1.0).ok().map(|student| {
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let half = student.inverse_cdf(0.975) * (variance / n).sqrt();
            [mean - half, mean + half]
        });
        Some(Self {
            mean,
            interval,
            values,
        })
    }

    /// Whether this interval lies above all of the other's; `None` without both.
    pub fn is_above(&self, other: &Self) -> Option<bool> {
        Some(self.interval?[0] > other.interval?[1])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sums of at most a few dozen numbers near 1.
    const ROUNDING: f64 = 1e-12;

    #[test]
    fn figures_of_nothing_are_none() {
        assert_eq!(auroc_of_low(&[], &[1.0]), None);
        assert_eq!(auroc_of_low(&[f64::NAN], &[1.0]), None);
        assert_eq!(correlation(&[1.0, 1.0], &[0.0, 2.0]), None);
        assert_eq!(leakage(&[]), None);
        assert!(OverSeeds::of(vec![0.5]).unwrap().interval.is_none());
    }

    #[test]
    fn zeros_of_either_sign_tie() {
        assert_eq!(auroc_of_low(&[0.0], &[-0.0, 0.0]), Some(0.5));
    }

    #[test]
    fn correlation_is_that_of_a_worked_example() {
        // Deviations (-1, 0, 1) and (-1, 1, 0): 1 / √(2 · 2).
        let found = correlation(&[1.0, 2.0, 3.0], &[0.0, 2.0, 1.0]).unwrap();
        assert!((found - 0.5).abs() < ROUNDING);
    }

    #[test]
    fn leakage_counts_later_tokens_and_neither_the_site_nor_what_stands_before() {
        let (before, after) = ([9.0, 0.0, 1.0, 1.0], [0.0, -4.0, 2.0, -0.5]);
        let leakage = leakage(&[(&before, &after, 1)]).unwrap();
        assert!((leakage.at_site + 4.0).abs() < ROUNDING);
        assert!((leakage.later_sum + 0.5).abs() < ROUNDING);
        assert!((leakage.later_size - 2.5).abs() < ROUNDING);
        assert!((leakage.ratio - 0.625).abs() < ROUNDING);
    }

    #[test]
    fn a_roc_curve_rises_to_all() {
        let curve = roc_of_low(&[-1.0, 0.5], &[0.0, 1.0], &[0.0, 0.5, 1.0]);
        assert_eq!(curve, [(0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]);
    }

    proptest! {
        #[test]
        fn auroc_is_the_share_of_ordered_pairs(
            // Few values, so that ties are common.
            positives in prop::collection::vec((-4i32..4).prop_map(f64::from), 1..20),
            negatives in prop::collection::vec((-4i32..4).prop_map(f64::from), 1..20),
        ) {
            let mut sum = 0.0;
            for p in &positives {
                for n in &negatives {
                    sum += if p < n { 1.0 } else if p > n { 0.0 } else { 0.5 };
                }
            }
            let expected = sum / (positives.len() * negatives.len()) as f64;
            let found = auroc_of_low(&positives, &negatives).unwrap();
            prop_assert!((found - expected).abs() < ROUNDING);
        }
    }
}
