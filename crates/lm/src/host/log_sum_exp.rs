//! The sum of many exponentials.

use ops::exp;
use pulp::{Arch, Simd, WithSimd};

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

    /// 64 additions in f32 to each sum, which round by 6e-8 and mostly cancel.
    const SUM_TOLERANCE: f64 = 5e-7;

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
