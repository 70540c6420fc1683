//! Preference models, labelled pairs, and losses of the margin on them.

use std::collections::BTreeMap;

use rand::{Rng, RngExt};

use crate::math::{log_sigmoid, log_softmax, log_sum_exp, sigmoid};
use crate::tabular::{check_finite, check_weights, reserve};
use crate::{Beta, MdpError, TabularMdp, TabularPolicy, Tree, completion_logps, implicit_rewards};

/// The Bradley-Terry probability that `a` is preferred to `b`: `σ(reward_a - reward_b)`, equation 1
/// of <https://arxiv.org/abs/2404.12358>, with returns `Σ r` in reward units.
///
/// # Examples
///
/// ```
/// use mdp_core::bradley_terry;
///
/// assert_eq!(bradley_terry(2.0, 2.0), 0.5);
/// // Odds are the exponential of the difference: 3 to 1.
/// assert!((bradley_terry(3.0_f64.ln(), 0.0) - 0.75).abs() < 1e-15);
/// ```
#[must_use]
pub fn bradley_terry(reward_a: f64, reward_b: f64) -> f64 {
    sigmoid(reward_a - reward_b)
}

/// The Plackett-Luce probability of a ranking, from the returns in its order, best first:
/// `Π_i exp(R_i) / Σ_{j >= i} exp(R_j)`. With two it is [`bradley_terry`]; with fewer, 1.
///
/// # Examples
///
/// ```
/// use mdp_core::plackett_luce;
///
/// // Weights 2, 1, 1: the first comes first half of the time, then a fair coin.
/// let ranking = [2.0_f64.ln(), 0.0, 0.0];
/// assert!((plackett_luce(&ranking) - 0.25).abs() < 1e-15);
/// ```
#[must_use]
pub fn plackett_luce(rewards: &[f64]) -> f64 {
    let logp: f64 = (0..rewards.len())
        .map(|i| rewards[i] - log_sum_exp(&rewards[i..]))
        .sum();
    logp.exp()
}

/// Draws a completion of `policy`, the environment moving where it does, and returns its last pair.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`].
pub fn sample_completion(
    mdp: &TabularMdp,
    policy: &TabularPolicy,
    rng: &mut impl Rng,
) -> Result<usize, MdpError> {
    let tree = mdp.tree();
    tree.check_same("policy", policy.tree())?;
    let mut state = 0;
    loop {
        let row = mdp.acting_row(policy, state);
        let mut left: f64 = rng.random();
        let mut action = None;
        for (a, logp) in row.iter().enumerate() {
            let p = logp.exp();
            if p > 0.0 {
                // The last possible token also takes what rounding leaves over.
                action = Some(a);
                left -= p;
                if left < 0.0 {
                    break;
                }
            }
        }
        let pair = state * tree.vocab() + action.unwrap_or(tree.eos() as usize);
        match tree.child(pair) {
            Some(next) => state = next,
            None => return Ok(pair),
        }
    }
}

/// A comparison of two completions of one prompt, by last pair, and its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WeightedPair {
    /// The last pair of the preferred completion.
    pub chosen: usize,
    /// The last pair of the other.
    pub rejected: usize,
    /// Its share of the table.
    pub weight: f64,
}

/// Labelled comparisons of the completions of one tree, so of one prompt. Weights sum to 1.
///
/// Two equal completions carry no preference; they are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct PairTable {
    tree: Tree,
    pairs: Vec<WeightedPair>,
}

impl PairTable {
    /// The table of these comparisons, weights scaled to sum to 1.
    ///
    /// # Errors
    ///
    /// [`MdpError::NotComplete`] or [`MdpError::TableLength`] if a side is no completion,
    /// [`MdpError::Weight`] if a weight is negative or not finite, or none is above 0.
    pub fn new(tree: Tree, mut pairs: Vec<WeightedPair>) -> Result<Self, MdpError> {
        for pair in &pairs {
            for side in [pair.chosen, pair.rejected] {
                if side >= tree.n_pairs() {
                    return Err(MdpError::TableLength {
                        table: "pairs of the tree that a comparison names",
                        expected: tree.n_pairs(),
                        got: side,
                    });
                }
                if tree.child(side).is_some() {
                    return Err(MdpError::NotComplete {
                        state: tree.pair_tokens(side),
                        eos: tree.eos(),
                        horizon: tree.horizon(),
                    });
                }
            }
        }
        pairs.retain(|pair| pair.chosen != pair.rejected);
        let weights: Vec<f64> = pairs.iter().map(|pair| pair.weight).collect();
        check_weights(&weights)?;
        let total: f64 = weights.iter().sum();
        for pair in &mut pairs {
            pair.weight /= total;
        }
        Ok(Self { tree, pairs })
    }

    /// Every comparison there can be: both sides drawn from `sampler`, labels by the Bradley-Terry
    /// model of the true returns. This is a data set without end.
    ///
    /// # Errors
    ///
    /// [`MdpError::TreeMismatch`], [`MdpError::Weight`] if `sampler` has one completion only, or
    /// [`MdpError::OutOfMemory`].
    pub fn population(mdp: &TabularMdp, sampler: &TabularPolicy) -> Result<Self, MdpError> {
        let completions: Vec<usize> = mdp.tree().completions().collect();
        let logps = completion_logps(mdp, sampler)?;
        let returns = mdp.returns();
        let n_pairs = completions.len().saturating_mul(completions.len());
        let mut pairs = reserve(n_pairs)?;
        for i in 0..completions.len() {
            for j in 0..completions.len() {
                if i != j {
                    pairs.push(WeightedPair {
                        chosen: completions[i],
                        rejected: completions[j],
                        weight: (logps[i] + logps[j]).exp() * bradley_terry(returns[i], returns[j]),
                    });
                }
            }
        }
        Self::new(mdp.tree().clone(), pairs)
    }

    /// `n_pairs` comparisons drawn: both sides from `sampler`, one label each by the Bradley-Terry
    /// model of the true returns. Equal comparisons are merged into one of larger weight.
    ///
    /// # Errors
    ///
    /// [`MdpError::TreeMismatch`], or [`MdpError::Weight`] if every draw had two equal sides.
    pub fn sample(
        mdp: &TabularMdp,
        sampler: &TabularPolicy,
        n_pairs: usize,
        rng: &mut impl Rng,
    ) -> Result<Self, MdpError> {
        let returns = mdp.tree().path_sums(mdp.rewards());
        let mut counts: BTreeMap<(usize, usize), f64> = BTreeMap::new();
        for _ in 0..n_pairs {
            let a = sample_completion(mdp, sampler, rng)?;
            let b = sample_completion(mdp, sampler, rng)?;
            let a_wins = rng.random::<f64>() < bradley_terry(returns[a], returns[b]);
            *counts
                .entry(if a_wins { (a, b) } else { (b, a) })
                .or_default() += 1.0;
        }
        let pairs = counts
            .into_iter()
            .map(|((chosen, rejected), weight)| WeightedPair {
                chosen,
                rejected,
                weight,
            })
            .collect();
        Self::new(mdp.tree().clone(), pairs)
    }

    /// The same comparisons with a share `rate` of the labels turned around.
    ///
    /// # Errors
    ///
    /// [`MdpError::Parameter`] if `rate` is outside `[0, 1]`.
    pub fn flipped(&self, rate: f64) -> Result<Self, MdpError> {
        if !(0.0..=1.0).contains(&rate) {
            return Err(MdpError::Parameter {
                name: "flip rate",
                value: rate,
                expected: "a number from 0 to 1",
            });
        }
        let pairs = self
            .pairs
            .iter()
            .flat_map(|pair| {
                let kept = WeightedPair {
                    weight: pair.weight * (1.0 - rate),
                    ..*pair
                };
                let turned = WeightedPair {
                    chosen: pair.rejected,
                    rejected: pair.chosen,
                    weight: pair.weight * rate,
                };
                [kept, turned]
            })
            .collect();
        Self::new(self.tree.clone(), pairs)
    }

    /// The comparisons.
    #[must_use]
    pub fn pairs(&self) -> &[WeightedPair] {
        &self.pairs
    }

    /// The tree whose completions are compared.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}

/// A loss of the margin: its value in nats, and its derivative by the margin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// The loss.
    pub loss: f64,
    /// `d loss / d margin`.
    pub slope: f64,
}

/// The DPO loss of a margin, `-log σ(margin)`, equation 9, and its derivative `-σ(-margin)`.
///
/// The margin is chosen minus rejected implicit return, in reward units.
#[must_use]
pub fn dpo_loss(margin: f64) -> Slope {
    Slope {
        loss: -log_sigmoid(margin),
        slope: -sigmoid(-margin),
    }
}

/// The conservative DPO loss, which hopes for a share `noise` of turned labels:
/// `(1 - noise) ℓ(m) + noise ℓ(-m)`. Mitchell (2023), <https://ericmitchell.ai/cdpo.pdf>.
///
/// Its population minimiser is never the optimal policy, with clean labels or with turned ones; see
/// [`robust_dpo_loss`].
pub fn conservative_dpo_loss(noise: f64) -> impl Fn(f64) -> Slope {
    move |margin| {
        let (kept, turned) = (dpo_loss(margin), dpo_loss(-margin));
        Slope {
            loss: (1.0 - noise) * kept.loss + noise * turned.loss,
            slope: (1.0 - noise) * kept.slope - noise * turned.slope,
        }
    }
}

/// The robust DPO loss, which subtracts what a share `noise` of turned labels adds:
/// `((1 - noise) ℓ(m) - noise ℓ(-m)) / (1 - 2 noise)`. Chowdhury et al. (2024),
/// <https://arxiv.org/abs/2403.00409>. At `noise = 1/2` labels say nothing and the loss is NaN.
///
/// Its population minimiser is the optimal policy if labels are turned at exactly this rate, and not
/// if they are clean.
pub fn robust_dpo_loss(noise: f64) -> impl Fn(f64) -> Slope {
    move |margin| {
        let (kept, turned) = (dpo_loss(margin), dpo_loss(-margin));
        let scale = 1.0 / (1.0 - 2.0 * noise);
        Slope {
            loss: scale * ((1.0 - noise) * kept.loss - noise * turned.loss),
            slope: scale * ((1.0 - noise) * kept.slope + noise * turned.slope),
        }
    }
}

/// A loss over a table of comparisons, and its gradient by the policy's logits.
#[derive(Clone, Debug, PartialEq)]
pub struct LossAndGradient {
    /// The weighted mean loss, in nats.
    pub loss: f64,
    /// `d loss / d logit`, `[pairs]`; 0 where the environment moves.
    pub gradient: Vec<f64>,
}

/// The weighted mean of `loss(margin)` over comparisons for the softmax policy of `logits`,
/// `[pairs]`, and its exact gradient.
///
/// With [`dpo_loss`] and [`PairTable::population`] this is the population DPO loss. A pair of margin
/// `u` adds `loss'(u) β (Σ_{t: s_t^w = s} (1[a = a_t] - π(a|s)) - the same over l)` to the gradient at
/// `(s, a)`.
///
/// # Errors
///
/// [`MdpError::TreeMismatch`], [`MdpError::TableLength`] or [`MdpError::NotFinite`].
///
/// # Examples
///
/// ```
/// use mdp_core::*;
///
/// let tree = Tree::new(2, 1, 1)?;
/// let mdp = TabularMdp::new(TabularPolicy::uniform(tree), vec![3.0_f64.ln(), 0.0])?;
/// let pairs = PairTable::population(&mdp, mdp.reference())?;
/// let beta = Beta::new(1.0)?;
/// // At the reference each margin is 0, so the loss is log 2 ...
/// let start = margin_loss(&mdp, &pairs, beta, &[0.0, 0.0], dpo_loss)?;
/// assert!((start.loss - 2.0_f64.ln()).abs() < 1e-15);
/// // ... and the gradient is β (σ(0) - 3/4) for the better token.
/// assert!((start.gradient[0] + 0.25).abs() < 1e-15);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub fn margin_loss(
    mdp: &TabularMdp,
    pairs: &PairTable,
    beta: Beta,
    logits: &[f64],
    loss: impl Fn(f64) -> Slope,
) -> Result<LossAndGradient, MdpError> {
    let tree = mdp.tree();
    tree.check_same("comparisons", pairs.tree())?;
    tree.check_pairs("logits", logits.len())?;
    check_finite("logit", tree, logits)?;
    let mut logps = logits.to_vec();
    for row in logps.chunks_exact_mut(tree.vocab()) {
        log_softmax(row);
    }
    let policy = TabularPolicy::from_checked(tree.clone(), logps);
    let returns = tree.path_sums(&implicit_rewards(mdp, &policy, beta)?);
    let mut total = 0.0;
    // By last pair: the derivative of the loss by the completion's implicit return.
    let mut mass = vec![0.0; tree.n_pairs()];
    for pair in pairs.pairs() {
        let Slope { loss, slope } = loss(returns[pair.chosen] - returns[pair.rejected]);
        total += pair.weight * loss;
        mass[pair.chosen] += pair.weight * slope;
        mass[pair.rejected] -= pair.weight * slope;
    }
    // Each token of a completion shares its derivative, so sums flow up to the root; a logit moves
    // its own token by 1 - π and the others by -π.
    for state in (0..tree.n_states()).rev() {
        let row = &mut mass[tree.row(state)];
        let through: f64 = row.iter().sum();
        if mdp.is_environment(state) {
            row.fill(0.0);
        } else {
            for (m, logp) in row.iter_mut().zip(policy.row(state)) {
                *m = beta.get() * (*m - logp.exp() * through);
            }
        }
        if let Some(before) = tree.parent(state) {
            mass[before] = through;
        }
    }
    Ok(LossAndGradient {
        loss: total,
        gradient: mass,
    })
}

/// Full-batch Adam on a table of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Steps to take.
    pub steps: usize,
    /// The largest step, in logits; it falls to 0 along half a cosine.
    pub step_size: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self {
            steps: 4000,
            step_size: 0.1,
        }
    }
}

/// Minimises [`margin_loss`] over tabular logits from `start`, `[pairs]`, and returns the policy.
///
/// # Errors
///
/// As [`margin_loss`]; [`MdpError::Parameter`] if the step size is not finite and above 0.
pub fn minimise_margin_loss(
    mdp: &TabularMdp,
    pairs: &PairTable,
    beta: Beta,
    start: &[f64],
    adam: Adam,
    loss: impl Fn(f64) -> Slope,
) -> Result<TabularPolicy, MdpError> {
    const MEAN_DECAY: f64 = 0.9;
    const SQUARE_DECAY: f64 = 0.999;
    // Small beside any gradient that matters: at 1e-8 rarely visited states would crawl.
    const EPSILON: f64 = 1e-14;
    if !(adam.step_size.is_finite() && adam.step_size > 0.0) {
        return Err(MdpError::Parameter {
            name: "step size",
            value: adam.step_size,
            expected: "a finite number above 0",
        });
    }
    let mut logits = start.to_vec();
    let mut mean = vec![0.0; logits.len()];
    let mut square = vec![0.0; logits.len()];
    let (mut mean_left, mut square_left) = (1.0, 1.0);
    for step in 0..adam.steps {
        let gradient = margin_loss(mdp, pairs, beta, &logits, &loss)?.gradient;
        mean_left *= MEAN_DECAY;
        square_left *= SQUARE_DECAY;
        let done = step as f64 / adam.steps as f64;
        let size = adam.step_size * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        for i in 0..logits.len() {
            mean[i] = MEAN_DECAY * mean[i] + (1.0 - MEAN_DECAY) * gradient[i];
            square[i] = SQUARE_DECAY * square[i] + (1.0 - SQUARE_DECAY) * gradient[i].powi(2);
            let scale = (square[i] / (1.0 - square_left)).sqrt() + EPSILON;
            logits[i] -= size * mean[i] / (1.0 - mean_left) / scale;
        }
    }
    TabularPolicy::from_logits(mdp.tree().clone(), logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RewardPlacement;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn mdp() -> TabularMdp {
        TabularMdp::seeded(Tree::new(3, 2, 2).unwrap(), RewardPlacement::Dense, 3).unwrap()
    }

    #[test]
    fn comparisons_that_are_none_are_refused() {
        let tree = mdp().tree().clone();
        let pair = |chosen, rejected, weight| WeightedPair {
            chosen,
            rejected,
            weight,
        };
        let table = |pair| PairTable::new(tree.clone(), vec![pair]);
        assert!(matches!(
            table(pair(0, 2, 1.0)),
            Err(MdpError::NotComplete { .. })
        ));
        assert!(table(pair(2, 99, 1.0)).is_err());
        assert!(table(pair(2, 3, f64::NAN)).is_err());
        assert!(table(pair(2, 3, -1.0)).is_err());
        // Two equal completions leave an empty table.
        assert!(table(pair(2, 2, 1.0)).is_err());
        assert!(table(pair(2, 3, 4.0)).is_ok());
    }

    #[test]
    fn sampled_labels_come_at_the_population_rates() {
        let mdp = mdp();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let sampled = PairTable::sample(&mdp, mdp.reference(), 200_000, &mut rng).unwrap();
        let population = PairTable::population(&mdp, mdp.reference()).unwrap();
        // Six standard deviations of a share near 0.1 among 150 000 pairs.
        const SAMPLING: f64 = 5e-3;
        for pair in population.pairs() {
            let share = sampled
                .pairs()
                .iter()
                .find(|p| (p.chosen, p.rejected) == (pair.chosen, pair.rejected))
                .map_or(0.0, |p| p.weight);
            assert!((share - pair.weight).abs() < SAMPLING);
        }
    }

    #[test]
    fn turning_every_label_swaps_the_sides() {
        let mdp = mdp();
        let pairs = PairTable::population(&mdp, mdp.reference()).unwrap();
        let beta = Beta::new(0.5).unwrap();
        let turned = pairs.flipped(1.0).unwrap();
        let logits = vec![0.3, -0.1, 0.7, 0.0, 0.0, 1.0, -2.0, 0.1, 0.4];
        let a = margin_loss(&mdp, &turned, beta, &logits, dpo_loss).unwrap();
        let b = margin_loss(&mdp, &pairs, beta, &logits, |m| {
            let Slope { loss, slope } = dpo_loss(-m);
            Slope {
                loss,
                slope: -slope,
            }
        })
        .unwrap();
        assert!((a.loss - b.loss).abs() < 1e-14);
        assert!(pairs.flipped(1.5).is_err());
    }

    #[test]
    fn samples_never_take_an_impossible_token() {
        let tree = mdp().tree().clone();
        let row = [0.0, f64::NEG_INFINITY, f64::NEG_INFINITY];
        let sure = TabularPolicy::from_logps(tree, row.repeat(3)).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..100 {
            assert_eq!(sample_completion(&mdp(), &sure, &mut rng).unwrap(), 3);
        }
    }

    #[test]
    fn a_step_size_that_is_none_is_refused() {
        let mdp = mdp();
        let pairs = PairTable::population(&mdp, mdp.reference()).unwrap();
        let beta = Beta::new(0.5).unwrap();
        let adam = Adam {
            steps: 1,
            step_size: f64::NAN,
        };
        assert!(minimise_margin_loss(&mdp, &pairs, beta, &[0.0; 9], adam, dpo_loss).is_err());
        assert!(margin_loss(&mdp, &pairs, beta, &[f64::NAN; 9], dpo_loss).is_err());
    }

    proptest! {
        #[test]
        fn probabilities_of_all_rankings_sum_to_one(
            rewards in prop::array::uniform3(-50.0..50.0_f64)
        ) {
            let [a, b, c] = rewards;
            let orders = [[a, b, c], [a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]];
            let total: f64 = orders.iter().map(|r| plackett_luce(r)).sum();
            prop_assert!((total - 1.0).abs() < 1e-12);
            prop_assert!((plackett_luce(&[a, b]) - bradley_terry(a, b)).abs() < 1e-12);
        }

        #[test]
        fn each_loss_has_the_slope_of_its_value(margin in -20.0..20.0_f64, noise in 0.0..0.4) {
            let losses: [&dyn Fn(f64) -> Slope; 3] =
                [&dpo_loss, &conservative_dpo_loss(noise), &robust_dpo_loss(noise)];
            for loss in losses {
                let difference = (loss(margin + 1e-5).loss - loss(margin - 1e-5).loss) / 2e-5;
                prop_assert!((difference - loss(margin).slope).abs() < 1e-6);
            }
        }
    }
}
