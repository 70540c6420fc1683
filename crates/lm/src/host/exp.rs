//! The exponential of many numbers at once.

use pulp::{Arch, Simd, WithSimd};

/// `exp(x)` in f32, to within a unit in the last place; 0 below -87.
///
/// Branchless, so that a loop over it is vectorised. `x = n ln 2 + f` with `|f| <= ln 2 / 2`, and a
/// polynomial of degree 6 for `exp(f)`. Meant for numbers that are not above 88.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to a whole number: 1.5 * 2^23.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, of which the first has few enough digits to be multiplied exactly.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.0, 88.0);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let f = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, bounded));
    // Cephes' polynomial for the exponential.
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.5,
    ] {
        p = p.mul_add(f, coefficient);
    }
    let power = p.mul_add(f * f, f) + 1.0;
    // The whole part goes to the exponent's bits.
    let scale = f32::from_bits(((shifted.to_bits() as i32) << 23).wrapping_add(127 << 23) as u32);
    if x < -87.0 { 0.0 } else { power * scale }
}

/// Numbers whose exponentials are added up in f32 before the sum goes on in f64.
const BLOCK: usize = 1024;

/// `ln Σ exp(x)` of a row of logits, in nats.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    Arch::new().dispatch(LogSumExp(row))
}

/// A type of its own, since a closure is compiled for the plainest processor, where every fused
/// multiplication is a call.
struct LogSumExp<'a>(&'a [f32]);

impl WithSimd for LogSumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> f64 {
        let row = self.0;
        let mut highest = [f32::NEG_INFINITY; 16];
        let chunks = row.chunks_exact(16);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (highest, &x) in highest.iter_mut().zip(chunk) {
                *highest = if x > *highest { x } else { *highest };
            }
        }
        let highest = highest.iter().chain(rest).copied();
        let largest = highest.fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        for block in row.chunks(BLOCK) {
            let mut sums = [0.0_f32; 16];
            let chunks = block.chunks_exact(16);
            for &x in chunks.remainder() {
                total += f64::from(exp(x - largest));
            }
            for chunk in chunks {
                for (sum, &x) in sums.iter_mut().zip(chunk) {
                    *sum += exp(x - largest);
                }
            }
            total += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        }
        f64::from(largest) + total.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A unit in the last place of f32.
    const EXP_TOLERANCE: f64 = 1.2e-7;
    /// 64 additions in f32 to each sum, which round by 6e-8 and mostly cancel.
    const SUM_TOLERANCE: f64 = 5e-7;

    #[test]
    fn the_exponential_is_that_of_double_precision() {
        let mut worst = 0.0_f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < EXP_TOLERANCE, "{worst:e}");
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
    }

    #[test]
    fn the_sum_is_that_of_double_precision() {
        for count in [1, 15, 16, 17, 4096, 49_152] {
            let row: Vec<f32> = (0..count).map(|i| (i % 977) as f32 * 0.02 - 5.0).collect();
            let exact: f64 = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let difference = (log_sum_exp(&row) - exact).abs();
            assert!(difference < SUM_TOLERANCE, "{count}: {difference:e}");
        }
        assert!(log_sum_exp(&[f32::NAN, 0.0]).is_nan());
        assert_eq!(
            log_sum_exp(&[f32::NEG_INFINITY, 2.0]).total_cmp(&2.0),
            std::cmp::Ordering::Equal
        );
    }
}
