//! A linear layer and its gradients.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{Into, Matrix, new_product, shared_product, with_matrix};
use super::memory::{Window, tensor, values, written};

/// `x w + b`: the bias lies in the output before the product is added to it.
#[expect(unsafe_code, reason = "rows of the bias fill fresh memory")]
pub(super) fn linear(x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
    let (rows, columns) = (x.shape()[0], weight.shape()[1]);
    let out = with_matrix(x, |x| {
        with_matrix(weight, |weight| match bias {
            None => new_product(x, weight),
            Some(bias) => {
                let bias = bias.to_contiguous();
                let bias = values(&bias);
                // SAFETY: every row is written.
                unsafe {
                    written(rows * columns, |at| {
                        let mut out = Window::new(at, rows, columns);
                        for row in 0..rows {
                            out.row(row).copy_from_slice(bias);
                        }
                        shared_product(out, Into::Sum, x, weight);
                    })
                }
            }
        })
    });
    tensor(out, [rows, columns])
}

/// `x w` of several weights side by side, each product where it belongs.
#[expect(unsafe_code, reason = "products fill columns of fresh memory")]
pub(crate) fn joined(x: &FlexTensor, weights: &[FlexTensor]) -> FlexTensor {
    let rows = x.shape()[0];
    let outputs = weights.iter().map(|weight| weight.shape()[1]);
    let columns = outputs.sum::<usize>();
    let out = with_matrix(x, |x| {
        // SAFETY: a fresh product writes every number of its columns, which are nobody else's.
        unsafe {
            written(rows * columns, |at| {
                let out = Window::new(at, rows, columns);
                for (weight, columns) in weights.iter().zip(places(weights)) {
                    with_matrix(weight, |weight| {
                        shared_product(out.part(0..rows, columns), Into::Fresh, x, weight);
                    });
                }
            })
        }
    });
    tensor(out, [rows, columns])
}

/// The gradient of [`joined`] with respect to `x`.
#[expect(unsafe_code, reason = "products fill fresh memory")]
pub(crate) fn joined_backward_input(grad: &FlexTensor, weights: &[FlexTensor]) -> FlexTensor {
    let grad = grad.to_contiguous();
    let (rows, inputs) = (grad.shape()[0], weights[0].shape()[0]);
    // SAFETY: the first product writes every number.
    let out = unsafe {
        written(rows * inputs, |at| {
            for (index, (weight, columns)) in weights.iter().zip(places(weights)).enumerate() {
                let into = if index == 0 { Into::Fresh } else { Into::Sum };
                let out = Window::new(at, rows, inputs);
                let grad = columns_of(&grad, columns);
                with_matrix(weight, |weight| {
                    shared_product(out, into, grad, weight.transposed());
                });
            }
        })
    };
    tensor(out, [rows, inputs])
}

/// The gradient of [`joined`] with respect to the weight that the `index`th columns come from.
pub(crate) fn joined_backward_weight(
    x: &FlexTensor,
    grad: &FlexTensor,
    weights: &[FlexTensor],
    index: usize,
) -> FlexTensor {
    let grad = grad.to_contiguous();
    let columns = places(weights).nth(index);
    let grad = columns_of(&grad, columns.expect("one of the weights"));
    let shape = [x.shape()[1], grad.dims().1];
    let out = with_matrix(x, |x| new_product(x.transposed(), grad));
    tensor(out, shape)
}

/// The columns of each weight's outputs.
fn places(weights: &[FlexTensor]) -> impl Iterator<Item = Range<usize>> {
    weights.iter().scan(0, |next, weight| {
        let first = *next;
        *next += weight.shape()[1];
        Some(first..*next)
    })
}

/// Columns of a contiguous tensor.
fn columns_of(tensor: &FlexTensor, columns: Range<usize>) -> Matrix<'_> {
    let shape = tensor.shape();
    let values = values(tensor);
    // No rows hold no columns either.
    let first = columns.start.min(values.len());
    Matrix::strided(&values[first..], shape[0], columns.len(), shape[1])
}

/// `g wᵀ`, of the gradient `g` of what came out.
pub(super) fn backward_input(grad: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let shape = [grad.shape()[0], weight.shape()[0]];
    let out = with_matrix(grad, |grad| {
        with_matrix(weight, |weight| new_product(grad, weight.transposed()))
    });
    tensor(out, shape)
}

/// `xᵀ g`.
pub(super) fn backward_weight(x: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let shape = [x.shape()[1], grad.shape()[1]];
    let out = with_matrix(x, |x| {
        with_matrix(grad, |grad| new_product(x.transposed(), grad))
    });
    tensor(out, shape)
}

/// The sum of the rows.
pub(super) fn backward_bias(grad: &FlexTensor) -> FlexTensor {
    let grad = grad.to_contiguous();
    let columns = grad.shape()[1];
    tensor(column_sums(values(&grad), columns), [columns])
}

/// Sums over the rows of `[rows, columns]`.
fn column_sums(rows: &[f32], columns: usize) -> Vec<f32> {
    /// Rows that one thread adds up at a time.
    const ROWS: usize = 64;
    let parts: Vec<Vec<f32>> = rows
        .par_chunks(ROWS * columns)
        .map(|rows| {
            let mut sums = vec![0.0; columns];
            for row in rows.chunks_exact(columns) {
                let sums = &mut sums;
                Arch::new().dispatch(Add { sums, row });
            }
            sums
        })
        .collect();
    add_up(parts, columns)
}

/// The sum of vectors, in their order.
pub(super) fn add_up(parts: Vec<Vec<f32>>, n: usize) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut sums = parts.next().unwrap_or_else(|| vec![0.0; n]);
    for row in parts {
        Arch::new().dispatch(Add {
            sums: &mut sums,
            row: &row,
        });
    }
    sums
}

pub(super) struct Add<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) row: &'a [f32],
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for (sum, x) in self.sums.iter_mut().zip(self.row) {
            *sum += x;
        }
    }
}
