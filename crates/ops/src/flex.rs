//! The operations on Burn's CPU backend: f32 in vector registers, other types composed.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::tensor::{Bytes, DType};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

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

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        if gate.dtype() != DType::F32 {
            return composed::swiglu::<Self>(gate, up);
        }
        let up = up.to_contiguous();
        let up = values(&up);
        let mut gate = own(gate);
        in_pieces(gate.storage_mut(), 1, |first, gate| {
            let up = &up[first..][..gate.len()];
            Arch::new().dispatch(SwiGlu { gate, up });
        });
        gate
    }

    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if grad.dtype() != DType::F32 {
            return composed::swiglu_backward::<Self>(gate, up, grad);
        }
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let (gate, up) = (values(&gate), values(&up));
        let shape = grad.shape();
        // The gradient becomes that of the gate, where it stands.
        let mut for_gate = own(grad);
        let mut for_up = vec![0.0_f32; gate.len()];
        for_gate
            .storage_mut::<f32>()
            .par_chunks_mut(PIECE)
            .zip(for_up.par_chunks_mut(PIECE))
            .zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)))
            .for_each(|((grad, for_up), (gate, up))| {
                Arch::new().dispatch(SwiGluBackward {
                    gate,
                    up,
                    grad,
                    for_up,
                });
            });
        let for_up = Bytes::from_elems(for_up);
        let for_up = FlexTensor::new(for_up, Layout::contiguous(shape), DType::F32);
        (for_gate, for_up)
    }
}

/// A tensor that fills its memory, in order. Writing to it copies what others hold too.
fn own(tensor: FlexTensor) -> FlexTensor {
    let tensor = tensor.to_contiguous();
    let whole = tensor.storage::<f32>().len();
    if tensor.layout().contiguous_offsets() == Some((0, whole)) {
        return tensor;
    }
    let copy = Bytes::from_elems(values(&tensor).to_vec());
    FlexTensor::new(copy, Layout::contiguous(tensor.shape()), DType::F32)
}

/// What a contiguous tensor of f32 holds.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("a contiguous tensor of the type that was asked for")
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

struct SwiGlu<'a> {
    /// What comes out takes its place.
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }
}

struct SwiGluBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    /// Of what came out; that of the gate takes its place.
    grad: &'a mut [f32],
    for_up: &'a mut [f32],
}

impl WithSimd for SwiGluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let grads = self.grad.iter_mut().zip(self.for_up);
        for ((&gate, &up), (grad, for_up)) in self.gate.iter().zip(self.up).zip(grads) {
            let open = 1.0 / (1.0 + exp(-gate));
            *for_up = *grad * gate * open;
            *grad = *grad * up * open * gate.mul_add(1.0 - open, 1.0);
        }
    }
}
