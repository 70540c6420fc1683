//! Attention by blocks of queries. Scores live for one block and one head, in the processor's cache;
//! the way back computes them again.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{Into, Matrix, product};
use super::memory::{Window, tensor, values, written};
use super::norm::dot;
use super::softmax_of_row;
use crate::attention::{Family, Heads, Spans, Turns};

/// Queries that are taken together: their scores against a few hundred keys stay in the first two
/// levels of the cache, and half a block is what causality wastes.
const BLOCK: usize = 64;

/// A family and a head of keys: what one thread does.
struct Task<'a> {
    family: &'a Family,
    key_head: usize,
    heads: Heads,
    /// `[tokens, joined]`.
    qkv: &'a [f32],
    turns: Option<&'a Turns>,
}

/// Memory of a thread, reused from task to task.
#[derive(Default)]
struct Scratch {
    /// Turned keys of the family, `[tokens, width]`.
    keys: Vec<f32>,
    /// A block of queries, turned and divided by `√width`.
    queries: Vec<f32>,
    /// Their scores, then their weights, `[block, keys]`.
    scores: Vec<f32>,
    /// Gradients of the weights, then of the scores.
    for_scores: Vec<f32>,
    for_queries: Vec<f32>,
    for_keys: Vec<f32>,
    for_values: Vec<f32>,
}

#[expect(
    unsafe_code,
    reason = "heads write to columns of one matrix side by side"
)]
pub(crate) fn attention(
    qkv: &FlexTensor,
    heads: Heads,
    spans: &Spans,
    turns: Option<&Turns>,
) -> FlexTensor {
    let qkv = qkv.to_contiguous();
    let (tokens, width) = (qkv.shape()[0], heads.queries * heads.width);
    let qkv = values(&qkv);
    // SAFETY: a task writes the columns of its heads in the rows of its family, and no two tasks
    // share both; rows of no family are cleared.
    let out = unsafe {
        written(tokens * width, |at| {
            let out = Window::new(at, tokens, width);
            clear_padding(out, spans);
            tasks(qkv, heads, spans, turns)
                .into_par_iter()
                .for_each_init(Scratch::default, |scratch, task| {
                    let group = heads.groups() * heads.width;
                    let columns = task.key_head * group..(task.key_head + 1) * group;
                    let out = out.part(task.family.tokens(), columns);
                    task.forward(scratch, out);
                });
        })
    };
    tensor(out, [tokens, width])
}

/// The gradient with respect to `qkv`, from that with respect to what came out.
#[expect(
    unsafe_code,
    reason = "heads write to columns of one matrix side by side"
)]
pub(crate) fn attention_backward(
    qkv: &FlexTensor,
    grad: &FlexTensor,
    heads: Heads,
    spans: &Spans,
    turns: Option<&Turns>,
) -> FlexTensor {
    let (qkv, grad) = (qkv.to_contiguous(), grad.to_contiguous());
    let tokens = qkv.shape()[0];
    let (qkv, grad) = (values(&qkv), values(&grad));
    // SAFETY: as above, of the columns of queries, keys and values.
    let out = unsafe {
        written(tokens * heads.joined(), |at| {
            let out = Window::new(at, tokens, heads.joined());
            clear_padding(out, spans);
            tasks(qkv, heads, spans, turns)
                .into_par_iter()
                .for_each_init(Scratch::default, |scratch, task| {
                    let columns = task.columns();
                    let part = |columns| out.part(task.family.tokens(), columns);
                    task.backward(scratch, grad, columns.map(part));
                });
        })
    };
    tensor(out, [tokens, heads.joined()])
}

/// Rows of no family become 0.
fn clear_padding(mut out: Window, spans: &Spans) {
    let (tokens, _) = out.dims();
    let mut next = 0;
    for family in spans.families() {
        let taken = family.tokens();
        for row in next..taken.start {
            out.row(row).fill(0.0);
        }
        next = taken.end;
    }
    for row in next..tokens {
        out.row(row).fill(0.0);
    }
}

fn tasks<'a>(
    qkv: &'a [f32],
    heads: Heads,
    spans: &'a Spans,
    turns: Option<&'a Turns>,
) -> Vec<Task<'a>> {
    spans
        .families()
        .iter()
        .filter(|family| !family.tokens().is_empty())
        .flat_map(|family| {
            (0..heads.keys).map(move |key_head| Task {
                family,
                key_head,
                heads,
                qkv,
                turns,
            })
        })
        .collect()
}

/// A block of queries of one head, and the keys they see, by place within the family.
struct Block {
    query_head: usize,
    queries: Range<usize>,
    /// Keys that all of them see.
    shared: Range<usize>,
    /// Keys of their own range, up to the last query's own.
    own: Range<usize>,
}

impl Block {
    fn keys(&self) -> usize {
        self.shared.len() + self.own.len()
    }

    /// Keys that the `i`th query sees.
    fn seen(&self, i: usize) -> usize {
        self.shared.len() + (self.queries.start + i + 1 - self.own.start)
    }

    /// The two ranges of keys, and where each begins among the scores.
    fn ranges(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let ranges = [
            (self.shared.clone(), 0),
            (self.own.clone(), self.shared.len()),
        ];
        ranges.into_iter().filter(|(range, _)| !range.is_empty())
    }
}

impl Task<'_> {
    fn blocks(&self) -> impl Iterator<Item = Block> {
        let start = self.family.tokens().start;
        let local = move |range: &Range<usize>| range.start - start..range.end - start;
        let prompt = local(&self.family.prompt);
        let alone = std::iter::once((0..0, prompt.clone()));
        let completions = self.family.completions.iter().map(local);
        let runs: Vec<(Range<usize>, Range<usize>)> = alone
            .chain(completions.map(|completion| (prompt.clone(), completion)))
            .collect();
        let group = self.heads.groups();
        (self.key_head * group..(self.key_head + 1) * group).flat_map(move |query_head| {
            runs.clone().into_iter().flat_map(move |(shared, run)| {
                run.clone().step_by(BLOCK).map(move |first| {
                    let queries = first..(first + BLOCK).min(run.end);
                    Block {
                        query_head,
                        shared: shared.clone(),
                        own: run.start..queries.end,
                        queries,
                    }
                })
            })
        })
    }

    /// Columns of the queries, the keys and the values of the task.
    fn columns(&self) -> [Range<usize>; 3] {
        let Heads {
            queries,
            keys,
            width,
        } = self.heads;
        let group = self.heads.groups();
        let heads = |first: usize, count: usize| first * width..(first + count) * width;
        [
            heads(self.key_head * group, group),
            heads(queries + self.key_head, 1),
            heads(queries + keys + self.key_head, 1),
        ]
    }

    /// A head of some tokens of the family.
    fn head(&self, tokens: Range<usize>, first_column: usize) -> Matrix<'_> {
        let step = self.heads.joined();
        let first = (self.family.tokens().start + tokens.start) * step + first_column;
        Matrix::strided(&self.qkv[first..], tokens.len(), self.heads.width, step)
    }

    /// Values of some tokens.
    fn values(&self, tokens: Range<usize>) -> Matrix<'_> {
        let [_, _, values] = self.columns();
        self.head(tokens, values.start)
    }

    /// Copies a head of some tokens, turned by their positions and scaled.
    fn load(&self, tokens: Range<usize>, first_column: usize, scale: f32, out: &mut Vec<f32>) {
        let width = self.heads.width;
        out.resize(tokens.len() * width, 0.0);
        let out = rows_of(out, 0..tokens.len(), width);
        let x = self.head(tokens.clone(), first_column);
        self.turn(tokens, x, out, (1.0, scale));
    }

    /// Scores of a block and, from them, its weights.
    fn weights(&self, block: &Block, scratch: &mut Scratch) {
        let width = self.heads.width;
        let scale = 1.0 / (width as f32).sqrt();
        let n = block.queries.len();
        self.load(
            block.queries.clone(),
            block.query_head * width,
            scale,
            &mut scratch.queries,
        );
        let queries = Matrix::new(&scratch.queries, n, width);
        scratch.scores.resize(n * block.keys(), 0.0);
        for (keys, at) in block.ranges() {
            let matrix = Matrix::new(
                &scratch.keys[keys.start * width..keys.end * width],
                keys.len(),
                width,
            );
            let out = columns_of(&mut scratch.scores, n, at, keys.len());
            product(out, Into::Fresh, queries, matrix.transposed());
        }
        Arch::new().dispatch(Softmax {
            scores: &mut scratch.scores,
            block,
        });
    }

    fn forward(&self, scratch: &mut Scratch, out: Window) {
        let width = self.heads.width;
        let tokens = 0..self.family.tokens().len();
        let [_, keys, _] = self.columns();
        self.load(tokens, keys.start, 1.0, &mut scratch.keys);
        for block in self.blocks() {
            self.weights(&block, scratch);
            let first = (block.query_head - self.key_head * self.heads.groups()) * width;
            let weights = &scratch.scores;
            let n = block.queries.len();
            let mut into = Into::Fresh;
            for (keys, at) in block.ranges() {
                let weights = Matrix::strided(&weights[at..], n, keys.len(), block.keys());
                let out = part(out, block.queries.clone(), first..first + width);
                product(out, into, weights, self.values(keys));
                into = Into::Sum;
            }
        }
    }

    /// Writes the gradients of the task's queries, keys and values to the windows.
    fn backward(&self, scratch: &mut Scratch, grad: &[f32], out: [Window; 3]) {
        let width = self.heads.width;
        let tokens = 0..self.family.tokens().len();
        let start = self.family.tokens().start;
        let [for_queries, for_keys, mut for_values] = out;
        let [_, key_columns, _] = self.columns();
        self.load(tokens.clone(), key_columns.start, 1.0, &mut scratch.keys);
        for sums in [&mut scratch.for_keys, &mut scratch.for_values] {
            sums.clear();
            sums.resize(tokens.len() * width, 0.0);
        }
        let step = self.heads.queries * width;
        let scale = 1.0 / (width as f32).sqrt();
        for block in self.blocks() {
            self.weights(&block, scratch);
            let n = block.queries.len();
            let first = (start + block.queries.start) * step + block.query_head * width;
            let grad = Matrix::strided(&grad[first..], n, width, step);
            scratch.for_scores.resize(n * block.keys(), 0.0);
            for (keys, at) in block.ranges() {
                let out = columns_of(&mut scratch.for_scores, n, at, keys.len());
                product(
                    out,
                    Into::Fresh,
                    grad,
                    self.values(keys.clone()).transposed(),
                );
                let weights = Matrix::strided(&scratch.scores[at..], n, keys.len(), block.keys());
                let out = rows_of(&mut scratch.for_values, keys, width);
                product(out, Into::Sum, weights.transposed(), grad);
            }
            Arch::new().dispatch(SoftmaxBackward {
                weights: &scratch.scores,
                grad: &mut scratch.for_scores,
                block: &block,
            });
            scratch.for_queries.resize(n * width, 0.0);
            let mut into = Into::Fresh;
            for (keys, at) in block.ranges() {
                let place = keys.start * width..keys.end * width;
                let for_scores =
                    Matrix::strided(&scratch.for_scores[at..], n, keys.len(), block.keys());
                let key_matrix = Matrix::new(&scratch.keys[place], keys.len(), width);
                let out = rows_of(&mut scratch.for_queries, 0..n, width);
                product(out, into, for_scores, key_matrix);
                into = Into::Sum;
                // The queries hold the scale, so that the gradient of the keys has it too.
                let queries = Matrix::new(&scratch.queries, n, width);
                let out = rows_of(&mut scratch.for_keys, keys, width);
                product(out, Into::Sum, for_scores.transposed(), queries);
            }
            let first = (block.query_head - self.key_head * self.heads.groups()) * width;
            let out = part(for_queries, block.queries.clone(), first..first + width);
            let grad = Matrix::new(&scratch.for_queries, n, width);
            self.turn(block.queries, grad, out, (-1.0, scale));
        }
        for (row, values) in scratch.for_values.chunks_exact(width).enumerate() {
            for_values.row(row).copy_from_slice(values);
        }
        let grad = Matrix::new(&scratch.for_keys, tokens.len(), width);
        self.turn(tokens, grad, for_keys, (-1.0, 1.0));
    }

    /// Turns a head of some tokens of the family by their positions, back if `way` is -1, and scales
    /// it.
    fn turn(&self, tokens: Range<usize>, x: Matrix<'_>, out: Window, (way, scale): (f32, f32)) {
        Arch::new().dispatch(Turn {
            turns: self.turns,
            first: self.family.tokens().start + tokens.start,
            x,
            out,
            way,
            scale,
        });
    }
}

/// Many rows in one call: a row is too short for a call of its own.
struct Turn<'a> {
    turns: Option<&'a Turns>,
    /// Flat place of the first token.
    first: usize,
    /// `[tokens, width]`.
    x: Matrix<'a>,
    out: Window,
    way: f32,
    scale: f32,
}

impl WithSimd for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (cos_scale, sin_scale) = (self.scale, self.way * self.scale);
        for row in 0..self.x.rows {
            let x = &self.x.values[row * self.x.row_step..][..self.x.columns];
            let out = self.out.row(row);
            let (cos, sin) = match self.turns {
                Some(turns) => turns.of(self.first + row),
                None => (&[][..], &[][..]),
            };
            let half = cos.len();
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

/// Columns of a row-major matrix of `rows` rows, to be written.
#[expect(unsafe_code, reason = "a window of a slice")]
fn columns_of(matrix: &mut [f32], rows: usize, first: usize, count: usize) -> Window {
    let columns = matrix.len() / rows;
    // SAFETY: the matrix is borrowed mutably until the window has been written, and by nobody else.
    unsafe { Window::new(matrix.as_mut_ptr(), rows, columns).part(0..rows, first..first + count) }
}

/// Rows of a row-major matrix, to be written.
fn rows_of(matrix: &mut [f32], rows: Range<usize>, columns: usize) -> Window {
    let matrix = &mut matrix[rows.start * columns..rows.end * columns];
    columns_of(matrix, rows.len(), 0, columns)
}

/// A part of a window of one thread.
#[expect(unsafe_code, reason = "a part of a window")]
fn part(window: Window, rows: Range<usize>, columns: Range<usize>) -> Window {
    // SAFETY: the window belongs to this thread, which writes one part at a time.
    unsafe { window.part(rows, columns) }
}

struct Softmax<'a> {
    scores: &'a mut [f32],
    block: &'a Block,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let rows = self.scores.chunks_exact_mut(self.block.keys());
        for (i, row) in rows.enumerate() {
            let (seen, future) = row.split_at_mut(self.block.seen(i));
            softmax_of_row(seen);
            future.fill(0.0);
        }
    }
}

struct SoftmaxBackward<'a> {
    weights: &'a [f32],
    grad: &'a mut [f32],
    block: &'a Block,
}

impl WithSimd for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let keys = self.block.keys();
        let rows = self.weights.chunks_exact(keys);
        for (i, (weights, grad)) in rows.zip(self.grad.chunks_exact_mut(keys)).enumerate() {
            let (grad, future) = grad.split_at_mut(self.block.seen(i));
            let weights = &weights[..grad.len()];
            let mean = dot(weights, grad);
            for (grad, weight) in grad.iter_mut().zip(weights) {
                *grad = weight * (*grad - mean);
            }
            future.fill(0.0);
        }
    }
}
