//! Matrices laid out for one pass over memory.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Outputs of a panel.
const PANEL: usize = 32;
/// Inputs of an unrolled turn, or of half of one: a panel is padded to a multiple of them.
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
/// Inputs that all rows are multiplied with before the next: weights of at most 16 KiB, half of a
/// small first-level cache.
const CHUNK: usize = 128;
/// Registers of a panel that are summed together where rows are many: with six rows' sums, or eight,
/// they fit the registers of every processor.
const STRIP: usize = 2;

/// A matrix `[inputs, outputs]` as panels of 32 outputs, each `[inputs, 32]`.
///
/// A product reads every panel once, front to back. With one row that is all there is to do, and
/// the time is that of reading the weights; further rows reuse what the registers hold. So weights
/// that bf16 can hold, as those of most published checkpoints, are kept in it, which halves the
/// time and changes no number; and weights that 24 bits can hold, such as means of bf16 ones, in
/// three quarters. Weights that come from a file of 4 or 8 bits lie, by blocks, on a lattice of 16 or
/// 256 points, which is found again here, and kept as the numbers of the points: six bits a weight,
/// or ten, for the same numbers.
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
    /// Points of lattices, as [`Lattice`] says.
    Lattice4(Lines<u32>),
    Lattice8(Lines<u32>),
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
        let panels = if let Some(words) = Lattice::<8>::points(&panels, inputs) {
            Panels::Lattice4(words)
        } else if let Some(words) = Lattice::<4>::points(&panels, inputs) {
            Panels::Lattice8(words)
        } else if held_without(LOWER) {
            let mut words = Lines::zeros(panels.len() / 2);
            words
                .par_chunks_exact_mut(PANEL / 2)
                .zip(panels.par_chunks_exact(PANEL))
                .for_each(|(words, weights)| upper_halves(weights, words));
            Panels::Bf16(words)
        } else if held_without(LOWEST) {
            let mut words = Lines::zeros(panels.len() / 4 * 3);
            words
                .par_chunks_exact_mut(Bytes3::PER_BLOCK)
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

    /// Bytes that a product reads of it.
    pub(crate) fn bytes(&self) -> usize {
        4 * match &self.panels {
            Panels::Full(words) => words.len(),
            Panels::Bf16(words)
            | Panels::Bytes3(words)
            | Panels::Lattice4(words)
            | Panels::Lattice8(words) => words.len(),
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
            Panels::Lattice4(panels) => {
                self.products::<Lattice<8>>(panels, rows, block, &work.rows, products);
            }
            Panels::Lattice8(panels) => {
                self.products::<Lattice<4>>(panels, rows, block, &work.rows, products);
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
        let stride = W::words(padded);
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
            self.rows.min(2)
        } else if S::F32_LANES == 16 {
            8
        } else {
            6
        };
        self.rows.div_ceil(self.rows.div_ceil(most))
    }
}

/// Up to how many rows are multiplied with weights as they are kept: their sums fit into the registers
/// beside what unpacking takes.
const fn most_direct(lanes: usize) -> usize {
    match lanes {
        16 | 8 => 2,
        4 => 1,
        // Without vectors there is nothing to gain.
        _ => usize::MAX,
    }
}

/// How the weights of a panel are kept: in blocks of inputs.
trait Weights {
    type Word: Copy + Sync;

    /// Words of a block.
    const PER_BLOCK: usize;
    /// Inputs of a block.
    const BLOCK: usize = GROUP;
    /// Those that an unrolled turn takes: 4 or 8.
    const TURN: usize = GROUP;

    /// Words that hold a panel's weights of some inputs, whole blocks of them.
    fn words(inputs: usize) -> usize {
        inputs / Self::BLOCK * Self::PER_BLOCK
    }

    /// `N` registers, from the one with number `FIRST` on, of a panel's weights of one `INPUT` of one
    /// of a block's turns, which are `V` registers in all.
    ///
    /// Without closures: one that is not inlined would be compiled for the plainest processor.
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        block: &[Self::Word],
        turn: usize,
    ) -> [S::f32s; N];

    /// How they are kept where many rows come: in another way if unpacking takes long.
    type Unpacked: Weights;

    /// A panel's weights of some inputs, kept in that way, in `to` if it is another.
    fn unpacked<'w, S: Simd, const V: usize>(
        simd: S,
        words: &'w [Self::Word],
        to: &'w mut [f32],
    ) -> &'w [<Self::Unpacked as Weights>::Word];
}

struct Full;

impl Weights for Full {
    type Word = f32;
    const PER_BLOCK: usize = GROUP * PANEL;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[f32],
        _: usize,
    ) -> [S::f32s; N] {
        let (words, _) = S::as_simd_f32s(&words[INPUT * PANEL..][..PANEL]);
        let mut weights = [simd.splat_f32s(0.0); N];
        weights.copy_from_slice(&words[FIRST..][..N]);
        weights
    }

    type Unpacked = Self;

    #[inline(always)]
    fn unpacked<'w, S: Simd, const V: usize>(
        _: S,
        words: &'w [f32],
        _: &'w mut [f32],
    ) -> &'w [f32] {
        words
    }
}

struct Bf16;

impl Weights for Bf16 {
    type Word = u32;
    const PER_BLOCK: usize = GROUP * PANEL / 2;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[u32],
        _: usize,
    ) -> [S::f32s; N] {
        let (words, _) = S::as_simd_u32s(&words[INPUT * PANEL / 2..][..PANEL / 2]);
        let mut weights = [simd.splat_f32s(0.0); N];
        for (at, weight) in weights.iter_mut().enumerate() {
            let upper = upper_half::<S, V>(simd, words, FIRST + at);
            *weight = simd.transmute_f32s_u32s(upper);
        }
        weights
    }

    type Unpacked = Self;

    #[inline(always)]
    fn unpacked<'w, S: Simd, const V: usize>(
        _: S,
        words: &'w [u32],
        _: &'w mut [f32],
    ) -> &'w [u32] {
        words
    }
}

struct Bytes3;

impl Weights for Bytes3 {
    type Word = u32;
    const PER_BLOCK: usize = GROUP * PANEL / 4 * 3;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        words: &[u32],
        _: usize,
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

    type Unpacked = Full;

    #[inline(always)]
    fn unpacked<'w, S: Simd, const V: usize>(
        simd: S,
        words: &'w [u32],
        to: &'w mut [f32],
    ) -> &'w [f32] {
        let to = &mut to[..words.len() / Self::PER_BLOCK * GROUP * PANEL];
        let blocks = words.chunks_exact(Self::PER_BLOCK);
        for (words, to) in blocks.zip(to.chunks_exact_mut(GROUP * PANEL)) {
            let (to, _) = S::as_mut_simd_f32s(to);
            to[..V].copy_from_slice(&Self::load::<S, V, 0, 0, V>(simd, words, 0));
            to[V..2 * V].copy_from_slice(&Self::load::<S, V, 1, 0, V>(simd, words, 0));
            to[2 * V..3 * V].copy_from_slice(&Self::load::<S, V, 2, 0, V>(simd, words, 0));
            to[3 * V..].copy_from_slice(&Self::load::<S, V, 3, 0, V>(simd, words, 0));
        }
        to
    }
}

/// Weights as points of lattices, `PER_WORD` a word: 8 of four bits or 4 of eight.
///
/// A block is what 32 inputs weigh for an output, as in the files of quantised models. Its weights are
/// `origin + step * (POINTS + point)`. Of either half of a panel come first the steps of its 16
/// outputs, then their origins, and for each turn a word for each output with the points of `PER_WORD`
/// inputs, the first in its lowest bits.
struct Lattice<const PER_WORD: usize>;

impl<const PER_WORD: usize> Lattice<PER_WORD> {
    const BITS: usize = 32 / PER_WORD;
    /// Points of a lattice. From this power of two to the next the floats that differ in their first
    /// bits of mantissa alone are the integers, so that a point becomes a number by two operations on
    /// bits.
    const POINTS: f32 = (1 << Self::BITS) as f32;
    /// Where these bits begin.
    const FIRST_BIT: usize = 23 - Self::BITS;
    /// Words of half a block.
    const PER_HALF: usize = PANEL / 2 * (2 + Self::BLOCK / PER_WORD);

    /// Weights on a line, its steps and origins, by the points of one input of their words.
    #[inline(always)]
    fn weights<S: Simd>(
        simd: S,
        (step, origin): (S::u32s, S::u32s),
        points: S::u32s,
        input: usize,
    ) -> S::f32s {
        let (bit, to) = (Self::BITS * input, Self::FIRST_BIT);
        let point = if bit < to {
            simd.wrapping_dyn_shl_u32s(points, simd.splat_u32s((to - bit) as u32))
        } else {
            simd.wrapping_dyn_shr_u32s(points, simd.splat_u32s((bit - to) as u32))
        };
        let mask = simd.splat_u32s(((1 << Self::BITS) - 1) << to);
        let first = simd.splat_u32s(Self::POINTS.to_bits());
        let point = simd.or_u32s(simd.and_u32s(point, mask), first);
        simd.mul_add_f32s(
            simd.transmute_f32s_u32s(step),
            simd.transmute_f32s_u32s(point),
            simd.transmute_f32s_u32s(origin),
        )
    }
}

impl<const PER_WORD: usize> Weights for Lattice<PER_WORD> {
    type Word = u32;
    const PER_BLOCK: usize = 2 * Self::PER_HALF;
    const BLOCK: usize = 32;
    const TURN: usize = PER_WORD;

    #[inline(always)]
    fn load<S: Simd, const V: usize, const INPUT: usize, const FIRST: usize, const N: usize>(
        simd: S,
        block: &[u32],
        turn: usize,
    ) -> [S::f32s; N] {
        let mut weights = [simd.splat_f32s(0.0); N];
        for (at, weight) in weights.iter_mut().enumerate() {
            // The register and its place in one of the halves.
            let (half, at) = ((FIRST + at) / (V / 2), (FIRST + at) % (V / 2));
            let half = &block[half * Self::PER_HALF..][..Self::PER_HALF];
            let (shared, _) = S::as_simd_u32s(&half[..PANEL]);
            let (points, _) = S::as_simd_u32s(&half[PANEL + turn * PANEL / 2..][..PANEL / 2]);
            let line = (shared[at], shared[V / 2 + at]);
            *weight = Self::weights(simd, line, points[at], INPUT);
        }
        weights
    }

    type Unpacked = Full;

    #[inline(always)]
    fn unpacked<'w, S: Simd, const V: usize>(
        simd: S,
        words: &'w [u32],
        to: &'w mut [f32],
    ) -> &'w [f32] {
        let halves = words.chunks_exact(Self::PER_HALF).enumerate();
        for (half, words) in halves {
            let to = &mut to[half / 2 * Self::BLOCK * PANEL..][..Self::BLOCK * PANEL];
            let (shared, _) = S::as_simd_u32s(&words[..PANEL]);
            for at in 0..V / 2 {
                let line = (shared[at], shared[V / 2 + at]);
                let place = half % 2 * PANEL / 2 + at * S::F32_LANES;
                let turns = to.chunks_exact_mut(PER_WORD * PANEL);
                for (points, to) in words[PANEL..].chunks_exact(PANEL / 2).zip(turns) {
                    let (points, _) = S::as_simd_u32s(points);
                    for input in 0..PER_WORD {
                        let to = &mut to[input * PANEL + place..][..S::F32_LANES];
                        let (to, _) = S::as_mut_simd_f32s(to);
                        to[0] = Self::weights(simd, line, points[at], input);
                    }
                }
            }
        }
        &to[..words.len() / Self::PER_BLOCK * Self::BLOCK * PANEL]
    }
}

impl<const PER_WORD: usize> Lattice<PER_WORD> {
    /// The weights of all panels, if every one of them is a point.
    fn points(panels: &[f32], inputs: usize) -> Option<Lines<u32>> {
        let block = Self::BLOCK * PANEL;
        if !inputs.is_multiple_of(Self::BLOCK) {
            return None;
        }
        let mut words = Lines::zeros(panels.len() / block * Self::PER_BLOCK);
        let blocks = words.par_chunks_exact_mut(Self::PER_BLOCK);
        blocks
            .zip(panels.par_chunks_exact(block))
            .try_for_each(|(words, weights)| {
                for (lane, weights) in (0..PANEL).map(|lane| (lane, &weights[lane..])) {
                    let weights = weights.iter().step_by(PANEL).copied();
                    let half = &mut words[lane / (PANEL / 2) * Self::PER_HALF..][..Self::PER_HALF];
                    let lane = lane % (PANEL / 2);
                    let (low, step) = spacing(weights.clone())?;
                    let origin = low - Self::POINTS * step;
                    half[lane] = step.to_bits();
                    half[PANEL / 2 + lane] = origin.to_bits();
                    for (input, weight) in weights.enumerate() {
                        let point = Self::point(weight, low, step, origin)?;
                        half[PANEL + input / PER_WORD * PANEL / 2 + lane] |=
                            point << (Self::BITS * (input % PER_WORD));
                    }
                }
                Some(())
            })?;
        Some(words)
    }

    /// The point that is computed as exactly this weight, with fused multiplication and addition and
    /// without.
    #[expect(
        clippy::float_cmp,
        reason = "a weight is kept to the bit or not at all"
    )]
    fn point(weight: f32, low: f32, step: f32, origin: f32) -> Option<u32> {
        let point = if step == 0.0 {
            0
        } else {
            ((weight - low) / step + 0.5) as u32
        };
        let integer = Self::POINTS + point as f32;
        let exact = f64::from(step) * f64::from(integer) == f64::from(step * integer);
        let same = exact && step * integer + origin == weight;
        (same && point >> Self::BITS == 0).then_some(point)
    }
}

/// The least of some numbers, and the widest step by which all others follow from it.
#[expect(clippy::float_cmp, reason = "a step that is rounded is none")]
fn spacing(numbers: impl Iterator<Item = f32> + Clone) -> Option<(f32, f32)> {
    let low = numbers.clone().fold(f32::INFINITY, f32::min);
    // As integers, in units of the last bit that any of them has.
    let unit = numbers.clone().filter(|&n| n != 0.0).map(last_bit).min();
    let unit = unit.unwrap_or_default();
    let least = integer(low, unit)?;
    let mut spacing = 0;
    for number in numbers {
        spacing = gcd(integer(number, unit)?.abs_diff(least), spacing);
    }
    let step = spacing as f64 * f64::from(unit).exp2();
    (f64::from(step as f32) == step).then_some((low, step as f32))
}

/// A number's power of two and what it is to be multiplied with.
fn parts(number: f32) -> (i32, u32) {
    match (number.to_bits() >> 23 & 0xff, number.to_bits() & 0x7f_ffff) {
        (0, mantissa) => (-149, mantissa),
        (exponent, mantissa) => (exponent as i32 - 150, mantissa | 0x80_0000),
    }
}

/// The power of two that the last bit of a number other than 0 stands for.
fn last_bit(number: f32) -> i32 {
    let (exponent, mantissa) = parts(number);
    exponent + mantissa.trailing_zeros() as i32
}

/// A number in units of a power of two, of which it is a multiple.
fn integer(number: f32, unit: i32) -> Option<i64> {
    let (exponent, mantissa) = parts(number);
    if mantissa == 0 {
        return Some(0);
    }
    let size = match exponent - unit {
        // What the units are taken from ends with a bit, or begins with more than a lattice spans.
        shift @ 0..32 => i64::from(mantissa) << shift,
        shift @ -23..0 => i64::from(mantissa >> -shift),
        _ => return None,
    };
    number
        .is_finite()
        .then_some(if number < 0.0 { -size } else { size })
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
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
        let panels = self.panels.chunks_exact(W::words(self.padded));
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
        let mut unpacked = Chunk([0.0; CHUNK * PANEL]);
        for (panel, products) in panels.zip(products) {
            products.fill(0.0);
            // Some inputs at a time, whose weights stay in the nearest cache for all rows.
            for (chunk, words) in panel.chunks(W::words(CHUNK)).enumerate() {
                let inputs = words.len() / W::PER_BLOCK * W::BLOCK;
                let words = W::unpacked::<S, V>(simd, words, &mut unpacked.0);
                let blocks = self.rows.chunks(self.block * self.padded);
                for (rows, out) in blocks.zip(products.chunks_mut(self.block * PANEL)) {
                    let n_rows = out.len() / PANEL;
                    let first = chunk * CHUNK * n_rows;
                    let rows = &rows[first..][..inputs * n_rows];
                    by_strips::<S, W::Unpacked, V>(simd, words, rows, out);
                }
            }
        }
    }
}

/// A panel's weights of some inputs, from a cache line on.
#[repr(align(64))]
struct Chunk([f32; CHUNK * PANEL]);

/// Adds to `out` the products of up to eight rows with a panel's weights of some
/// inputs.
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
    let blocks = words.chunks_exact(W::PER_BLOCK);
    for (words, rows) in blocks.zip(rows.chunks_exact(W::BLOCK * R)) {
        let sums = std::array::from_mut(&mut sums);
        turn::<S, W, V, R, FIRST, STRIP, 1>(simd, words, 0, rows, sums);
    }
    for (sums, out) in sums.iter().zip(out.chunks_exact_mut(PANEL)) {
        let (out, _) = S::as_mut_simd_f32s(&mut out[place.clone()]);
        out.copy_from_slice(sums);
    }
}

/// Writes the products of one row or two.
#[inline(always)]
fn by_rows<S: Simd, W: Weights, const V: usize>(
    simd: S,
    panel: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    // Into sums side by side, enough that none waits for its last addition, unless they do not fit
    // the registers: a sum that is put aside at every input costs more than it saves. One row with
    // weights that need no unpacking waits for memory, and was no slower for it.
    match (out.len() / PANEL, V) {
        (1, 8..) => product::<S, W, V, 1, 1>(simd, panel, rows, out),
        (1, _) if W::BLOCK > GROUP => block_product::<S, W, V, 1, 2>(simd, panel, rows, out),
        (1, _) => product::<S, W, V, 1, 4>(simd, panel, rows, out),
        (_, 8..) => product::<S, W, V, 2, 1>(simd, panel, rows, out),
        _ if W::BLOCK > GROUP => block_product::<S, W, V, 2, 1>(simd, panel, rows, out),
        (_, 3..) => product::<S, W, V, 2, 1>(simd, panel, rows, out),
        _ => product::<S, W, V, 2, 2>(simd, panel, rows, out),
    }
}

/// `R` rows with one panel of `V` registers, into `U` sums side by side.
#[inline(always)]
fn product<S: Simd, W: Weights, const V: usize, const R: usize, const U: usize>(
    simd: S,
    panel: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    let mut sums = [[[simd.splat_f32s(0.0); V]; R]; U];
    let blocks = panel.chunks_exact(W::PER_BLOCK);
    for (words, rows) in blocks.zip(rows.chunks_exact(W::BLOCK * R)) {
        block::<S, W, V, R, 0, V, U>(simd, words, rows, &mut sums);
    }
    finish::<S, R, V, U>(simd, 0, &sums, out);
}

/// [`product`] with a panel of two or four registers, [`STRIP`] after another in each block.
#[inline(always)]
fn block_product<S: Simd, W: Weights, const V: usize, const R: usize, const U: usize>(
    simd: S,
    panel: &[W::Word],
    rows: &[f32],
    out: &mut [f32],
) {
    let mut sums = [[[[simd.splat_f32s(0.0); STRIP]; R]; U]; 2];
    let blocks = panel.chunks_exact(W::PER_BLOCK);
    for (words, rows) in blocks.zip(rows.chunks_exact(W::BLOCK * R)) {
        block::<S, W, V, R, 0, STRIP, U>(simd, words, rows, &mut sums[0]);
        if V == 2 * STRIP {
            block::<S, W, V, R, 2, STRIP, U>(simd, words, rows, &mut sums[1]);
        }
    }
    for (strip, sums) in sums.iter().enumerate().take(V / STRIP) {
        finish::<S, R, STRIP, U>(simd, strip * STRIP, sums, out);
    }
}

/// Writes the totals of sums side by side as the registers of a panel from `first` on.
#[inline(always)]
fn finish<S: Simd, const R: usize, const N: usize, const U: usize>(
    simd: S,
    first: usize,
    sums: &[[[S::f32s; N]; R]; U],
    out: &mut [f32],
) {
    for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
        let (out, _) = S::as_mut_simd_f32s(out);
        for (register, out) in out[first..].iter_mut().take(N).enumerate() {
            let mut total = sums[0][row][register];
            for sums in &sums[1..] {
                total = simd.add_f32s(total, sums[row][register]);
            }
            *out = total;
        }
    }
}

/// Adds the products of a block's inputs with `N` registers of a panel.
#[inline(always)]
fn block<
    S: Simd,
    W: Weights,
    const V: usize,
    const R: usize,
    const FIRST: usize,
    const N: usize,
    const U: usize,
>(
    simd: S,
    words: &[W::Word],
    rows: &[f32],
    sums: &mut [[[S::f32s; N]; R]; U],
) {
    let mut local = *sums;
    for (at, rows) in rows.chunks_exact(W::TURN * R).enumerate() {
        turn::<S, W, V, R, FIRST, N, U>(simd, words, at, rows, &mut local);
    }
    *sums = local;
}

/// Adds the products of a turn's inputs with `N` registers of a panel, to one of the `U` sums after
/// another.
#[inline(always)]
fn turn<
    S: Simd,
    W: Weights,
    const V: usize,
    const R: usize,
    const FIRST: usize,
    const N: usize,
    const U: usize,
>(
    simd: S,
    block: &[W::Word],
    turn: usize,
    rows: &[f32],
    sums: &mut [[[S::f32s; N]; R]; U],
) {
    add::<S, W, V, R, 0, FIRST, N>(simd, block, turn, rows, &mut sums[0]);
    add::<S, W, V, R, 1, FIRST, N>(simd, block, turn, rows, &mut sums[1 % U]);
    add::<S, W, V, R, 2, FIRST, N>(simd, block, turn, rows, &mut sums[2 % U]);
    add::<S, W, V, R, 3, FIRST, N>(simd, block, turn, rows, &mut sums[3 % U]);
    if W::TURN == 8 {
        add::<S, W, V, R, 4, FIRST, N>(simd, block, turn, rows, &mut sums[0]);
        add::<S, W, V, R, 5, FIRST, N>(simd, block, turn, rows, &mut sums[1 % U]);
        add::<S, W, V, R, 6, FIRST, N>(simd, block, turn, rows, &mut sums[2 % U]);
        add::<S, W, V, R, 7, FIRST, N>(simd, block, turn, rows, &mut sums[3 % U]);
    }
}

/// Adds the products of one input of a turn with `N` registers of a panel.
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
    block: &[W::Word],
    turn: usize,
    rows: &[f32],
    sums: &mut [[S::f32s; N]; R],
) {
    if INPUT >= W::TURN {
        return;
    }
    let weights = W::load::<S, V, INPUT, FIRST, N>(simd, block, turn);
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

    /// Sums of up to 288 products of numbers below 1, in f32 against f64.
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
                    Panels::Lattice4(_) | Panels::Lattice8(_) => panic!("not on a lattice"),
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

    /// Weights of `bits` bits as files of quantised models have them: a scale and an offset of 11 bits
    /// for every 32 inputs of an output. `[outputs, inputs]`.
    fn quantised(inputs: usize, outputs: usize, bits: u32) -> Vec<f32> {
        let eleven_bits = |number: f32| f32::from_bits(number.to_bits() & !0x1fff);
        let points = numbers(inputs * outputs, 11);
        let blocks = points.chunks(32).zip(numbers(inputs * outputs / 32, 5));
        let weights = blocks.flat_map(|(points, seed)| {
            let scale = eleven_bits(seed.abs() / 16.0 + 1e-4);
            let offset = eleven_bits(-seed.abs() / 2.0);
            points.iter().map(move |point| {
                let point = ((point + 1.0) / 2.0 * ((1 << bits) - 1) as f32).round();
                scale * point + offset
            })
        });
        weights.collect()
    }

    #[test]
    fn weights_on_lattices_give_the_bits_that_they_give_in_full() {
        for (bits, (inputs, outputs)) in [(4, (64, 70)), (8, (32, 33)), (4, (288, 32))] {
            let weights = quantised(inputs, outputs, bits);
            let matrix = Matrix::from_rows(inputs, &weights);
            let kept = match matrix.panels {
                Panels::Lattice4(_) => 4,
                Panels::Lattice8(_) => 8,
                _ => 32,
            };
            assert_eq!(kept, bits);
            let mut full = zeros(inputs, outputs);
            let panels = full.chunks_exact_mut(stride(inputs));
            for (panel, rows) in panels.zip(weights.chunks(PANEL * inputs)) {
                for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                    for (input, &weight) in row.iter().enumerate() {
                        panel[input * PANEL + lane] = weight;
                    }
                }
            }
            let full = Matrix {
                panels: Panels::Full(full),
                inputs,
                outputs,
            };
            assert!(matrix.bytes() * 3 < full.bytes());
            // Each input alone, whose product is its weight, and many at once.
            for rows in [1, 2, 3, 5, 16] {
                let one_by_one = (0..inputs).map(|input| {
                    let mut x = vec![0.0; rows * inputs];
                    x[(rows - 1) * inputs + input] = 1.0;
                    (x, 0.0)
                });
                let together = [(numbers(rows * inputs, 7), SUM_TOLERANCE)];
                for (x, tolerance) in one_by_one.chain(together) {
                    let (mut got, mut expected) = (vec![], vec![]);
                    matrix.multiply(&x, &mut got, &mut Workspace::default());
                    full.multiply(&x, &mut expected, &mut Workspace::default());
                    for (got, expected) in got.iter().zip(&expected) {
                        let difference = f64::from(got - expected).abs();
                        assert!(difference <= tolerance, "{rows} rows: {difference:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_lies_on_no_lattice_is_kept_as_it_is() {
        let on = quantised(64, 32, 4);
        let changes: [fn(f32) -> f32; 4] = [
            |weight| f32::from_bits(weight.to_bits() ^ 1),
            |_| f32::NAN,
            |_| f32::INFINITY,
            |_| f32::MIN_POSITIVE / 8.0,
        ];
        for change in changes {
            let mut weights = on.clone();
            weights[777] = change(weights[777]);
            let matrix = Matrix::from_rows(64, &weights);
            assert!(matches!(matrix.panels, Panels::Full(_) | Panels::Bytes3(_)));
        }
        // One number alone is a point, whichever it is.
        let matrix = Matrix::from_rows(32, &[-0.1; 64]);
        assert!(matches!(matrix.panels, Panels::Lattice4(_)));
        // Another number of inputs has no whole blocks.
        let matrix = Matrix::from_rows(31, &[0.1; 62]);
        assert!(matches!(matrix.panels, Panels::Full(_)));
    }
}
