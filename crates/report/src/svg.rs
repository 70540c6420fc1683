//! What both kinds of picture share: text measure, coordinates, style.

use crate::number::fixed;
use crate::page::escape;

/// Width of every picture in its own units. A phone shows it at nearly this size, so that text
/// of [`FONT`] units stays readable there.
pub(crate) const WIDTH: f64 = 400.0;
/// Text height in picture units.
pub(crate) const FONT: f64 = 12.5;

/// Style of the pictures: colours by class, so that light, dark and print need no second picture.
pub(crate) const CSS: &str = include_str!("svg.css");

/// Values as large as this are overflow and not data; like NaN they are not drawn.
const LARGEST_DRAWN: f64 = 1e100;

pub(crate) fn is_drawable(value: f64) -> bool {
    value.is_finite() && value.abs() < LARGEST_DRAWN
}

/// An upper estimate of the width of `text`, since there is no font to ask.
pub(crate) fn text_width(text: &str, size: f64) -> f64 {
    let em: f64 = text
        .chars()
        .map(|c| match c {
            'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' => 0.32,
            'f' | 't' | 'r' | ' ' | '(' | ')' | '/' | '-' => 0.40,
            'm' | 'w' | 'M' | 'W' | '@' | '%' => 0.95,
            'A'..='Z' => 0.74,
            '\u{2212}' => 0.84,
            c if (c as u32) < 0x2e80 => 0.63,
            _ => 1.05,
        })
        .sum();
    em * size
}

/// `text` cut to `width` with an ellipsis where it does not fit.
pub(crate) fn fit(text: &str, size: f64, width: f64) -> String {
    if text_width(text, size) <= width {
        return text.into();
    }
    let mut kept = String::new();
    for c in text.chars() {
        kept.push(c);
        if text_width(&kept, size) + size > width {
            kept.pop();
            break;
        }
    }
    kept.truncate(kept.trim_end().len());
    kept.push('\u{2026}');
    kept
}

/// `text` in at most `lines` lines of `width`, the last of them cut where it does not fit.
pub(crate) fn wrap(text: &str, size: f64, width: f64, lines: usize) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let last_allowed = out.len() >= lines;
        match out.last_mut() {
            Some(line)
                if last_allowed
                    || text_width(line, size) + text_width(word, size) + 0.4 * size <= width =>
            {
                line.push(' ');
                line.push_str(word);
            }
            _ => out.push(word.into()),
        }
    }
    for line in &mut out {
        *line = fit(line, size, width);
    }
    out
}

/// A coordinate with at most one decimal: a tenth of a unit is below what a screen shows.
pub(crate) fn at(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").unwrap_or(&text).to_owned()
}

/// A text element; `attributes` is trusted, `text` is escaped.
pub(crate) fn text(x: f64, y: f64, attributes: &str, text: &str) -> String {
    format!(
        "<text x=\"{}\" y=\"{}\" {attributes}>{}</text>",
        at(x),
        at(y),
        escape(text)
    )
}

pub(crate) fn line(x1: f64, y1: f64, x2: f64, y2: f64, class: &str) -> String {
    format!(
        "<line class=\"{class}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>",
        at(x1),
        at(y1),
        at(x2),
        at(y2)
    )
}

/// The outer element. `label` is what a screen reader says; `standalone` adds the namespace and
/// the style that a file of its own needs.
pub(crate) fn wrap_svg(
    label: &str,
    height: f64,
    extra: &str,
    standalone: bool,
    body: &str,
) -> String {
    let (namespace, style) = if standalone {
        (
            " xmlns=\"http://www.w3.org/2000/svg\"",
            format!("<style>{CSS}</style><rect class=\"paper\" width=\"100%\" height=\"100%\"/>"),
        )
    } else {
        ("", String::new())
    };
    format!(
        "<svg{namespace} class=\"chart\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\"{extra}>{style}{body}</svg>",
        fixed(WIDTH, 0),
        at(height),
        escape(label)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fitted_text_is_no_wider_than_asked() {
        let long = "rewards/margins of a policy with a very long name ".repeat(4);
        assert!(text_width(&fit(&long, FONT, 120.0), FONT) <= 120.0);
        let lines = wrap(&long, FONT, 150.0, 2);
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|l| text_width(l, FONT) <= 150.0));
        assert_eq!(fit("step", FONT, 120.0), "step");
    }
}
