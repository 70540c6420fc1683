//! Losses of the margin alone: chosen minus rejected score, times β.

use burn::tensor::{
    Tensor,
    activation::{log_sigmoid, relu, sigmoid},
};
use mdp_core::Beta;

use crate::logps::PairLogps;

/// The hinge loss of each margin, `max(0, 1 − m)`.
///
/// SLiC-HF, Zhao et al. (2023), arXiv 2305.10425, in the form of RSO, arXiv 2309.06657. Its
/// population optimum is not the exact one: margins stop at ±1.
pub fn hinge_loss(margins: Tensor<1>) -> Tensor<1> {
    relu(margins.neg().add_scalar(1.0))
}

/// The IPO loss of each pair, `(s_c / n_c − s_r / n_r − 1 / (2β))²`.
///
/// Equation 17 of Azar et al. (2023), arXiv 2310.12036, on scores averaged over tokens, which that
/// paper's experiments used though the equation does not show it. `mean_scores` are those averages.
/// Its population optimum is not the exact one: it fits `(2p − 1) / (2β)` for a preference `p`.
pub fn ipo_loss(mean_scores: &PairLogps, beta: Beta) -> Tensor<1> {
    let margins = mean_scores.chosen.clone() - mean_scores.rejected.clone();
    margins.sub_scalar(0.5 / beta.get()).square()
}

/// The EXO loss of each margin: `KL(q ‖ p)` of `q = (σ(m), σ(−m))` from the smoothed labels
/// `p = (1 − noise, noise)`.
///
/// Equation 16 of Ji et al. (2024), arXiv 2402.00856. `noise` lies strictly between 0 and 1; 1e-3 is
/// usual. With one label for a pair its population optimum is not the exact one: the margin of a
/// preference `p` becomes `(2p − 1) log((1 − noise) / noise)`.
pub fn exo_loss(margins: Tensor<1>, noise: f64) -> Tensor<1> {
    let side = |margins: Tensor<1>, label: f64| {
        let log_q = log_sigmoid(margins.clone());
        sigmoid(margins) * log_q.sub_scalar(label.ln())
    };
    side(margins.clone(), 1.0 - noise) + side(-margins, noise)
}

/// The robust loss of each margin: `(−(1 − noise) log σ(m) + noise log σ(−m)) / (1 − 2 noise)`.
///
/// rDPO, Chowdhury et al. (2024), arXiv 2403.00409. Its population optimum is the exact one if a
/// share `noise`, below one half, of the labels was turned, and not if they are clean; there is none
/// at all where a preference is surer than `1 − noise`.
pub fn robust_loss(margins: Tensor<1>, noise: f64) -> Tensor<1> {
    let kept = log_sigmoid(margins.clone()).mul_scalar(-(1.0 - noise));
    let turned = log_sigmoid(-margins).mul_scalar(noise);
    // A product, since the gradient of a division by a scalar is rounded to single precision.
    (kept + turned).mul_scalar(1.0 / (1.0 - 2.0 * noise))
}

/// The conservative loss of each margin: `−(1 − noise) log σ(m) − noise log σ(−m)`.
///
/// cDPO, equation 3 of Mitchell (2023), <https://ericmitchell.ai/cdpo.pdf>. For `noise` above 0 its
/// population optimum is not the exact one, with clean labels or with turned ones.
pub fn conservative_loss(margins: Tensor<1>, noise: f64) -> Tensor<1> {
    let kept = log_sigmoid(margins.clone()).mul_scalar(-(1.0 - noise));
    let turned = log_sigmoid(-margins).mul_scalar(-noise);
    kept + turned
}

/// The `DiscoPOP` loss of each margin: `(1 − w)(−log σ(m)) + w e^{−m}` with `w = σ(m / tau)`.
///
/// The log-ratio modulated loss, equation 5 of Lu et al. (2024), arXiv 2406.08414; `tau` is 0.05
/// there. Its population optimum is not the exact one: it is not convex, and has two valleys.
pub fn discopop_loss(margins: Tensor<1>, tau: f64) -> Tensor<1> {
    let scaled = margins.clone().mul_scalar(1.0 / tau);
    let logistic = -log_sigmoid(margins.clone()) * sigmoid(-scaled.clone());
    // In one exponent: w vanishes where the other factor overflows.
    logistic + (log_sigmoid(scaled) - margins).exp()
}
