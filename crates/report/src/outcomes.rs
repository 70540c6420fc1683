//! Before and after: means with their intervals.

use serde::{Deserialize, Serialize};

use crate::number::ticks;
use crate::svg::{self, FONT, WIDTH, at, is_drawable, line, text, text_width};

/// What one policy scored on one metric.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OutcomeRow {
    /// Which policy, for example `base`, `SFT` or `DPO`. It keeps its colour across metrics.
    pub policy: String,
    /// What was measured, with its unit, for example `true reward (reward units)`.
    pub metric: String,
    /// The mean over prompts, in units of the metric.
    pub mean: f64,
    /// Lower end of the 95% interval.
    pub ci_low: f64,
    /// Upper end of the 95% interval.
    pub ci_high: f64,
    /// How many prompts the mean is over.
    pub n: usize,
}

/// A dot and whisker for each row, over one shared axis that `metric` labels.
///
/// Policies are coloured by their place in `policies`, and named at the left. An end of an
/// interval that is not finite leaves the whisker out, and a mean that is not finite says so.
///
/// # Examples
///
/// ```
/// use report::{OutcomeRow, whisker_svg};
///
/// let row = OutcomeRow {
///     policy: "DPO".into(),
///     metric: "win rate (fraction)".into(),
///     mean: 0.8,
///     ci_low: 0.75,
///     ci_high: 0.85,
///     n: 256,
/// };
/// let svg = whisker_svg("win rate (fraction)", &[&row], &["DPO"]);
/// assert!(svg.contains("win rate (fraction)") && svg.contains("0.80"));
/// ```
pub fn whisker_svg(metric: &str, rows: &[&OutcomeRow], policies: &[&str]) -> String {
    const ROW: f64 = 26.0;
    let names: Vec<String> = rows
        .iter()
        .map(|row| svg::fit(&row.policy, FONT, 120.0))
        .collect();
    let name_width = names
        .iter()
        .map(|name| text_width(name, FONT))
        .fold(24.0, f64::max);
    let (left, right, top) = (8.0 + name_width + 14.0, WIDTH - 18.0, 8.0);
    let bottom = top + ROW * rows.len() as f64;

    let values = rows
        .iter()
        .flat_map(|row| [row.mean, row.ci_low, row.ci_high])
        .filter(|v| is_drawable(*v));
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(v), h.max(v))
    });
    let mut body = String::new();
    let range = (low <= high).then(|| {
        let least = 1e-6 * low.abs().max(high.abs()).max(1e-6);
        let air = (0.08 * (high - low)).max(least);
        (low - air, high + air)
    });
    let place = |value: f64| {
        let (low, high) = range.unwrap_or((0.0, 1.0));
        left + (value - low) / (high - low) * (right - left)
    };

    if let Some((low, high)) = range {
        let mut free_from = f64::NEG_INFINITY;
        for (value, label) in ticks(low, high, 6) {
            let x = place(value);
            body += &line(x, top, x, bottom, "grid");
            let half = text_width(&label, 12.0) / 2.0;
            let centre = x.min(WIDTH - 2.0 - half);
            if centre - half > free_from {
                let middle = "class=\"tick\" text-anchor=\"middle\"";
                body += &text(centre, bottom + 16.0, middle, &label);
                free_from = centre + half + 4.0;
            }
        }
        if low < 0.0 && high > 0.0 {
            body += &line(place(0.0), top, place(0.0), bottom, "zero");
        }
    }
    body += &line(left, bottom, right, bottom, "axis");
    let label = svg::fit(metric, FONT, WIDTH - 16.0);
    // Centred under the axis, moved only as far as a long name needs to stay inside.
    let half = text_width(&label, FONT) / 2.0;
    let centre = ((left + right) / 2.0).clamp(8.0 + half, (WIDTH - 8.0 - half).max(8.0 + half));
    let middle = "class=\"soft\" text-anchor=\"middle\"";
    body += &text(centre, bottom + 33.0, middle, &label);

    for (i, (row, name)) in rows.iter().zip(&names).enumerate() {
        let y = top + ROW * (i as f64 + 0.5);
        let colour = policies.iter().position(|p| *p == row.policy).unwrap_or(i) % 8;
        body += &format!("<g class=\"c{colour}\">");
        let end = "text-anchor=\"end\"";
        body += &text(left - 12.0, y + 4.5, end, name);
        if is_drawable(row.ci_low) && is_drawable(row.ci_high) {
            let (from, to) = (place(row.ci_low), place(row.ci_high));
            body += &line(from, y, to, y, "whisker");
            body += &line(from, y - 4.5, from, y + 4.5, "whisker");
            body += &line(to, y - 4.5, to, y + 4.5, "whisker");
        }
        if is_drawable(row.mean) {
            let (x, y) = (at(place(row.mean)), at(y));
            body += &format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"4.5\"/>");
        } else {
            body += &text(left + 4.0, y + 4.5, "class=\"soft\"", "no finite mean");
        }
        body += "</g>";
    }
    let aria = format!("{metric}: mean and 95% interval of each policy");
    svg::wrap_svg(&aria, bottom + 42.0, "", false, &body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(mean: f64, ci_low: f64, ci_high: f64) -> OutcomeRow {
        OutcomeRow {
            policy: "DPO".into(),
            metric: "m".into(),
            mean,
            ci_low,
            ci_high,
            n: 4,
        }
    }

    #[test]
    fn the_dot_lies_between_the_ends_of_its_whisker() {
        let svg = whisker_svg("m", &[&row(0.5, 0.25, 0.75)], &["DPO"]);
        let whisker = &svg[svg.find("class=\"whisker\"").unwrap()..];
        let number = |from: &str| -> f64 {
            let rest = &whisker[whisker.find(from).unwrap() + from.len()..];
            rest[..rest.find('"').unwrap()].parse().unwrap()
        };
        let (low, dot, high) = (number("x1=\""), number("cx=\""), number("x2=\""));
        assert!(low < dot && dot < high, "{low} {dot} {high}");
    }

    #[test]
    fn missing_numbers_are_said() {
        let svg = whisker_svg("m", &[&row(f64::NAN, f64::NAN, f64::NAN)], &[]);
        assert!(svg.contains("no finite mean"));
    }

    proptest! {
        #[test]
        fn any_numbers_are_drawn_without_panic(
            mean in prop::num::f64::ANY,
            low in prop::num::f64::ANY,
            high in prop::num::f64::ANY,
        ) {
            let svg = whisker_svg("m", &[&row(mean, low, high)], &["DPO"]);
            prop_assert!(!svg.contains("NaN") && !svg.contains("inf\""));
        }
    }
}
