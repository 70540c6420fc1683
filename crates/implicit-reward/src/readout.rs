//! Everything that two models' logits say of a token.

use burn::tensor::Tensor;
use mdp_core::Beta;
use rayon::prelude::*;

use crate::error::ReadoutError;
use crate::row::RowPair;

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// One token as a policy and its reference see it, with the distributions it was drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenReadout {
    /// The token.
    pub id: u32,
    /// `log π(a|s)`, nats.
    pub policy_logp: f64,
    /// `log π_ref(a|s)`, nats.
    pub reference_logp: f64,
    /// Entropy of `π(·|s)`, nats.
    pub policy_entropy: f64,
    /// Entropy of `π_ref(·|s)`, nats.
    pub reference_entropy: f64,
    /// `KL(π(·|s) ‖ π_ref(·|s))`, nats: what the policy pays here on its own samples.
    pub policy_kl: f64,
    /// `KL(π_ref(·|s) ‖ π(·|s))`, nats: `−1/β` times the reference's mean implicit reward here.
    pub reference_kl: f64,
    /// The policy's most likely tokens here, most likely first.
    pub candidates: Vec<Candidate>,
}

/// A token that might have stood at a position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// `log π(a|s)`, nats.
    pub policy_logp: f64,
    /// `log π_ref(a|s)`, nats.
    pub reference_logp: f64,
}

impl Candidate {
    /// `Q(s,a) − V(s)` in the KL form, reward units: `β log(π/π_ref)(a|s)`, equation 10.
    ///
    /// Soft action values are known up to `V(s)`, which is the same for all candidates of a
    /// position: their differences are differences of Q.
    pub fn advantage(&self, beta: Beta) -> f64 {
        beta.get() * (self.policy_logp - self.reference_logp)
    }

    /// `Q(s,a) − V(s)` in the `MaxEnt` form of the paper's equation 5, reward units: `β log π(a|s)`.
    ///
    /// That Q holds `β log π_ref` too; V is the same in both forms. Candidates come in its order.
    pub fn max_ent_advantage(&self, beta: Beta) -> f64 {
        beta.get() * self.policy_logp
    }

    /// `Q(s,a) − V(s_0) + Σ_{i<t} r_i` in the KL form, reward units, where `before` is
    /// [`value_differences`](crate::value_differences) at the candidate's state: comparable between
    /// all positions of one prompt's completions.
    pub fn action_value(&self, beta: Beta, before: f64) -> f64 {
        before + self.advantage(beta)
    }
}

impl TokenReadout {
    /// The token that stands there, as a candidate.
    pub fn chosen(&self) -> Candidate {
        Candidate {
            id: self.id,
            policy_logp: self.policy_logp,
            reference_logp: self.reference_logp,
        }
    }

    /// `β log(π/π_ref)(a|s)`, reward units, equation 11: the advantage in the KL form.
    pub fn implicit_reward(&self, beta: Beta) -> f64 {
        self.chosen().advantage(beta)
    }

    /// `β log π(a|s)`, reward units, equation 5: the advantage in the `MaxEnt` form.
    pub fn max_ent_advantage(&self, beta: Beta) -> f64 {
        self.chosen().max_ent_advantage(beta)
    }
}

/// Reads each token of `targets`, `[rows]`, off the logits that predict it, `[rows, vocab]` each,
/// with the `n_candidates` most likely tokens of each row (all, if the vocabulary has no more).
///
/// The logits come to the host and are gone when this returns: give it a tile of a long text at a
/// time. Sums run in f64 over blocks of f32, so that figures keep six digits at any vocabulary.
///
/// # Errors
///
/// A logit that is not finite, by its row and token id; or a device that fails.
///
/// # Panics
///
/// If the shapes differ, or a target lies outside the vocabulary.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use implicit_reward::{Beta, read_logits};
///
/// let device = Device::default();
/// // Probabilities 3/4, 1/4 under the policy and 1/2, 1/2 under the reference.
/// let policy = Tensor::<2>::from_floats([[3f32.ln(), 0.0]], &device);
/// let reference = Tensor::<2>::from_floats([[7.0, 7.0]], &device);
/// let readout = &read_logits(policy, reference, &[0], 2)?[0];
/// let beta = Beta::new(0.1).unwrap();
/// assert!((readout.implicit_reward(beta) - 0.1 * 1.5f64.ln()).abs() < 1e-7);
/// assert!((readout.candidates[1].advantage(beta) - 0.1 * 0.5f64.ln()).abs() < 1e-7);
/// assert!((readout.reference_entropy - 2f64.ln()).abs() < 1e-6);
/// # Ok::<(), implicit_reward::ReadoutError>(())
/// ```
pub fn read_logits(
    policy: Tensor<2>,
    reference: Tensor<2>,
    targets: &[u32],
    n_candidates: usize,
) -> Result<Vec<TokenReadout>, ReadoutError> {
    let shape = policy.dims();
    assert_eq!(shape, reference.dims(), "two models of one vocabulary");
    assert_eq!(shape[0], targets.len(), "one target for each row of logits");
    let failed = |error: &dyn std::fmt::Debug| ReadoutError::Device(format!("{error:?}"));
    let host = |logits: Tensor<2>| {
        let data = logits.try_into_data_as::<f32>();
        data.map_err(|error| failed(&error))
    };
    let (policy, reference) = (host(policy)?, host(reference)?);
    // As slices: a vector of their own would be one more copy of the logits.
    let policy = policy.as_slice::<f32>().map_err(|error| failed(&error))?;
    let reference = reference
        .as_slice::<f32>()
        .map_err(|error| failed(&error))?;
    read_rows(policy, reference, targets, n_candidates)
}

/// [`read_logits`] of rows that lie one after the other in memory, `[rows * vocab]` each.
///
/// # Errors
///
/// A logit that is not finite, by its row and token id.
///
/// # Panics
///
/// If the two differ in length, are no whole rows, or a target lies outside the vocabulary.
pub fn read_rows(
    policy: &[f32],
    reference: &[f32],
    targets: &[u32],
    n_candidates: usize,
) -> Result<Vec<TokenReadout>, ReadoutError> {
    assert_eq!(
        policy.len(),
        reference.len(),
        "two models of one vocabulary"
    );
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    let vocab = policy.len() / targets.len();
    assert_eq!(
        policy.len(),
        vocab * targets.len(),
        "one whole row of logits for each target"
    );
    let rows = targets
        .par_iter()
        .zip(policy.par_chunks_exact(vocab))
        .zip(reference.par_chunks_exact(vocab))
        .enumerate()
        .with_min_len(ROWS);
    rows.map(|(row, ((&id, policy), reference))| {
        read_row(policy, reference, id, n_candidates).ok_or_else(|| bad(row, policy, reference))
    })
    .collect()
}

fn read_row(
    policy: &[f32],
    reference: &[f32],
    id: u32,
    n_candidates: usize,
) -> Option<TokenReadout> {
    let pair = RowPair::read(policy, reference, n_candidates)?;
    let candidate = |id: u32| Candidate {
        id,
        policy_logp: f64::from(policy[id as usize]) - pair.policy_total,
        reference_logp: f64::from(reference[id as usize]) - pair.reference_total,
    };
    let own = candidate(id);
    Some(TokenReadout {
        id,
        policy_logp: own.policy_logp,
        reference_logp: own.reference_logp,
        policy_entropy: pair.policy_entropy,
        reference_entropy: pair.reference_entropy,
        policy_kl: pair.policy_kl,
        reference_kl: pair.reference_kl,
        candidates: pair.likeliest.into_iter().map(candidate).collect(),
    })
}

/// The first logit that is not finite.
fn bad(row: usize, policy: &[f32], reference: &[f32]) -> ReadoutError {
    let find = |model: &'static str, logits: &[f32]| {
        let id = logits.iter().position(|x| !x.is_finite())?;
        Some(ReadoutError::NotFinite {
            model,
            row,
            id,
            value: logits[id],
        })
    };
    find("policy", policy)
        .or_else(|| find("reference", reference))
        .unwrap_or_else(|| ReadoutError::Device(format!("logits of row {row} are out of range")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_logit_that_is_no_number_is_named_with_its_row_and_token() {
        let fine = [0.0; 6];
        let bad = [0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0];
        let message = |p: &[f32], q: &[f32]| read_rows(p, q, &[0, 0], 1).unwrap_err().to_string();
        let expected = "token 1: expected finite logits of the policy, got NaN for token id 1";
        assert_eq!(message(&bad, &fine), expected);
        assert!(message(&fine, &bad).contains("of the reference"));
    }

    #[test]
    fn no_rows_read_as_nothing_and_no_candidates_may_be_asked_for() {
        assert!(read_rows(&[], &[], &[], 3).unwrap().is_empty());
        let readout = &read_rows(&[1.0, 2.0], &[0.0, 0.0], &[1], 0).unwrap()[0];
        assert!(readout.candidates.is_empty());
    }

    proptest! {
        #[test]
        fn candidates_are_the_largest_in_order(
            row in prop::collection::vec((-40i32..40).prop_map(|x| x as f32 * 0.5), 1..90),
            n in 0usize..12,
        ) {
            let mut expected: Vec<u32> = (0..row.len() as u32).collect();
            // Stable: of equals the lowest id stays first.
            expected.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
            expected.truncate(n);
            prop_assert_eq!(RowPair::read(&row, &row, n).unwrap().likeliest, expected);
        }

        #[test]
        fn swapping_the_models_negates_rewards_and_swaps_the_rest(
            rows in prop::collection::vec((-8f32..8.0, -8f32..8.0), 2..40), pick in 0usize..40,
        ) {
            let p: Vec<f32> = rows.iter().map(|row| row.0).collect();
            let q: Vec<f32> = rows.iter().map(|row| row.1).collect();
            let target = [(pick % rows.len()) as u32];
            let beta = Beta::new(0.3).unwrap();
            let one = &read_rows(&p, &q, &target, 0).unwrap()[0];
            let two = &read_rows(&q, &p, &target, 0).unwrap()[0];
            prop_assert!((one.implicit_reward(beta) + two.implicit_reward(beta)).abs() < 1e-9);
            prop_assert!((one.policy_kl - two.reference_kl).abs() < 1e-9);
            prop_assert!((one.policy_entropy - two.reference_entropy).abs() < 1e-9);
        }

        #[test]
        fn the_references_mean_reward_is_its_divergence(
            rows in prop::collection::vec((-5f32..5.0, -5f32..5.0), 2..40),
        ) {
            // Equation 16, over all candidates of a row.
            let p: Vec<f32> = rows.iter().map(|row| row.0).collect();
            let q: Vec<f32> = rows.iter().map(|row| row.1).collect();
            let beta = Beta::new(0.5).unwrap();
            let readout = &read_rows(&p, &q, &[0], rows.len()).unwrap()[0];
            let mean = |weight: &dyn Fn(&Candidate) -> f64| -> f64 {
                let terms = readout.candidates.iter().map(|c| weight(c).exp() * c.advantage(beta));
                terms.sum()
            };
            let reference = mean(&|c| c.reference_logp);
            let policy = mean(&|c| c.policy_logp);
            // f32 terms of up to ten nats.
            prop_assert!((reference + beta.get() * readout.reference_kl).abs() < 5e-6);
            prop_assert!((policy - beta.get() * readout.policy_kl).abs() < 5e-6);
        }
    }
}
