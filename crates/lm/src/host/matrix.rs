//! Matrices laid out for one pass over memory.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Outputs of a panel.
const PANEL: usize = 32;
/// Inputs that are kept together, and that the longest unrolled loop takes: a panel is padded to a
/// multiple of them.
const GROUP: usize = 4;
/// Numbers of a cache line: panels begin on one, so that no load touches two.
const LINE: usize = 16;
/// The bits of an f32 that bf16 has not.
const LOWER: u32 = 0xffff;
/// The bits of an f32 that its upper three bytes have not.
const LOWEST: u32 = 0xff;
/// Multiplications and additions that one core does while two cores agree on who does what.
pub(super) const WORTH_SHARING: usize = 1 << 16;
/// Weights of one task where work is shared: few enough that the cores end together.
const TASK_WEIGHTS: usize = 1 << 15;
/// Groups of inputs that all rows are multiplied with before the next: weights of at most 16 KiB, half
/// of a small first-level cache.
const CHUNK_GROUPS: usize = 32;
/// Registers of a panel that are summed together where rows are many: with six rows' sums, or eight,
/// they fit the registers of every processor.
const STRIP: usize = 2;

/// A matrix `[inputs, outputs]` as panels of 32 outputs, each `[inputs, 32]`.
///
/// A product reads every panel once, front to back. With one row that is all there is to do, and
/// the time is that of reading the weights; further rows reuse what the registers hold. So weights
/// that bf16 can hold, as those of most published checkpoints, are kept in it, which halves the
/// time and changes no number; and weights that 24 bits can hold, such as means of bf16 ones, in
/// three quarters.
pub(crate) struct Matrix {
    panels: Panels,
    inputs: usize,
    outputs: usize,
}

enum Panels {
    Full(Lines<f32>),
    /// Two weights a word, [`PANEL`] / 2 outputs apart: the first in the lower half.
    Bf16(Lines<u32>),
    /// The upper halves of a group's weights as above, and behind them a word for each output with
    /// the third bytes of the group's four inputs, the first in its lowest byte.
    Bytes3(Lines<u32>),
}

/// Numbers that begin at a cache line.
#[derive(Default)]
struct Lines<T> {
    storage: Vec<T>,
    start: usize,
}

impl<T: Copy + Default> Lines<T> {
    fn zeros(size: usize) -> Self {
        let mut storage = vec![T::default(); size + LINE];
        // Without an offset, which is a hint, the products are the same.
        let start = storage.as_ptr().align_offset(LINE * size_of::<T>());
        let start = if start <= LINE { start } else { 0 };
        storage.truncate(start + size);
        Self { storage, start }
    }
}

impl<T> std::ops::Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.storage[self.start..]
    }
}

impl<T> std::ops::DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.start..]
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix [{}, {}]", self.inputs, self.outputs)
    }
}

/// What products write on their way, kept so that a step allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Rows side by side: `[block][inputs][rows of the block]`.
    rows: Vec<f32>,
    /// Products by panel, `[panel][rows][32]`.
    panels: Vec<f32>,
}

impl Matrix {
    /// A matrix whose columns are those of `parts`, each `[inputs, its columns]` by rows.
    pub(crate) fn from_columns(inputs: usize, parts: &[Vec<f32>]) -> Self {
        let widths: Vec<usize> = parts.iter().map(|part| part.len() / inputs).collect();
        let outputs = widths.iter().sum();
        let stride = stride(inputs);
        let mut panels = zeros(inputs, outputs);
        let mut first = 0;
        for (part, &width) in parts.iter().zip(&widths) {
            let mut done = 0;
            while done < width {
                let (panel, lane) = ((first + done) / PANEL, (first + done) % PANEL);
                let count = (PANEL - lane).min(width - done);
                for (input, row) in part.chunks_exact(width).enumerate() {
                    panels[panel * stride + input * PANEL + lane..][..count]
                        .copy_from_slice(&row[done..done + count]);
                }
                done += count;
            }
            first += width;
        }
        Self::new(panels, inputs, outputs)
    }

    /// The transpose of `rows`, `[outputs, inputs]`.
    pub(crate) fn from_rows(inputs: usize, rows: &[f32]) -> Self {
        let outputs = rows.len() / inputs;
        let mut panels = zeros(inputs, outputs);
        panels
            .par_chunks_mut(stride(inputs))
            .zip(rows.par_chunks(PANEL * inputs))
            .for_each(|(panel, rows)| {
                for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                    for (weights, &weight) in panel.chunks_exact_mut(PANEL).zip(row) {
                        weights[lane] = weight;
                    }
                }
            });
        Self::new(panels, inputs, outputs)
    }

    fn new(panels: Lines<f32>, inputs: usize, outputs: usize) -> Self {
        let held_without = |bits: u32| {
            let weights = panels.par_iter();
            weights.all(|weight| weight.to_bits() & bits == 0)
        };
        let panels = if held_without(LOWER) {
            let mut words = Lines::zeros(panels.len() / 2);
            words
                .par_chunks_exact_mut(PANEL / 2)
                .zip(panels.par_chunks_exact(PANEL))
                .for_each(|(words, weights)| upper_halves(weights, words));
            Panels::Bf16(words)
        } else if held_without(LOWEST) {
            let mut words = Lines::zeros(panels.len() / 4 * 3);
            words
                .par_chunks_exact_mut(Bytes3::PER_GROUP)
                .zip(panels.par_chunks_exact(GROUP * PANEL))
                .for_each(|(words, weights)| {
                    let (upper, third) = words.split_at_mut(GROUP * PANEL / 2);
                    let upper = upper.chunks_exact_mut(PANEL / 2);
                    let inputs = weights.chunks_exact(PANEL).zip(upper);
                    for (input, (weights, upper)) in inputs.enumerate() {
                        upper_halves(weights, upper);
                        for (third, weight) in third.iter_mut().zip(weights) {
                            *third |= (weight.to_bits() >> 8 & 0xff) << (8 * input);
                        }
                    }
                });
            Panels::Bytes3(words)
        } else {
            Panels::Full(panels)
        };
        Self {
            panels,
            inputs,
            outputs,
        }
    }

    /// Writes the products of the rows of `x`, `[rows, inputs]`, to `out`, `[rows, outputs]`.
    pub(crate) fn multiply(&self, x: &[f32], out: &mut Vec<f32>, work: &mut Workspace) {
        let rows = x.len() / self.inputs;
        let block = Arch::new().dispatch(BlockRows { rows });
        pack(x, self.inputs, block, &mut work.rows);
        // One row by panels is the row itself.
        let products = if rows == 1 {
            &mut *out
        } else {
            &mut work.panels
        };
        products.resize(self.outputs.next_multiple_of(PANEL) * rows, 0.0);
        match &self.panels {
            Panels::Full(panels) => {
                self.products::<Full>(panels, rows, block, &work.rows, products);
            }
            Panels::Bf16(panels) => {
                self.products::<Bf16>(panels, rows, block, &work.rows, products);
            }
            Panels::Bytes3(panels) => {
                self.products::<Bytes3>(panels, rows, block, &work.rows, products);
            }
        }
        if rows == 1 {
            out.truncate(self.outputs);
            return;
        }
        out.resize(rows * self.outputs, 0.0);
        for (row, out) in out.chunks_exact_mut(self.outputs).enumerate() {
            let lanes = work.panels.chunks_exact(PANEL).skip(row).step_by(rows);
            for (out, lanes) in out.chunks_mut(PANEL).zip(lanes) {
                out.copy_from_slice(&lanes[..out.len()]);
            }
        }
    }

    /// Products of all panels, `[panel][rows][32]`, with rows that lie in blocks.
    fn products<W: Weights>(
        &self,
        panels: &[W::Word],
        n_rows: usize,
        block: usize,
        rows: &[f32],
        products: &mut [f32],
    ) {
        let arch = Arch::new();
        let padded = self.inputs.next_multiple_of(GROUP);
        let run = |panels: &[W::Word], products: &mut [f32]| {
            arch.dispatch(Products::<W> {
                panels,
                padded,
                rows,
                n_rows,
                block,
                products,
            });
        };
        let stride = padded / GROUP * W::PER_GROUP;
        if n_rows * padded * self.outputs <= WORTH_SHARING {
            run(panels, products);
        } else {
            let share = (TASK_WEIGHTS / (padded * PANEL)).max(1);
            products
                .par_chunks_mut(share * n_rows * PANEL)
                .zip(panels.par_chunks(share * stride))
                .for_each(|(products, panels)| run(panels, products));
        }
    }
}

/// Floats of a panel.
fn stride(inputs: usize) -> usize {
    inputs.next_multiple_of(GROUP) * PANEL
}

fn zeros(inputs: usize, outputs: usize) -> Lines<f32> {
    Lines::zeros(stride(inputs) * outputs.div_ceil(PANEL))
}

/// Lays blocks of rows side by side, input by input, padded as the panels are.
fn pack(x: &[f32], inputs: usize, block: usize, packed: &mut Vec<f32>) {
    let padded = inputs.next_multiple_of(GROUP);
    packed.clear();
    packed.resize(x.len() / inputs * padded, 0.0);
    let blocks = packed.chunks_mut(block * padded);
    for (packed, x) in blocks.zip(x.chunks(block * inputs)) {
        let rows = x.len() / inputs;
        if rows == 1 {
            packed[..inputs].copy_from_slice(x);
            continue;
        }
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            for (packed, &x) in packed.chunks_exact_mut(rows).zip(x) {
                packed[row] = x;
            }
        }
    }
}

/// Of `rows`, how many are multiplied together, so that blocks are as even as can be.
struct BlockRows {
    rows: usize,
}

impl WithSimd for BlockRows {
    type Output = usize;

    fn with_simd<S: Simd>(self, _simd: S) -> usize {
        let most = if self.rows <= most_direct(S::F32_LANES) {
            self.rows.min(8)
        } else if S::F32_LANES == 16 {
            8
        } else {
            6
        };
        self.rows.div_ceil(self.rows.div_ceil(most))
    }
}

/// Up to how many rows' sums fit into the registers beside a whole panel's 32 weights of an input.
const fn most_direct(lanes: usize) -> usize {
    match lanes {
        16 => 8,
        8 => 2,
        4 => 1,
        // Without vectors there is nothing to gain.
        _ => usize::MAX,
    }
}

/// How the weights of a panel are kept.
trait Weights {
    type Word: Copy + Sync;

    /// Words for a panel's weights of a group of inputs.
    const PER_GROUP: usize;

    /// `N` registers, from the one with number `FIRST` on, of a panel's weights of one `INPUT` of a
    /// group, which are `V` registers in all.
    ///
    /// Without closures: one that is not inlined would be compiled for the plainest processor.
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[Self::Word],
    ) -> [S::f32s; N];
}

struct Full;

impl Weights for Full {
    type Word = f32;
    const PER_GROUP: usize = GROUP * PANEL;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[f32],
    ) -> [S::f32s; N] {
        let (words, _) = S::as_simd_f32s(&words[INPUT * PANEL..][..PANEL]);
        let mut weights = [simd.splat_f32s(0.0); N];
        weights.copy_from_slice(&words[FIRST..][..N]);
        weights
    }
}

struct Bf16;

impl Weights for Bf16 {
    type Word = u32;
    const PER_GROUP: usize = GROUP * PANEL / 2;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[u32],
    ) -> [S::f32s; N] {
        let (words, _) = S::as_simd_u32s(&words[INPUT * PANEL / 2..][..PANEL / 2]);
        let mut weights = [simd.splat_f32s(0.0); N];
        for (at, weight) in weights.iter_mut().enumerate() {
            let upper = upper_half::<S, V>(simd, words, FIRST + at);
            *weight = simd.transmute_f32s_u32s(upper);
        }
        weights
    }
}

struct Bytes3;

impl Weights for Bytes3 {
    type Word = u32;
    const PER_GROUP: usize = GROUP * PANEL / 4 * 3;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[u32],
    ) -> [S::f32s; N] {
        let (upper, third) = words.split_at(GROUP * PANEL / 2);
        let (upper, _) = S::as_simd_u32s(&upper[INPUT * PANEL / 2..][..PANEL / 2]);
        let (third, _) = S::as_simd_u32s(third);
        let mut weights = [simd.splat_f32s(0.0); N];
        for (at, weight) in weights.iter_mut().enumerate() {
            let register = FIRST + at;
            // The input's byte goes to where an f32 has its third.
            let third = match INPUT {
                0 => simd.wrapping_dyn_shl_u32s(third[register], simd.splat_u32s(8)),
                1 => third[register],
                2 => simd.wrapping_dyn_shr_u32s(third[register], simd.splat_u32s(8)),
                _ => simd.wrapping_dyn_shr_u32s(third[register], simd.splat_u32s(16)),
            };
            let third = simd.and_u32s(third, simd.splat_u32s(LOWER & !LOWEST));
            let upper = upper_half::<S, V>(simd, upper, register);
            *weight = simd.transmute_f32s_u32s(simd.or_u32s(upper, third));
        }
        weights
    }
}

/// The upper halves of a panel's weights, two a word and half a panel apart.
fn upper_halves(weights: &[f32], words: &mut [u32]) {
    let (first, second) = weights.split_at(PANEL / 2);
    for ((word, first), second) in words.iter_mut().zip(first).zip(second) {
        *word = first.to_bits() >> 16 | (second.to_bits() & !LOWER);
    }
}

/// One of the `V` registers of [`upper_halves`].
#[inline(always)]
fn upper_half<S: Simd, const V: usize>(simd: S, words: &[S::u32s], register: usize) -> S::u32s {
    if register < V / 2 {
        simd.wrapping_dyn_shl_u32s(words[register], simd.splat_u32s(16))
    } else {
        simd.and_u32s(words[register - V / 2], simd.splat_u32s(!LOWER))
    }
}

/// Products of some panels with all rows.
struct Products<'a, W: Weights> {
    panels: &'a [W::Word],
    /// Inputs of a panel.
    padded: usize,
    rows: &'a [f32],
    n_rows: usize,
    block: usize,
    products: &'a mut [f32],
}

impl<W: Weights> WithSimd for Products<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Registers that 32 outputs take.
        match S::F32_LANES {
            16 => self.run::<S, 2>(simd),
            8 => self.run::<S, 4>(simd),
            4 => self.run::<S, 8>(simd),
            _ => self.run::<S, PANEL>(simd),
        }
    }
}

impl<W: Weights> Products<'_, W> {
    #[inline(always)]
    fn run<S: Simd, const V: usize>(self, simd: S) {
        let panels = self.panels.chunks_exact(self.padded / GROUP * W::PER_GROUP);
        let products = self.products.chunks_exact_mut(self.n_rows * PANEL);
        if self.n_rows <= most_direct(S::F32_LANES) {
            for (panel, products) in panels.zip(products) {
                let blocks = self.rows.chunks(self.block * self.padded);
                for (rows, out) in blocks.zip(products.chunks_mut(self.block * PANEL)) {
                    by_rows::<S, W, V>(simd, panel, rows, out);
                }
            }
            return;
        }
        for (panel, products) in panels.zip(products) {
            products.fill(0.0);
            // Some inputs at a time, whose weights stay in the nearest cache for all rows.
            let chunks = panel.chunks(CHUNK_GROUPS * W::PER_GROUP);
            for (chunk, words) in chunks.enumerate() {
                let inputs = words.len() / W::PER_GROUP * GROUP;
                let blocks = self.rows.chunks(self.block * self.padded);
                for (rows, out) in blocks.zip(products.chunks_mut(self.block * PANEL)) {
                    let n_rows = out.len() / PANEL;
                    let first = chunk * CHUNK_GROUPS * GROUP * n_rows;
                    let rows = &rows[first..][..inputs * n_rows];
                    by_strips::<S, W, V>(simd, words, rows, out);
                }
            }
        }
    }
}

/// Adds to `out` the products of up to eight rows.
#[inline(always)]
fn by_strips<S: Simd, W: Weights, const V: usize>(
    simd: S,
    words: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    match out.len() / PANEL {
        1 => strips::<S, W, V, 1>(simd, words, rows, out),
        2 => strips::<S, W, V, 2>(simd, words, rows, out),
        3 => strips::<S, W, V, 3>(simd, words, rows, out),
        4 => strips::<S, W, V, 4>(simd, words, rows, out),
        5 => strips::<S, W, V, 5>(simd, words, rows, out),
        6 => strips::<S, W, V, 6>(simd, words, rows, out),
        7 => strips::<S, W, V, 7>(simd, words, rows, out),
        _ => strips::<S, W, V, 8>(simd, words, rows, out),
    }
}

/// Adds the products of `R` rows, [`STRIP`] registers of a panel after another.
#[inline(always)]
fn strips<S: Simd, W: Weights, const V: usize, const R: usize>(
    simd: S,
    words: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    strip::<S, W, V, R, 0>(simd, words, rows, out);
    if V >= 4 {
        strip::<S, W, V, R, 2>(simd, words, rows, out);
    }
    if V >= 8 {
        strip::<S, W, V, R, 4>(simd, words, rows, out);
        strip::<S, W, V, R, 6>(simd, words, rows, out);
    }
}

/// Adds the products of `R` rows with [`STRIP`] registers of a panel, from the one with number `FIRST`.
#[inline(always)]
fn strip<S: Simd, W: Weights, const V: usize, const R: usize, const FIRST: usize>(
    simd: S,
    words: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    let place = FIRST * S::F32_LANES..(FIRST + STRIP) * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); STRIP]; R];
    for (sums, out) in sums.iter_mut().zip(out.chunks_exact(PANEL)) {
        let (out, _) = S::as_simd_f32s(&out[place.clone()]);
        sums.copy_from_slice(out);
    }
    let groups = words.chunks_exact(W::PER_GROUP);
    for (words, rows) in groups.zip(rows.chunks_exact(GROUP * R)) {
        add::<S, W, V, R, 0, FIRST, STRIP>(simd, words, rows, &mut sums);
        add::<S, W, V, R, 1, FIRST, STRIP>(simd, words, rows, &mut sums);
        add::<S, W, V, R, 2, FIRST, STRIP>(simd, words, rows, &mut sums);
        add::<S, W, V, R, 3, FIRST, STRIP>(simd, words, rows, &mut sums);
    }
    for (sums, out) in sums.iter().zip(out.chunks_exact_mut(PANEL)) {
        let (out, _) = S::as_mut_simd_f32s(&mut out[place.clone()]);
        out.copy_from_slice(sums);
    }
}

/// Writes the products of a few rows, all registers of a panel together.
#[inline(always)]
fn by_rows<S: Simd, W: Weights, const V: usize>(
    simd: S,
    panel: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    // Sums, a panel's weights of an input and the rows' own numbers fill 32 registers, or 16 where a
    // panel takes more than two of them: a sum that is put aside costs more than it saves. One row
    // waits for memory, and more sums side by side were no slower for being put aside.
    match out.len() / PANEL {
        1 if V > 4 => product::<S, W, V, 1, 1>(simd, panel, rows, out),
        1 => product::<S, W, V, 1, 4>(simd, panel, rows, out),
        2 if V > 2 => product::<S, W, V, 2, 1>(simd, panel, rows, out),
        2 => product::<S, W, V, 2, 2>(simd, panel, rows, out),
        3 => product::<S, W, V, 3, 1>(simd, panel, rows, out),
        4 => product::<S, W, V, 4, 1>(simd, panel, rows, out),
        5 => product::<S, W, V, 5, 1>(simd, panel, rows, out),
        6 => product::<S, W, V, 6, 1>(simd, panel, rows, out),
        7 => product::<S, W, V, 7, 1>(simd, panel, rows, out),
        _ => product::<S, W, V, 8, 1>(simd, panel, rows, out),
    }
}

/// `R` rows with one panel of `V` registers, into `U` sums side by side: enough that none waits for
/// its last addition.
#[inline(always)]
fn product<S: Simd, W: Weights, const V: usize, const R: usize, const U: usize>(
    simd: S,
    panel: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    let mut sums = [[[simd.splat_f32s(0.0); V]; R]; U];
    let panel = panel.chunks_exact(W::PER_GROUP);
    for (words, rows) in panel.zip(rows.chunks_exact(GROUP * R)) {
        add::<S, W, V, R, 0, 0, V>(simd, words, rows, &mut sums[0]);
        add::<S, W, V, R, 1, 0, V>(simd, words, rows, &mut sums[1 % U]);
        add::<S, W, V, R, 2, 0, V>(simd, words, rows, &mut sums[2 % U]);
        add::<S, W, V, R, 3, 0, V>(simd, words, rows, &mut sums[3 % U]);
    }
    for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
        let (out, _) = S::as_mut_simd_f32s(out);
        for (register, out) in out.iter_mut().enumerate() {
            let mut total = sums[0][row][register];
            for sums in &sums[1..] {
                total = simd.add_f32s(total, sums[row][register]);
            }
            *out = total;
        }
    }
}

/// Adds the products of one input of a group with `N` registers of a panel.
#[inline(always)]
fn add<
    S: Simd,
    W: Weights,
    const V: usize,
    const R: usize,
    const INPUT: usize,
    const FIRST: usize,
    const N: usize,
>(
    simd: S,
    words: &[W::Word],
    rows: &[f32],
    sums: &mut [[S::f32s; N]; R],
) {
    let weights = W::load::<S, V, INPUT, FIRST, N>(simd, words);
    for (sums, &x) in sums.iter_mut().zip(&rows[INPUT * R..][..R]) {
        let x = simd.splat_f32s(x);
        for (sum, &weight) in sums.iter_mut().zip(&weights) {
            *sum = simd.mul_add_f32s(weight, x, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of up to 70 products of numbers below 1, in f32 against f64.
    const SUM_TOLERANCE: f64 = 1e-5;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let next = |i: usize| ((i as u64 + 1) * (seed * 2 + 1) * 2_654_435_761) % 2001;
        (0..count).map(|i| next(i) as f32 / 1000.0 - 1.0).collect()
    }

    #[test]
    fn products_of_odd_sizes_equal_sums_in_double() {
        let sizes = [(1, 1), (3, 31), (16, 32), (70, 33), (64, 300)];
        let lost = [0, LOWEST, LOWER];
        for ((inputs, outputs), lost) in sizes.into_iter().flat_map(|s| lost.map(|l| (s, l))) {
            // The first has every bit that its kind may have.
            let mut weights = numbers(inputs * outputs, 3);
            weights[0] = f32::from_bits(0x3f7f_ffff);
            for weight in &mut weights {
                *weight = f32::from_bits(weight.to_bits() & !lost);
            }
            let split = outputs / 3 * inputs;
            let columns = |from: usize, to: usize| -> Vec<f32> {
                (0..inputs)
                    .flat_map(|i| weights[i * outputs + from..i * outputs + to].to_vec())
                    .collect()
            };
            let at = split / inputs;
            let parts: Vec<Vec<f32>> = [columns(0, at), columns(at, outputs)]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect();
            let transposed: Vec<f32> = (0..outputs)
                .flat_map(|o| weights.iter().skip(o).step_by(outputs).copied())
                .collect();
            let matrices = [
                Matrix::from_columns(inputs, &parts),
                Matrix::from_rows(inputs, &transposed),
            ];
            for matrix in &matrices {
                let kind = match matrix.panels {
                    Panels::Full(_) => 0,
                    Panels::Bytes3(_) => LOWEST,
                    Panels::Bf16(_) => LOWER,
                };
                assert_eq!(kind, lost);
            }
            for rows in [1, 2, 3, 5, 8, 9, 17, 40] {
                let x = numbers(rows * inputs, 7);
                for matrix in &matrices {
                    // What an earlier product left behind does not matter.
                    let mut work = Workspace {
                        rows: vec![5.0; 7],
                        panels: vec![f32::NAN; 99],
                    };
                    let mut out = vec![f32::NAN; 3];
                    matrix.multiply(&x, &mut out, &mut work);
                    assert_eq!(out.len(), rows * outputs);
                    for (index, &got) in out.iter().enumerate() {
                        let (row, output) = (index / outputs, index % outputs);
                        let expected: f64 = (0..inputs)
                            .map(|i| {
                                f64::from(x[row * inputs + i])
                                    * f64::from(weights[i * outputs + output])
                            })
                            .sum();
                        let difference = (f64::from(got) - expected).abs();
                        assert!(
                            difference < SUM_TOLERANCE,
                            "[{rows}, {inputs}] x [{inputs}, {outputs}]: {difference:e}"
                        );
                    }
                }
            }
        }
    }
}
