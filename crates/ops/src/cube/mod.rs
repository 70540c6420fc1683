//! The operations on cards: kernels in `CubeCL`, which become CUDA or WGSL.
//!
//! What Burn composes of a dozen passes over memory is one here, and sums are in f32 whatever the
//! numbers are kept in. Matrix products are by kernels of our choice rather than by trying them out: a
//! run starts at once, computes the same bits again, and f32 is f32 and never TF32.

mod attention;
mod elements;
mod head;
mod product;
mod rows;

use burn::backend::TensorMetadata;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::ir::ElemType;
use cubecl::prelude::{CubeCount, CubeDim};

pub(crate) use self::attention::{Kept, attention, attention_backward};
pub(crate) use self::head::{Logits, head, head_backward};
use crate::AdamWStep;
use crate::backend::Ops;
use crate::composed;

#[cfg(feature = "wgpu")]
pub(crate) type Card = burn::backend::Wgpu;
// The two are one type of backend.
#[cfg(not(feature = "wgpu"))]
pub(crate) type Card = burn::backend::Cuda;

impl Ops for Card {
    fn masked_softmax(scores: FloatTensor<Self>, hidden: BoolTensor<Self>) -> FloatTensor<Self> {
        rows::masked_softmax(scores, hidden)
    }

    fn softmax_backward(weights: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        rows::softmax_backward(weights, grad)
    }

    fn swiglu(joined: FloatTensor<Self>) -> FloatTensor<Self> {
        elements::swiglu(joined)
    }

    fn swiglu_backward(joined: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        elements::swiglu_backward(joined, grad)
    }

    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        product::product(a, b)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        rows::rms_norm(x, weight, eps as f32)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (for_x, products) = rows::rms_norm_backward(x, weight, eps as f32, grad);
        (for_x, composed::sum_of_rows::<Self>(products))
    }

    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if [&value, &grad, &first, &second]
            .iter()
            .any(|x| x.dtype != DType::F32)
        {
            return composed::adamw::<Self>(value, grad, (first, second), step);
        }
        elements::adamw([value, first, second], grad, step)
    }
}

/// Fresh memory of a shape, row by row: what Burn makes by itself may have gaps between rows, on CUDA
/// where they are no multiple of some bytes.
fn fresh(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}

/// Fresh memory for as many numbers as a tensor has.
fn like(tensor: &CubeTensor) -> CubeTensor {
    fresh(tensor, tensor.shape(), tensor.dtype)
}

/// The tensor row by row, in memory that nobody else holds.
fn own(tensor: CubeTensor) -> CubeTensor {
    let tensor = into_contiguous(tensor);
    if tensor.can_mut() {
        tensor
    } else {
        into_contiguous(tensor.copy())
    }
}

/// How many units of how many cubes compute a number each.
fn units(of: &CubeTensor) -> (CubeCount, CubeDim) {
    let numbers = of.shape().num_elements();
    let dim = CubeDim::new(&of.client, numbers);
    (calculate_cube_count_elemwise(&of.client, numbers, dim), dim)
}

/// What a kernel reads a tensor's numbers as.
fn elem(tensor: &CubeTensor) -> ElemType {
    dtype_to_storage_type(tensor.dtype)
}
