//! Logps straight from hidden states: one table of logits, read in two passes, and overwritten by its
//! gradient.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::product::product;
use super::rows::{cubes, together};
use super::{Card, elem, fresh, own, units};
use crate::composed::NOWHERE;
use crate::head::STATS;

/// What the way back of a head needs.
#[derive(Clone, Debug)]
pub(crate) struct Logits {
    /// `[n, vocab]`, in the type of the product.
    logits: CubeTensor,
    /// `log Σ exp` of each row, `[n]`.
    totals: CubeTensor,
}

/// Logps and totals `[rows]`, and statistics `[STATS, rows]`: entropy, mean logit, top-1 hit.
#[cube(launch, address_type = "dynamic")]
fn head_kernel<F: Float, I: Int>(
    logits: &Tensor<F>,
    targets: &Tensor<I>,
    logps: &mut Tensor<f32>,
    totals: &mut Tensor<f32>,
    stats: &mut Tensor<f32>,
    rows: usize,
    vocab: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let start = row * vocab;
    let target = u32::cast_from(targets[row]) as usize;
    let chosen = f32::cast_from(logits[start + target]);
    let mut highest = f32::new(NOWHERE);
    let mut plain = f32::new(0.0);
    let mut better = f32::new(0.0);
    let mut token = UNIT_POS_X as usize;
    while token < vocab {
        let logit = f32::cast_from(logits[start + token]);
        highest = max(highest, logit);
        plain += logit;
        // The first of equal ones is the likeliest.
        if logit > chosen || (logit >= chosen && token < target) {
            better = f32::new(1.0);
        }
        token += CUBE_DIM_X as usize;
    }
    let highest = together(highest, true);
    let plain = together(plain, false);
    let better = together(better, true);
    let mut sum = f32::new(0.0);
    let mut weighted = f32::new(0.0);
    let mut token = UNIT_POS_X as usize;
    while token < vocab {
        let below = f32::cast_from(logits[start + token]) - highest;
        let weight = below.exp();
        sum += weight;
        weighted += weight * below;
        token += CUBE_DIM_X as usize;
    }
    let sum = together(sum, false);
    let weighted = together(weighted, false);
    if UNIT_POS_X == 0 {
        let log_sum = sum.ln();
        logps[row] = chosen - highest - log_sum;
        totals[row] = highest + log_sum;
        stats[row] = log_sum - weighted / sum;
        stats[rows + row] = plain / f32::cast_from(vocab as u32);
        stats[2 * rows + row] = 1.0 - better;
    }
}

/// `(1[a = target] − π(a)) g` in place of the logits.
#[cube(launch, address_type = "dynamic")]
fn head_backward_kernel<F: Float, I: Int>(
    logits: &mut Tensor<F>,
    targets: &Tensor<I>,
    totals: &Tensor<f32>,
    grad: &Tensor<f32>,
    vocab: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= logits.len() {
        terminate!();
    }
    let row = ABSOLUTE_POS / vocab;
    let token = ABSOLUTE_POS % vocab;
    let mut slope = -(f32::cast_from(logits[ABSOLUTE_POS]) - totals[row]).exp();
    if token == u32::cast_from(targets[row]) as usize {
        slope += 1.0;
    }
    logits[ABSOLUTE_POS] = F::cast_from(slope * grad[row]);
}

/// Logps `[n]` in f32, statistics `[STATS, n]`, and what the way back needs.
pub(crate) fn head(
    hidden: CubeTensor,
    weight: CubeTensor,
    tied: bool,
    targets: CubeTensor,
) -> (CubeTensor, CubeTensor, Logits) {
    let weight = if tied {
        Card::float_swap_dims(weight, 0, 1)
    } else {
        weight
    };
    let logits = product(hidden, weight);
    let targets = into_contiguous(targets);
    let (count, dim, [rows, vocab]) = cubes(&logits);
    let fresh = |shape| fresh(&logits, shape, DType::F32);
    let (logps, totals) = (fresh(Shape::new([rows])), fresh(Shape::new([rows])));
    let stats = fresh(Shape::new([STATS, rows]));
    if rows > 0 {
        let dtypes = [elem(&logits), elem(&targets)];
        head_kernel::launch(
            &logits.client,
            count,
            dim,
            logits.required_address_type(),
            logits.clone().into_tensor_arg(),
            targets.into_tensor_arg(),
            logps.clone().into_tensor_arg(),
            totals.clone().into_tensor_arg(),
            stats.clone().into_tensor_arg(),
            rows,
            vocab,
            dtypes,
        );
    }
    (logps, stats, Logits { logits, totals })
}

/// The gradients of hidden states and the weight that are wanted, from that of the logps.
pub(crate) fn head_backward(
    hidden: CubeTensor,
    weight: CubeTensor,
    tied: bool,
    targets: CubeTensor,
    kept: Logits,
    grad: CubeTensor,
    (for_hidden, for_weight): (bool, bool),
) -> (Option<CubeTensor>, Option<CubeTensor>) {
    let Logits { logits, totals } = kept;
    let slopes = own(logits);
    let (targets, grad) = (into_contiguous(targets), into_contiguous(grad));
    let (count, dim) = units(&slopes);
    let vocab = slopes.shape()[1];
    if slopes.shape().num_elements() > 0 {
        let dtypes = [elem(&slopes), elem(&targets)];
        head_backward_kernel::launch(
            &slopes.client,
            count,
            dim,
            slopes.required_address_type(),
            slopes.clone().into_tensor_arg(),
            targets.into_tensor_arg(),
            totals.into_tensor_arg(),
            grad.into_tensor_arg(),
            vocab,
            dtypes,
        );
    }
    let turned_over = |x: CubeTensor| Card::float_swap_dims(x, 0, 1);
    let for_hidden = for_hidden.then(|| {
        let weight = if tied { weight } else { turned_over(weight) };
        product(slopes.clone(), weight)
    });
    let for_weight = for_weight.then(|| {
        if tied {
            product(turned_over(slopes), hidden)
        } else {
            product(turned_over(hidden), slopes)
        }
    });
    (for_hidden, for_weight)
}
