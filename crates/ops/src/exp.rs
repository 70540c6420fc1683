//! The exponential that loops of vector instructions are made of.

use pulp::Simd;

/// Adding and subtracting it rounds to a whole number: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;
// ln 2 in two parts, of which the first has few enough digits to be multiplied exactly.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Where results become 0, and the largest argument.
const LEAST: f32 = -87.0;
const MOST: f32 = 88.0;
/// Cephes' polynomial for the exponential, but for its last two coefficients, which are 1.
const COEFFICIENTS: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    0.166_666_65,
    0.5,
];

/// `exp(x)` in f32, to within a unit in the last place; 0 below -87.
///
/// Branchless, so that a loop over it is vectorised. `x = n ln 2 + f` with `|f| <= ln 2 / 2`, and a
/// polynomial of degree 6 for `exp(f)`. Meant for numbers that are not above 88. Call it where the
/// code is compiled for the processor at hand (as in a method of [`pulp::WithSimd`]): elsewhere each
/// fused multiplication is a call.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let bounded = x.clamp(LEAST, MOST);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let f = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, bounded));
    let mut p = COEFFICIENTS[0];
    for &coefficient in &COEFFICIENTS[1..] {
        p = p.mul_add(f, coefficient);
    }
    let power = p.mul_add(f * f, f) + 1.0;
    // The whole part goes to the exponent's bits.
    let scale = f32::from_bits(((shifted.to_bits() as i32) << 23).wrapping_add(127 << 23) as u32);
    if x < LEAST { 0.0 } else { power * scale }
}

/// [`exp`] of each lane of a register, for loops that the compiler does not vectorise well by itself.
///
/// Meant for numbers that are not above 88. Below -87 it stays at the 1.6e-38 of -87: nothing beside
/// the 1 that a row's largest number has. Of a lane that is no number nothing is said.
#[inline(always)]
pub fn exp_lanes<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    /// [`ROUND`] with the bias of an exponent: the whole part comes as the exponent's bits.
    const BIASED: f32 = ROUND + 127.0;
    let splat = |x: f32| simd.splat_f32s(x);
    let bounded = simd.max_f32s(x, splat(LEAST));
    let shifted = simd.mul_add_f32s(bounded, splat(std::f32::consts::LOG2_E), splat(BIASED));
    let n = simd.sub_f32s(shifted, splat(BIASED));
    let f = simd.mul_add_f32s(n, splat(-LN_2_HIGH), bounded);
    let f = simd.mul_add_f32s(n, splat(-LN_2_LOW), f);
    let mut p = splat(COEFFICIENTS[0]);
    for &coefficient in &COEFFICIENTS[1..] {
        p = simd.mul_add_f32s(p, f, splat(coefficient));
    }
    let power = simd.add_f32s(simd.mul_add_f32s(p, simd.mul_f32s(f, f), f), splat(1.0));
    let bits = simd.transmute_u32s_f32s(shifted);
    let scale = simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23));
    simd.mul_f32s(power, simd.transmute_f32s_u32s(scale))
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

    struct Lanes<'a>(&'a [f32], &'a mut [f32]);

    impl pulp::WithSimd for Lanes<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let ((x, _), (out, _)) = (S::as_simd_f32s(self.0), S::as_mut_simd_f32s(self.1));
            for (&x, out) in x.iter().zip(out) {
                *out = exp_lanes(simd, x);
            }
        }
    }

    #[test]
    fn lanes_are_the_exponential_of_one_number() {
        let mut x: Vec<f32> = (-90_000..88_000).map(|i| i as f32 * 1e-3).collect();
        x[16] = f32::NEG_INFINITY;
        x.truncate(x.len() / 16 * 16);
        let mut lanes = vec![f32::NAN; x.len()];
        pulp::Arch::new().dispatch(Lanes(&x, &mut lanes));
        for (x, lane) in x.into_iter().zip(lanes) {
            let one = exp(x.max(LEAST));
            // The same operations, but where the processor has no fused ones.
            let gap = (f64::from(lane) - f64::from(one)).abs();
            assert!(gap <= EXP_TOLERANCE * f64::from(one), "{x}: {lane} {one}");
        }
    }
}
