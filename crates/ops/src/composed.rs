//! The operations composed of Burn's own.

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, Scalar, TensorMetadata};
use burn::tensor::Shape;

/// Below every score, and finite: a query from which all is hidden yields no NaN.
const NOWHERE: f32 = -1e30;

pub(crate) fn masked_softmax<B: Backend>(
    scores: FloatTensor<B>,
    hidden: BoolTensor<B>,
) -> FloatTensor<B> {
    let shape = scores.shape();
    let mask = hidden.shape();
    let [batch, heads, queries, keys] = [shape[0], shape[1], shape[2], shape[3]];
    let seq = mask[2];
    let split = Shape::new([batch, heads, queries / seq.max(1), seq, keys]);
    let hidden = B::bool_reshape(hidden, Shape::new([mask[0], 1, 1, seq, keys]));
    let hidden = B::bool_expand(hidden, split.clone());
    let scores = B::float_reshape(scores, split);
    let scores = B::float_mask_fill(scores, hidden.clone(), Scalar::from(NOWHERE));
    let weights = B::softmax(scores, 4);
    let weights = B::float_mask_fill(weights, hidden, Scalar::from(0.0_f32));
    B::float_reshape(weights, shape)
}

pub(crate) fn softmax_backward<B: Backend>(
    weights: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let last = weights.shape().num_dims() - 1;
    let mean = B::float_sum_dim(B::float_mul(weights.clone(), grad.clone()), last);
    B::float_mul(weights, B::float_sub(grad, mean))
}

pub(crate) fn swiglu<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let open = B::sigmoid(gate.clone());
    B::float_mul(B::float_mul(gate, open), up)
}

pub(crate) fn swiglu_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let open = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate, open.clone());
    // The slope of g σ is σ + g σ (1 − σ).
    let slope = B::float_sub(open.clone(), B::float_mul(silu.clone(), open));
    let slope = B::float_add(slope, silu.clone());
    let for_gate = B::float_mul(B::float_mul(grad.clone(), up), slope);
    (for_gate, B::float_mul(grad, silu))
}
