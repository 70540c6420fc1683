//! The inner layer of a Llama-like MLP, gate and other factor side by side.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::memory::{Window, tensor, values, written};
use super::norm::pieces;
use crate::exp::exp;

/// `[rows, 2 n]` to `[rows, n]`.
#[expect(unsafe_code, reason = "rows are written to fresh memory")]
pub(super) fn swiglu(joined: &FlexTensor) -> FlexTensor {
    let joined = joined.to_contiguous();
    let (rows, n) = (joined.shape()[0], joined.shape()[1] / 2);
    let joined = values(&joined);
    // SAFETY: the pieces are all rows, and each is written.
    let out = unsafe {
        written(rows * n, |at| {
            let out = Window::new(at, rows, n);
            pieces(rows, n).into_par_iter().for_each(|rows| {
                let mut out = out.part(rows.clone(), 0..n);
                for (row, at) in rows.enumerate() {
                    let (gate, up) = joined[2 * n * at..][..2 * n].split_at(n);
                    let out = out.row(row);
                    Arch::new().dispatch(SwiGlu { gate, up, out });
                }
            });
        })
    };
    tensor(out, [rows, n])
}

/// The gradient with respect to both factors, `[rows, 2 n]`.
#[expect(unsafe_code, reason = "rows are written to fresh memory")]
pub(super) fn swiglu_backward(joined: &FlexTensor, grad: &FlexTensor) -> FlexTensor {
    let (joined, grad) = (joined.to_contiguous(), grad.to_contiguous());
    let (rows, n) = (joined.shape()[0], joined.shape()[1] / 2);
    let (joined, grad) = (values(&joined), values(&grad));
    // SAFETY: the pieces are all rows, and each is written.
    let out = unsafe {
        written(rows * 2 * n, |at| {
            let out = Window::new(at, rows, 2 * n);
            pieces(rows, 2 * n).into_par_iter().for_each(|rows| {
                let mut out = out.part(rows.clone(), 0..2 * n);
                for (row, at) in rows.enumerate() {
                    let (gate, up) = joined[2 * n * at..][..2 * n].split_at(n);
                    let grad = &grad[n * at..][..n];
                    let (for_gate, for_up) = out.row(row).split_at_mut(n);
                    Arch::new().dispatch(SwiGluBackward {
                        gate,
                        up,
                        grad,
                        for_gate,
                        for_up,
                    });
                }
            });
        })
    };
    tensor(out, [rows, 2 * n])
}

struct SwiGlu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

struct SwiGluBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    grad: &'a [f32],
    for_gate: &'a mut [f32],
    for_up: &'a mut [f32],
}

impl WithSimd for SwiGluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let out = self.for_gate.iter_mut().zip(self.for_up);
        let inputs = self.gate.iter().zip(self.up).zip(self.grad);
        for ((for_gate, for_up), ((&gate, &up), &grad)) in out.zip(inputs) {
            let open = 1.0 / (1.0 + exp(-gate));
            *for_up = grad * gate * open;
            // The slope of g σ is σ (1 + g (1 − σ)).
            *for_gate = grad * up * open * gate.mul_add(1.0 - open, 1.0);
        }
    }
}
