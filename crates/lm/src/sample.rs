//! Random tokens from logits: temperature, top-k, top-p.

use rand::{Rng, RngExt};

use crate::error::LmError;

/// A sampling distribution: the model's, sharpened by a temperature and cut to its head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 1 is the model's own distribution.
    pub temperature: f64,
    /// Keeps the `k` most likely tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keeps the fewest most likely tokens whose mass reaches this; 1 keeps all.
    pub top_p: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
        }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// A temperature that is not positive, a top-k of 0, or a top-p outside (0, 1].
    pub fn check(&self) -> Result<(), LmError> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(LmError::Request(format!(
                "temperature must be positive, got {}; a top_k of 1 takes the likeliest token",
                self.temperature
            )));
        }
        if self.top_k == Some(0) {
            return Err(LmError::Request("top_k must be at least 1, got 0".into()));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(LmError::Request(format!(
                "top_p must lie in (0, 1], got {}",
                self.top_p
            )));
        }
        Ok(())
    }
}

/// Draws one token id from a row of logits.
///
/// Cuts to `top_k`, then to `top_p` of what is left, as transformers does. Returns nothing where the
/// logits are no distribution: one is NaN or infinity, or none is finite.
pub fn sample(logits: &[f32], sampling: &Sampling, rng: &mut impl Rng) -> Option<u32> {
    let uniform: f64 = rng.random();
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // The difference first: a logit over a small temperature alone may exceed all numbers.
    let above = |logit: f32| f64::from(logit) - f64::from(largest);
    let weight = |logit: f32| (above(logit) / sampling.temperature).exp();
    if logits.is_empty() {
        return None;
    }
    // A logit that is no number makes a weight NaN, and so does a largest one that is infinite.
    if sampling.top_k.is_none() && sampling.top_p >= 1.0 {
        let weights = || logits.iter().map(|&logit| weight(logit));
        let total: f64 = weights().sum();
        return (!total.is_nan()).then(|| pick(weights().enumerate(), uniform * total));
    }
    let mut ranked: Vec<(usize, f64)> = logits.iter().map(|&l| weight(l)).enumerate().collect();
    if ranked.iter().any(|(_, weight)| weight.is_nan()) {
        return None;
    }
    // Equal weights keep the order of their ids.
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked.truncate(sampling.top_k.unwrap_or(usize::MAX).max(1));
    let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
    let mut mass = 0.0;
    let kept = ranked
        .iter()
        .position(|(_, weight)| {
            mass += weight;
            mass >= sampling.top_p * total
        })
        .map_or(ranked.len(), |last| last + 1);
    ranked.truncate(kept);
    let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
    Some(pick(ranked.into_iter(), uniform * total))
}

fn pick(weights: impl Iterator<Item = (usize, f64)>, target: f64) -> u32 {
    let mut mass = 0.0;
    let mut last = 0;
    for (id, weight) in weights {
        if weight > 0.0 {
            last = id;
            mass += weight;
            if mass > target {
                break;
            }
        }
    }
    last as u32
}

/// A draw from the normal distribution with mean 0 and variance 1 (Box and Muller).
pub(crate) fn standard_normal(rng: &mut impl Rng) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Frequencies of 20,000 draws: three standard errors of a share are below 0.011.
    const SHARE_TOLERANCE: f64 = 0.011;

    fn shares(sampling: &Sampling) -> Vec<f64> {
        let logits = [1.0_f32, 3.0, 2.0, 0.0];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 4];
        for _ in 0..20_000 {
            counts[sample(&logits, sampling, &mut rng).unwrap() as usize] += 1;
        }
        counts
            .iter()
            .map(|&count| f64::from(count) / 20_000.0)
            .collect()
    }

    fn softmax(logits: &[f64]) -> Vec<f64> {
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        logits.iter().map(|l| l.exp() / total).collect()
    }

    #[test]
    fn draws_follow_the_tempered_softmax() {
        for temperature in [0.5, 1.0, 2.0] {
            let expected = softmax(&[1.0, 3.0, 2.0, 0.0].map(|l: f64| l / temperature));
            let got = shares(&Sampling {
                temperature,
                ..Sampling::default()
            });
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() < SHARE_TOLERANCE, "{got} {expected}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail_and_renormalise() {
        let head = softmax(&[3.0, 2.0]);
        // The two best hold 0.88 of the mass, the best alone 0.64.
        for sampling in [
            Sampling {
                top_k: Some(2),
                ..Sampling::default()
            },
            Sampling {
                top_p: 0.8,
                ..Sampling::default()
            },
        ] {
            let got = shares(&sampling);
            assert!(got[0] + got[3] < 1e-12);
            assert!((got[1] - head[0]).abs() < SHARE_TOLERANCE);
        }
        let got = shares(&Sampling {
            top_p: 0.5,
            ..Sampling::default()
        });
        assert!((got[1] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_least_temperature_draws_the_likeliest() {
        let sampling = Sampling {
            temperature: f64::MIN_POSITIVE,
            ..Sampling::default()
        };
        sampling.check().unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for logits in [[1.0, 3.0, f32::NEG_INFINITY], [-9.0, -3.0, -f32::MAX]] {
            assert_eq!(sample(&logits, &sampling, &mut rng), Some(1));
        }
    }

    #[test]
    fn nothing_is_drawn_from_what_is_no_distribution() {
        let all = Sampling::default();
        let cut = Sampling {
            top_k: Some(1),
            ..all
        };
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (none, most) = (f32::NEG_INFINITY, f32::INFINITY);
        for sampling in [all, cut] {
            for bad in [
                &[1.0, f32::NAN][..],
                &[-f32::NAN, 1.0],
                &[f32::NAN, f32::NAN],
                &[most, 1.0],
                &[none, none],
                &[],
            ] {
                assert_eq!(sample(bad, &sampling, &mut rng), None, "{bad:?}");
            }
            // A token that cannot be is no error.
            assert_eq!(sample(&[none, 1.0], &sampling, &mut rng), Some(1));
        }
    }

    #[test]
    fn out_of_range_settings_are_refused() {
        for bad in [
            Sampling {
                temperature: 0.0,
                ..Sampling::default()
            },
            Sampling {
                temperature: f64::NAN,
                ..Sampling::default()
            },
            Sampling {
                top_k: Some(0),
                ..Sampling::default()
            },
            Sampling {
                top_p: 0.0,
                ..Sampling::default()
            },
            Sampling {
                top_p: 1.5,
                ..Sampling::default()
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
