//! Two rows of logits in one pass: normalisers, entropies, divergences; and the likeliest tokens.

use ops::{exp, exp_lanes};
use pulp::{Arch, Simd, WithSimd};

/// After this many registers an f32 sum goes into f64: its rounding stays below 1e-6.
const BLOCK: usize = 64;
/// Registers whose exponentials are taken together: one alone would wait for its own multiplications.
const TOGETHER: usize = 2;
/// Registers whose largest numbers are looked for side by side, each lane for itself.
const COLUMNS: usize = 4;

/// What two rows of logits say together; nats.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RowPair {
    /// `log Σ_v exp` of the policy's row.
    pub policy_total: f64,
    /// The same of the reference's.
    pub reference_total: f64,
    pub policy_entropy: f64,
    pub reference_entropy: f64,
    /// `KL(π ‖ π_ref)`.
    pub policy_kl: f64,
    /// `KL(π_ref ‖ π)`.
    pub reference_kl: f64,
    /// Ids of the policy's largest logits, largest first; of equals, the lowest id first.
    pub likeliest: Vec<u32>,
}

impl RowPair {
    /// Reads two rows of one vocabulary, with the policy's `n` likeliest tokens (all, if there are no
    /// more); nothing where a logit is not finite.
    pub(crate) fn read(policy: &[f32], reference: &[f32], n: usize) -> Option<Self> {
        let n = n.min(policy.len());
        Arch::new().dispatch(Read {
            policy,
            reference,
            n,
        })
    }
}

/// [`RowPair::read`] in the widest registers that the processor has.
struct Read<'a> {
    policy: &'a [f32],
    reference: &'a [f32],
    n: usize,
}

impl WithSimd for Read<'_> {
    type Output = Option<RowPair>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Option<RowPair> {
        let Self {
            policy,
            reference,
            n,
        } = self;
        let (p_columns, q_columns) = (Columns::of(simd, policy), Columns::of(simd, reference));
        let sums = Sums::of(simd, [policy, reference], [p_columns.most, q_columns.most]);
        // A NaN or an infinity anywhere is in the product of a shifted logit and its exponential.
        if sums.0.iter().any(|total| !total.is_finite()) {
            return None;
        }
        let [p_sum, q_sum, p_own, q_own, p_cross, q_cross] = sums.0;
        let (p_log, q_log) = (p_sum.ln(), q_sum.ln());
        Some(RowPair {
            policy_total: f64::from(p_columns.most) + p_log,
            reference_total: f64::from(q_columns.most) + q_log,
            policy_entropy: (p_log - p_own / p_sum).max(0.0),
            reference_entropy: (q_log - q_own / q_sum).max(0.0),
            // Never below 0 but by rounding.
            policy_kl: (p_cross / p_sum - p_log + q_log).max(0.0),
            reference_kl: (-q_cross / q_sum - q_log + p_log).max(0.0),
            likeliest: p_columns.likeliest(simd, policy, n),
        })
    }
}

/// With a = p − max p and b = q − max q: Σ e^a, Σ e^b, Σ a e^a, Σ b e^b, Σ (a−b) e^a and Σ (a−b) e^b.
/// They hold everything; no probability is stored.
struct Sums([f64; 6]);

impl Sums {
    #[inline(always)]
    fn of<S: Simd>(simd: S, rows: [&[f32]; 2], largest: [f32; 2]) -> Self {
        let mut totals = [0.0_f64; 6];
        let [(p_registers, p_rest), (q_registers, q_rest)] = rows.map(S::as_simd_f32s);
        let high = largest.map(|x| simd.splat_f32s(x));
        let zero = simd.splat_f32s(0.0);
        // Apart from the sums: they and the exponentials' constants are too many for the registers.
        let mut exps = [[zero; BLOCK]; 2];
        for (p, q) in p_registers.chunks(BLOCK).zip(q_registers.chunks(BLOCK)) {
            for ((exps, x), high) in exps.iter_mut().zip([p, q]).zip(high) {
                shifted_exps(simd, x, high, exps);
            }
            let mut sums = [zero; 6];
            let terms = p.iter().zip(q).zip(&exps[0]).zip(&exps[1]);
            for (((&p, &q), &p_exp), &q_exp) in terms {
                let (a, b) = (simd.sub_f32s(p, high[0]), simd.sub_f32s(q, high[1]));
                let gap = simd.sub_f32s(a, b);
                sums[0] = simd.add_f32s(sums[0], p_exp);
                sums[1] = simd.add_f32s(sums[1], q_exp);
                sums[2] = simd.mul_add_f32s(p_exp, a, sums[2]);
                sums[3] = simd.mul_add_f32s(q_exp, b, sums[3]);
                sums[4] = simd.mul_add_f32s(p_exp, gap, sums[4]);
                sums[5] = simd.mul_add_f32s(q_exp, gap, sums[5]);
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += f64::from(simd.reduce_sum_f32s(sum));
            }
        }
        for (&p, &q) in p_rest.iter().zip(q_rest) {
            let (a, b) = (p - largest[0], q - largest[1]);
            let (p_exp, q_exp) = (exp(a), exp(b));
            let gap = a - b;
            let terms = [p_exp, q_exp, p_exp * a, q_exp * b, p_exp * gap, q_exp * gap];
            for (total, term) in totals.iter_mut().zip(terms) {
                *total += f64::from(term);
            }
        }
        Self(totals)
    }
}

/// `exp(x − high)` of each register.
#[inline(always)]
fn shifted_exps<S: Simd>(simd: S, x: &[S::f32s], high: S::f32s, out: &mut [S::f32s; BLOCK]) {
    let (pairs, last) = x.as_chunks::<TOGETHER>();
    for (&x, out) in pairs.iter().zip(out.as_chunks_mut::<TOGETHER>().0) {
        *out = exp_lanes(simd, x.map(|x| simd.sub_f32s(x, high)));
    }
    for (&x, out) in last.iter().zip(&mut out[x.len() - last.len()..]) {
        [*out] = exp_lanes(simd, [simd.sub_f32s(x, high)]);
    }
}

/// The largest number of each column of a row, which is laid out in lines of [`COLUMNS`] registers; NaN
/// is none.
struct Columns<S: Simd> {
    most_of_each: [S::f32s; COLUMNS],
    /// The largest of all, those behind the last whole line too.
    most: f32,
}

impl<S: Simd> Columns<S> {
    /// Numbers in a line.
    const WIDTH: usize = COLUMNS * S::F32_LANES;

    #[inline(always)]
    fn of(simd: S, row: &[f32]) -> Self {
        let (lines, rest) = Self::lines(row);
        let mut most_of_each = [simd.splat_f32s(f32::NEG_INFINITY); COLUMNS];
        for line in lines {
            for (most, &x) in most_of_each.iter_mut().zip(line) {
                *most = simd.max_f32s(x, *most);
            }
        }
        let most = simd.reduce_max_f32s(Self::most_of(simd, most_of_each));
        let larger = |most: f32, &x: &f32| if x > most { x } else { most };
        Self {
            most_of_each,
            most: rest.iter().fold(most, larger),
        }
    }

    #[inline(always)]
    fn lines(row: &[f32]) -> (&[[S::f32s; COLUMNS]], &[f32]) {
        let (registers, _) = S::as_simd_f32s(row);
        let (lines, _) = registers.as_chunks::<COLUMNS>();
        (lines, &row[lines.len() * Self::WIDTH..])
    }

    /// The largest number of each lane of a line.
    #[inline(always)]
    fn most_of(simd: S, [a, b, c, d]: [S::f32s; COLUMNS]) -> S::f32s {
        simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d))
    }

    /// The `n`-th largest number of the columns', of equals in different columns all; negative infinity
    /// where there are none left.
    ///
    /// It is no more than the `n`-th largest of the row.
    #[inline(always)]
    fn bound(&self, simd: S, n: usize) -> f32 {
        let mut left = self.most_of_each;
        let mut bound = f32::NEG_INFINITY;
        for _ in 0..n.min(Self::WIDTH + 1) {
            bound = simd.reduce_max_f32s(Self::most_of(simd, left));
            let (taken, none) = (simd.splat_f32s(bound), simd.splat_f32s(f32::NEG_INFINITY));
            // A loop, since the closure of a `map` is a call here, its registers through memory.
            for x in &mut left {
                *x = simd.select_f32s(simd.greater_than_or_equal_f32s(*x, taken), none, *x);
            }
        }
        bound
    }

    /// The ids of the row's `n` largest numbers, of no more than there are; of equals, the lowest ids.
    #[inline(always)]
    fn likeliest(&self, simd: S, row: &[f32], n: usize) -> Vec<u32> {
        if n == 0 {
            return Vec::new();
        }
        // Few registers hold anything that is not below it.
        let least = self.bound(simd, n);
        let bound = simd.splat_f32s(least);
        let reached = |x: S::f32s| {
            simd.first_true_m32s(simd.greater_than_or_equal_f32s(x, bound)) < S::F32_LANES
        };
        let mut kept: Vec<(f32, u32)> = Vec::with_capacity(n + 1);
        let mut look = |first: usize, numbers: &[f32]| {
            for (id, &x) in (first..).zip(numbers) {
                if x < least || (kept.len() == n && x <= kept[n - 1].0) {
                    continue;
                }
                let behind = kept.iter().rev().take_while(|&&(kept, _)| kept < x).count();
                kept.insert(kept.len() - behind, (x, id as u32));
                kept.truncate(n);
            }
        };
        let (lines, rest) = Self::lines(row);
        for (index, line) in lines.iter().enumerate() {
            if !reached(Self::most_of(simd, *line)) {
                continue;
            }
            for (column, &x) in line.iter().enumerate() {
                if reached(x) {
                    let first = index * Self::WIDTH + column * S::F32_LANES;
                    look(first, &row[first..][..S::F32_LANES]);
                }
            }
        }
        look(row.len() - rest.len(), rest);
        kept.into_iter().map(|(_, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything by its definition, in f64.
    fn by_definition(p: &[f32], q: &[f32]) -> RowPair {
        let logps = |row: &[f32]| {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let total = mdp_core::log_sum_exp(&row);
            (total, row.iter().map(|x| x - total).collect::<Vec<f64>>())
        };
        let ((policy_total, p), (reference_total, q)) = (logps(p), logps(q));
        let mean = |of: &[f64], value: &dyn Fn(usize) -> f64| -> f64 {
            (0..of.len()).map(|i| of[i].exp() * value(i)).sum()
        };
        RowPair {
            policy_total,
            reference_total,
            policy_entropy: mean(&p, &|i| -p[i]),
            reference_entropy: mean(&q, &|i| -q[i]),
            policy_kl: mean(&p, &|i| p[i] - q[i]),
            reference_kl: mean(&q, &|i| q[i] - p[i]),
            likeliest: Vec::new(),
        }
    }

    fn close(a: &RowPair, b: &RowPair, tolerance: f64) -> bool {
        [
            (a.policy_total, b.policy_total),
            (a.reference_total, b.reference_total),
            (a.policy_entropy, b.policy_entropy),
            (a.reference_entropy, b.reference_entropy),
            (a.policy_kl, b.policy_kl),
            (a.reference_kl, b.reference_kl),
        ]
        .iter()
        .all(|(a, b)| (a - b).abs() < tolerance)
    }

    #[test]
    fn a_vocabulary_of_real_size_keeps_six_digits() {
        // Logits like a model's: a few high ones above a wide floor.
        let row = |seed: usize| -> Vec<f32> {
            (0..50_257)
                .map(|i| {
                    let x = (i * 7919 + seed * 104_729) % 10_007;
                    let peak = if x < 7 { 9.0 } else { 0.0 };
                    peak + (x as f32 / 10_007.0 - 0.5) * 6.0
                })
                .collect()
        };
        let (p, q) = (row(1), row(2));
        let got = RowPair::read(&p, &q, 0).unwrap();
        assert!(close(&got, &by_definition(&p, &q), 1e-6), "{got:?}");
        let same = RowPair::read(&p, &p, 0).unwrap();
        assert!(same.policy_kl < 1e-12 && same.reference_kl < 1e-12);
    }

    #[test]
    fn what_is_no_number_is_noticed_at_every_place() {
        let fine: Vec<f32> = (0..100).map(|i| i as f32 * 0.1).collect();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 17, 99] {
                let mut row = fine.clone();
                row[place] = bad;
                assert!(RowPair::read(&row, &fine, 0).is_none(), "{bad} at {place}");
                assert!(RowPair::read(&fine, &row, 0).is_none(), "{bad} at {place}");
            }
        }
    }

    proptest! {
        #[test]
        fn one_pass_gives_what_the_definitions_do(
            rows in prop::collection::vec((-20f32..20.0, -20f32..20.0), 1..70), shift in -50f32..50.0,
        ) {
            let p: Vec<f32> = rows.iter().map(|row| row.0).collect();
            let q: Vec<f32> = rows.iter().map(|row| row.1 + shift).collect();
            let (got, expected) = (RowPair::read(&p, &q, 0).unwrap(), by_definition(&p, &q));
            // Divergences of up to 40 nats, in f32 terms.
            prop_assert!(close(&got, &expected, 1e-5), "{:?} {:?}", got, expected);
        }
    }
}
