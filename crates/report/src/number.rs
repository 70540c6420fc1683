//! Numbers as a person reads them: round ticks, as many digits as the interval supports.

/// A proper minus sign in place of the hyphen that Rust prints.
fn minus(text: String) -> String {
    text.replace('-', "\u{2212}")
}

/// `value` with `decimals` digits after the point; what rounds to zero has no sign.
pub(crate) fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return "n/a".into();
    }
    let text = format!("{value:.decimals$}");
    if text.starts_with('-') && text.bytes().all(|b| matches!(b, b'-' | b'0' | b'.')) {
        return text[1..].into();
    }
    minus(text)
}

/// `value` with an explicit sign, three decimals or scientific where those would say nothing.
pub(crate) fn signed(value: f64) -> String {
    if !value.is_finite() {
        return "n/a".into();
    }
    let text = plain(value);
    if value > 0.0 && text.bytes().any(|b| (b'1'..=b'9').contains(&b)) {
        format!("+{text}")
    } else {
        text
    }
}

/// `value` with three decimals, or scientific where those would say nothing.
pub(crate) fn plain(value: f64) -> String {
    if !value.is_finite() {
        return "n/a".into();
    }
    let size = value.abs();
    if size >= 1e6 || (size > 0.0 && size < 5e-4) {
        minus(format!("{value:.2e}"))
    } else {
        fixed(value, 3)
    }
}

/// The mean and both ends of an interval, rounded alike: two digits of the interval's width.
pub(crate) fn with_interval(mean: f64, low: f64, high: f64) -> (String, String, String) {
    let width = high - low;
    let largest = [mean, low, high]
        .into_iter()
        .filter(|v| v.is_finite())
        .fold(0.0, |a: f64, v| a.max(v.abs()));
    if largest >= 1e6 || (largest > 0.0 && largest < 1e-4) {
        let scientific = |v: f64| {
            if v.is_finite() {
                minus(format!("{v:.2e}"))
            } else {
                "n/a".into()
            }
        };
        return (scientific(mean), scientific(low), scientific(high));
    }
    let decimals = if width.is_finite() && width > 0.0 {
        (1.0 - width.log10().floor()).clamp(0.0, 6.0) as usize
    } else {
        3
    };
    (
        fixed(mean, decimals),
        fixed(low, decimals),
        fixed(high, decimals),
    )
}

/// Round values (1, 2 or 5 times a power of ten apart) inside `[low, high]`, with their labels.
///
/// `about` is how many are wanted; between half and twice as many come. An interval that is
/// empty or not finite gives none.
pub(crate) fn ticks(low: f64, high: f64, about: usize) -> Vec<(f64, String)> {
    let range = high - low;
    if !range.is_finite() || range <= 0.0 {
        return Vec::new();
    }
    let rough = range / about.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= rough)
        .unwrap_or(power * 10.0);
    let first = (low / step).ceil();
    let count = ((high / step).floor() - first).clamp(0.0, 40.0) as usize;
    let largest = low.abs().max(high.abs());
    (0..=count)
        .map(|i| (first + i as f64) * step)
        .filter(|value| (low..=high).contains(value))
        .map(|value| (value, tick_label(value, step, largest)))
        .collect()
}

fn tick_label(value: f64, step: f64, largest: f64) -> String {
    let step_exponent = step.log10().floor() as i32;
    if !(1e-3..1e6).contains(&largest) {
        if value.abs() < step / 2.0 {
            return "0".into();
        }
        let exponent = value.abs().log10().floor() as i32;
        let digits = (exponent - step_exponent).clamp(0, 8) as usize;
        return minus(format!("{value:.digits$e}"));
    }
    if step >= 1e3 && largest >= 1e4 {
        if value.abs() < step / 2.0 {
            return "0".into();
        }
        return format!("{}k", fixed(value / 1e3, 0));
    }
    fixed(value, (-step_exponent).clamp(0, 9) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64) -> Vec<String> {
        ticks(low, high, 5).into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(labels(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(
            labels(-0.5, 2.1),
            ["0", "1", "2"].map(String::from).to_vec()
        );
        assert_eq!(labels(0.0, 20_000.0), ["0", "5k", "10k", "15k", "20k"]);
        assert_eq!(
            labels(0.0, 5e-5),
            [
                "0",
                "1e\u{2212}5",
                "2e\u{2212}5",
                "3e\u{2212}5",
                "4e\u{2212}5",
                "5e\u{2212}5"
            ]
        );
        assert_eq!(labels(0.0, 2000.0), ["0", "500", "1000", "1500", "2000"]);
    }

    #[test]
    fn impossible_ranges_have_no_ticks() {
        assert!(ticks(1.0, 1.0, 5).is_empty());
        assert!(ticks(f64::NAN, 1.0, 5).is_empty());
        assert!(ticks(f64::MIN, f64::MAX, 5).is_empty());
    }

    #[test]
    fn interval_width_sets_the_digits() {
        assert_eq!(
            with_interval(0.8412, 0.792, 0.8801),
            ("0.841".into(), "0.792".into(), "0.880".into())
        );
        assert_eq!(with_interval(-0.0001, -2.0, 2.0).0, "0.0");
        assert_eq!(with_interval(f64::NAN, 0.0, 1.0).0, "n/a");
    }

    #[test]
    fn signs_are_shown_once() {
        assert_eq!(signed(0.25), "+0.250");
        assert_eq!(signed(-0.25), "\u{2212}0.250");
        assert_eq!(signed(0.0), "0.000");
        assert_eq!(signed(-1e-9), "\u{2212}1.00e\u{2212}9");
    }
}
