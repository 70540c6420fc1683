//! Products of matrices on processors with registers of eight numbers (AVX2 and FMA): packed, and by
//! tiles whose sums stay in registers.
//!
//! After Goto and van de Geijn, *Anatomy of high-performance matrix multiplication*, ACM TOMS 34
//! (2008): a block of `a` is packed into the second-level cache, and each panel of `b` meets all of
//! it before the next one comes.

use std::cell::Cell;

use pulp::x86::V3;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{Into, Matrix};
use super::memory::{Window, prefetch};
use super::tile::{COLUMNS, ROWS, Sums, add, none};

/// The most terms that are packed at a time, of a panel of `b` 27 KB. The product is read and written
/// once for each such part of its terms.
const DEPTH: usize = 432;
/// About how many rows of `a` are packed at a time: 145 KB at the most.
const BLOCK: usize = 84;
/// Columns of `b` that are packed at a time: 7 MB at the most.
const WIDTH: usize = 4096;
/// Panels of `b` that a thread packs at a time, side by side: rows of four cache lines.
const GROUP: usize = 4;
/// Numbers in a cache line.
const CACHE_LINE: usize = 16;
/// How many terms ahead of those that are packed others are fetched.
const AHEAD: usize = 8;

/// What this processor computes tiles with, if it is one that they are for. Wider registers are left
/// to the crate `gemm`.
pub(super) fn processor() -> Option<V3> {
    V3::try_new().filter(|_| !std::arch::is_x86_feature_detected!("avx512f"))
}

/// Lines of a matrix, rows of `a` or columns of `b`, and the terms of their sums.
#[derive(Clone, Copy)]
struct Lines<'a> {
    values: &'a [f32],
    line_step: usize,
    term_step: usize,
}

impl<'a> Lines<'a> {
    fn from(self, line: usize, term: usize) -> Self {
        let first = line * self.line_step + term * self.term_step;
        Self {
            values: &self.values[first..],
            ..self
        }
    }

    /// Packs the first `count` lines, `N` to a panel: term by term, `depth` of them. Lines that the
    /// last panel lacks are zeros.
    #[inline(always)]
    fn pack<const N: usize>(self, count: usize, depth: usize, panels: &mut [[f32; N]]) {
        if self.line_step == 1 {
            for term in 0..depth {
                // Terms may lie pages apart, where no processor fetches the next one by itself.
                let ahead = self.values.as_ptr();
                let ahead = ahead.wrapping_add((term + AHEAD) * self.term_step);
                for line in (0..count).step_by(CACHE_LINE) {
                    prefetch(ahead.wrapping_add(line));
                }
                let (whole, rest) = self.values[term * self.term_step..][..count].as_chunks::<N>();
                for (panel, lines) in whole.iter().enumerate() {
                    panels[panel * depth + term] = *lines;
                }
                if !rest.is_empty() {
                    let mut lines = [0.0; N];
                    lines[..rest.len()].copy_from_slice(rest);
                    panels[whole.len() * depth + term] = lines;
                }
            }
            return;
        }
        for (index, panel) in panels.chunks_exact_mut(depth).enumerate() {
            let from = self.from(index * N, 0);
            let count = N.min(count - index * N);
            if count == N && self.term_step == 1 {
                let lines: [&[f32]; N] =
                    std::array::from_fn(|line| &from.values[line * from.line_step..][..depth]);
                for (term, to) in panel.iter_mut().enumerate() {
                    *to = std::array::from_fn(|line| lines[line][term]);
                }
            } else {
                for (term, to) in panel.iter_mut().enumerate() {
                    *to = std::array::from_fn(|line| {
                        let at = line * from.line_step + term * from.term_step;
                        if line < count { from.values[at] } else { 0.0 }
                    });
                }
            }
        }
    }
}

/// `a b`, on all cores if it is to be shared.
///
/// Each number's terms are added up in an order that depends on their count alone.
pub(super) fn product(
    simd: V3,
    out: Window,
    into: Into,
    a: Matrix<'_>,
    b: Matrix<'_>,
    shared: bool,
) {
    let (rows, columns) = out.dims();
    let terms = a.columns;
    let depth = terms.div_ceil(terms.div_ceil(DEPTH));
    let tiles = rows.div_ceil(ROWS);
    // How many pieces one thread takes at least: all, if the product is its own.
    let (threads, alone) = if shared {
        (rayon::current_num_threads(), 1)
    } else {
        (1, usize::MAX)
    };
    let blocks = rows.div_ceil(BLOCK).next_multiple_of(threads).min(tiles);
    let first_row = |block: usize| (block * tiles / blocks * ROWS).min(rows);
    let a = Lines {
        values: a.values,
        line_step: a.row_step,
        term_step: a.column_step,
    };
    let b = Lines {
        values: b.values,
        line_step: b.column_step,
        term_step: b.row_step,
    };
    let most = WIDTH.min(columns).div_ceil(COLUMNS) * depth;
    let mut packed = PACKED_B.take();
    packed.resize(packed.len().max(most), [0.0; COLUMNS]);
    for left in (0..columns).step_by(WIDTH) {
        let width = WIDTH.min(columns - left);
        for first in (0..terms).step_by(depth) {
            let depth = depth.min(terms - first);
            let packed = &mut packed[..width.div_ceil(COLUMNS) * depth];
            let pack = |(group, panels): (usize, &mut [[f32; COLUMNS]])| {
                let column = group * GROUP * COLUMNS;
                let count = (GROUP * COLUMNS).min(width - column);
                b.from(left + column, first).pack(count, depth, panels);
            };
            let groups = packed.par_chunks_mut(GROUP * depth).enumerate();
            groups.with_min_len(alone).for_each(pack);
            let multiply = |block: usize| {
                let rows = first_row(block)..first_row(block + 1);
                let a = a.from(rows.start, first);
                // SAFETY: blocks have rows of their own.
                #[expect(unsafe_code, reason = "threads fill rows of one matrix side by side")]
                let out = unsafe { out.part(rows, left..left + width) };
                let block = Block {
                    out,
                    fresh: into == Into::Fresh && first == 0,
                    a,
                    b: packed,
                    depth,
                };
                Simd::vectorize(simd, block);
            };
            let blocks = (0..blocks).into_par_iter();
            blocks.with_min_len(alone).for_each(multiply);
        }
    }
    PACKED_B.set(packed);
}

thread_local! {
    // Taken for the time of a product: a thread that waits in one for others may begin another.
    static PACKED_B: Cell<Vec<[f32; COLUMNS]>> = const { Cell::new(Vec::new()) };
    static PACKED_A: Cell<Vec<[f32; ROWS]>> = const { Cell::new(Vec::new()) };
}

/// Some rows of the product's part that `depth` terms make.
struct Block<'a> {
    out: Window,
    fresh: bool,
    a: Lines<'a>,
    b: &'a [[f32; COLUMNS]],
    depth: usize,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (rows, columns) = self.out.dims();
        let mut packed = PACKED_A.take();
        let panels = rows.div_ceil(ROWS);
        packed.resize(packed.len().max(panels * self.depth), [0.0; ROWS]);
        let a = &mut packed[..panels * self.depth];
        self.a.pack(rows, self.depth, a);
        for (index, b) in self.b.chunks_exact(self.depth).enumerate() {
            let column = index * COLUMNS;
            let count = COLUMNS.min(columns - column);
            for (index, a) in a.chunks_exact(self.depth).enumerate() {
                // No pattern that the processor finds: without this, a twentieth slower.
                for row in index * ROWS..rows.min((index + 1) * ROWS) {
                    self.out.prefetch(row, column..column + count);
                }
                let mut sums: Sums<S, 2> = none(simd);
                add(simd, &mut sums, a, b);
                for (row, sums) in sums.into_iter().enumerate() {
                    let row = index * ROWS + row;
                    if row < rows {
                        let out = &mut self.out.row(row)[column..column + count];
                        write(simd, out, self.fresh, sums);
                    }
                }
            }
        }
        PACKED_A.set(packed);
    }
}

/// Writes or adds a row of a tile, as many of its numbers as there is room for.
#[inline(always)]
fn write<S: Simd>(simd: S, out: &mut [f32], fresh: bool, sums: [S::f32s; 2]) {
    if out.len() == COLUMNS {
        let (out, _) = S::as_mut_simd_f32s(out);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if fresh { sum } else { simd.add_f32s(*out, sum) };
        }
    } else {
        let mut all = [0.0; COLUMNS];
        S::as_mut_simd_f32s(&mut all).0.copy_from_slice(&sums);
        for (out, sum) in out.iter_mut().zip(all) {
            *out = if fresh { sum } else { *out + sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows, terms and columns: one, whole tiles, one more and one less, several parts and groups.
    const SHAPES: [[usize; 3]; 8] = [
        [1, 1, 1],
        [6, 16, 16],
        [7, 33, 17],
        [5, 513, 31],
        [150, 40, 70],
        [13, 1200, 65],
        [80, 130, 129],
        [7, 3, WIDTH + 18],
    ];
    /// Of each of n additions, relative to the sum of the terms' sizes: half of f32's last bit.
    const ROUNDING: f64 = 6e-8;

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        let number = |at: usize| ((at * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        (0..n).map(number).collect()
    }

    /// The matrix as it lies, or as it would after a transposition.
    fn matrix(values: &[f32], rows: usize, columns: usize, turned: bool) -> Matrix<'_> {
        if turned {
            Matrix::new(values, columns, rows).transposed()
        } else {
            Matrix::new(values, rows, columns)
        }
    }

    #[expect(unsafe_code, reason = "a window is made of a pointer")]
    fn run(
        out: &mut [f32],
        columns: usize,
        into: Into,
        a: Matrix<'_>,
        b: Matrix<'_>,
        shared: bool,
    ) {
        // Also on a processor with wider registers, where products are not left to tiles.
        let Some(simd) = V3::try_new() else { return };
        // SAFETY: the window is the slice's.
        let window = unsafe { Window::new(out.as_mut_ptr(), out.len() / columns, columns) };
        product(simd, window, into, a, b, shared);
    }

    #[test]
    fn products_are_sums_of_products_however_matrices_lie() {
        if V3::try_new().is_none() {
            return;
        }
        for [rows, terms, columns] in SHAPES {
            let (x, y) = (noise(rows * terms, 1), noise(terms * columns, 2));
            for turned in [[false; 2], [false, true], [true, false], [true; 2]] {
                let a = matrix(&x, rows, terms, turned[0]);
                let b = matrix(&y, terms, columns, turned[1]);
                for into in [Into::Fresh, Into::Sum] {
                    // What is fresh is not read.
                    let before = if into == Into::Sum { 0.5 } else { f32::NAN };
                    let mut out = vec![before; rows * columns];
                    run(&mut out, columns, into, a, b, true);
                    for (at, &found) in out.iter().enumerate() {
                        let (row, column) = (at / columns, at % columns);
                        let term = |term: usize| {
                            let a = a.values[row * a.row_step + term * a.column_step];
                            let b = b.values[term * b.row_step + column * b.column_step];
                            f64::from(a) * f64::from(b)
                        };
                        let start = if into == Into::Sum { 0.5 } else { 0.0 };
                        let sum = start + (0..terms).map(term).sum::<f64>();
                        let sizes = start + (0..terms).map(|at| term(at).abs()).sum::<f64>();
                        let gap = (f64::from(found) - sum).abs();
                        assert!(
                            gap <= ROUNDING * (terms + 1) as f64 * sizes,
                            "{rows} {terms} {columns} {turned:?} {into:?}: {found} for {sum}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn threads_and_other_rows_change_no_bit() {
        for [rows, terms, columns] in SHAPES {
            let (x, y) = (noise(rows * terms, 3), noise(terms * columns, 4));
            let (a, b) = (
                Matrix::new(&x, rows, terms),
                Matrix::new(&y, terms, columns),
            );
            let mut all = vec![0.0; rows * columns];
            run(&mut all, columns, Into::Fresh, a, b, true);
            let mut alone = vec![0.0; rows * columns];
            run(&mut alone, columns, Into::Fresh, a, b, false);
            assert_eq!(all, alone);
            for (row, x) in x.chunks_exact(terms).enumerate() {
                let mut alone = vec![0.0; columns];
                let x = Matrix::new(x, 1, terms);
                run(&mut alone, columns, Into::Fresh, x, b, false);
                assert_eq!(all[row * columns..][..columns], alone);
            }
        }
    }

    #[test]
    fn a_thread_that_waits_in_a_product_may_begin_another() {
        let [rows, terms, columns] = [150, 300, 70];
        let (x, y) = (noise(rows * terms, 5), noise(terms * columns, 6));
        let mut first = vec![0.0; rows * columns];
        let (a, b) = (
            Matrix::new(&x, rows, terms),
            Matrix::new(&y, terms, columns),
        );
        run(&mut first, columns, Into::Fresh, a, b, false);
        let others: Vec<Vec<f32>> = (0..64)
            .into_par_iter()
            .map(|_| {
                let mut out = vec![0.0; rows * columns];
                run(&mut out, columns, Into::Fresh, a, b, true);
                out
            })
            .collect();
        assert!(others.iter().all(|other| *other == first));
    }
}
