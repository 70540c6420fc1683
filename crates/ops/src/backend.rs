//! What a backend must be able to do, composed of Burn's operations where it has nothing better.

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, backend_extension};

use crate::AdamWStep;
use crate::composed;

/// The operations on a backend's own tensors. The functions of this crate check shapes; these trust
/// them.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
)]
pub trait Ops: Backend {
    /// [`masked_softmax`](crate::masked_softmax).
    fn masked_softmax(scores: FloatTensor<Self>, hidden: BoolTensor<Self>) -> FloatTensor<Self> {
        composed::masked_softmax::<Self>(scores, hidden)
    }

    /// The gradient of a softmax over the last dimension with respect to its scores, from its
    /// `weights` and the gradient with respect to them: `w ∘ (g − Σ w ∘ g)`.
    fn softmax_backward(weights: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::softmax_backward::<Self>(weights, grad)
    }

    /// [`swiglu`](crate::swiglu).
    fn swiglu(joined: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::swiglu::<Self>(joined)
    }

    /// The gradient of [`swiglu`](crate::swiglu).
    fn swiglu_backward(joined: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::swiglu_backward::<Self>(joined, grad)
    }

    /// [`product`](crate::product), and that of two matrices.
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(a, b)
    }

    /// [`linear`](crate::linear) without a bias.
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::product(x, weight)
    }

    /// [`linear`](crate::linear) with a bias.
    fn project_with_bias(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::with_bias::<Self>(Self::product(x, weight), bias)
    }

    /// The gradient of a linear layer with respect to its input: `g wᵀ`.
    fn project_backward_input(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        composed::project_backward_input::<Self>(grad, weight)
    }

    /// The gradient of a linear layer with respect to its weight: `xᵀ g`.
    fn project_backward_weight(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::project_backward_weight::<Self>(x, grad)
    }

    /// The gradient of a linear layer with respect to its bias: the sum of the rows.
    fn project_backward_bias(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::sum_of_rows::<Self>(grad)
    }

    /// [`rms_norm`](crate::rms_norm) of `[rows, n]`.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        composed::rms_norm::<Self>(x, weight, eps)
    }

    /// The gradients of [`rms_norm`](crate::rms_norm) with respect to `x` and the weight.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::rms_norm_backward::<Self>(x, weight, eps, grad)
    }

    /// [`adamw`](crate::adamw): value, first and second moment.
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        composed::adamw::<Self>(value, grad, (first, second), step)
    }

    /// [`accumulate`](crate::accumulate).
    fn accumulate(sum: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::accumulate::<Self>(sum, x)
    }

    /// The sum of the squares, `[1]`.
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::sum_of_squares::<Self>(x)
    }
}
