//! Losses without a reference: of the policy's own likelihood.

use burn::tensor::{Tensor, activation::log_sigmoid};
use mdp_core::Beta;

use crate::logps::{PairLogps, TokenLogps};
use crate::margin::conservative_loss;
use crate::pair::PairTokens;

/// Supervised fine-tuning on the chosen completions, shared out over the pairs.
///
/// The mean over the batch is `−mean log π(a|s)` over all of its chosen tokens, so a long completion
/// weighs more: a token mean and not a pair mean. The value of pair `i` is
/// `−batch · L_c(i) / n_tokens`. Its population optimum is the distribution of chosen completions,
/// which is not the exact optimum.
pub fn sft_loss(chosen: &TokenLogps) -> Tensor<1> {
    let [batch, _] = chosen.values.dims();
    let n_tokens = chosen.mask.clone().sum().clamp_min(1.0).detach();
    -chosen.sums().mul_scalar(batch as f64) / n_tokens
}

/// `log π(y|x)` per token of each completion.
fn means(policy: &PairTokens) -> PairLogps {
    let (sums, counts) = (policy.sums(), policy.counts());
    PairLogps {
        chosen: sums.chosen / counts.chosen.clamp_min(1.0),
        rejected: sums.rejected / counts.rejected.clamp_min(1.0),
    }
}

/// The `SimPO` loss of each pair: `−log σ(β L_c / n_c − β L_r / n_r − gamma)`.
///
/// Equation 6 of Meng et al. (2024), arXiv 2405.14734, which uses β from 2 and `gamma` from 0.3 up;
/// `noise` mixes in the other label as TRL's CPO trainer does. Its population optimum is not the
/// exact one: there is no reference in it, and length divides.
pub fn simpo_loss(policy: &PairTokens, beta: Beta, gamma: f64, noise: f64) -> Tensor<1> {
    let means = means(policy);
    let margins = (means.chosen - means.rejected).mul_scalar(beta.get());
    conservative_loss(margins.sub_scalar(gamma), noise)
}

/// Largest mean log-probability whose odds are told from infinity.
const SUREST: f64 = -1e-7;

/// The ORPO loss of each pair: `sft − λ log σ(log odds(y_c) − log odds(y_r))`, where
/// `odds = P / (1 − P)`, `log P = L / n` and λ is β.
///
/// Equations 6 and 7 of Hong et al. (2024), arXiv 2403.07691. The [`sft_loss`] in it is over the
/// completion; TRL's experimental trainer counts the prompt's tokens in that term as well. Its
/// population optimum is not the exact one: there is no reference in it.
pub fn orpo_loss(policy: &PairTokens, beta: Beta) -> Tensor<1> {
    sft_loss(&policy.chosen) + orpo_odds_loss(policy).mul_scalar(beta.get())
}

/// The odds-ratio term of [`orpo_loss`], without λ.
pub(crate) fn orpo_odds_loss(policy: &PairTokens) -> Tensor<1> {
    let means = means(policy);
    -log_sigmoid(log_odds(means.chosen) - log_odds(means.rejected))
}

/// `log(e^x / (1 − e^x))` for x below 0.
fn log_odds(logp: Tensor<1>) -> Tensor<1> {
    let logp = logp.clamp_max(SUREST);
    // 1 − e^x = tanh(−x/2) (1 + e^x): no digits cancel where x is near 0.
    let log_rest = logp.clone().mul_scalar(-0.5).tanh().log() + logp.clone().exp().log1p();
    logp - log_rest
}

/// The CPO loss of each pair: `−log σ(β (L_c − L_r)) + alpha · sft`.
///
/// Xu et al. (2024), arXiv 2401.08417, whose equation 3 is the first term; `noise` mixes in the other
/// label as TRL's trainer does, and `alpha` is its `cpo_alpha`, 1 in the paper. Its population
/// optimum is not the exact one: there is no reference in it.
pub fn cpo_loss(
    sums: &PairLogps,
    chosen: &TokenLogps,
    beta: Beta,
    alpha: f64,
    noise: f64,
) -> Tensor<1> {
    let margins = (sums.chosen.clone() - sums.rejected.clone()).mul_scalar(beta.get());
    conservative_loss(margins, noise) + sft_loss(chosen).mul_scalar(alpha)
}

/// The DPO loss of each pair with the uniform reference: `−log σ(β (L_c − L_r))`.
///
/// Rafailov et al. (2023), arXiv 2305.18290, equation 7, with a reference that gives all completions
/// one probability. Its population optimum is exact for that reference and not for another.
pub fn reference_free_loss(sums: &PairLogps, beta: Beta) -> Tensor<1> {
    -log_sigmoid((sums.chosen.clone() - sums.rejected.clone()).mul_scalar(beta.get()))
}
