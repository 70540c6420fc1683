//! Losses of single completions, each labelled desirable or not.

use burn::tensor::{Tensor, activation::sigmoid};
use mdp_core::Beta;
use serde::{Deserialize, Serialize};

use crate::LossError;
use crate::logps::PairLogps;

/// Completions with a label each.
#[derive(Clone, Debug)]
pub struct UnpairedBatch {
    /// `log π(y|x)`, `[batch]`, nats.
    pub policy: Tensor<1>,
    /// `log π_ref(y|x)`, `[batch]`, nats.
    pub reference: Tensor<1>,
    /// One where the completion is desirable, zero where it is not, `[batch]`.
    pub desirable: Tensor<1>,
}

impl UnpairedBatch {
    /// Both completions of each pair, the chosen ones desirable: chosen half first, `[2 · batch]`.
    pub fn from_pairs(policy: &PairLogps, reference: &PairLogps) -> Self {
        let join =
            |pair: &PairLogps| Tensor::cat(vec![pair.chosen.clone(), pair.rejected.clone()], 0);
        let desirable = vec![
            reference.chosen.ones_like(),
            reference.rejected.zeros_like(),
        ];
        Self {
            policy: join(policy),
            reference: join(reference),
            desirable: Tensor::cat(desirable, 0),
        }
    }
}

/// A loss of single completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnpairedLoss {
    /// [`kto_loss`].
    #[default]
    Kto,
    /// [`kto_loss`] with the estimate 0.
    ApoZeroUnpaired,
}

/// A loss of single completions and the weights of the two kinds; TRL's names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnpairedObjective {
    /// Which loss.
    pub loss: UnpairedLoss,
    /// Weight of desirable completions.
    pub desirable_weight: f64,
    /// Weight of the others.
    pub undesirable_weight: f64,
}

impl Default for UnpairedObjective {
    fn default() -> Self {
        Self {
            loss: UnpairedLoss::Kto,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        }
    }
}

impl UnpairedObjective {
    /// Checks the weights.
    ///
    /// # Errors
    ///
    /// [`LossError::Parameter`] if a weight is negative or not finite.
    pub fn check(&self) -> Result<(), LossError> {
        for (name, value) in [
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                let expected = "a finite number, at least 0";
                return Err(LossError::Parameter {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// Whether the loss reads an estimate of the KL, from [`kl_estimate`].
    pub fn needs_kl(&self) -> bool {
        self.loss == UnpairedLoss::Kto
    }

    /// The loss of each completion, `[batch]`; its mean is the loss of the batch.
    ///
    /// `kl` is `[1]`, and not read unless [`UnpairedObjective::needs_kl`].
    ///
    /// # Errors
    ///
    /// [`LossError::Shape`] if the tensors of the batch differ in length.
    pub fn losses(
        &self,
        batch: &UnpairedBatch,
        kl: Tensor<1>,
        beta: Beta,
    ) -> Result<Tensor<1>, LossError> {
        let expected = batch.policy.dims();
        for (what, got) in [
            ("reference logps", batch.reference.dims()),
            ("desirable labels", batch.desirable.dims()),
        ] {
            if got != expected {
                return Err(LossError::Shape {
                    what,
                    expected: expected.to_vec(),
                    got: got.to_vec(),
                });
            }
        }
        if kl.dims() != [1] {
            return Err(LossError::Shape {
                what: "KL estimate",
                expected: vec![1],
                got: kl.dims().to_vec(),
            });
        }
        let kl = match self.loss {
            UnpairedLoss::Kto => kl,
            UnpairedLoss::ApoZeroUnpaired => kl.zeros_like(),
        };
        let losses = kto_loss(batch, kl, beta);
        let desirable = batch.desirable.clone().mul_scalar(self.desirable_weight);
        let others = batch.desirable.clone().neg().add_scalar(1.0);
        Ok(losses * (desirable + others.mul_scalar(self.undesirable_weight)))
    }
}

/// The KTO loss of each completion: `1 − σ(β (ρ − kl))` if it is desirable, `1 − σ(β (kl − ρ))` if not.
///
/// Equation 7 of Ethayarajh et al. (2024), arXiv 2402.01306. `kl`, `[1]`, nats, is the batch's
/// [`kl_estimate`]. Its population optimum is not the exact one: each completion runs to one end or
/// the other by whether it is desirable more often than not.
pub fn kto_loss(batch: &UnpairedBatch, kl: Tensor<1>, beta: Beta) -> Tensor<1> {
    let rewards = (batch.policy.clone() - batch.reference.clone() - kl).mul_scalar(beta.get());
    let sign = batch.desirable.clone().mul_scalar(2.0).sub_scalar(1.0);
    sigmoid(-(rewards * sign))
}

/// The batch's estimate of `KL(π ‖ π_ref)`, `[1]`, nats: the mean log-ratio of completions that belong
/// to other prompts, at least 0. No gradient passes.
///
/// `policy` and `reference` hold the log-probability of completion `i − 1` after prompt `i`.
pub fn kl_estimate(policy: Tensor<1>, reference: Tensor<1>) -> Tensor<1> {
    (policy - reference).detach().mean().clamp_min(0.0)
}
