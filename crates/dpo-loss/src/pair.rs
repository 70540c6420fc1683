use burn::tensor::Tensor;

use crate::LossError;
use crate::logps::{PairLogps, TokenLogps};

/// Per-token log-probabilities of the two completions of each pair, under one model.
#[derive(Clone, Debug)]
pub struct PairTokens {
    /// `[batch, seq]`.
    pub chosen: TokenLogps,
    /// `[batch, seq]`; `seq` may differ from that of the chosen side.
    pub rejected: TokenLogps,
}

/// One number for each token of the two completions of each pair.
#[derive(Clone, Debug)]
pub struct PairTable {
    /// `[batch, seq]`.
    pub chosen: Tensor<2>,
    /// `[batch, seq]`.
    pub rejected: Tensor<2>,
}

/// What is known of the reference.
#[derive(Clone, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one for each batch, beside tensors that are larger still; how large depends on the backends"
)]
pub enum ReferenceLogps {
    /// Nothing: enough for losses without a reference.
    Absent,
    /// Its log-probability of each completion. Make them with [`crate::Objectives::sums`], which
    /// knows of `ld_alpha`; they are used as they are.
    Sums(PairLogps),
    /// Its log-probability of each token.
    Tokens(PairTokens),
}

/// All that a preference loss is a function of, save β.
///
/// All tensors have one number type; with f64 tensors, losses are f64 throughout.
#[derive(Clone, Debug)]
pub struct PairBatch {
    /// Log-probabilities under the policy; gradients flow through these.
    pub policy: PairTokens,
    /// Log-probabilities under the reference.
    pub reference: ReferenceLogps,
    /// What only some losses read.
    pub inputs: PairInputs,
}

/// Inputs that only some losses read; [`crate::Objectives::needs`] says which.
#[derive(Clone, Debug, Default)]
pub struct PairInputs {
    /// `log Σ_v π(v|s_t)²` of the policy, from [`crate::log_sum_sq_probs`]; for WPO.
    pub log_sum_sq_probs: Option<PairTable>,
    /// `KL(π_ref(·|s_t) ‖ π(·|s_t))`, nats, from [`crate::position_kls`] with its gradient; for TDPO.
    pub position_kls: Option<PairTable>,
    /// A weight for each token, such as [`crate::contrastive_weights`]; for `token_weighted`.
    pub token_weights: Option<PairTable>,
    /// One at the tokens of the step that was compared, zero elsewhere; for `step`.
    pub step_mask: Option<PairTable>,
}

impl PairTokens {
    /// Splits a batch whose first half are the chosen completions and whose second half, in the
    /// same order, are the rejected ones.
    ///
    /// # Panics
    ///
    /// If the batch is odd.
    pub fn from_halves(table: TokenLogps) -> Self {
        let values = PairTable::from_halves(table.values);
        let mask = PairTable::from_halves(table.mask);
        Self {
            chosen: TokenLogps {
                values: values.chosen,
                mask: mask.chosen,
            },
            rejected: TokenLogps {
                values: values.rejected,
                mask: mask.rejected,
            },
        }
    }

    /// `log π(y|x)` of each completion, nats.
    pub fn sums(&self) -> PairLogps {
        PairLogps {
            chosen: self.chosen.sums(),
            rejected: self.rejected.sums(),
        }
    }

    /// Number of tokens of each completion.
    pub fn counts(&self) -> PairLogps {
        PairLogps {
            chosen: self.chosen.counts(),
            rejected: self.rejected.counts(),
        }
    }

    /// `log π(y|x)` where tokens past the length of the shorter completion count `alpha` each.
    ///
    /// `Σ_{t ≤ n} + alpha · Σ_{t > n}` with `n = min(n_c, n_r)`: LD-DPO, arXiv 2409.06411. At
    /// `alpha = 1` these are the [`PairTokens::sums`].
    pub fn length_desensitised_sums(&self, alpha: f64) -> PairLogps {
        let counts = self.counts();
        let shorter = smaller(counts.chosen, counts.rejected);
        let sum = |table: &TokenLogps| {
            let [batch, seq] = table.values.dims();
            let position = table.mask.clone().cumsum(1);
            let limit = shorter.clone().reshape([batch, 1]).expand([batch, seq]);
            let past = position.greater(limit);
            let weights = table.values.ones_like().mask_fill(past, alpha).detach();
            row_sums(table.values.clone() * weights)
        };
        PairLogps {
            chosen: sum(&self.chosen),
            rejected: sum(&self.rejected),
        }
    }

    /// `log π(a|s)` minus the reference's, token by token.
    pub(crate) fn minus(&self, reference: &Self) -> PairTable {
        PairTable {
            chosen: self.chosen.values.clone() - reference.chosen.values.clone(),
            rejected: self.rejected.values.clone() - reference.rejected.values.clone(),
        }
    }
}

impl PairTable {
    /// Splits a table `[2 · batch, seq]`, chosen half first.
    ///
    /// # Panics
    ///
    /// If the number of rows is odd.
    pub fn from_halves(table: Tensor<2>) -> Self {
        let [rows, _] = table.dims();
        assert_eq!(rows % 2, 0, "chosen and rejected halves are of one size");
        Self {
            chosen: table.clone().narrow(0, 0, rows / 2),
            rejected: table.narrow(0, rows / 2, rows / 2),
        }
    }

    /// Sums over tokens, `[batch]` each.
    pub fn sums(&self) -> PairLogps {
        PairLogps {
            chosen: row_sums(self.chosen.clone()),
            rejected: row_sums(self.rejected.clone()),
        }
    }

    pub(crate) fn times(&self, other: &Self) -> Self {
        Self {
            chosen: self.chosen.clone() * other.chosen.clone(),
            rejected: self.rejected.clone() * other.rejected.clone(),
        }
    }
}

impl From<PairLogps> for ReferenceLogps {
    fn from(sums: PairLogps) -> Self {
        Self::Sums(sums)
    }
}

impl From<PairTokens> for ReferenceLogps {
    fn from(tokens: PairTokens) -> Self {
        Self::Tokens(tokens)
    }
}

impl PairBatch {
    /// A batch without the inputs that only some losses read.
    pub fn new(policy: PairTokens, reference: impl Into<ReferenceLogps>) -> Self {
        Self {
            policy,
            reference: reference.into(),
            inputs: PairInputs::default(),
        }
    }

    /// Number of pairs.
    pub fn n_pairs(&self) -> usize {
        self.policy.chosen.values.dims()[0]
    }

    /// Checks that shapes agree: broadcasting would make a wrong loss of tensors that do not.
    pub(crate) fn check(&self) -> Result<(), LossError> {
        let fits = |what, got: &[usize], expected: &[usize]| {
            if got == expected {
                Ok(())
            } else {
                Err(LossError::Shape {
                    what,
                    expected: expected.to_vec(),
                    got: got.to_vec(),
                })
            }
        };
        let chosen = self.policy.chosen.values.dims();
        let rejected = self.policy.rejected.values.dims();
        fits("rejected policy logps", &rejected[..1], &chosen[..1])?;
        fits("chosen mask", &self.policy.chosen.mask.dims(), &chosen)?;
        fits(
            "rejected mask",
            &self.policy.rejected.mask.dims(),
            &rejected,
        )?;
        match &self.reference {
            ReferenceLogps::Absent => {}
            ReferenceLogps::Sums(sums) => {
                fits("chosen reference logps", &sums.chosen.dims(), &chosen[..1])?;
                fits(
                    "rejected reference logps",
                    &sums.rejected.dims(),
                    &chosen[..1],
                )?;
            }
            ReferenceLogps::Tokens(table) => {
                fits(
                    "chosen reference logps",
                    &table.chosen.values.dims(),
                    &chosen,
                )?;
                fits(
                    "rejected reference logps",
                    &table.rejected.values.dims(),
                    &rejected,
                )?;
            }
        }
        let inputs = &self.inputs;
        for (what, table) in [
            (
                "log sums of squared probabilities",
                &inputs.log_sum_sq_probs,
            ),
            ("position KLs", &inputs.position_kls),
            ("token weights", &inputs.token_weights),
            ("step mask", &inputs.step_mask),
        ] {
            if let Some(table) = table {
                fits(what, &table.chosen.dims(), &chosen)?;
                fits(what, &table.rejected.dims(), &rejected)?;
            }
        }
        Ok(())
    }
}

/// Sums over the second dimension, `[batch]`.
pub(crate) fn row_sums(table: Tensor<2>) -> Tensor<1> {
    let [batch, _] = table.dims();
    table.sum_dim(1).reshape([batch])
}

/// The smaller of each two numbers.
fn smaller(a: Tensor<1>, b: Tensor<1>) -> Tensor<1> {
    let second = b.clone().lower(a.clone());
    a.mask_where(second, b)
}
