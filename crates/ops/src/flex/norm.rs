//! Root-mean-square norms and their gradients.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::linear::add_up;
use super::memory::{Window, tensor, values, written};
use super::{LANES, PIECE};

/// `x / rms(x) · weight`, row by row.
#[expect(unsafe_code, reason = "rows are written to fresh memory")]
pub(super) fn rms_norm(x: &FlexTensor, weight: &FlexTensor, eps: f32) -> FlexTensor {
    let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
    let shape = [x.shape()[0], x.shape()[1]];
    let (x, weight) = (values(&x), values(&weight));
    let n = weight.len();
    // SAFETY: the pieces are all rows, and each is written.
    let out = unsafe {
        written(x.len(), |at| {
            let out = Window::new(at, shape[0], n);
            pieces(shape[0], n).into_par_iter().for_each(|rows| {
                let x = &x[rows.start * n..rows.end * n];
                let out = out.part(rows, 0..n);
                Arch::new().dispatch(Norm {
                    x,
                    weight,
                    eps,
                    out,
                });
            });
        })
    };
    tensor(out, shape)
}

/// Gradients with respect to `x` and the weight.
#[expect(unsafe_code, reason = "rows are written to fresh memory")]
pub(super) fn rms_norm_backward(
    x: &FlexTensor,
    weight: &FlexTensor,
    eps: f32,
    grad: &FlexTensor,
) -> (FlexTensor, FlexTensor) {
    let (x, weight, grad) = (
        x.to_contiguous(),
        weight.to_contiguous(),
        grad.to_contiguous(),
    );
    let shape = [x.shape()[0], x.shape()[1]];
    let (x, weight, grad) = (values(&x), values(&weight), values(&grad));
    let n = weight.len();
    let mut for_weight = Vec::new();
    // SAFETY: the pieces are all rows, and each is written.
    let for_x = unsafe {
        written(x.len(), |at| {
            let out = Window::new(at, shape[0], n);
            for_weight = pieces(shape[0], n)
                .into_par_iter()
                .map(|rows| {
                    let place = rows.start * n..rows.end * n;
                    let mut for_weight = vec![0.0; n];
                    Arch::new().dispatch(NormBackward {
                        x: &x[place.clone()],
                        weight,
                        grad: &grad[place],
                        eps,
                        for_x: out.part(rows, 0..n),
                        for_weight: &mut for_weight,
                    });
                    for_weight
                })
                .collect();
        })
    };
    (tensor(for_x, shape), tensor(add_up(for_weight, n), [n]))
}

/// Rows for a thread to take at a time.
pub(super) fn pieces(rows: usize, row: usize) -> Vec<std::ops::Range<usize>> {
    let size = PIECE.div_ceil(row.max(1));
    (0..rows)
        .step_by(size)
        .map(|start| start..(start + size).min(rows))
        .collect()
}

/// `Σ a b`, in vector registers.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    folded(sums) + rest
}

/// The sum of all lanes, half with half: no number waits for more than a few others.
#[inline(always)]
fn folded(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// What a row is divided by, inverted: the square root of the mean square.
#[inline(always)]
fn inverse(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: Window,
}

impl WithSimd for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self {
            x,
            weight,
            eps,
            mut out,
        } = self;
        for (row, x) in x.chunks_exact(weight.len()).enumerate() {
            let scale = inverse(x, eps);
            let out = out.row(row).iter_mut();
            for ((out, x), weight) in out.zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        }
    }
}

struct NormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    grad: &'a [f32],
    eps: f32,
    for_x: Window,
    for_weight: &'a mut [f32],
}

impl WithSimd for NormBackward<'_> {
    type Output = ();

    /// With `s = 1 / rms(x)`: `s w g − x s³ mean(x w g)`, and `Σ x s g`.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self {
            x,
            weight,
            grad,
            eps,
            mut for_x,
            for_weight,
        } = self;
        let n = weight.len();
        for (row, (x, grad)) in x.chunks_exact(n).zip(grad.chunks_exact(n)).enumerate() {
            let scale = inverse(x, eps);
            let for_x = for_x.row(row);
            for ((out, grad), weight) in for_x.iter_mut().zip(grad).zip(weight) {
                *out = grad * weight;
            }
            let along = dot(x, for_x) / n as f32 * scale * scale * scale;
            for (out, x) in for_x.iter_mut().zip(x) {
                *out = *out * scale - x * along;
            }
            for ((sum, x), grad) in for_weight.iter_mut().zip(x).zip(grad) {
                *sum = (x * scale).mul_add(*grad, *sum);
            }
        }
    }
}
