//! Operations that a language model spends its time in, each in one pass, with its gradient.
//!
//! Burn composes a masked softmax or a `SwiGLU` of many small operations, and its CPU backend takes
//! exponentials one number at a time: together that was more than a third of a forward pass. Here
//! each is one pass over memory in the widest registers of the processor, on all cores. Backends
//! without a version of their own run the same formula composed of Burn's operations; the tests
//! hold both against each other, and the gradients against finite differences in f64.
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

mod autodiff;
mod backend;
mod composed;
mod exp;
#[cfg(feature = "flex")]
mod flex;

use burn::backend::Dispatch;
use burn::tensor::{Bool, Tensor};

pub use backend::Ops;
pub use exp::exp;

/// Whether a feature names a backend to route to. Without one, everything is composed.
const FUSED: bool = cfg!(any(feature = "flex", feature = "wgpu", feature = "cuda"));

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

/// `gate · σ(gate) · up`, element by element, of two tensors of one shape: the inner layer of a
/// Llama-like MLP.
///
/// # Panics
///
/// If the shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "a gate for each number");
    let run = if FUSED {
        Dispatch::swiglu
    } else {
        composed::swiglu::<Dispatch>
    };
    Tensor::from_dispatch(run(gate.into_dispatch(), up.into_dispatch()))
}
