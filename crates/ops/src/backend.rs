//! What a backend must be able to do, composed of Burn's operations where it has nothing better.

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, backend_extension};

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
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::swiglu::<Self>(gate, up)
    }

    /// The gradients of [`swiglu`](crate::swiglu) with respect to its gate and its other factor.
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::swiglu_backward::<Self>(gate, up, grad)
    }
}

#[cfg(feature = "wgpu")]
impl Ops for burn::backend::Wgpu {}
// The two are one type of backend.
#[cfg(all(feature = "cuda", not(feature = "wgpu")))]
impl Ops for burn::backend::Cuda {}
