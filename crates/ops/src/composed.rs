//! The operations composed of Burn's own.

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, Scalar, TensorMetadata};
use burn::tensor::{Shape, Slice};

use crate::AdamWStep;
use crate::backend::Ops;

/// Below every score, and finite: a query from which all is hidden yields no NaN.
pub(crate) const NOWHERE: f32 = -1e30;

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

pub(crate) fn swiglu<B: Backend>(joined: FloatTensor<B>) -> FloatTensor<B> {
    let [gate, up] = halves::<B>(joined);
    let open = B::sigmoid(gate.clone());
    B::float_mul(B::float_mul(gate, open), up)
}

pub(crate) fn swiglu_backward<B: Backend>(
    joined: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let [gate, up] = halves::<B>(joined);
    let open = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate, open.clone());
    // The slope of g σ is σ + g σ (1 − σ).
    let slope = B::float_sub(open.clone(), B::float_mul(silu.clone(), open));
    let slope = B::float_add(slope, silu.clone());
    let for_gate = B::float_mul(B::float_mul(grad.clone(), up), slope);
    B::float_cat(vec![for_gate, B::float_mul(grad, silu)], 1)
}

/// The left and the right half of the columns.
fn halves<B: Backend>(joined: FloatTensor<B>) -> [FloatTensor<B>; 2] {
    let shape = joined.shape();
    let (rows, n) = (shape[0], shape[1] / 2);
    [0..n, n..2 * n].map(|columns| {
        let columns = Slice::from(columns);
        B::float_slice(joined.clone(), &[Slice::from(0..rows), columns])
    })
}

pub(crate) fn accumulate<B: Backend>(sum: FloatTensor<B>, x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(sum, x)
}

pub(crate) fn sum_of_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let n = x.shape().num_elements();
    let x = B::float_reshape(x, Shape::new([n]));
    B::float_sum(B::float_mul(x.clone(), x))
}

pub(crate) fn project_backward_input<B: Ops>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    B::product(grad, B::float_swap_dims(weight, 0, 1))
}

pub(crate) fn project_backward_weight<B: Ops>(
    x: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    B::product(B::float_swap_dims(x, 0, 1), grad)
}

/// A number more in each row's place of it.
pub(crate) fn with_bias<B: Backend>(x: FloatTensor<B>, bias: FloatTensor<B>) -> FloatTensor<B> {
    let columns = bias.shape()[0];
    B::float_add(x, B::float_reshape(bias, Shape::new([1, columns])))
}

pub(crate) fn sum_of_rows<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let columns = grad.shape()[1];
    B::float_reshape(B::float_sum_dim(grad, 0), Shape::new([columns]))
}

/// `1 / rms(x)` of each row, `[rows, 1]`.
fn inverse<B: Backend>(x: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x), 1);
    B::float_recip(B::float_sqrt(B::float_add_scalar(mean, Scalar::from(eps))))
}

pub(crate) fn rms_norm<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let n = weight.shape()[0];
    let scale = inverse::<B>(x.clone(), eps);
    let weight = B::float_reshape(weight, Shape::new([1, n]));
    B::float_mul(B::float_mul(x, scale), weight)
}

pub(crate) fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f64,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let n = weight.shape()[0];
    let scale = inverse::<B>(x.clone(), eps);
    let normal = B::float_mul(x, scale.clone());
    let for_weight = sum_of_rows::<B>(B::float_mul(grad.clone(), normal.clone()));
    let weight = B::float_reshape(weight, Shape::new([1, n]));
    let pulled = B::float_mul(grad, weight);
    // With s = 1 / rms(x) and n = x s: s (g w − n mean(n g w)).
    let along = B::float_mean_dim(B::float_mul(normal.clone(), pulled.clone()), 1);
    let for_x = B::float_sub(pulled, B::float_mul(normal, along));
    (B::float_mul(for_x, scale), for_weight)
}

pub(crate) fn adamw<B: Backend>(
    value: FloatTensor<B>,
    grad: FloatTensor<B>,
    moments: (FloatTensor<B>, FloatTensor<B>),
    step: AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let times = |x, by: f64| B::float_mul_scalar(x, Scalar::from(by));
    let grad = times(grad, step.grad_scale);
    let first = B::float_add(
        times(moments.0, step.beta1),
        times(grad.clone(), 1.0 - step.beta1),
    );
    let squares = B::float_mul(grad.clone(), grad);
    let second = B::float_add(
        times(moments.1, step.beta2),
        times(squares, 1.0 - step.beta2),
    );
    let root = times(B::float_sqrt(second.clone()), 1.0 / step.root_bias2);
    let root = B::float_add_scalar(root, Scalar::from(step.epsilon));
    let change = B::float_div(times(first.clone(), step.rate), root);
    let value = B::float_sub(times(value, step.keep), change);
    (value, first, second)
}
