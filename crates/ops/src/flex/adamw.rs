//! AdamW in one pass, the sum of gradients before it, and the norm they are clipped by.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::PIECE;
use super::linear::Add;
use super::memory::{own, values};
use super::norm::dot;
use crate::AdamWStep;

/// Updates value and moments where they stand, if nobody else holds them.
pub(super) fn adamw(
    value: FlexTensor,
    grad: &FlexTensor,
    moments: (FlexTensor, FlexTensor),
    step: AdamWStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (mut value, mut first, mut second) = (own(value), own(moments.0), own(moments.1));
    let grad = grad.to_contiguous();
    let n = grad.shape().num_elements();
    let grads = values(&grad).par_chunks(PIECE);
    value.storage_mut::<f32>()[..n]
        .par_chunks_mut(PIECE)
        .zip(first.storage_mut::<f32>().par_chunks_mut(PIECE))
        .zip(second.storage_mut::<f32>().par_chunks_mut(PIECE))
        .zip(grads)
        .for_each(|(((value, first), second), grad)| {
            Arch::new().dispatch(Update {
                value,
                first,
                second,
                grad,
                step,
            });
        });
    (value, first, second)
}

/// `sum + x`, where `sum` stands if nobody else holds it.
pub(super) fn accumulate(sum: FlexTensor, x: &FlexTensor) -> FlexTensor {
    let (mut sum, x) = (own(sum), x.to_contiguous());
    let rows = values(&x).par_chunks(PIECE);
    let sums = sum.storage_mut::<f32>().par_chunks_mut(PIECE);
    sums.zip(rows).for_each(|(sums, row)| {
        Arch::new().dispatch(Add { sums, row });
    });
    sum
}

/// `Σ x²`, in f64 from piece to piece.
pub(super) fn sum_of_squares(x: &FlexTensor) -> f64 {
    let x = x.to_contiguous();
    let parts: Vec<f64> = values(&x)
        .par_chunks(PIECE)
        .map(|x| f64::from(Arch::new().dispatch(Squares(x))))
        .collect();
    parts.iter().sum()
}

struct Squares<'a>(&'a [f32]);

impl WithSimd for Squares<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> f32 {
        dot(self.0, self.0)
    }
}

struct Update<'a> {
    value: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    grad: &'a [f32],
    step: AdamWStep,
}

impl WithSimd for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let step = self.step;
        let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
        let (share1, share2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
        let (grad_scale, keep) = (step.grad_scale as f32, step.keep as f32);
        let (rate, epsilon) = (step.rate as f32, step.epsilon as f32);
        let root_bias2 = step.root_bias2 as f32;
        let moments = self.first.iter_mut().zip(self.second);
        let places = self.value.iter_mut().zip(self.grad).zip(moments);
        for ((value, grad), (first, second)) in places {
            let grad = grad * grad_scale;
            *first = *first * beta1 + grad * share1;
            *second = *second * beta2 + grad * grad * share2;
            let change = *first * rate / (second.sqrt() / root_bias2 + epsilon);
            *value = *value * keep - change;
        }
    }
}
