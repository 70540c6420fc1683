//! Losses that see tokens, not sums alone.

use burn::tensor::{Tensor, activation::log_sigmoid};
use mdp_core::Beta;

use crate::logps::{PairLogps, TokenLogps};
use crate::pair::PairTable;

/// The TDPO₁ loss of each pair: `−log σ(β (ρ_c − ρ_r) − β (K_r − K_c))`, where `K` is the sum over
/// positions of `KL(π_ref(·|s_t) ‖ π(·|s_t))`.
///
/// Zeng et al. (2024), arXiv 2404.11999. `position_kls` carries gradients, in nats. Since
/// `β KL(π_ref‖π) = −E_{π_ref}[r̂]` at a state, this compares sums of `r̂ − E_{π_ref}[r̂]`: advantages
/// under the reference's own evaluation. Its population optimum is `π_ref exp(A_ref / β)`, one step
/// of improvement on the reference, and is the exact one only where one token ends a completion.
pub fn tdpo1_loss(logratios: &PairLogps, position_kls: &PairTable, beta: Beta) -> Tensor<1> {
    let kls = position_kls.sums();
    let margins =
        (logratios.chosen.clone() - logratios.rejected.clone()) - (kls.rejected - kls.chosen);
    -log_sigmoid(margins.mul_scalar(beta.get()))
}

/// The TDPO₂ loss of each pair: `−log σ(β (ρ_c − ρ_r) − alpha β (K_r − sg K_c))`, where no gradient
/// passes through the chosen side's KL.
///
/// Zeng et al. (2024), arXiv 2404.11999, which uses `alpha = 0.5`. The stopped gradient makes this no
/// gradient of a function; where it rests is not the exact optimum.
pub fn tdpo2_loss(
    logratios: &PairLogps,
    position_kls: &PairTable,
    beta: Beta,
    alpha: f64,
) -> Tensor<1> {
    let kls = position_kls.sums();
    let offset = (kls.rejected - kls.chosen.detach()).mul_scalar(alpha);
    let margins = logratios.chosen.clone() - logratios.rejected.clone() - offset;
    -log_sigmoid(margins.mul_scalar(beta.get()))
}

/// The DPO loss of each pair with a weight for each token:
/// `−log σ(β (Σ_t w_t ρ_t over chosen − the same over rejected))`.
///
/// The form of TIS-DPO, Liu et al. (2024), arXiv 2410.04350, without its offset by weighted KLs. With
/// all weights 1 it is the DPO loss, and its population optimum the exact one; with others it is not.
pub fn token_weighted_loss(logratios: &PairTable, weights: &PairTable, beta: Beta) -> Tensor<1> {
    let sums = logratios.times(weights).sums();
    -log_sigmoid((sums.chosen - sums.rejected).mul_scalar(beta.get()))
}

/// The DPO loss of the step at which two completions were compared:
/// `−log σ(β (ρ of the chosen step − ρ of the rejected step))`.
///
/// Step-DPO, Lai et al. (2024), arXiv 2406.18629. The masks are one at the tokens of that step.
/// Both sides share what comes before it, which cancels; what comes after is not judged. Its
/// population optimum is the exact one if labels follow the soft action values of steps, and not if
/// they follow the returns of whole completions.
pub fn step_loss(logratios: &PairTable, step_mask: &PairTable, beta: Beta) -> Tensor<1> {
    token_weighted_loss(logratios, step_mask, beta)
}

/// How a pair of models makes weights of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contrast {
    /// Exponent of the ratio: above 0 for chosen completions, below 0 for rejected ones.
    pub scale: f64,
    /// Least log-ratio that is told apart, nats.
    pub low: f64,
    /// Largest log-ratio that is told apart, nats.
    pub high: f64,
}

/// A weight for each token from a model of good completions and one of bad ones, `[batch, seq]`:
/// `exp(scale · clamp(log π₊(a|s) − log π₋(a|s), low, high))`, zero outside the completion.
///
/// TIS-DPO, Liu et al. (2024), arXiv 2410.04350. No gradient passes.
pub fn contrastive_weights(
    positive: &TokenLogps,
    negative: &TokenLogps,
    contrast: Contrast,
) -> Tensor<2> {
    let ratios = (positive.values.clone() - negative.values.clone()).detach();
    let weights = ratios
        .clamp(contrast.low, contrast.high)
        .mul_scalar(contrast.scale)
        .exp();
    weights * positive.mask.clone()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn contrastive_weights_follow_the_ratio_within_bounds_and_vanish_outside() {
        let device = Device::default();
        let mask = Tensor::from_floats([[1.0, 1.0, 1.0, 0.0]], &device);
        let table = |values: [f32; 4]| TokenLogps {
            values: Tensor::from_floats([values], &device),
            mask: mask.clone(),
        };
        let positive = table([-1.0, -1.0, -9.0, 0.0]);
        let negative = table([-2.0, -9.0, -1.0, 0.0]);
        let contrast = |scale| Contrast {
            scale,
            low: -0.5,
            high: 1.5,
        };
        let weights = |scale| -> Vec<f32> {
            contrastive_weights(&positive, &negative, contrast(scale))
                .try_into_vec_as()
                .unwrap()
        };
        // Ratios 1, 8 held at 1.5, and -8 held at -0.5.
        for scale in [1.0_f32, -1.0] {
            let expected = [scale.exp(), (1.5 * scale).exp(), (-0.5 * scale).exp(), 0.0];
            for (got, expected) in weights(f64::from(scale)).iter().zip(expected) {
                assert!((got - expected).abs() < 1e-6);
            }
        }
    }
}
