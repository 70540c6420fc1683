//! Operations that a language model spends its time in, each in one pass, with its gradient.
//!
//! Burn composes a masked softmax or a `SwiGLU` of many small operations, and its CPU backend takes
//! exponentials one number at a time: together that was more than a third of a forward pass. Here
//! each is one pass over memory in the widest registers of the processor, on all cores, and on cards a
//! kernel or two, in CUDA or WGSL. Backends without a version of their own run the same formula composed of
//! Burn's operations; the tests hold all against each other, and the gradients against finite differences
//! in f64.
//!
//! # Examples
//!
//! ```
//! use burn::tensor::{Bool, Device, Tensor};
//!
//! let device = Device::default();
//! // Two queries and two keys: the first query may not look at the second key.
//! let scores = Tensor::<4>::from_floats([[[[0.3, 9.0], [1.0, 1.0]]]], &device);
//! let hidden = Tensor::<4, Bool>::from_data([[[[false, true], [false, false]]]], &device);
//! let weights = ops::masked_softmax(scores, hidden);
//! assert_eq!(weights.into_data().to_vec::<f32>().unwrap(), [1.0, 0.0, 0.5, 0.5]);
//! ```

mod attention;
mod autodiff;
#[cfg_attr(
    not(any(feature = "flex", feature = "cube")),
    expect(unused_variables, reason = "no backend is at hand to route to")
)]
mod backend;
#[cfg(feature = "cube")]
mod card;
mod composed;
#[cfg(feature = "cube")]
mod cube;
mod exp;
#[cfg(feature = "flex")]
mod flex;
mod head;
#[cfg(feature = "flex")]
mod host;

use burn::backend::Dispatch;
use burn::tensor::{Bool, Device, Tensor};

pub use attention::{Family, Heads, Spans, Turns, attend, attention};
pub use backend::Ops;
#[cfg(feature = "cube")]
pub use card::{CardOps, Layout};
pub use exp::{exp, exp_lanes};
pub use head::{HeadOutput, head_logps};
#[cfg(feature = "flex")]
pub use host::HostOps;

/// Whether a feature names a backend to route to. Without one, everything is composed.
const FUSED: bool = cfg!(any(feature = "flex", feature = "wgpu", feature = "cuda"));

/// What kernels that read memory as numbers of a type rely on.
const ONE_TYPE: &str = "numbers of one type";

/// Whether the processor's own version of an operation is at hand for a tensor.
#[cfg(feature = "flex")]
fn fused<const D: usize>(tensor: &Tensor<D>) -> bool {
    packs(&tensor.device()) && tensor.dtype() == burn::tensor::DType::F32
}

/// Whether a tensor is on a card, whose version of an operation is at hand.
#[cfg(feature = "cube")]
fn is_card<const D: usize>(tensor: &Tensor<D>) -> bool {
    use burn::backend::DispatchDevice;

    matches!(
        tensor.device().inner().as_dispatch(),
        DispatchDevice::Cube(_)
    )
}

/// Whether [`attention`] on a device takes as long for texts one after the other in one row as for a
/// row for each: it does where it does not compute what a query may not see.
pub fn packs(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return device.clone().inner() == Device::flex();
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

/// Attention's weights, `[batch, heads, queries, keys]`: the softmax over the keys of the `scores`
/// of the same shape, 0 wherever `hidden` is true. A query from which all is hidden weighs nothing.
///
/// `hidden`, `[1 or batch, 1, seq, keys]`, holds for every head, and `queries` is a multiple of
/// `seq`: queries `seq` apart, as those of the heads that share a key head, hide the same keys.
///
/// # Panics
///
/// If the shapes are others.
pub fn masked_softmax(scores: Tensor<4>, hidden: Tensor<4, Bool>) -> Tensor<4> {
    let [batch, _, queries, keys] = scores.dims();
    let [rows, one, seq, mask_keys] = hidden.dims();
    assert!(
        (rows == 1 || rows == batch) && one == 1 && mask_keys == keys && queries % seq.max(1) == 0,
        "expected a mask of [1 or {batch}, 1, a divisor of {queries}, {keys}], got {:?}",
        hidden.dims()
    );
    let run = if FUSED {
        Dispatch::masked_softmax
    } else {
        composed::masked_softmax::<Dispatch>
    };
    Tensor::from_dispatch(run(scores.into_dispatch(), hidden.into_dispatch()))
}

/// `gate · σ(gate) · up`, `[rows, n]`, of `[rows, 2 n]` that holds each row's gate and then its other
/// factor: the inner layer of a Llama-like MLP.
///
/// # Panics
///
/// If the number of columns is odd.
pub fn swiglu(joined: Tensor<2>) -> Tensor<2> {
    assert_eq!(joined.dims()[1] % 2, 0, "a gate for each number");
    let run = if FUSED {
        Dispatch::swiglu
    } else {
        composed::swiglu::<Dispatch>
    };
    Tensor::from_dispatch(run(joined.into_dispatch()))
}

/// Products of matrices, `[batch, heads, m, n]`, of `[batch, heads, m, k]` and `[batch, heads, k, n]`.
///
/// # Panics
///
/// If the shapes do not fit, or the types differ.
pub fn product(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    let ([batch, heads, _, k], [batches, b_heads, b_k, _]) = (a.dims(), b.dims());
    assert_eq!(
        [batch, heads, k],
        [batches, b_heads, b_k],
        "a row for each column"
    );
    assert_eq!(a.dtype(), b.dtype(), "{ONE_TYPE}");
    if !FUSED {
        return a.matmul(b);
    }
    Tensor::from_dispatch(Dispatch::product(a.into_dispatch(), b.into_dispatch()))
}

/// `x w + b`, `[rows, outputs]`, of `x`, `[rows, inputs]`, a weight `[inputs, outputs]` and perhaps a
/// bias `[outputs]`.
///
/// # Panics
///
/// If the shapes do not fit, or the types differ.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let [inputs, outputs] = weight.dims();
    assert_eq!(x.dims()[1], inputs, "a row of weights for each input");
    assert_eq!(x.dtype(), weight.dtype(), "{ONE_TYPE}");
    if !FUSED {
        return burn::tensor::module::linear(x, weight, bias);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias {
        None => Dispatch::project(x, weight),
        Some(bias) => {
            assert_eq!(bias.dims(), [outputs], "a bias for each output");
            Dispatch::project_with_bias(x, weight, bias.into_dispatch())
        }
    })
}

/// `x w` of several weights side by side, `[rows, all outputs]`: of `x`, `[rows, inputs]`, and of weights
/// `[inputs, outputs]` each.
///
/// On the processor each product is written where it belongs, and nothing is copied.
///
/// # Panics
///
/// If there is no weight, or the shapes do not fit.
pub fn joined_linear(x: Tensor<2>, weights: &[Tensor<2>]) -> Tensor<2> {
    let inputs = x.dims()[1];
    assert!(
        !weights.is_empty() && weights.iter().all(|weight| weight.dims()[0] == inputs),
        "weights with a row for each input"
    );
    #[cfg(feature = "flex")]
    if fused(&x) {
        let weight = |index: usize| weights[index].clone().into_dispatch();
        match weights.len() {
            2 => {
                let out = Dispatch::project_two(x.into_dispatch(), weight(0), weight(1));
                return Tensor::from_dispatch(out);
            }
            3 => {
                let (x, weights) = (x.into_dispatch(), [0, 1, 2].map(weight));
                let [first, second, third] = weights;
                let out = Dispatch::project_three(x, first, second, third);
                return Tensor::from_dispatch(out);
            }
            _ => {}
        }
    }
    // Joining the matrices copies each of their numbers, which costs about as much as a row of the
    // product does with it: little beside a hundred rows, whose product then reads them once.
    const MANY: usize = 128;
    if x.dims()[0] < MANY {
        let outputs = weights
            .iter()
            .map(|weight| linear(x.clone(), weight.clone(), None));
        return Tensor::cat(outputs.collect(), 1);
    }
    linear(x, Tensor::cat(weights.to_vec(), 1), None)
}

/// `x / √(mean(x²) + eps) · weight`, over the last dimension, which `weight` has a number for each of.
///
/// # Panics
///
/// If it has not, or the types differ.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let shape = x.shape();
    let [n] = weight.dims();
    assert_eq!(shape[D - 1], n, "a weight for each number of a row");
    assert_eq!(x.dtype(), weight.dtype(), "{ONE_TYPE}");
    let rows = x.reshape([shape.num_elements() / n, n]);
    let run = if FUSED {
        Dispatch::rms_norm
    } else {
        composed::rms_norm::<Dispatch>
    };
    let out = run(rows.into_dispatch(), weight.into_dispatch(), eps);
    Tensor::<2>::from_dispatch(out).reshape(shape)
}

/// What one step of AdamW does to each number; Loshchilov and Hutter, arXiv 1711.05101.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// What gradients are multiplied with first: 1, or less where they are clipped.
    pub grad_scale: f64,
    /// The decay of the running mean of gradients.
    pub beta1: f64,
    /// The decay of the running mean of their squares.
    pub beta2: f64,
    /// The learning rate over the first mean's bias, `1 − beta1^t`.
    pub rate: f64,
    /// The root of the second mean's bias, `√(1 − beta2^t)`.
    pub root_bias2: f64,
    /// What is added to the denominator.
    pub epsilon: f64,
    /// What is left of a value before it moves: 1 less the weight decay.
    pub keep: f64,
}

/// A parameter and its two moments after a step, from those before and its gradient: tensors without
/// a graph, of one shape, which are updated where they stand if nobody else holds them.
///
/// # Panics
///
/// If the shapes differ.
pub fn adamw<const D: usize>(
    value: Tensor<D>,
    grad: Tensor<D>,
    [first, second]: [Tensor<D>; 2],
    step: AdamWStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let dims = value.dims();
    assert!(
        [grad.dims(), first.dims(), second.dims()] == [dims; 3],
        "a gradient and two moments for each number"
    );
    let (value, grad) = (value.into_dispatch(), grad.into_dispatch());
    let (first, second) = (first.into_dispatch(), second.into_dispatch());
    let (value, first, second) = if FUSED {
        Dispatch::adamw(value, grad, first, second, step)
    } else {
        composed::adamw::<Dispatch>(value, grad, (first, second), step)
    };
    let moments = [first, second].map(Tensor::from_dispatch);
    (Tensor::from_dispatch(value), moments)
}

/// `sum + x`, of tensors without a graph and of one shape; in place of `sum` if nobody else holds it.
///
/// # Panics
///
/// If the shapes differ.
pub fn accumulate<const D: usize>(sum: Tensor<D>, x: Tensor<D>) -> Tensor<D> {
    assert_eq!(sum.dims(), x.dims(), "a number to add to each");
    if !FUSED {
        return sum + x;
    }
    let (sum, x) = (sum.into_dispatch(), x.into_dispatch());
    Tensor::from_dispatch(Dispatch::accumulate(sum, x))
}

/// The sum of the squares of all numbers, `[1]`.
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    if FUSED {
        Tensor::from_dispatch(Dispatch::sum_of_squares(x.into_dispatch()))
    } else {
        x.square().sum()
    }
}
