//! Attention of new tokens over the slots of their prefixes.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::pool::Layer;
use ops::exp;

/// Slots whose weights are held at once.
const BLOCK: usize = 64;
/// The most heads of a row that are taken together.
const HEADS: usize = 16;
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
    let n_heads = heads.n_kv * heads.groups;
    let span = n_heads * heads.width;
    let rows = mixed.len() / span;
    let products: usize = (0..rows).map(|row| path(row).len()).sum::<usize>() * span;
    let shared = products > WORTH_SHARING;
    // Heads lie side by side in a slot: those of a part are read in one go. A row is divided only where
    // a few rows would leave a core without work.
    let threads = rayon::current_num_threads();
    let even = rows.is_multiple_of(threads) || rows >= 4 * threads;
    let parts = if shared && !even { threads } else { 1 };
    let count = n_heads.div_ceil(parts).min(HEADS);
    let part = |row: usize, part: usize, mixed: &mut [f32]| {
        let first = part * count;
        let from = row * stride + first * heads.width;
        arch.dispatch(Part {
            queries: &queries[from..][..mixed.len()],
            first,
            heads,
            layer,
            path: path(row),
            mixed,
        });
    };
    if shared {
        let by_row = mixed.par_chunks_exact_mut(span).enumerate();
        by_row.for_each(|(row, mixed)| {
            let parts = mixed.par_chunks_mut(count * heads.width).enumerate();
            parts.for_each(|(index, mixed)| part(row, index, mixed));
        });
    } else {
        for (row, mixed) in mixed.chunks_exact_mut(span).enumerate() {
            for (index, mixed) in mixed.chunks_mut(count * heads.width).enumerate() {
                part(row, index, mixed);
            }
        }
    }
}

/// Some neighbouring query heads of one row.
struct Part<'a> {
    /// `[heads, width]`.
    queries: &'a [f32],
    /// The number of the first.
    first: usize,
    heads: Heads,
    layer: &'a Layer,
    path: &'a [u32],
    /// `[heads, width]`.
    mixed: &'a mut [f32],
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Heads {
            n_kv,
            groups,
            width,
        } = self.heads;
        let count = self.queries.len() / width;
        // The place of a query head's keys and values in a slot.
        let slot = |at: u32, head: usize| {
            let from = (at as usize * n_kv + (self.first + head) / groups) * width;
            from..from + width
        };
        let (keys, values) = (&self.layer.keys[..], &self.layer.values[..]);
        // The softmax by blocks: sums so far are kept relative to the largest score so far.
        let mut largest = [f32::NEG_INFINITY; HEADS];
        let mut totals = [0.0_f32; HEADS];
        let mut weights = [[0.0_f32; BLOCK]; HEADS];
        self.mixed.fill(0.0);
        for path in self.path.chunks(BLOCK) {
            for (index, &at) in path.iter().enumerate() {
                let queries = self.queries.chunks_exact(width);
                for (head, (query, weights)) in queries.zip(&mut weights).enumerate() {
                    weights[index] = dot(simd, query, &keys[slot(at, head)]);
                }
            }
            for head in 0..count {
                let weights = &mut weights[head][..path.len()];
                let highest = weights.iter().fold(largest[head], |a, &b| a.max(b));
                let shrink = exp(largest[head] - highest);
                if shrink < 1.0 {
                    totals[head] *= shrink;
                    scale(simd, shrink, &mut self.mixed[head * width..][..width]);
                }
                largest[head] = highest;
                for weight in weights.iter_mut() {
                    *weight = exp(*weight - highest);
                }
                totals[head] += weights.iter().sum::<f32>();
            }
            for (index, &at) in path.iter().enumerate() {
                let mixed = self.mixed.chunks_exact_mut(width);
                for (head, (mixed, weights)) in mixed.zip(&weights).enumerate() {
                    add_scaled(simd, weights[index], &values[slot(at, head)], mixed);
                }
            }
        }
        for (mixed, total) in self.mixed.chunks_exact_mut(width).zip(totals) {
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
