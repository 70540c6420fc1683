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
/// The polynomial of degree 5 for `2^f`, `|f| <= 1/2`, with the least relative error of those that are
/// 1 at 0: 9.1e-8.
#[expect(
    clippy::approx_constant,
    reason = "the polynomial's own, a little less than ln 2"
)]
const POWER_OF_TWO: [f32; 6] = [
    1.326_472_7e-3,
    9.671_513e-3,
    5.550_733_6e-2,
    0.240_222_42,
    0.693_147,
    1.0,
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

/// `exp` of each lane of some registers, for loops that the compiler does not vectorise well by itself:
/// with several registers, none waits for its own multiplications.
///
/// To within 2e-7 of the result, and 1.4e-8 more for each unit of `x`, which is where [`exp`] takes four
/// operations more. Meant for numbers that are not above 88. Below -87 it stays at the 1.6e-38 of
/// -87: nothing beside the 1 that a row's largest number has. Of a lane that is no number nothing is said.
#[inline(always)]
pub fn exp_lanes<S: Simd, const N: usize>(simd: S, x: [S::f32s; N]) -> [S::f32s; N] {
    let splat = |x: f32| simd.splat_f32s(x);
    let (log2_e, round) = (splat(std::f32::consts::LOG2_E), splat(ROUND));
    // x log2 e = n + f, and 2^f by a polynomial.
    let x = x.map(|x| simd.max_f32s(x, splat(LEAST)));
    let shifted = x.map(|x| simd.mul_add_f32s(x, log2_e, round));
    let mut f = x;
    for (f, &shifted) in f.iter_mut().zip(&shifted) {
        *f = simd.mul_add_f32s(*f, log2_e, simd.sub_f32s(round, shifted));
    }
    let mut power = [splat(POWER_OF_TWO[0]); N];
    for &coefficient in &POWER_OF_TWO[1..] {
        for (power, &f) in power.iter_mut().zip(&f) {
            *power = simd.mul_add_f32s(*power, f, splat(coefficient));
        }
    }
    // The whole part is added to the exponent's bits.
    for (power, &shifted) in power.iter_mut().zip(&shifted) {
        let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
        let bits = simd.add_u32s(simd.transmute_u32s_f32s(*power), n);
        *power = simd.transmute_f32s_u32s(bits);
    }
    power
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

    /// What a lane's result is off by, of itself: its polynomial's error, 9.1e-8, and some roundings.
    const LANES_TOLERANCE: f64 = 2e-7;
    /// The same for each unit of the argument: log2 e is rounded.
    const LANES_TOLERANCE_PER_UNIT: f64 = 1.4e-8;

    struct Lanes<'a, const N: usize>(&'a [f32], &'a mut [f32]);

    impl<const N: usize> pulp::WithSimd for Lanes<'_, N> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let ((x, _), (out, _)) = (S::as_simd_f32s(self.0), S::as_mut_simd_f32s(self.1));
            let ((x, _), (out, _)) = (x.as_chunks::<N>(), out.as_chunks_mut::<N>());
            for (&x, out) in x.iter().zip(out) {
                *out = exp_lanes(simd, x);
            }
        }
    }

    #[test]
    fn lanes_are_exponentials_too() {
        let mut x: Vec<f32> = (-90_000..88_000).map(|i| i as f32 * 1e-3).collect();
        x[16] = f32::NEG_INFINITY;
        // Whole registers, and threes of them.
        x.truncate(x.len() / 48 * 48);
        let (mut one, mut three) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
        pulp::Arch::new().dispatch(Lanes::<1>(&x, &mut one));
        pulp::Arch::new().dispatch(Lanes::<3>(&x, &mut three));
        assert_eq!(one, three);
        for (x, lane) in x.into_iter().zip(one) {
            let x = f64::from(x.max(LEAST));
            let off = (f64::from(lane) / x.exp() - 1.0).abs();
            let most = LANES_TOLERANCE + LANES_TOLERANCE_PER_UNIT * x.abs();
            assert!(off <= most, "{x}: {lane} is off by {off:e}");
        }
    }
}
