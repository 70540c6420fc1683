//! Means, win rates and length-controlled win rates, each with a bootstrap interval.

use mdp_core::sigmoid;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A mean, or another figure of a sample, with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure on the sample itself.
    pub mean: f64,
    /// Lower end of the interval.
    pub ci_low: f64,
    /// Upper end of the interval.
    pub ci_high: f64,
}

/// Resamples of a bootstrap: the ends of its interval are then good to a few per cent of it.
const RESAMPLES: usize = 4000;
/// The places of the interval's ends among the sorted resamples. They mirror each other, so that
/// swapping sides swaps the ends.
const LOW: usize = RESAMPLES * 25 / 1000;
const HIGH: usize = RESAMPLES - 1 - LOW;

impl Estimate {
    /// The mean of `values`, with the percentile bootstrap's 95% interval over them.
    ///
    /// Returns `None` for no values. The resampling is seeded, so that a run repeats exactly.
    ///
    /// # Examples
    ///
    /// ```
    /// use judge::Estimate;
    ///
    /// let estimate = Estimate::bootstrap(&[1.0, 1.0, 0.5, 0.0], 0).unwrap();
    /// assert_eq!(estimate.mean, 0.625);
    /// assert!(estimate.ci_low < 0.625 && 0.625 < estimate.ci_high);
    /// ```
    #[must_use]
    pub fn bootstrap(values: &[f64], seed: u64) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let means = (0..RESAMPLES)
            .map(|_| (0..n).map(|_| values[rng.random_range(0..n)]).sum::<f64>() / n as f64)
            .collect();
        Some(Self::of(mean(values), means))
    }

    /// The mean of `values`, with an interval that resamples whole groups of them.
    ///
    /// `groups[i]` names the group of `values[i]`. Several completions of one prompt are not
    /// independent; resampling them one by one would make the interval too narrow. With every
    /// value in a group of its own this is [`bootstrap`](Self::bootstrap).
    ///
    /// Returns `None` for no values.
    ///
    /// # Panics
    ///
    /// If there are not as many groups as values.
    #[must_use]
    pub fn bootstrap_grouped(values: &[f64], groups: &[usize], seed: u64) -> Option<Self> {
        let groups = members(values.len(), groups);
        if groups.len() == values.len() {
            return Self::bootstrap(values, seed);
        }
        let means = resample(&groups, seed, |rows| {
            rows.iter().map(|&row| values[row]).sum::<f64>() / rows.len() as f64
        });
        Some(Self::of(mean(values), means))
    }

    fn of(mean: f64, mut resampled: Vec<f64>) -> Self {
        resampled.sort_by(f64::total_cmp);
        Self {
            mean,
            ci_low: resampled[LOW],
            ci_high: resampled[HIGH],
        }
    }
}

/// A win rate with the advantage of longer answers taken out; see [`length_controlled`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthControlled {
    /// The fitted win rate at no difference in length.
    pub win_rate: Estimate,
    /// What one standard deviation of length difference adds to the log-odds of winning, nats.
    /// Above zero the judge prefers the longer answer.
    pub length_coefficient: f64,
    /// Root mean square of the length differences, in the unit they came in.
    pub length_scale: f64,
}

/// A normal prior of deviation `1 / sqrt(RIDGE)`, about 32 nats, on both coefficients. It gives
/// the fit one answer where the outcomes are all alike or split by length exactly, and moves
/// others by less than the fourth digit.
const RIDGE: f64 = 1e-3;

/// The win rate at equal length.
///
/// Fits `σ(θ_0 + θ_1 · d / scale)` to the credits by logistic regression, where `d` is the length
/// of A's completion minus B's and `scale` the root mean square of `d`, and returns `σ(θ_0)` with a
/// bootstrap interval. This is the length term of `AlpacaEval` 2's length-controlled win rate
/// (<https://arxiv.org/abs/2404.04475>, equation 1) in its simplest form: without its terms for
/// each instruction's difficulty, without the `tanh` around the length, and fitted on these pairs
/// alone. So it is no `AlpacaEval` score and cannot be compared with one.
///
/// It answers what the judge would say if both sides wrote equally long *and the effect of length
/// on the log-odds were the fitted straight line*. It controls for length only: what makes an
/// answer both longer and better is taken out too.
///
/// `credits` are 1 for a win of A, 0 for a loss, 0.5 for a tie, or probabilities; `groups` as in
/// [`Estimate::bootstrap_grouped`]. Where all lengths are equal the rate is the plain mean.
///
/// Returns `None` for no pairs.
///
/// # Panics
///
/// If the slices differ in length, or a number is not finite.
///
/// # Examples
///
/// ```
/// use judge::length_controlled;
///
/// // The longer answer wins three times in four, and A's is longer in eight pairs of twelve.
/// let credits = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
/// let differences = [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, -9.0, -9.0, -9.0, -9.0];
/// let groups: Vec<usize> = (0..12).collect();
/// let controlled = length_controlled(&credits, &differences, &groups, 0).unwrap();
/// // The plain rate is 7/12; at equal length nobody wins. Odds of 3 to 1 are ln 3 nats.
/// assert!((controlled.win_rate.mean - 0.5).abs() < 1e-3);
/// assert!((controlled.length_coefficient - 3f64.ln()).abs() < 1e-3);
/// ```
#[must_use]
pub fn length_controlled(
    credits: &[f64],
    length_differences: &[f64],
    groups: &[usize],
    seed: u64,
) -> Option<LengthControlled> {
    assert_eq!(
        credits.len(),
        length_differences.len(),
        "a credit for each length difference"
    );
    assert!(
        credits
            .iter()
            .chain(length_differences)
            .all(|x| x.is_finite()),
        "credits and lengths are finite"
    );
    if credits.is_empty() {
        return None;
    }
    let square = |x: &f64| x * x;
    let scale = mean(&length_differences.iter().map(square).collect::<Vec<_>>()).sqrt();
    if scale <= 0.0 {
        return Some(LengthControlled {
            win_rate: Estimate::bootstrap_grouped(credits, groups, seed)?,
            length_coefficient: 0.0,
            length_scale: 0.0,
        });
    }
    let z: Vec<f64> = length_differences.iter().map(|d| d / scale).collect();
    let all: Vec<usize> = (0..credits.len()).collect();
    let fitted = logistic(credits, &z, &all, [0.0; 2]);
    let groups = members(credits.len(), groups);
    // Each resample's fit starts from the sample's: two or three steps instead of six.
    let rates = resample(&groups, seed, |rows| {
        sigmoid(logistic(credits, &z, rows, fitted)[0])
    });
    Some(LengthControlled {
        win_rate: Estimate::of(sigmoid(fitted[0]), rates),
        length_coefficient: fitted[1],
        length_scale: scale,
    })
}

/// The win rate among a third of the pairs, by length difference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthTercile {
    /// Pairs in this third.
    pub n_pairs: usize,
    /// Mean length of A's completion minus B's, in the unit they came in.
    pub mean_difference: f64,
    /// The win rate of A among them.
    pub win_rate: Estimate,
}

/// Win rates of the thirds of the pairs where A's completion is shortest, middling and longest
/// beside B's, in this order. A rate that rises from third to third shows a judge that likes length
/// (or answers that are better for being longer).
///
/// Takes what [`length_controlled`] takes. Returns nothing for fewer than three pairs.
///
/// # Panics
///
/// If the slices differ in length.
#[must_use]
pub fn win_rate_by_length(
    credits: &[f64],
    length_differences: &[f64],
    groups: &[usize],
    seed: u64,
) -> Vec<LengthTercile> {
    let n = credits.len();
    assert_eq!(n, length_differences.len(), "a credit for each difference");
    assert_eq!(n, groups.len(), "a group for each credit");
    if n < 3 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| length_differences[i].total_cmp(&length_differences[j]));
    (0..3)
        .filter_map(|third| {
            let rows = &order[third * n / 3..(third + 1) * n / 3];
            let pick = |from: &[f64]| -> Vec<f64> { rows.iter().map(|&row| from[row]).collect() };
            let groups: Vec<usize> = rows.iter().map(|&row| groups[row]).collect();
            Some(LengthTercile {
                n_pairs: rows.len(),
                mean_difference: mean(&pick(length_differences)),
                win_rate: Estimate::bootstrap_grouped(&pick(credits), &groups, seed)?,
            })
        })
        .collect()
}

/// The mean; NaN for no values.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The rows of each group, groups in the order of their first row.
fn members(n: usize, groups: &[usize]) -> Vec<Vec<usize>> {
    assert_eq!(n, groups.len(), "a group for each value");
    let mut place = std::collections::HashMap::new();
    let mut members: Vec<Vec<usize>> = Vec::new();
    for (row, group) in groups.iter().enumerate() {
        let at = *place.entry(group).or_insert(members.len());
        if at == members.len() {
            members.push(Vec::new());
        }
        members[at].push(row);
    }
    members
}

/// The statistic of each resample, which draws as many groups as there are, with replacement.
fn resample(
    groups: &[Vec<usize>],
    seed: u64,
    mut statistic: impl FnMut(&[usize]) -> f64,
) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut rows = Vec::new();
    (0..RESAMPLES)
        .map(|_| {
            rows.clear();
            for _ in 0..groups.len() {
                rows.extend_from_slice(&groups[rng.random_range(0..groups.len())]);
            }
            statistic(&rows)
        })
        .collect()
}

/// Intercept and slope of the logistic regression of `y` on `z` over `rows`, by Newton's method.
fn logistic(y: &[f64], z: &[f64], rows: &[usize], start: [f64; 2]) -> [f64; 2] {
    const STEPS: usize = 100;
    // Far below what an interval over any sample can show.
    const CLOSE: f64 = 1e-10;
    // The loss is convex, but Newton's steps overshoot where the curve is flat: never leap further
    // than this many nats at once.
    const LEAP: f64 = 4.0;
    let [mut intercept, mut slope] = start;
    for _ in 0..STEPS {
        let (mut g0, mut g1) = (RIDGE * intercept, RIDGE * slope);
        let (mut h00, mut h01, mut h11) = (RIDGE, 0.0, RIDGE);
        for &row in rows {
            let p = sigmoid(intercept + slope * z[row]);
            let (error, weight) = (p - y[row], p * (1.0 - p));
            g0 += error;
            g1 += error * z[row];
            h00 += weight;
            h01 += weight * z[row];
            h11 += weight * z[row] * z[row];
        }
        let determinant = h00 * h11 - h01 * h01;
        let step = [
            (h11 * g0 - h01 * g1) / determinant,
            (h00 * g1 - h01 * g0) / determinant,
        ];
        let size = step[0].abs().max(step[1].abs());
        let shrink = if size > LEAP { LEAP / size } else { 1.0 };
        intercept -= shrink * step[0];
        slope -= shrink * step[1];
        if size < CLOSE {
            break;
        }
    }
    [intercept, slope]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bootstrap's own noise is a few per cent of the width.
    const WIDTH_NOISE: f64 = 0.1;
    /// Sums of a thousand terms, and Newton's last step.
    const ROUNDING: f64 = 1e-9;

    fn alone(n: usize) -> Vec<usize> {
        (0..n).collect()
    }

    fn assert_half_width(estimate: Estimate, expected: f64) {
        for half in [
            estimate.ci_high - estimate.mean,
            estimate.mean - estimate.ci_low,
        ] {
            assert!(
                (half - expected).abs() < WIDTH_NOISE * expected,
                "half width {half}, theory says {expected}"
            );
        }
    }

    /// Length differences and credits of pairs that follow the fitted model.
    fn simulate(n: usize, intercept: f64, slope: f64, seed: u64) -> (Vec<f64>, Vec<f64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n)
            .map(|_| {
                // Uniform, with a mean far from 0 so that length matters, in words.
                let difference = rng.random_range(-60.0..100.0);
                let wins = rng.random::<f64>() < sigmoid(intercept + slope * difference);
                (f64::from(u8::from(wins)), difference)
            })
            .unzip()
    }

    #[test]
    fn the_interval_has_the_width_that_theory_gives() {
        // 0 and 1 in equal parts: the mean's standard error is 0.5 / sqrt(400).
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let estimate = Estimate::bootstrap(&values, 1).unwrap();
        assert!((estimate.mean - 0.5).abs() < ROUNDING);
        assert_half_width(estimate, 1.96 * 0.5 / 20.0);
        assert_eq!(Estimate::bootstrap(&[], 1), None);
    }

    #[test]
    fn groups_of_equal_values_widen_the_interval_by_the_root_of_their_size() {
        // Each of 400 values four times over: 1600 values that know no more than 400.
        let values: Vec<f64> = (0..1600).map(|i| f64::from((i / 4) % 2)).collect();
        let groups: Vec<usize> = (0..1600).map(|i| i / 4).collect();
        let grouped = Estimate::bootstrap_grouped(&values, &groups, 1).unwrap();
        assert_half_width(grouped, 1.96 * 0.5 / 20.0);
        let single = Estimate::bootstrap_grouped(&values, &alone(1600), 1).unwrap();
        assert_half_width(single, 1.96 * 0.5 / 40.0);
        assert_eq!(Estimate::bootstrap(&values, 1), Some(single));
    }

    #[test]
    fn the_regression_recovers_known_coefficients() {
        let (intercept, slope) = (-0.5, 0.02);
        let (credits, differences) = simulate(4000, intercept, slope, 3);
        let fit = length_controlled(&credits, &differences, &alone(4000), 0).unwrap();
        let expected = sigmoid(intercept);
        // The standard error of the intercept is near 2.2 / sqrt(4000); four of them, times the
        // logistic's slope of at most 0.25.
        assert!((fit.win_rate.mean - expected).abs() < 4.0 * 2.2 / 4000f64.sqrt() * 0.25);
        assert!(fit.win_rate.ci_low < expected && expected < fit.win_rate.ci_high);
        // The slope's standard error is near 2.3 / (sqrt(4000) * 46), 46 being the deviation of
        // the differences.
        let found = fit.length_coefficient / fit.length_scale;
        assert!(
            (found - slope).abs() < 4.0 * 2.3 / (4000f64.sqrt() * 46.0),
            "{found}"
        );
        // The plain win rate is misled by A's longer completions.
        assert!(mean(&credits) - expected > 0.05);
    }

    #[test]
    fn the_controlled_interval_has_the_width_that_theory_gives() {
        let (credits, differences) = simulate(1500, 0.3, 0.015, 5);
        let fit = length_controlled(&credits, &differences, &alone(1500), 0).unwrap();
        // The inverse of the Fisher information, by the delta method.
        let theta = [
            (fit.win_rate.mean / (1.0 - fit.win_rate.mean)).ln(),
            fit.length_coefficient,
        ];
        let (mut h00, mut h01, mut h11) = (0.0, 0.0, 0.0);
        for difference in &differences {
            let z = difference / fit.length_scale;
            let p = sigmoid(theta[0] + theta[1] * z);
            let weight = p * (1.0 - p);
            h00 += weight;
            h01 += weight * z;
            h11 += weight * z * z;
        }
        let deviation = (h11 / (h00 * h11 - h01 * h01)).sqrt();
        let slope = fit.win_rate.mean * (1.0 - fit.win_rate.mean);
        assert_half_width(fit.win_rate, 1.96 * deviation * slope);
    }

    #[test]
    fn swapping_the_sides_mirrors_every_figure() {
        let (credits, differences) = simulate(300, 0.4, 0.01, 7);
        let swapped: Vec<f64> = credits.iter().map(|credit| 1.0 - credit).collect();
        let reversed: Vec<f64> = differences.iter().map(|difference| -difference).collect();
        let mirrors = |a: Estimate, b: Estimate| {
            assert!((a.mean - (1.0 - b.mean)).abs() < ROUNDING);
            assert!((a.ci_low - (1.0 - b.ci_high)).abs() < ROUNDING);
            assert!((a.ci_high - (1.0 - b.ci_low)).abs() < ROUNDING);
        };
        mirrors(
            Estimate::bootstrap(&credits, 2).unwrap(),
            Estimate::bootstrap(&swapped, 2).unwrap(),
        );
        let a = length_controlled(&credits, &differences, &alone(300), 2).unwrap();
        let b = length_controlled(&swapped, &reversed, &alone(300), 2).unwrap();
        mirrors(a.win_rate, b.win_rate);
        assert!((a.length_coefficient - b.length_coefficient).abs() < ROUNDING);
    }

    #[test]
    fn equal_lengths_leave_the_plain_win_rate() {
        let credits = [1.0, 0.5, 0.0, 1.0];
        let fit = length_controlled(&credits, &[0.0; 4], &alone(4), 4).unwrap();
        assert_eq!(Some(fit.win_rate), Estimate::bootstrap(&credits, 4));
        assert_eq!(length_controlled(&[], &[], &[], 0), None);
    }

    #[test]
    fn a_clean_sweep_and_a_perfect_split_have_finite_fits() {
        let differences = [-3.0, -1.0, 2.0, 5.0];
        let sweep = length_controlled(&[1.0; 4], &differences, &alone(4), 0).unwrap();
        assert!(sweep.win_rate.mean > 0.99 && sweep.win_rate.mean < 1.0);
        let split = length_controlled(&[0.0, 0.0, 1.0, 1.0], &differences, &alone(4), 0).unwrap();
        assert!(split.length_coefficient > 3.0 && split.length_coefficient.is_finite());
        assert!(split.win_rate.ci_low >= 0.0 && split.win_rate.ci_high <= 1.0);
    }

    #[test]
    fn terciles_hold_every_pair_once_and_rise_where_length_wins() {
        let (credits, differences) = simulate(301, 0.0, 0.03, 9);
        let thirds = win_rate_by_length(&credits, &differences, &alone(301), 0);
        assert_eq!(thirds.iter().map(|third| third.n_pairs).sum::<usize>(), 301);
        assert!(thirds[0].mean_difference < thirds[1].mean_difference);
        assert!(thirds[0].win_rate.ci_high < thirds[2].win_rate.ci_low);
        let weighted: f64 = thirds
            .iter()
            .map(|third| third.win_rate.mean * third.n_pairs as f64)
            .sum();
        assert!((weighted / 301.0 - mean(&credits)).abs() < ROUNDING);
        assert!(win_rate_by_length(&[1.0, 0.0], &[1.0, 2.0], &alone(2), 0).is_empty());
    }
}
