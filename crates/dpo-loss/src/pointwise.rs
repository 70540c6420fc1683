//! Losses of the two log-ratios of a pair that are no function of their difference.

use burn::tensor::{
    Tensor,
    activation::{log_sigmoid, relu, sigmoid},
};
use mdp_core::Beta;

use crate::logps::PairLogps;

fn rewards(logratios: &PairLogps, beta: Beta) -> (Tensor<1>, Tensor<1>) {
    let scaled = |ratios: &Tensor<1>| ratios.clone().mul_scalar(beta.get());
    (scaled(&logratios.chosen), scaled(&logratios.rejected))
}

/// The NCA loss of each pair: `−log σ(r_c) − ½ log σ(−r_c) − ½ log σ(−r_r)` with rewards `r = β ρ`.
///
/// Chen et al. (2024), arXiv 2402.05369, for two completions of which one is best. Its population
/// optimum is not the exact one: `e^r` tends to twice the chance of being chosen.
pub fn nca_loss(logratios: &PairLogps, beta: Beta) -> Tensor<1> {
    let (chosen, rejected) = rewards(logratios, beta);
    let pushed_down = (log_sigmoid(-chosen.clone()) + log_sigmoid(-rejected)).mul_scalar(0.5);
    -log_sigmoid(chosen) - pushed_down
}

/// The BCO loss of each pair: `−log σ(r_c) − log σ(−r_r)` with rewards `r = β ρ`.
///
/// Jung et al. (2024), arXiv 2404.04656, without the paper's running mean of rewards, as in TRL
/// 1.16. Its population optimum is not the exact one: `r` tends to the log-odds of being chosen.
pub fn bco_loss(logratios: &PairLogps, beta: Beta) -> Tensor<1> {
    let (chosen, rejected) = rewards(logratios, beta);
    -log_sigmoid(chosen) - log_sigmoid(-rejected)
}

/// The SPPO loss of each pair with hard labels: `(ρ_c − 1/(2β))² + (ρ_r + 1/(2β))²`.
///
/// Equation 4.7 of Wu et al. (2024), arXiv 2405.00675, with probability 1 for the chosen completion.
/// Its population optimum is not the exact one: `β ρ` tends to the win rate less one half.
pub fn sppo_loss(logratios: &PairLogps, beta: Beta) -> Tensor<1> {
    let half = 0.5 / beta.get();
    let chosen = logratios.chosen.clone().sub_scalar(half).square();
    chosen + logratios.rejected.clone().add_scalar(half).square()
}

/// The APO-zero loss of each pair: `1 − σ(r_c) + σ(r_r)` with rewards `r = β ρ`.
///
/// Equation 7 of D'Oosterlinck et al. (2024), arXiv 2408.06266, for chosen completions better than
/// the policy's own. Its population optimum is not the exact one; there may be none.
pub fn apo_zero_loss(logratios: &PairLogps, beta: Beta) -> Tensor<1> {
    let (chosen, rejected) = rewards(logratios, beta);
    sigmoid(-chosen) + sigmoid(rejected)
}

/// The APO-down loss of each pair: `σ(r_c) + 1 − σ(r_c − r_r)` with rewards `r = β ρ`.
///
/// Equation 8 of D'Oosterlinck et al. (2024), arXiv 2408.06266, for chosen completions worse than
/// the policy's own. Its population optimum is not the exact one; there may be none.
pub fn apo_down_loss(logratios: &PairLogps, beta: Beta) -> Tensor<1> {
    let (chosen, rejected) = rewards(logratios, beta);
    sigmoid(chosen.clone()) + sigmoid(rejected - chosen)
}

/// The DPO-Positive loss of each pair: `−log σ(β (ρ_c − ρ_r − lambda · max(0, −ρ_c)))`.
///
/// Equation 3 of Pal et al. (2024), arXiv 2402.13228, which uses `lambda = 50`. The penalty keeps the
/// chosen completion as likely as under the reference. Its population optimum is not the exact one,
/// where some completions become less likely.
pub fn dpo_positive_loss(logratios: &PairLogps, beta: Beta, lambda: f64) -> Tensor<1> {
    let penalty = relu(-logratios.chosen.clone()).mul_scalar(lambda);
    let margins = logratios.chosen.clone() - logratios.rejected.clone() - penalty;
    -log_sigmoid(margins.mul_scalar(beta.get()))
}
