//! Alignment by optimal transport: the whole batch is compared with itself, in order.

use burn::tensor::Tensor;
use mdp_core::Beta;

use crate::logps::PairLogps;
use crate::margin::conservative_loss;

/// The paired AOT loss: the policy's `L_c − L_r` and the reference's, each sorted over the batch, are
/// compared rank by rank under [`conservative_loss`].
///
/// Melnyk et al. (2024), arXiv 2406.05882. Returns `[batch]`, by rank and not by pair, and depends on
/// which pairs share a batch. Its population optimum is not the exact one: any policy whose
/// differences dominate the reference's will do, whichever pairs they belong to.
pub fn aot_loss(policy: &PairLogps, reference: &PairLogps, beta: Beta, noise: f64) -> Tensor<1> {
    let ours = policy.chosen.clone() - policy.rejected.clone();
    let theirs = reference.chosen.clone() - reference.rejected.clone();
    by_rank(ours, theirs, beta, noise)
}

/// The unpaired AOT loss: chosen log-ratios and rejected ones, each sorted over the batch, are
/// compared rank by rank under [`conservative_loss`].
///
/// As [`aot_loss`] otherwise.
pub fn aot_unpaired_loss(logratios: &PairLogps, beta: Beta, noise: f64) -> Tensor<1> {
    let (chosen, rejected) = (logratios.chosen.clone(), logratios.rejected.clone());
    by_rank(chosen, rejected, beta, noise)
}

fn by_rank(upper: Tensor<1>, lower: Tensor<1>, beta: Beta, noise: f64) -> Tensor<1> {
    let margins = ascending(upper) - ascending(lower);
    conservative_loss(margins.mul_scalar(beta.get()), noise)
}

fn ascending(numbers: Tensor<1>) -> Tensor<1> {
    // By index, so that gradients go back to where each number came from.
    let order = numbers.clone().argsort(0);
    numbers.select(0, order)
}
