//! A policy reweighted by an action value at every token.

use mdp_core::{ActionValue, Beta, LogpRows, MdpError, TokenPolicy, log_sum_exp};

/// `π ∝ base exp(Q/β)`: value-guided decoding as a policy, so that every search runs on it.
///
/// With the reference as base and the exact action values in the KL form this *is* the optimal
/// policy. Any number per state may be added to Q without a change, so an advantage does as well.
///
/// # Examples
///
/// ```
/// use mdp_core::{Beta, RewardPlacement, TabularMdp, TokenPolicy, Tree, solve};
/// use search::ValueGuided;
///
/// let mdp = TabularMdp::seeded(Tree::new(3, 3, 2)?, RewardPlacement::Dense, 4)?;
/// let beta = Beta::new(0.5)?;
/// let solution = solve(&mdp, beta)?;
/// let guided = ValueGuided::new(mdp.reference(), solution.kl_form(), beta);
/// let optimum = solution.optimal_policy();
/// for (x, y) in guided.next_logps(&[&[0]])?.row(0).iter().zip(optimum.row(1)) {
///     assert!((x - y).abs() < 1e-12);
/// }
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ValueGuided<B, Q> {
    base: B,
    values: Q,
    beta: Beta,
}

impl<B, Q> ValueGuided<B, Q> {
    /// The base, the values in reward units, and the strength of the pull back to the base.
    pub fn new(base: B, values: Q, beta: Beta) -> Self {
        Self { base, values, beta }
    }
}

impl<B: TokenPolicy, Q: ActionValue> TokenPolicy for ValueGuided<B, Q> {
    fn vocab(&self) -> usize {
        self.base.vocab()
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let vocab = self.base.vocab();
        let mut rows = self.base.next_logps(states)?.into_values();
        let all: Vec<u32> = (0..vocab as u32).collect();
        let values = self
            .values
            .action_values(states, &vec![all.as_slice(); states.len()])?;
        if values.len() != rows.len() {
            return Err(MdpError::TableLength {
                table: "action values",
                expected: rows.len(),
                got: values.len(),
            });
        }
        let rows_and_values = rows.chunks_exact_mut(vocab).zip(values.chunks_exact(vocab));
        for ((row, values), state) in rows_and_values.zip(states) {
            for (action, (logp, value)) in row.iter_mut().zip(values).enumerate() {
                if !value.is_finite() {
                    return Err(MdpError::NotFinite {
                        table: "action value",
                        state: state.to_vec(),
                        action: action as u32,
                        value: *value,
                    });
                }
                *logp += value / self.beta.get();
            }
            let total = log_sum_exp(row);
            for logp in row {
                *logp -= total;
            }
        }
        LogpRows::new(vocab, rows)
    }
}
