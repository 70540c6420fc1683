//! What attention does with a block of queries: how its keys and values lie, products by tiles, and the
//! softmax between them.

use std::ops::Range;

use pulp::Simd;

use super::gemm::Matrix;
use super::tile::{COLUMNS, Left, ROWS, Right, Sums, add, add_rows, load, none, store};
use crate::exp::exp;

/// Panels of queries that the gradients of keys and values are added up for at a time: so often they
/// are read and written once.
const PANELS: usize = 4;
/// Queries of that many panels.
pub(super) const BLOCK: usize = PANELS * COLUMNS;

/// Tokens of a family that each see the ones before: its prompt, or a completion.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// The first of them, by place within the family.
    pub(super) first: usize,
    pub(super) tokens: usize,
    /// The first of its tiles of keys; what its last one lacks is zeros.
    pub(super) tile: usize,
}

impl Run {
    pub(super) fn tiles(&self) -> usize {
        self.tokens.div_ceil(ROWS)
    }

    /// Its tokens by place within the family, and that of their keys among those of all tiles.
    pub(super) fn places(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.tokens).map(move |token| (self.first + token, self.tile * ROWS + token))
    }
}

/// Queries of one head that follow one another in a run.
pub(super) struct Block {
    pub(super) query_head: usize,
    pub(super) run: Run,
    /// By place within the run.
    pub(super) queries: Range<usize>,
    /// The prompt, if the run is a completion: all of the queries see it.
    pub(super) prompt: Option<Run>,
}

/// Tiles of keys, and the first of their rows among a panel's scores.
pub(super) type Seen = [(Range<usize>, usize); 2];

impl Block {
    pub(super) fn panels(&self) -> usize {
        self.queries.len().div_ceil(COLUMNS)
    }

    /// Queries of a panel, by place within the run.
    pub(super) fn panel(&self, panel: usize) -> Range<usize> {
        let first = self.queries.start + panel * COLUMNS;
        first..(first + COLUMNS).min(self.queries.end)
    }

    pub(super) fn shared(&self) -> usize {
        self.prompt.map_or(0, |prompt| prompt.tiles())
    }

    /// How many tiles of the run a panel sees: up to its last query's own.
    pub(super) fn own(&self, panel: usize) -> usize {
        self.panel(panel).end.div_ceil(ROWS)
    }

    pub(super) fn seen(&self, panel: usize) -> Seen {
        let own = self.run.tile..self.run.tile + self.own(panel);
        [(0..self.shared(), 0), (own, self.shared() * ROWS)]
    }

    /// Rows of a panel's scores.
    pub(super) fn rows(&self, panel: usize) -> usize {
        (self.shared() + self.own(panel)) * ROWS
    }

    /// Rows that are kept for each panel's scores: as many as the last one has.
    pub(super) fn stride(&self) -> usize {
        self.rows(self.panels() - 1)
    }
}

/// That many zeros in place of what was there.
pub(super) fn cleared<T: Copy>(values: &mut Vec<T>, count: usize, zero: T) {
    values.clear();
    values.resize(count, zero);
}

/// Rows of a head by tiles of keys, and each tile by dimensions.
#[inline(always)]
pub(super) fn lay_keys(rows: Matrix<'_>, runs: &[Run], tiles: &mut Vec<Left>) {
    let width = rows.columns;
    let zeros = [0.0; ROWS];
    tiles.resize(keys_of(runs) / ROWS * width, zeros);
    for run in runs {
        for tile in 0..run.tiles() {
            let out = &mut tiles[(run.tile + tile) * width..][..width];
            let first = tile * ROWS;
            let count = ROWS.min(run.tokens - first);
            let row =
                |row: usize| &rows.values[(run.first + first + row) * rows.row_step..][..width];
            if count == ROWS {
                turned_over(std::array::from_fn(row), out);
            } else {
                out.fill(zeros);
                for at in 0..count {
                    for (out, &x) in out.iter_mut().zip(row(at)) {
                        out[at] = x;
                    }
                }
            }
        }
    }
}

/// Rows of a head by tiles of dimensions, and each tile by keys.
#[inline(always)]
pub(super) fn lay_dimensions(rows: Matrix<'_>, runs: &[Run], across: &mut Vec<Left>) {
    let width = rows.columns;
    let keys = keys_of(runs);
    cleared(across, keys * width.div_ceil(ROWS), [0.0; ROWS]);
    for (token, key) in runs.iter().flat_map(|run| run.places()) {
        let row = &rows.values[token * rows.row_step..][..width];
        let (whole, rest) = row.as_chunks::<ROWS>();
        for (dims, row) in whole.iter().enumerate() {
            across[dims * keys + key] = *row;
        }
        if !rest.is_empty() {
            across[whole.len() * keys + key][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// Keys of all tiles.
pub(super) fn keys_of(runs: &[Run]) -> usize {
    runs.last().map_or(0, |run| (run.tile + run.tiles()) * ROWS)
}

/// A panel's rows by dimensions.
#[inline(always)]
pub(super) fn lay_panel(rows: &[f32], width: usize, panel: &mut [Right]) {
    turned_over(
        std::array::from_fn(|row| &rows[row * width..][..width]),
        panel,
    );
}

/// Rows as columns.
#[inline(always)]
fn turned_over<const N: usize>(rows: [&[f32]; N], out: &mut [[f32; N]]) {
    let rows = rows.map(|row| &row[..out.len()]);
    for (at, out) in out.iter_mut().enumerate() {
        for (out, row) in out.iter_mut().zip(rows) {
            *out = row[at];
        }
    }
}

/// What a panel has by dimensions, a row to a query.
#[inline(always)]
pub(super) fn rows_of_panel(across: &[Right], width: usize, rows: &mut [f32]) {
    /// Dimensions that are written side by side.
    const SIDE: usize = 4;
    let (whole, rest) = across[..width].as_chunks::<SIDE>();
    for (dims, across) in whole.iter().enumerate() {
        for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
            let out = &mut row[dims * SIDE..][..SIDE];
            for (out, across) in out.iter_mut().zip(across) {
                *out = across[lane];
            }
        }
    }
    for (dim, across) in rest.iter().enumerate() {
        for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
            row[whole.len() * SIDE + dim] = across[lane];
        }
    }
}

/// A block's rows by panels of dimensions.
#[inline(always)]
pub(super) fn lay_columns(rows: &[f32], width: usize, columns: &mut [Right]) {
    for (at, row) in rows.chunks_exact(width).enumerate() {
        for (dims, row) in row.chunks(COLUMNS).enumerate() {
            let out = &mut columns[dims * BLOCK + at];
            out[..row.len()].copy_from_slice(row);
        }
    }
}

/// Scores of a panel of queries: `K q`, of the tiles that are seen.
#[inline(always)]
pub(super) fn by_tiles<S: Simd, const REGISTERS: usize>(
    simd: S,
    keys: &[Left],
    queries: &[Right],
    seen: &Seen,
    scores: &mut [Right],
) {
    let width = queries.len();
    for (tiles, at) in seen {
        let keys = keys[tiles.start * width..tiles.end * width].chunks_exact(width);
        let (scores, _) = scores[*at..].as_chunks_mut::<ROWS>();
        for (keys, scores) in keys.zip(scores) {
            let mut sums: Sums<S, REGISTERS> = none(simd);
            add(simd, &mut sums, keys, queries);
            store::<S, REGISTERS>(sums, scores);
        }
    }
}

/// What a panel makes of the keys that it sees, by dimensions: `Vᵀ p`.
#[inline(always)]
pub(super) fn by_dimensions<S: Simd, const REGISTERS: usize>(
    simd: S,
    across: &[Left],
    weights: &[Right],
    seen: &Seen,
    out: &mut [Right],
) {
    let (out, _) = out.as_chunks_mut::<ROWS>();
    let keys = across.len() / out.len();
    for (across, out) in across.chunks_exact(keys).zip(out) {
        let mut sums: Sums<S, REGISTERS> = none(simd);
        for (tiles, at) in seen {
            let across = &across[tiles.start * ROWS..tiles.end * ROWS];
            add(simd, &mut sums, across, &weights[*at..][..across.len()]);
        }
        store::<S, REGISTERS>(sums, out);
    }
}

/// Adds to the keys' sums what a block's panels make of them: `Σ p qᵀ`.
#[inline(always)]
pub(super) fn by_keys<S: Simd, const REGISTERS: usize>(
    simd: S,
    block: &Block,
    weights: &[Right],
    columns: &[Right],
    out: &mut [[Right; ROWS]],
) {
    let (panels, stride) = (block.panels(), block.stride());
    let dims = columns.len() / BLOCK;
    let (columns, _) = columns.as_chunks::<COLUMNS>();
    for (index, (tiles, at)) in block.seen(panels - 1).into_iter().enumerate() {
        for (tile, out) in out[tiles.start * dims..tiles.end * dims]
            .chunks_exact_mut(dims)
            .enumerate()
        {
            // The first panel that sees it; all see the prompt.
            let first = (0..panels).find(|&panel| index == 0 || tile < block.own(panel));
            let first = first.unwrap_or(panels);
            for (out, columns) in out.iter_mut().zip(columns.chunks_exact(PANELS)) {
                let mut sums: Sums<S, REGISTERS> = load(simd, out);
                for panel in first..panels {
                    let weights = &weights[panel * stride + at + tile * ROWS..];
                    let (weights, _) = weights.as_chunks::<ROWS>();
                    add_rows(simd, &mut sums, &weights[0], &columns[panel]);
                }
                store::<S, REGISTERS>(sums, out);
            }
        }
    }
}

/// Weights of each lane in place of its scores, but for their sums, whose inverses are given back.
#[inline(always)]
pub(super) fn softmax<S: Simd, const REGISTERS: usize>(simd: S, scores: &mut [Right]) -> Right {
    let mut largest = [simd.splat_f32s(f32::NEG_INFINITY); REGISTERS];
    for row in scores.iter() {
        for (largest, &score) in largest.iter_mut().zip(S::as_simd_f32s(row).0) {
            *largest = simd.max_f32s(score, *largest);
        }
    }
    let mut sums = [simd.splat_f32s(0.0); REGISTERS];
    for row in scores.iter_mut() {
        let registers = S::as_mut_simd_f32s(row).0.iter_mut();
        for (score, &largest) in registers.zip(&largest) {
            *score = simd.sub_f32s(*score, largest);
        }
        // Not by registers: what is hidden has no weight at all, and what is no number stays none.
        for score in row.iter_mut() {
            *score = exp(*score);
        }
        for (sum, &weight) in sums.iter_mut().zip(S::as_simd_f32s(row).0) {
            *sum = simd.add_f32s(*sum, weight);
        }
    }
    let mut shares = [0.0; COLUMNS];
    S::as_mut_simd_f32s(&mut shares).0.copy_from_slice(&sums);
    for share in &mut shares {
        *share = 1.0 / *share;
    }
    shares
}

/// Whole weights in place of those without their shares, and gradients of scores in place of those of
/// the weights.
#[inline(always)]
pub(super) fn softmax_backward<S: Simd, const REGISTERS: usize>(
    simd: S,
    weights: &mut [Right],
    shares: Right,
    grads: &mut [Right],
) {
    let (shares, _) = S::as_simd_f32s(&shares);
    let mut means = [simd.splat_f32s(0.0); REGISTERS];
    for (weights, grads) in weights.iter_mut().zip(grads.iter()) {
        let (weights, _) = S::as_mut_simd_f32s(weights);
        let (grads, _) = S::as_simd_f32s(grads);
        for (at, mean) in means.iter_mut().enumerate() {
            weights[at] = simd.mul_f32s(weights[at], shares[at]);
            *mean = simd.mul_add_f32s(weights[at], grads[at], *mean);
        }
    }
    for (weights, grads) in weights.iter().zip(grads) {
        let (weights, _) = S::as_simd_f32s(weights);
        let (grads, _) = S::as_mut_simd_f32s(grads);
        for (at, &mean) in means.iter().enumerate() {
            grads[at] = simd.mul_f32s(weights[at], simd.sub_f32s(grads[at], mean));
        }
    }
}
