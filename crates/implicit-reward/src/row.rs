//! Two rows of logits in one pass: normalisers, entropies, divergences.

use ops::{exp, exp_lanes};
use pulp::{Arch, Simd, WithSimd};

/// After this many registers a lane's f32 sum goes into f64: its rounding stays below 1e-6.
const BLOCK: usize = 64;
/// The most lanes of a register.
pub(crate) const LANES: usize = 16;

/// What two rows of logits say together; nats.
#[derive(Clone, Copy, Debug, PartialEq)]
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
}

impl RowPair {
    /// Reads two rows of one vocabulary; nothing where a logit is not finite.
    pub(crate) fn read(policy: &[f32], reference: &[f32]) -> Option<Self> {
        Arch::new().dispatch(Read { policy, reference })
    }

    #[inline(always)]
    fn of<S: Simd>(simd: S, policy: &[f32], reference: &[f32]) -> Option<Self> {
        // In several registers: none waits for its last comparison.
        let (p_largest, q_largest) = (largest::<32>(policy), largest::<32>(reference));
        let (p_lanes, p_rest) = S::as_simd_f32s(policy);
        let (q_lanes, q_rest) = S::as_simd_f32s(reference);
        let (p_high, q_high) = (simd.splat_f32s(p_largest), simd.splat_f32s(q_largest));
        // With a = p − max p and b = q − max q: Σ e^a, Σ e^b, Σ a e^a, Σ b e^b, Σ (a−b) e^a and
        // Σ (b−a) e^b hold everything; no probability is stored.
        let mut totals = [0.0_f64; 6];
        for (p, q) in p_lanes.chunks(BLOCK).zip(q_lanes.chunks(BLOCK)) {
            let mut sums = [simd.splat_f32s(0.0); 6];
            for (&p, &q) in p.iter().zip(q) {
                let (a, b) = (simd.sub_f32s(p, p_high), simd.sub_f32s(q, q_high));
                let (p_exp, q_exp) = (exp_lanes(simd, a), exp_lanes(simd, b));
                sums[0] = simd.add_f32s(sums[0], p_exp);
                sums[1] = simd.add_f32s(sums[1], q_exp);
                sums[2] = simd.mul_add_f32s(p_exp, a, sums[2]);
                sums[3] = simd.mul_add_f32s(q_exp, b, sums[3]);
                sums[4] = simd.mul_add_f32s(p_exp, simd.sub_f32s(a, b), sums[4]);
                sums[5] = simd.mul_add_f32s(q_exp, simd.sub_f32s(b, a), sums[5]);
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                let mut lanes = [0.0_f32; LANES];
                let (out, _) = S::as_mut_simd_f32s(&mut lanes);
                out[0] = sum;
                *total += lanes.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
        }
        for (&p, &q) in p_rest.iter().zip(q_rest) {
            let (a, b) = (p - p_largest, q - q_largest);
            let (p_exp, q_exp) = (exp(a), exp(b));
            let terms = [
                p_exp,
                q_exp,
                p_exp * a,
                q_exp * b,
                p_exp * (a - b),
                q_exp * (b - a),
            ];
            for (total, term) in totals.iter_mut().zip(terms) {
                *total += f64::from(term);
            }
        }
        // A NaN or an infinity anywhere is in the product of a shifted logit and its exponential.
        if totals.iter().any(|total| !total.is_finite()) {
            return None;
        }
        let [p_sum, q_sum, p_own, q_own, p_cross, q_cross] = totals;
        let (p_log, q_log) = (p_sum.ln(), q_sum.ln());
        Some(Self {
            policy_total: f64::from(p_largest) + p_log,
            reference_total: f64::from(q_largest) + q_log,
            policy_entropy: (p_log - p_own / p_sum).max(0.0),
            reference_entropy: (q_log - q_own / q_sum).max(0.0),
            // Never below 0 but by rounding.
            policy_kl: (p_cross / p_sum - p_log + q_log).max(0.0),
            reference_kl: (q_cross / q_sum - q_log + p_log).max(0.0),
        })
    }
}

/// [`RowPair::read`] in the widest registers that the processor has.
struct Read<'a> {
    policy: &'a [f32],
    reference: &'a [f32],
}

impl WithSimd for Read<'_> {
    type Output = Option<RowPair>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Option<RowPair> {
        RowPair::of(simd, self.policy, self.reference)
    }
}

/// The largest of some numbers, compared in lanes; NaN never is.
#[inline(always)]
fn largest<const LANES: usize>(row: &[f32]) -> f32 {
    let (lanes, rest) = row.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for chunk in lanes {
        for (most, &x) in most.iter_mut().zip(chunk) {
            *most = if x > *most { x } else { *most };
        }
    }
    most.iter().chain(rest).fold(
        f32::NEG_INFINITY,
        |most, &x| if x > most { x } else { most },
    )
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
        let got = RowPair::read(&p, &q).unwrap();
        assert!(close(&got, &by_definition(&p, &q), 1e-6), "{got:?}");
        let same = RowPair::read(&p, &p).unwrap();
        assert!(same.policy_kl < 1e-12 && same.reference_kl < 1e-12);
    }

    #[test]
    fn what_is_no_number_is_noticed_at_every_place() {
        let fine: Vec<f32> = (0..100).map(|i| i as f32 * 0.1).collect();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 17, 99] {
                let mut row = fine.clone();
                row[place] = bad;
                assert!(RowPair::read(&row, &fine).is_none(), "{bad} at {place}");
                assert!(RowPair::read(&fine, &row).is_none(), "{bad} at {place}");
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
            let (got, expected) = (RowPair::read(&p, &q).unwrap(), by_definition(&p, &q));
            // Divergences of up to 40 nats, in f32 terms.
            prop_assert!(close(&got, &expected, 1e-5), "{:?} {:?}", got, expected);
        }
    }
}
