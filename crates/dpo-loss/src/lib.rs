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

mod logps;
mod sigmoid;
mod stats;

pub use logps::{PairLogps, TokenLogps, token_logps};
pub use mdp_core::Beta;
pub use sigmoid::dpo_loss;
pub use stats::{TokenStats, token_stats};
