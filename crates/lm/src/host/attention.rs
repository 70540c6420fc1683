//! Attention of new tokens over the slots of their prefixes.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::pool::Layer;
use ops::exp;

/// Slots whose weights are held at once.
const BLOCK: usize = 64;
/// Products of queries with keys beyond which the cores share the work.
const WORTH_SHARING: usize = 1 << 15;

/// The sizes of a layer's heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    /// Number of key and value heads.
    pub(super) n_kv: usize,
    /// Query heads that share a key head.
    pub(super) groups: usize,
    /// Width of a head.
    pub(super) width: usize,
}

/// Mixes the values of each row's path by its queries.
///
/// `queries` has the rows' queries at the front of rows of `stride` floats; `mixed` becomes
/// `[rows, heads * width]`. A path is the slots that a row may look at, its own among them.
pub(super) fn attend<'p>(
    queries: &[f32],
    stride: usize,
    heads: Heads,
    layer: &Layer,
    path: impl Fn(usize) -> &'p [u32] + Sync,
    mixed: &mut [f32],
) {
    let arch = Arch::new();
    let span = heads.groups * heads.width;
    let one = |index: usize, mixed: &mut [f32]| {
        let (row, head) = (index / heads.n_kv, index % heads.n_kv);
        arch.dispatch(Group {
            queries: &queries[row * stride + head * span..][..span],
            layer,
            pool_width: heads.n_kv * heads.width,
            offset: head * heads.width,
            width: heads.width,
            path: path(row),
            mixed,
        });
    };
    let rows = mixed.len() / (heads.n_kv * span);
    let products: usize = (0..rows).map(|row| path(row).len()).sum::<usize>() * heads.n_kv * span;
    if products <= WORTH_SHARING {
        for (index, mixed) in mixed.chunks_exact_mut(span).enumerate() {
            one(index, mixed);
        }
    } else {
        let chunks = mixed.par_chunks_exact_mut(span).enumerate();
        chunks.for_each(|(index, mixed)| one(index, mixed));
    }
}

/// One row's query heads that share a key head.
struct Group<'a> {
    /// `[groups, width]`.
    queries: &'a [f32],
    layer: &'a Layer,
    pool_width: usize,
    /// Where the head begins within a slot.
    offset: usize,
    width: usize,
    path: &'a [u32],
    /// `[groups, width]`.
    mixed: &'a mut [f32],
}

impl WithSimd for Group<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let slot = |side: &'_ [f32], slot: u32| -> std::ops::Range<usize> {
            let from = slot as usize * self.pool_width + self.offset;
            debug_assert!(from + self.width <= side.len(), "the slot has been written");
            from..from + self.width
        };
        let (keys, values) = (&self.layer.keys[..], &self.layer.values[..]);
        let queries = self.queries.chunks_exact(self.width);
        for (query, mixed) in queries.zip(self.mixed.chunks_exact_mut(self.width)) {
            // The softmax by blocks: sums so far are kept relative to the largest score so far.
            let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0_f32);
            mixed.fill(0.0);
            for path in self.path.chunks(BLOCK) {
                let mut weights = [0.0_f32; BLOCK];
                let mut highest = largest;
                for (weight, &at) in weights.iter_mut().zip(path) {
                    *weight = dot(simd, query, &keys[slot(keys, at)]);
                    highest = highest.max(*weight);
                }
                let shrink = exp(largest - highest);
                if shrink < 1.0 {
                    total *= shrink;
                    scale(simd, shrink, mixed);
                }
                largest = highest;
                for weight in &mut weights {
                    *weight = exp(*weight - highest);
                }
                for (&weight, &at) in weights.iter().zip(path) {
                    total += weight;
                    add_scaled(simd, weight, &values[slot(values, at)], mixed);
                }
            }
            scale(simd, 1.0 / total, mixed);
        }
    }
}

#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sums = [simd.splat_f32s(0.0); 2];
    let (pairs_a, pairs_b) = (a.chunks_exact(2), b.chunks_exact(2));
    let odd = pairs_a.remainder().iter().zip(pairs_b.remainder());
    for (a, b) in odd {
        sums[0] = simd.mul_add_f32s(*a, *b, sums[0]);
    }
    for (a, b) in pairs_a.zip(pairs_b) {
        sums[0] = simd.mul_add_f32s(a[0], b[0], sums[0]);
        sums[1] = simd.mul_add_f32s(a[1], b[1], sums[1]);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1])) + rest
}

#[inline(always)]
fn scale<S: Simd>(simd: S, factor: f32, x: &mut [f32]) {
    let (x, rest) = S::as_mut_simd_f32s(x);
    let splat = simd.splat_f32s(factor);
    for x in x {
        *x = simd.mul_f32s(*x, splat);
    }
    for x in rest {
        *x *= factor;
    }
}

/// Adds `factor * x` to `y`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, factor: f32, x: &[f32], y: &mut [f32]) {
    let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(x), S::as_mut_simd_f32s(y));
    let splat = simd.splat_f32s(factor);
    for (x, y) in x.iter().zip(y) {
        *y = simd.mul_add_f32s(*x, splat, *y);
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        *y += factor * x;
    }
}
