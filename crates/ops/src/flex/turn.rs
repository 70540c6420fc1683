//! Heads of tokens, turned by their positions: rotary embeddings.

use pulp::{Simd, WithSimd};

use super::gemm::Matrix;
use super::memory::Window;
use crate::attention::Turns;

/// Many rows in one call: a row is too short for a call of its own.
pub(super) struct Turn<'a> {
    pub(super) turns: Option<&'a Turns>,
    /// Flat place of the first token.
    pub(super) first: usize,
    /// `[tokens, width]`.
    pub(super) x: Matrix<'a>,
    pub(super) out: Window,
    pub(super) way: f32,
    pub(super) scale: f32,
}

impl WithSimd for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (cos_scale, sin_scale) = (self.scale, self.way * self.scale);
        let tokens = self.x.rows;
        let (cos, sin) = match self.turns {
            Some(turns) => turns.of(self.first, tokens),
            None => (&[][..], &[][..]),
        };
        let half = cos.len() / tokens.max(1);
        for row in 0..tokens {
            let x = &self.x.values[row * self.x.row_step..][..self.x.columns];
            let out = self.out.row(row);
            let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
            let (x, x_rest) = x.split_at(2 * half);
            let (out, out_rest) = out.split_at_mut(2 * half);
            for (out, x) in out_rest.iter_mut().zip(x_rest) {
                *out = x * self.scale;
            }
            let (x1, x2) = x.split_at(half);
            let (out1, out2) = out.split_at_mut(half);
            let lanes = [cos, sin, x1, x2].map(S::as_simd_f32s);
            let [
                (cos, cos_rest),
                (sin, sin_rest),
                (x1, x1_rest),
                (x2, x2_rest),
            ] = lanes;
            let (out1, out1_rest) = S::as_mut_simd_f32s(out1);
            let (out2, out2_rest) = S::as_mut_simd_f32s(out2);
            for (at, (out1, out2)) in out1.iter_mut().zip(out2).enumerate() {
                let cos = simd.mul_f32s(cos[at], simd.splat_f32s(cos_scale));
                let sin = simd.mul_f32s(sin[at], simd.splat_f32s(sin_scale));
                let (x1, x2) = (x1[at], x2[at]);
                *out1 = simd.sub_f32s(simd.mul_f32s(x1, cos), simd.mul_f32s(x2, sin));
                *out2 = simd.add_f32s(simd.mul_f32s(x2, cos), simd.mul_f32s(x1, sin));
            }
            for (at, (out1, out2)) in out1_rest.iter_mut().zip(out2_rest).enumerate() {
                let (cos, sin) = (cos_rest[at] * cos_scale, sin_rest[at] * sin_scale);
                *out1 = x1_rest[at] * cos - x2_rest[at] * sin;
                *out2 = x2_rest[at] * cos + x1_rest[at] * sin;
            }
        }
    }
}
