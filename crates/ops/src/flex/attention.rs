//! Attention by panels of queries, a lane for each, so that what a softmax does along the keys needs no
//! sum across lanes. Scores live for one panel and one head, in the processor's cache; the way back
//! computes them again.
//!
//! A family's keys and values are laid out once as tiles, and each product goes by tiles, of which those
//! that causality hides are left out.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::Matrix;
use super::memory::{Window, tensor, values, written};
use super::panels::{
    BLOCK, Block, Run, by_dimensions, by_keys, by_tiles, cleared, keys_of, lay_columns,
    lay_dimensions, lay_keys, lay_panel, rows_of_panel, softmax, softmax_backward,
};
use super::tile::{COLUMNS, Left, ROWS, Right};
use super::turn::Turn;
use crate::attention::{Family, Heads, Spans, Turns};

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
    /// Rows of a head, turned or to be turned back, `[tokens, width]`.
    rows: Vec<f32>,
    /// A block's gradients of outputs, `[BLOCK, width]`.
    grad_rows: Vec<f32>,
    /// Turned keys by tiles, and each tile by dimensions.
    keys: Vec<Left>,
    /// Values in the same way.
    values: Vec<Left>,
    /// Turned keys by tiles of dimensions, and each tile by keys.
    keys_across: Vec<Left>,
    /// Values in the same way.
    values_across: Vec<Left>,
    /// A panel of queries by dimensions, turned and divided by `√width`.
    queries: Vec<Right>,
    /// The gradients of their outputs in the same way.
    grads: Vec<Right>,
    /// Queries of a block by panels of dimensions, and each panel by queries.
    query_columns: Vec<Right>,
    /// The gradients of their outputs in the same way.
    grad_columns: Vec<Right>,
    /// Scores by panels of queries and, in each, by keys; then their weights.
    scores: Vec<Right>,
    /// Gradients of the weights, then of the scores.
    for_scores: Vec<Right>,
    /// Outputs of a panel, or gradients of its queries, by dimensions.
    across: Vec<Right>,
    /// Gradients of keys by tiles, and each tile by panels of dimensions.
    for_keys: Vec<[Right; ROWS]>,
    /// Gradients of values in the same way.
    for_values: Vec<[Right; ROWS]>,
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
                    Arch::new().dispatch(Forward { task, scratch, out });
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
                    let out = columns.map(part);
                    Arch::new().dispatch(Backward {
                        task,
                        scratch,
                        grad,
                        out,
                    });
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

impl Task<'_> {
    fn runs(&self) -> Vec<Run> {
        let start = self.family.tokens().start;
        let mut tile = 0;
        let ranges = std::iter::once(&self.family.prompt).chain(&self.family.completions);
        let run = |range: &Range<usize>| {
            let run = Run {
                first: range.start - start,
                tokens: range.len(),
                tile,
            };
            tile += run.tiles();
            run
        };
        ranges.map(run).collect()
    }

    fn blocks(&self, runs: &[Run]) -> Vec<Block> {
        let group = self.heads.groups();
        let mut blocks = Vec::new();
        for query_head in self.key_head * group..(self.key_head + 1) * group {
            for (index, &run) in runs.iter().enumerate() {
                for first in (0..run.tokens).step_by(BLOCK) {
                    blocks.push(Block {
                        query_head,
                        run,
                        queries: first..(first + BLOCK).min(run.tokens),
                        prompt: (index > 0).then_some(runs[0]),
                    });
                }
            }
        }
        blocks
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

    /// The first column of a head of queries among the task's.
    fn column_of(&self, query_head: usize) -> usize {
        (query_head - self.key_head * self.heads.groups()) * self.heads.width
    }

    /// A head of some tokens of the family.
    fn head(&self, tokens: Range<usize>, first_column: usize) -> Matrix<'_> {
        let step = self.heads.joined();
        let first = (self.family.tokens().start + tokens.start) * step + first_column;
        Matrix::strided(&self.qkv[first..], tokens.len(), self.heads.width, step)
    }

    /// All keys of the task, turned.
    #[inline(always)]
    fn keys<S: Simd>(&self, simd: S, out: &mut [f32]) {
        let [_, keys, _] = self.columns();
        let tokens = 0..self.family.tokens().len();
        self.turned(simd, tokens, keys.start, 1.0, out);
    }

    /// All values of the task.
    fn values(&self) -> Matrix<'_> {
        let [_, _, values] = self.columns();
        self.head(0..self.family.tokens().len(), values.start)
    }

    /// Copies a head of some tokens, turned by their positions and scaled.
    #[inline(always)]
    fn turned<S: Simd>(
        &self,
        simd: S,
        tokens: Range<usize>,
        first_column: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let width = self.heads.width;
        let x = self.head(tokens.clone(), first_column);
        let out = window(out, tokens.len(), width);
        self.turn(simd, tokens.start, x, out, (1.0, scale));
    }

    /// Turns a head of tokens of the family by their positions, back if `way` is -1, and scales it.
    #[inline(always)]
    fn turn<S: Simd>(
        &self,
        simd: S,
        first: usize,
        x: Matrix<'_>,
        out: Window,
        (way, scale): (f32, f32),
    ) {
        let turn = Turn {
            turns: self.turns,
            first: self.family.tokens().start + first,
            x,
            out,
            way,
            scale,
        };
        turn.with_simd(simd);
    }

    /// A block's queries, row by row, turned and divided by `√width`; then zeros up to a whole panel.
    #[inline(always)]
    fn queries<S: Simd>(&self, simd: S, block: &Block, rows: &mut [f32]) {
        let width = self.heads.width;
        let first = block.run.first + block.queries.start;
        let tokens = first..first + block.queries.len();
        let (queries, rest) = rows.split_at_mut(tokens.len() * width);
        let scale = 1.0 / (width as f32).sqrt();
        self.turned(simd, tokens, block.query_head * width, scale, queries);
        rest.fill(0.0);
    }

    /// Weights of a panel, but for their sums, whose inverses are given back.
    #[inline(always)]
    fn weights<S: Simd, const REGISTERS: usize>(
        &self,
        simd: S,
        (block, panel): (&Block, usize),
        keys: &[Left],
        queries: &[Right],
        scores: &mut [Right],
    ) -> Right {
        let seen = block.seen(panel);
        by_tiles::<S, REGISTERS>(simd, keys, queries, &seen, scores);
        if let Some(prompt) = block.prompt {
            for row in &mut scores[prompt.tokens..prompt.tiles() * ROWS] {
                *row = [f32::NEG_INFINITY; COLUMNS];
            }
        }
        // A query does not see the keys after its own.
        let first = block.panel(panel).start;
        let own = &mut scores[block.shared() * ROWS..];
        for (before, row) in own.iter_mut().skip(first + 1).enumerate() {
            row[..COLUMNS.min(before + 1)].fill(f32::NEG_INFINITY);
        }
        softmax::<S, REGISTERS>(simd, scores)
    }
}

/// Runs what is generic over the number of registers that hold a tile's row.
macro_rules! by_registers {
    ($self:ident, $simd:ident) => {
        match COLUMNS / S::F32_LANES {
            1 => $self.run::<S, 1>($simd),
            2 => $self.run::<S, 2>($simd),
            4 => $self.run::<S, 4>($simd),
            _ => $self.run::<S, COLUMNS>($simd),
        }
    };
}

struct Forward<'a> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    /// The task's columns of what comes out, in the rows of its family.
    out: Window,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        by_registers!(self, simd)
    }
}

impl Forward<'_> {
    #[inline(always)]
    fn run<S: Simd, const REGISTERS: usize>(mut self, simd: S) {
        let Self { task, scratch, .. } = self;
        let width = task.heads.width;
        let tokens = task.family.tokens().len();
        let runs = task.runs();
        scratch.rows.resize(tokens.max(BLOCK) * width, 0.0);
        task.keys(simd, &mut scratch.rows[..tokens * width]);
        let rows = Matrix::new(&scratch.rows, tokens, width);
        lay_keys(rows, &runs, &mut scratch.keys);
        lay_dimensions(task.values(), &runs, &mut scratch.values_across);
        scratch.queries.resize(width, [0.0; COLUMNS]);
        let across = width.next_multiple_of(ROWS);
        scratch.across.resize(across, [0.0; COLUMNS]);
        for block in task.blocks(&runs) {
            task.queries(simd, &block, &mut scratch.rows[..BLOCK * width]);
            scratch.scores.resize(block.stride(), [0.0; COLUMNS]);
            for panel in 0..block.panels() {
                let rows = &scratch.rows[panel * COLUMNS * width..];
                lay_panel(rows, width, &mut scratch.queries);
                let scores = &mut scratch.scores[..block.rows(panel)];
                let (keys, queries) = (&scratch.keys, &scratch.queries);
                let shares =
                    task.weights::<S, REGISTERS>(simd, (&block, panel), keys, queries, scores);
                let seen = block.seen(panel);
                let values = &scratch.values_across;
                by_dimensions::<S, REGISTERS>(simd, values, scores, &seen, &mut scratch.across);
                for across in &mut scratch.across {
                    for (x, share) in across.iter_mut().zip(&shares) {
                        *x *= share;
                    }
                }
                // Queries of the panel are needed no more.
                let queries = block.panel(panel);
                let rows = &mut scratch.rows[panel * COLUMNS * width..][..COLUMNS * width];
                rows_of_panel(&scratch.across, width, rows);
                let first = task.column_of(block.query_head);
                for (query, row) in queries.zip(rows.chunks_exact(width)) {
                    let out = self.out.row(block.run.first + query);
                    out[first..first + width].copy_from_slice(row);
                }
            }
        }
    }
}

struct Backward<'a> {
    task: Task<'a>,
    scratch: &'a mut Scratch,
    /// The gradient of what came out, `[tokens, heads of queries · width]`.
    grad: &'a [f32],
    /// Where those of the task's queries, keys and values go, in the rows of its family.
    out: [Window; 3],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        by_registers!(self, simd)
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn run<S: Simd, const REGISTERS: usize>(self, simd: S) {
        let Self {
            task,
            scratch,
            grad,
            out: [for_queries, for_keys, mut for_values],
        } = self;
        let width = task.heads.width;
        let tokens = task.family.tokens();
        let runs = task.runs();
        let scale = 1.0 / (width as f32).sqrt();
        scratch.rows.resize(tokens.len().max(BLOCK) * width, 0.0);
        task.keys(simd, &mut scratch.rows[..tokens.len() * width]);
        let rows = Matrix::new(&scratch.rows, tokens.len(), width);
        lay_keys(rows, &runs, &mut scratch.keys);
        lay_dimensions(rows, &runs, &mut scratch.keys_across);
        lay_keys(task.values(), &runs, &mut scratch.values);
        let dims = width.div_ceil(COLUMNS);
        for sums in [&mut scratch.for_keys, &mut scratch.for_values] {
            cleared(sums, keys_of(&runs) / ROWS * dims, [[0.0; COLUMNS]; ROWS]);
        }
        for panel in [&mut scratch.queries, &mut scratch.grads] {
            panel.resize(width, [0.0; COLUMNS]);
        }
        for columns in [&mut scratch.query_columns, &mut scratch.grad_columns] {
            cleared(columns, dims * BLOCK, [0.0; COLUMNS]);
        }
        let across = width.next_multiple_of(ROWS);
        scratch.across.resize(across, [0.0; COLUMNS]);
        scratch.grad_rows.resize(BLOCK * width, 0.0);
        let step = task.heads.queries * width;
        for block in task.blocks(&runs) {
            let stride = block.stride();
            let queries = &mut scratch.rows[..BLOCK * width];
            task.queries(simd, &block, queries);
            lay_columns(queries, width, &mut scratch.query_columns);
            let first = tokens.start + block.run.first + block.queries.start;
            let (rows, rest) = scratch.grad_rows.split_at_mut(block.queries.len() * width);
            for (at, row) in rows.chunks_exact_mut(width).enumerate() {
                let from = (first + at) * step + block.query_head * width;
                row.copy_from_slice(&grad[from..from + width]);
            }
            rest.fill(0.0);
            lay_columns(&scratch.grad_rows, width, &mut scratch.grad_columns);
            for scores in [&mut scratch.scores, &mut scratch.for_scores] {
                scores.resize(block.panels() * stride, [0.0; COLUMNS]);
            }
            for panel in 0..block.panels() {
                let first_row = panel * COLUMNS * width;
                lay_panel(&scratch.rows[first_row..], width, &mut scratch.queries);
                lay_panel(&scratch.grad_rows[first_row..], width, &mut scratch.grads);
                let rows = panel * stride..panel * stride + block.rows(panel);
                let weights = &mut scratch.scores[rows.clone()];
                let for_scores = &mut scratch.for_scores[rows];
                let (keys, queries) = (&scratch.keys, &scratch.queries);
                let shares =
                    task.weights::<S, REGISTERS>(simd, (&block, panel), keys, queries, weights);
                let seen = block.seen(panel);
                let (values, grads) = (&scratch.values, &scratch.grads);
                by_tiles::<S, REGISTERS>(simd, values, grads, &seen, for_scores);
                softmax_backward::<S, REGISTERS>(simd, weights, shares, for_scores);
                let keys = &scratch.keys_across;
                by_dimensions::<S, REGISTERS>(simd, keys, for_scores, &seen, &mut scratch.across);
                // Turned back from rows of queries, which are needed no more.
                let queries = block.panel(panel);
                let rows = &mut scratch.rows[first_row..][..COLUMNS * width];
                rows_of_panel(&scratch.across, width, rows);
                let first = block.run.first + queries.start;
                let column = task.column_of(block.query_head);
                let rows = Matrix::new(rows, queries.len(), width);
                let places = first..first + queries.len();
                let out = part(for_queries, places, column..column + width);
                task.turn(simd, first, rows, out, (-1.0, scale));
            }
            // The queries hold the scale, so that the gradient of the keys has it too.
            let columns = &scratch.query_columns;
            by_keys::<S, REGISTERS>(
                simd,
                &block,
                &scratch.for_scores,
                columns,
                &mut scratch.for_keys,
            );
            let columns = &scratch.grad_columns;
            by_keys::<S, REGISTERS>(
                simd,
                &block,
                &scratch.scores,
                columns,
                &mut scratch.for_values,
            );
        }
        let rows = &mut scratch.rows[..tokens.len() * width];
        for (token, key) in runs.iter().flat_map(|run| run.places()) {
            let tile = key / ROWS * dims..(key / ROWS + 1) * dims;
            let read = |sums: &[[Right; ROWS]], out: &mut [f32]| {
                for (out, sums) in out.chunks_mut(COLUMNS).zip(&sums[tile.clone()]) {
                    out.copy_from_slice(&sums[key % ROWS][..out.len()]);
                }
            };
            read(&scratch.for_keys, &mut rows[token * width..][..width]);
            read(&scratch.for_values, for_values.row(token));
        }
        let rows = Matrix::new(rows, tokens.len(), width);
        task.turn(simd, 0, rows, for_keys, (-1.0, 1.0));
    }
}

/// A row-major matrix, to be written.
#[expect(unsafe_code, reason = "a window of a slice")]
fn window(matrix: &mut [f32], rows: usize, columns: usize) -> Window {
    assert_eq!(matrix.len(), rows * columns);
    // SAFETY: the matrix is borrowed mutably until the window has been written, and by nobody else.
    unsafe { Window::new(matrix.as_mut_ptr(), rows, columns) }
}

/// A part of a window of one thread.
#[expect(unsafe_code, reason = "a part of a window")]
fn part(window: Window, rows: Range<usize>, columns: Range<usize>) -> Window {
    // SAFETY: the window belongs to this thread, which writes one part at a time.
    unsafe { window.part(rows, columns) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of some dozen numbers of size one, with fused multiplications and without.
    const ROUNDING: f32 = 1e-5;
    /// Neither whole tiles of dimensions nor whole panels of them, and two query heads to one of keys.
    const HEADS: Heads = Heads {
        queries: 4,
        keys: 2,
        width: 22,
    };

    /// A prompt and completions that are no whole panels, and a text alone of more than a block.
    fn spans() -> Spans {
        let families = [
            Family {
                prompt: 0..7,
                completions: vec![7..30, 30..31],
            },
            Family {
                prompt: 31..31 + BLOCK + 9,
                completions: Vec::new(),
            },
        ];
        Spans::new(1, 31 + BLOCK + 9, families.to_vec())
    }

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        let number = |at: usize| ((at * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        (0..n).map(number).collect()
    }

    /// What comes out and the gradient, by registers of some kind.
    fn by<S: Simd>(simd: S) -> [Vec<f32>; 2] {
        let spans = spans();
        let tokens = spans.dims()[1];
        let positions: Vec<u32> = (0..).take(tokens).collect();
        let turns = Turns::new(HEADS.width, 1e4, &positions, tokens);
        let outputs = HEADS.queries * HEADS.width;
        let qkv = noise(tokens * HEADS.joined(), 1);
        let grad = noise(tokens * outputs, 2);
        let mut found = [
            vec![f32::NAN; tokens * outputs],
            vec![f32::NAN; tokens * HEADS.joined()],
        ];
        let [out, for_qkv] = &mut found;
        let out = window(out, tokens, outputs);
        let for_qkv = window(for_qkv, tokens, HEADS.joined());
        let scratch = &mut Scratch::default();
        for task in tasks(&qkv, HEADS, &spans, Some(&turns)) {
            let rows = task.family.tokens();
            let [queries, _, _] = task.columns();
            let out = part(out, rows, queries);
            Forward { task, scratch, out }.with_simd(simd);
        }
        for task in tasks(&qkv, HEADS, &spans, Some(&turns)) {
            let rows = task.family.tokens();
            let out = task
                .columns()
                .map(|columns| part(for_qkv, rows.clone(), columns));
            let grad = &grad;
            Backward {
                task,
                scratch,
                grad,
                out,
            }
            .with_simd(simd);
        }
        found
    }

    #[test]
    fn registers_of_every_width_compute_the_same() {
        let one = by(pulp::Scalar);
        for others in [
            by(pulp::Scalar128b),
            by(pulp::Scalar256b),
            by(pulp::Scalar512b),
        ] {
            for (one, others) in one.iter().zip(others) {
                for (at, (one, other)) in one.iter().zip(others).enumerate() {
                    let gap = (one - other).abs();
                    assert!(gap < ROUNDING * (1.0 + one.abs()), "{at}: {one} {other}");
                }
            }
        }
    }
}
