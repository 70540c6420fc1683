//! Kernels that compute each number by itself.

use burn::backend::TensorMetadata;
use burn::tensor::Shape;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{elem, fresh, like, own, units};
use crate::AdamWStep;

/// `gate · σ(gate) · up` of rows that hold both side by side.
#[cube(launch, address_type = "dynamic")]
fn swiglu_kernel<F: Float>(
    joined: &Tensor<F>,
    out: &mut Tensor<F>,
    columns: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let at = ABSOLUTE_POS + ABSOLUTE_POS / columns * columns;
    let gate = f32::cast_from(joined[at]);
    let up = f32::cast_from(joined[at + columns]);
    let open = 1.0 / (1.0 + (-gate).exp());
    out[ABSOLUTE_POS] = F::cast_from(gate * open * up);
}

/// The slope of `g σ` is `σ + g σ (1 − σ)`.
#[cube(launch, address_type = "dynamic")]
fn swiglu_backward_kernel<F: Float>(
    joined: &Tensor<F>,
    grad: &Tensor<F>,
    out: &mut Tensor<F>,
    columns: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= grad.len() {
        terminate!();
    }
    let at = ABSOLUTE_POS + ABSOLUTE_POS / columns * columns;
    let gate = f32::cast_from(joined[at]);
    let up = f32::cast_from(joined[at + columns]);
    let grad = f32::cast_from(grad[ABSOLUTE_POS]);
    let open = 1.0 / (1.0 + (-gate).exp());
    let silu = gate * open;
    out[at] = F::cast_from(grad * up * (open + silu - silu * open));
    out[at + columns] = F::cast_from(grad * silu);
}

/// A step of AdamW in place: see [`AdamWStep`].
#[cube(launch, address_type = "dynamic")]
fn adamw_kernel(
    value: &mut Tensor<f32>,
    first: &mut Tensor<f32>,
    second: &mut Tensor<f32>,
    grad: &Tensor<f32>,
    scale: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    rate: f32,
    inverse_root_bias2: f32,
    epsilon: f32,
    keep: f32,
) {
    if ABSOLUTE_POS >= value.len() {
        terminate!();
    }
    let grad = grad[ABSOLUTE_POS] * scale;
    let mean = first[ABSOLUTE_POS] * beta1 + grad * rest1;
    let squares = second[ABSOLUTE_POS] * beta2 + grad * grad * rest2;
    first[ABSOLUTE_POS] = mean;
    second[ABSOLUTE_POS] = squares;
    let root = squares.sqrt() * inverse_root_bias2 + epsilon;
    value[ABSOLUTE_POS] = value[ABSOLUTE_POS] * keep - mean * rate / root;
}

pub(super) fn swiglu(joined: CubeTensor) -> CubeTensor {
    let joined = into_contiguous(joined);
    let shape = joined.shape();
    let columns = shape[1] / 2;
    let out = fresh(&joined, Shape::new([shape[0], columns]), joined.dtype);
    let (count, dim) = units(&out);
    swiglu_kernel::launch(
        &out.client,
        count,
        dim,
        joined.required_address_type(),
        joined.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        columns,
        elem(&out),
    );
    out
}

pub(super) fn swiglu_backward(joined: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (joined, grad) = (into_contiguous(joined), into_contiguous(grad));
    let out = like(&joined);
    let (count, dim) = units(&grad);
    let columns = grad.shape()[1];
    swiglu_backward_kernel::launch(
        &out.client,
        count,
        dim,
        joined.required_address_type(),
        joined.into_tensor_arg(),
        grad.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        columns,
        elem(&out),
    );
    out
}

/// Value and moments after a step.
pub(super) fn adamw(
    state: [CubeTensor; 3],
    grad: CubeTensor,
    step: AdamWStep,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [value, first, second] = state.map(own);
    let grad = into_contiguous(grad);
    let (count, dim) = units(&value);
    adamw_kernel::launch(
        &value.client,
        count,
        dim,
        value.required_address_type(),
        value.clone().into_tensor_arg(),
        first.clone().into_tensor_arg(),
        second.clone().into_tensor_arg(),
        grad.into_tensor_arg(),
        step.grad_scale as f32,
        step.beta1 as f32,
        (1.0 - step.beta1) as f32,
        step.beta2 as f32,
        (1.0 - step.beta2) as f32,
        step.rate as f32,
        (1.0 / step.root_bias2) as f32,
        step.epsilon as f32,
        step.keep as f32,
    );
    (value, first, second)
}
