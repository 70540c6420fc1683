//! The head: logits by the tile, and what is wanted of them.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::LANES;
use super::gemm::{Into, Matrix, new_product, shared_product, with_matrix};
use super::memory::{Window, tensor, values, written};
use crate::exp::exp;
use crate::head::STATS;

/// Logits of a tile: 64 MB. The weights are read once for each tile, so that a tile has some hundred
/// rows; and a batch whose logits are one tile keeps them for the gradient.
const TILE: usize = 1 << 24;

/// What the forward pass leaves for the way back.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// `exp(z − max)` of all rows, if they are one tile.
    exps: Option<std::sync::Arc<Vec<f32>>>,
    /// The inverse of each row's sum of them.
    shares: Vec<f32>,
}

/// Logps `[n]`, statistics `[STATS, n]`, and what the way back needs.
pub(crate) fn head(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    tied: bool,
    targets: &FlexTensor,
    keep: bool,
) -> (FlexTensor, FlexTensor, Kept) {
    let hidden = hidden.to_contiguous();
    let n = hidden.shape()[0];
    let targets = indices(targets);
    let mut logps = Vec::with_capacity(n);
    let mut stats = vec![0.0; STATS * n];
    let mut shares = Vec::with_capacity(n);
    let mut exps = None;
    with_matrix(weight, |weight| {
        let weight = if tied { weight.transposed() } else { weight };
        let vocab = weight.dims().1;
        let rows = rows_of_tile(n, vocab);
        for (index, (hidden, targets)) in tiles(&hidden, rows).zip(targets.chunks(rows)).enumerate()
        {
            let mut logits = new_product(hidden, weight);
            let read: Vec<Read> = logits
                .par_chunks_mut(vocab)
                .zip(targets)
                .map(|(row, &target)| Arch::new().dispatch(ReadRow { row, target }))
                .collect();
            for (row, read) in read.into_iter().enumerate() {
                logps.push(read.logp);
                shares.push(read.share);
                for (stat, x) in read.stats.into_iter().enumerate() {
                    stats[stat * n + index * rows + row] = x;
                }
            }
            if keep && rows >= n {
                exps = Some(std::sync::Arc::new(logits));
            }
        }
    });
    let kept = Kept { exps, shares };
    (tensor(logps, [n]), tensor(stats, [STATS, n]), kept)
}

/// Gradients with respect to the hidden states and the weight, from that with respect to the logps.
#[expect(unsafe_code, reason = "products fill fresh memory")]
pub(crate) fn head_backward(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    tied: bool,
    targets: &FlexTensor,
    kept: Kept,
    grad: &FlexTensor,
    wanted: (bool, bool),
) -> (Option<FlexTensor>, Option<FlexTensor>) {
    let (hidden, grad) = (hidden.to_contiguous(), grad.to_contiguous());
    let [n, width] = [hidden.shape()[0], hidden.shape()[1]];
    let targets = indices(targets);
    let grad = values(&grad);
    let weight_shape = [weight.shape()[0], weight.shape()[1]];
    let mut kept_exps = kept.exps;
    let (for_hidden, for_weight) = with_matrix(weight, |weight| {
        let weight = if tied { weight.transposed() } else { weight };
        let vocab = weight.dims().1;
        let rows = rows_of_tile(n, vocab);
        let mut for_hidden = Vec::with_capacity(if wanted.0 { n * width } else { 0 });
        let mut run = |for_weight: *mut f32| {
            for (index, tile) in tiles(&hidden, rows).enumerate() {
                let first = index * rows;
                let count = tile.dims().0;
                let mut slopes = match kept_exps.take() {
                    Some(exps) => std::sync::Arc::unwrap_or_clone(exps),
                    None => {
                        let mut logits = new_product(tile, weight);
                        logits.par_chunks_mut(vocab).for_each(|row| {
                            Arch::new().dispatch(Exps(row));
                        });
                        logits
                    }
                };
                slopes
                    .par_chunks_mut(vocab)
                    .enumerate()
                    .for_each(|(row, slopes)| {
                        let (grad, share) = (grad[first + row], kept.shares[first + row]);
                        let by = -grad * share;
                        Arch::new().dispatch(Scale { row: slopes, by });
                        slopes[targets[first + row]] += grad;
                    });
                let slopes = Matrix::new(&slopes, count, vocab);
                if wanted.0 {
                    for_hidden.append(&mut new_product(slopes, weight.transposed()));
                }
                if wanted.1 {
                    let into = if index == 0 { Into::Fresh } else { Into::Sum };
                    // SAFETY: the memory has room for the weight's gradient, and the first tile's
                    // product writes all of it.
                    let out = unsafe { Window::new(for_weight, weight_shape[0], weight_shape[1]) };
                    if tied {
                        shared_product(out, into, slopes.transposed(), tile);
                    } else {
                        shared_product(out, into, tile.transposed(), slopes);
                    }
                }
            }
        };
        let for_weight = if wanted.1 && n > 0 {
            // SAFETY: there is a first tile, which fills it.
            Some(unsafe { written(weight_shape[0] * weight_shape[1], &mut run) })
        } else {
            run(std::ptr::null_mut());
            wanted
                .1
                .then(|| vec![0.0; weight_shape[0] * weight_shape[1]])
        };
        (for_hidden, for_weight)
    });
    (
        wanted.0.then(|| tensor(for_hidden, [n, width])),
        for_weight.map(|for_weight| tensor(for_weight, weight_shape)),
    )
}

fn rows_of_tile(n: usize, vocab: usize) -> usize {
    (TILE / vocab).clamp(1, n.max(1))
}

fn tiles(hidden: &FlexTensor, rows: usize) -> impl Iterator<Item = Matrix<'_>> {
    let width = hidden.shape()[1];
    values(hidden)
        .chunks(rows * width)
        .map(move |tile| Matrix::new(tile, tile.len() / width, width))
}

/// Whole numbers, as indices.
fn indices(tensor: &FlexTensor) -> Vec<usize> {
    let tensor = tensor.to_contiguous();
    let index = |id: i64| usize::try_from(id).expect("token ids are not negative");
    match tensor.dtype() {
        DType::I32 => {
            let ids = tensor.as_slice::<i32>().expect("contiguous, and of i32");
            ids.iter().map(|&id| index(i64::from(id))).collect()
        }
        DType::I64 => {
            let ids = tensor.as_slice::<i64>().expect("contiguous, and of i64");
            ids.iter().map(|&id| index(id)).collect()
        }
        other => panic!("expected token ids of i32 or i64, got {other:?}"),
    }
}

/// What is read off a row of logits.
struct Read {
    logp: f32,
    share: f32,
    stats: [f32; STATS],
}

struct ReadRow<'a> {
    /// Logits; `exp(z − max)` takes their place.
    row: &'a mut [f32],
    target: usize,
}

impl WithSimd for ReadRow<'_> {
    type Output = Read;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> Read {
        let Self { row, target } = self;
        let largest = max(row);
        // An id at or above the target's logit before it takes the first place from it.
        let best = row.iter().position(|&z| z >= largest);
        let picked = row[target] - largest;
        let (chunks, rest) = row.as_chunks_mut::<LANES>();
        let mut sums = [[0.0_f32; LANES]; 3];
        for chunk in chunks {
            for (lane, x) in chunk.iter_mut().enumerate() {
                let z = *x - largest;
                let e = exp(z);
                *x = e;
                sums[0][lane] += e;
                sums[1][lane] += z;
                sums[2][lane] = e.mul_add(z, sums[2][lane]);
            }
        }
        for (lane, x) in rest.iter_mut().enumerate() {
            let z = *x - largest;
            let e = exp(z);
            *x = e;
            sums[0][lane] += e;
            sums[1][lane] += z;
            sums[2][lane] += e * z;
        }
        let [total, logits, moment] = sums.map(|lanes| lanes.iter().sum::<f32>());
        let log_total = total.ln();
        Read {
            logp: picked - log_total,
            share: 1.0 / total,
            stats: [
                log_total - moment / total,
                logits / row.len() as f32 + largest,
                if best == Some(target) { 1.0 } else { 0.0 },
            ],
        }
    }
}

#[inline(always)]
fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut highest = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (highest, &z) in highest.iter_mut().zip(chunk) {
            *highest = if z > *highest { z } else { *highest };
        }
    }
    let all = highest.iter().chain(rest);
    all.fold(
        f32::NEG_INFINITY,
        |most, &z| if z > most { z } else { most },
    )
}

/// `exp(z − max)` in place of logits.
struct Exps<'a>(&'a mut [f32]);

impl WithSimd for Exps<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let largest = max(self.0);
        for x in self.0 {
            *x = exp(*x - largest);
        }
    }
}

struct Scale<'a> {
    row: &'a mut [f32],
    by: f32,
}

impl WithSimd for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for x in self.row {
            *x *= self.by;
        }
    }
}
