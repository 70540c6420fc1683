//! The exponential that loops of vector instructions are made of.

/// `exp(x)` in f32, to within a unit in the last place; 0 below -87.
///
/// Branchless, so that a loop over it is vectorised. `x = n ln 2 + f` with `|f| <= ln 2 / 2`, and a
/// polynomial of degree 6 for `exp(f)`. Meant for numbers that are not above 88. Call it where the
/// code is compiled for the processor at hand (as in a method of [`pulp::WithSimd`]): elsewhere each
/// fused multiplication is a call.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A unit in the last place of f32.
    const EXP_TOLERANCE: f64 = 1.2e-7;

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
}
