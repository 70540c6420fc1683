//! Log-probabilities of completions, and preference losses over them.
//!
//! Everything here is a pure function of logits or of log-probabilities; no model is known. The
//! shared primitive is the log-probability of each token, [`token_logps`]: a preference loss is
//! made of its sums over completion tokens ([`TokenLogps::sums`]), a per-token reward of its
//! differences.
//!
//! | What | Where |
//! |---|---|
//! | log π(a\|s) of given tokens | [`token_logps`] |
//! | a batch of completions, padded | [`TokenLogps`] |
//! | summed logps of chosen and rejected | [`PairLogps`] |
//! | the DPO loss | [`dpo_loss`] |
//! | all losses of a batch of pairs, by name | [`Objectives`], [`LossConfig`], [`PairBatch`] |
//! | each of them as a function | [`Objective`] lists them |
//! | other divergences from the reference | [`Divergence`] |
//! | labels on single completions | [`UnpairedObjective`], [`kto_loss`] |
//! | per-position KL, squared probabilities | [`position_kls`], [`log_sum_sq_probs`] |
//! | entropy, mean logit, top-1 hits | [`token_stats`] |
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use dpo_loss::{Beta, PairLogps, dpo_loss};
//!
//! let device = Device::default();
//! let logps = |chosen: f32, rejected: f32| PairLogps {
//!     chosen: Tensor::from_floats([chosen], &device),
//!     rejected: Tensor::from_floats([rejected], &device),
//! };
//! // Log-ratios are -3 + 4 = 1 and -5 + 4 = -1; with beta 0.5 the margin is 1 reward unit.
//! let loss = dpo_loss(&logps(-3.0, -5.0), &logps(-4.0, -4.0), Beta::new(0.5).unwrap());
//! let loss: f32 = loss.into_scalar();
//! assert!((loss - 0.313_262).abs() < 1e-6); // -ln sigmoid(1)
//! ```

mod divergence;
mod error;
mod likelihood;
mod logps;
mod margin;
mod objective;
mod objectives;
mod pair;
mod pointwise;
mod sigmoid;
mod sorted;
mod stats;
mod token_level;
mod unpaired;

pub use divergence::Divergence;
pub use error::LossError;
pub use likelihood::{cpo_loss, orpo_loss, reference_free_loss, sft_loss, simpo_loss};
pub use logps::{PairLogps, TokenLogps, token_logps};
pub use margin::{conservative_loss, discopop_loss, exo_loss, hinge_loss, ipo_loss, robust_loss};
pub use mdp_core::Beta;
pub use objective::{Objective, Optimum, ReferenceNeed};
pub use objectives::{LossConfig, Needs, Objectives, likelihood_weights};
pub use pair::{PairBatch, PairInputs, PairTable, PairTokens, ReferenceLogps};
pub use pointwise::{
    apo_down_loss, apo_zero_loss, bco_loss, dpo_positive_loss, nca_loss, sppo_loss,
};
pub use sigmoid::dpo_loss;
pub use sorted::{aot_loss, aot_unpaired_loss};
pub use stats::{TokenStats, log_sum_sq_probs, position_kls, token_stats};
pub use token_level::{
    Contrast, contrastive_weights, step_loss, tdpo1_loss, tdpo2_loss, token_weighted_loss,
};
pub use unpaired::{UnpairedBatch, UnpairedLoss, UnpairedObjective, kl_estimate, kto_loss};
