//! The operations on Burn's CPU backend: f32 in vector registers, other types composed.

mod adamw;
mod attention;
mod gemm;
mod head;
mod linear;
mod memory;
mod norm;
mod panels;
mod swiglu;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod turn;

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub(crate) use self::attention::{attention, attention_backward};
pub(crate) use self::head::{Kept, head, head_backward};
pub(crate) use self::linear::{joined, joined_backward_input, joined_backward_weight};
use self::memory::{own, values};
use crate::AdamWStep;
use crate::backend::Ops;
use crate::composed;
use crate::exp::exp;

/// Partial sums and maxima of a row, so that the compiler can use vector registers.
const LANES: usize = 16;
/// About how many numbers a thread takes at a time: enough for taking them to cost nothing.
const PIECE: usize = 16 * 1024;

impl Ops for Flex {
    fn masked_softmax(scores: FloatTensor<Self>, hidden: BoolTensor<Self>) -> FloatTensor<Self> {
        if scores.dtype() != DType::F32 {
            return composed::masked_softmax::<Self>(scores, hidden);
        }
        let (shape, mask) = (scores.shape(), hidden.shape());
        let (queries, keys) = (shape[2], shape[3]);
        let hidden = hidden.to_contiguous();
        let start = hidden.layout().start_offset();
        let masks = Masks {
            hidden: &hidden.storage::<u8>()[start..],
            rows: mask[0],
            seq: mask[2],
            keys,
            queries_of_a_row: shape[1] * queries,
        };
        let mut scores = own(scores);
        in_pieces(scores.storage_mut(), keys, |first, scores| {
            Arch::new().dispatch(MaskedSoftmax {
                scores,
                masks,
                first,
            });
        });
        scores
    }

    fn softmax_backward(weights: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if grad.dtype() != DType::F32 {
            return composed::softmax_backward::<Self>(weights, grad);
        }
        let shape = weights.shape();
        let row = shape[shape.num_dims() - 1];
        let weights = weights.to_contiguous();
        let weights = values(&weights);
        let mut grad = own(grad);
        in_pieces(grad.storage_mut(), row, |first, grad| {
            let weights = &weights[first * row..][..grad.len()];
            Arch::new().dispatch(SoftmaxBackward { weights, grad, row });
        });
        grad
    }

    fn swiglu(joined: FloatTensor<Self>) -> FloatTensor<Self> {
        if joined.dtype() != DType::F32 {
            return composed::swiglu::<Self>(joined);
        }
        swiglu::swiglu(&joined)
    }

    fn swiglu_backward(joined: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if joined.dtype() != DType::F32 {
            return composed::swiglu_backward::<Self>(joined, grad);
        }
        swiglu::swiglu_backward(&joined, &grad)
    }

    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        if x.dtype() != DType::F32 {
            return Self::product(x, weight);
        }
        linear::linear(&x, &weight, None)
    }

    fn project_with_bias(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if x.dtype() != DType::F32 {
            return composed::with_bias::<Self>(Self::product(x, weight), bias);
        }
        linear::linear(&x, &weight, Some(&bias))
    }

    fn project_backward_input(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if grad.dtype() != DType::F32 {
            return composed::project_backward_input::<Self>(grad, weight);
        }
        linear::backward_input(&grad, &weight)
    }

    fn project_backward_weight(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if grad.dtype() != DType::F32 {
            return composed::project_backward_weight::<Self>(x, grad);
        }
        linear::backward_weight(&x, &grad)
    }

    fn project_backward_bias(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        if grad.dtype() != DType::F32 {
            return composed::sum_of_rows::<Self>(grad);
        }
        linear::backward_bias(&grad)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        if x.dtype() != DType::F32 {
            return composed::rms_norm::<Self>(x, weight, eps);
        }
        norm::rms_norm(&x, &weight, eps as f32)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if x.dtype() != DType::F32 {
            return composed::rms_norm_backward::<Self>(x, weight, eps, grad);
        }
        norm::rms_norm_backward(&x, &weight, eps as f32, &grad)
    }

    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if value.dtype() != DType::F32 {
            return composed::adamw::<Self>(value, grad, (first, second), step);
        }
        adamw::adamw(value, &grad, (first, second), step)
    }

    fn accumulate(sum: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        if sum.dtype() != DType::F32 {
            return composed::accumulate::<Self>(sum, x);
        }
        adamw::accumulate(sum, &x)
    }

    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        if x.dtype() != DType::F32 {
            return composed::sum_of_squares::<Self>(x);
        }
        memory::tensor(vec![adamw::sum_of_squares(&x) as f32], [1])
    }
}

/// Gives `work` whole rows at a time, and the place of the first of them, on all threads.
fn in_pieces(values: &mut [f32], row: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if values.is_empty() {
        return;
    }
    let rows = PIECE.div_ceil(row);
    values
        .par_chunks_mut(rows * row)
        .enumerate()
        .for_each(|(piece, values)| work(piece * rows, values));
}

/// Which keys are hidden from each row of scores.
#[derive(Clone, Copy)]
struct Masks<'a> {
    /// `[rows, seq, keys]`, not 0 where hidden.
    hidden: &'a [u8],
    rows: usize,
    seq: usize,
    keys: usize,
    /// Rows of scores that stand in one row of the batch.
    queries_of_a_row: usize,
}

impl<'a> Masks<'a> {
    #[inline(always)]
    fn of(&self, query: usize) -> &'a [u8] {
        let row = query / self.queries_of_a_row % self.rows;
        let place = row * self.seq + query % self.seq;
        &self.hidden[place * self.keys..][..self.keys]
    }
}

struct MaskedSoftmax<'a> {
    /// Whole rows; the weights take their place.
    scores: &'a mut [f32],
    masks: Masks<'a>,
    first: usize,
}

impl WithSimd for MaskedSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let rows = self.scores.chunks_exact_mut(self.masks.keys);
        for (at, scores) in rows.enumerate() {
            let hidden = self.masks.of(self.first + at);
            // A causal mask hides the end of a row: nothing is computed there.
            let seen = hidden.iter().rposition(|&hidden| hidden == 0);
            let (scores, rest) = scores.split_at_mut(seen.map_or(0, |last| last + 1));
            rest.fill(0.0);
            softmax(scores, &hidden[..scores.len()]);
        }
    }
}

/// A NaN that is not hidden makes the whole row NaN.
#[inline(always)]
fn softmax(scores: &mut [f32], hidden: &[u8]) {
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    let (masks, rest_masks) = hidden.as_chunks::<LANES>();
    let mut highest = [f32::NEG_INFINITY; LANES];
    for (scores, hidden) in chunks.iter_mut().zip(masks) {
        for ((highest, score), &hidden) in highest.iter_mut().zip(scores).zip(hidden) {
            // exp gives 0 for it.
            *score = if hidden == 0 {
                *score
            } else {
                f32::NEG_INFINITY
            };
            *highest = if *score > *highest { *score } else { *highest };
        }
    }
    let mut largest = f32::NEG_INFINITY;
    for (score, &hidden) in rest.iter_mut().zip(rest_masks) {
        *score = if hidden == 0 {
            *score
        } else {
            f32::NEG_INFINITY
        };
        largest = if *score > largest { *score } else { largest };
    }
    for highest in highest {
        largest = if highest > largest { highest } else { largest };
    }
    let mut sums = [0.0_f32; LANES];
    for scores in chunks.iter_mut() {
        for (sum, score) in sums.iter_mut().zip(scores) {
            *score = exp(*score - largest);
            *sum += *score;
        }
    }
    let mut total = 0.0;
    for score in rest.iter_mut() {
        *score = exp(*score - largest);
        total += *score;
    }
    total += sums.iter().sum::<f32>();
    let share = 1.0 / total;
    for score in chunks.iter_mut().flatten().chain(rest) {
        *score *= share;
    }
}

struct SoftmaxBackward<'a> {
    weights: &'a [f32],
    /// Of the weights; that of the scores takes its place.
    grad: &'a mut [f32],
    row: usize,
}

impl WithSimd for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let weights = self.weights.chunks_exact(self.row);
        for (weights, grad) in weights.zip(self.grad.chunks_exact_mut(self.row)) {
            let (w, w_rest) = weights.as_chunks::<LANES>();
            let (g, g_rest) = grad.as_chunks::<LANES>();
            let mut sums = [0.0_f32; LANES];
            for (w, g) in w.iter().zip(g) {
                for lane in 0..LANES {
                    sums[lane] = w[lane].mul_add(g[lane], sums[lane]);
                }
            }
            let rest = w_rest.iter().zip(g_rest).map(|(w, g)| w * g).sum::<f32>();
            let mean = sums.iter().sum::<f32>() + rest;
            for (grad, weight) in grad.iter_mut().zip(weights) {
                *grad = weight * (*grad - mean);
            }
        }
    }
}
