//! The few special functions that exact solutions need, safe against overflow.

/// The logistic function `1 / (1 + exp(-x))`, in `[0, 1]`.
///
/// Overflow-safe at both ends: the exponential only ever sees a negative number.
///
/// # Examples
///
/// ```
/// assert_eq!(mdp_core::sigmoid(0.0), 0.5);
/// assert_eq!(mdp_core::sigmoid(-1e6), 0.0);
/// ```
#[must_use]
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `log σ(x)`, in nats, at most zero.
///
/// Written as `min(x, 0) - log(1 + exp(-|x|))`: `sigmoid(x).ln()` is minus infinity from `x = -746`
/// on, where the true value is about `x`.
///
/// # Examples
///
/// ```
/// assert_eq!(mdp_core::log_sigmoid(0.0), 0.5_f64.ln());
/// assert_eq!(mdp_core::log_sigmoid(-1e6), -1e6);
/// ```
#[must_use]
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// `log Σ exp(x)` in nats; minus infinity for no terms, and NaN where one is.
///
/// # Examples
///
/// ```
/// let total = mdp_core::log_sum_exp(&[1000.0, 1000.0]);
/// assert!((total - (1000.0 + 2.0_f64.ln())).abs() < 1e-12);
/// ```
#[must_use]
pub fn log_sum_exp(terms: &[f64]) -> f64 {
    // Not by `f64::max`, which passes over NaN; once there, NaN stays.
    let larger = |max: f64, x: f64| if x > max || x.is_nan() { x } else { max };
    let max = terms.iter().copied().fold(f64::NEG_INFINITY, larger);
    if !max.is_finite() {
        // All terms are zero mass, or one is infinite: subtracting it would make a NaN.
        return max;
    }
    let sum: f64 = terms.iter().map(|x| (x - max).exp()).sum();
    max + sum.ln()
}

/// Turns a row of logits into logps in place, in nats.
pub(crate) fn log_softmax(row: &mut [f64]) {
    let total = log_sum_exp(row);
    for x in row {
        *x -= total;
    }
}

/// Below this, `exp_nonpositive` stops falling: `exp(-708)` is the last normal number, and next to
/// the row's largest term, which is 1, it is nothing.
const SMALLEST_EXPONENT: f64 = -708.0;
/// `1.5 * 2^52`: adding it rounds to an integer that then sits in the low mantissa bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 split in two, so that `n * LN2_HIGH` is exact for every exponent in range.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Near-minimax polynomial of exp on `[-ln 2 / 2, ln 2 / 2]` (interpolation at the Chebyshev nodes,
/// degree 11): relative error 4.3e-18 before rounding.
const EXP: [f64; 12] = [
    1.0,
    1.0,
    0.500_000_000_000_001_9,
    0.166_666_666_666_666_8,
    0.041_666_666_666_487_95,
    0.008_333_333_333_319_589,
    0.001_388_888_895_235_286_3,
    0.000_198_412_698_900_764_03,
    2.480_148_544_154_156e-5,
    2.755_724_088_722_987e-6,
    2.763_265_472_252_779e-7,
    2.511_004_920_481_865_8e-8,
];

/// `exp(x)` for `x <= 0`, within two units in the last place of the standard one.
///
/// Branch-free, table-free and without a call, so a loop over a slice becomes vector code on any
/// target; the standard function is one call per number. Bits are the same on every machine,
/// because nothing here is fused.
#[inline(always)]
pub(crate) fn exp_nonpositive(x: f64) -> f64 {
    let x = if x < SMALLEST_EXPONENT {
        SMALLEST_EXPONENT
    } else {
        x
    };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = EXP[11];
    // Horner's rule from the top; the loop is unrolled, being over a constant.
    let mut i = 11;
    while i > 0 {
        i -= 1;
        p = p * r + EXP[i];
    }
    // The low bits of `shifted` hold n; adding it to the exponent field multiplies by 2^n.
    let scale = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << 52);
    p * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two units in the last place: one for rounding the polynomial's sum, one for the argument.
    const EXP_RELATIVE: f64 = 4.5e-16;

    #[test]
    fn vector_exp_stays_within_two_units_of_the_standard_one() {
        let mut worst: f64 = 0.0;
        for i in 0..2_000_000 {
            let x = -708.0 * f64::from(i) / 2_000_000.0;
            worst = worst.max((exp_nonpositive(x) / x.exp() - 1.0).abs());
            // Small arguments are the common case and deserve as many points.
            let x = -f64::from(i) / 100_000.0;
            worst = worst.max((exp_nonpositive(x) / x.exp() - 1.0).abs());
        }
        assert!(worst < EXP_RELATIVE, "worst relative error {worst:e}");
    }

    #[test]
    fn a_sum_over_something_that_is_no_number_is_none() {
        assert!(log_sum_exp(&[f64::NAN]).is_nan());
        assert!(log_sum_exp(&[1.0, f64::NAN, f64::INFINITY]).is_nan());
        assert!(log_sum_exp(&[f64::INFINITY, f64::NAN, 1.0]).is_nan());
    }

    #[test]
    fn vector_exp_of_zero_is_one_and_of_minus_infinity_is_nothing() {
        assert_eq!(exp_nonpositive(0.0).to_bits(), 1.0_f64.to_bits());
        assert_eq!(exp_nonpositive(-0.0).to_bits(), 1.0_f64.to_bits());
        assert!(exp_nonpositive(f64::NEG_INFINITY) < 1e-300);
        assert!(exp_nonpositive(-1e300) < 1e-300);
        assert!(exp_nonpositive(f64::NAN).is_nan());
    }

    #[test]
    fn log_sum_exp_survives_terms_that_overflow_and_rows_without_mass() {
        assert!((log_sum_exp(&[1e300, 1e300]) - 1e300).abs() < 1e285);
        assert!(log_sum_exp(&[f64::NEG_INFINITY; 3]) < f64::MIN);
        assert!(log_sum_exp(&[]) < f64::MIN);
    }

    proptest! {
        #[test]
        fn log_sigmoid_is_the_log_of_sigmoid(x in -30.0..30.0_f64) {
            prop_assert!((log_sigmoid(x) - sigmoid(x).ln()).abs() < 1e-12);
            prop_assert!((sigmoid(x) + sigmoid(-x) - 1.0).abs() < 1e-15);
        }
    }
}
