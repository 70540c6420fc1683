//! A linear layer and its gradients.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{Into, new_product, shared_product, with_matrix};
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
