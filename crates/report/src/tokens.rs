//! Tokens coloured by what each of them was worth.

use serde::{Deserialize, Serialize};

use crate::number::{plain, signed};
use crate::page::escape;

/// Steps of the colour scale on each side of zero.
const LEVELS: i8 = 6;
/// The scale ends at this quantile of the sizes, so that one outlier does not fade all others.
const SCALE_QUANTILE: f64 = 0.98;
/// Script of the token lines: a tooltip on hover and focus, arrow keys between tokens.
pub(crate) const JS: &str = include_str!("page.js");

/// Backgrounds and text of one colour scheme, as sRGB.
struct Palette {
    ink: [u8; 3],
    zero: [u8; 3],
    /// The strongest positive (blue) and negative (orange) background.
    positive: [u8; 3],
    negative: [u8; 3],
    /// The line under negative tokens: the sign must also survive a grey print.
    negative_line: [u8; 3],
}

const LIGHT: Palette = Palette {
    ink: [0x14, 0x18, 0x1d],
    zero: [0xf6, 0xf7, 0xf8],
    positive: [0x5b, 0xa7, 0xe6],
    negative: [0xf0, 0x94, 0x3a],
    negative_line: [0xa8, 0x4c, 0x00],
};

const DARK: Palette = Palette {
    ink: [0xf4, 0xf6, 0xf8],
    zero: [0x22, 0x27, 0x2d],
    positive: [0x12, 0x62, 0xa8],
    negative: [0x9c, 0x4a, 0x06],
    negative_line: [0xff, 0xb4, 0x70],
};

/// One token of a completion, with what is known about it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Its text, which may be empty or hold line breaks.
    pub text: String,
    /// Its id in the vocabulary.
    pub id: u32,
    /// `beta * log(pi / pi_ref)` of this token, in reward units.
    #[serde(default)]
    pub implicit_reward: Option<f64>,
    /// The true reward of this token, in reward units, where the task knows it.
    #[serde(default)]
    pub true_reward: Option<f64>,
    /// Log-probability under the policy, in nats.
    #[serde(default)]
    pub policy_logp: Option<f64>,
    /// Log-probability under the reference, in nats.
    #[serde(default)]
    pub reference_logp: Option<f64>,
    /// What the task calls it, for example `contradiction`.
    #[serde(default)]
    pub kind: Option<String>,
}

/// Which number of a [`Token`] gives its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readout {
    /// [`Token::implicit_reward`].
    ImplicitReward,
    /// [`Token::true_reward`].
    TrueReward,
}

impl Readout {
    /// The number of `token` that this colours by, if it is known and finite.
    pub fn of(self, token: &Token) -> Option<f64> {
        match self {
            Readout::ImplicitReward => token.implicit_reward,
            Readout::TrueReward => token.true_reward,
        }
        .filter(|v| v.is_finite())
    }
}

/// A symmetric scale around zero: orange and underlined below, blue above.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DivergingScale {
    limit: f64,
}

impl DivergingScale {
    /// The scale whose strongest colours stand at `-limit` and `limit`.
    ///
    /// `None` unless `limit` is positive and finite.
    pub fn new(limit: f64) -> Option<Self> {
        (limit.is_finite() && limit > 0.0).then_some(Self { limit })
    }

    /// The scale that suits `values`: it ends at the 98th percentile of their sizes, rounded up
    /// to two digits. Values that are not finite do not count; without any, it ends at 1.
    ///
    /// # Examples
    ///
    /// ```
    /// let scale = report::DivergingScale::covering([-0.2, 0.31, f64::NAN]);
    /// assert_eq!(scale.limit(), 0.31);
    /// ```
    pub fn covering(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sizes: Vec<f64> = values
            .into_iter()
            .map(f64::abs)
            .filter(|v| v.is_finite())
            .collect();
        sizes.sort_by(f64::total_cmp);
        let rank = (SCALE_QUANTILE * sizes.len() as f64).ceil() as usize;
        let size = match sizes.get(rank.saturating_sub(1)) {
            Some(size) if *size > 0.0 => *size,
            _ => sizes.last().copied().unwrap_or(0.0),
        };
        let unit = 10f64.powf(size.log10().floor() - 1.0);
        // A hair below, so that 0.31 (3.1000000000000001e-1) is not rounded up to 0.32.
        let digits = (size / unit - 1e-9).ceil();
        // Through text, because 31 * 0.01 is not the f64 nearest to 0.31.
        let rounded = format!("{digits}e{}", unit.log10().round())
            .parse()
            .unwrap_or(size);
        Self::new(rounded).unwrap_or(Self { limit: 1.0 })
    }

    /// Where the strongest colours stand, in units of the values; positive.
    pub fn limit(self) -> f64 {
        self.limit
    }

    /// `text` on the colour of `value`, for a terminal; underlined below zero.
    pub(crate) fn terminal(self, value: f64, text: &str) -> String {
        let share = (value / self.limit).clamp(-1.0, 1.0);
        let level = (share * f64::from(LEVELS)).round() as i8;
        if level == 0 || text.is_empty() {
            return text.to_owned();
        }
        let ([r, g, b], [x, y, z]) = (shade(&LIGHT, level), LIGHT.ink);
        let underline = if level < 0 { "4;" } else { "" };
        format!("\x1b[{underline}48;2;{r};{g};{b};38;2;{x};{y};{z}m{text}\x1b[0m")
    }

    /// The colour of `value` as a CSS class; `na` where there is no value.
    fn class(self, value: Option<f64>) -> String {
        let Some(value) = value.filter(|v| !v.is_nan()) else {
            return "na".into();
        };
        let share = (value / self.limit).clamp(-1.0, 1.0);
        class_of_level((share * f64::from(LEVELS)).round() as i8)
    }
}

fn class_of_level(level: i8) -> String {
    match level {
        0 => "z".into(),
        1.. => format!("p{level}"),
        _ => format!("n{}", -i16::from(level)),
    }
}

/// The tokens as one HTML line, each coloured by `readout` on `scale`.
///
/// Token text is escaped. Each token carries its id, log-probabilities, rewards and kind for the
/// tooltip that [`page`](crate::page)'s script shows on hover and keyboard focus (tab to a line,
/// arrows within it). `label` names the line for screen readers. The styles are [`token_css`].
///
/// # Examples
///
/// ```
/// use report::{DivergingScale, Readout, Token, token_spans};
///
/// let tokens = [Token { text: "<b>".into(), implicit_reward: Some(-0.5), ..Token::default() }];
/// let scale = DivergingScale::new(0.5).unwrap();
/// let html = token_spans(&tokens, Readout::ImplicitReward, scale, "implicit reward");
/// assert!(html.contains("&lt;b&gt;") && html.contains("class=n6"));
/// ```
pub fn token_spans(
    tokens: &[Token],
    readout: Readout,
    scale: DivergingScale,
    label: &str,
) -> String {
    let mut out = format!(
        "<div class=\"tokens\" role=\"group\" aria-label=\"{}\">",
        escape(label)
    );
    for (i, token) in tokens.iter().enumerate() {
        let number = |v: Option<f64>| v.filter(|v| v.is_finite()).map(plain).unwrap_or_default();
        let reward = |v: Option<f64>| v.filter(|v| v.is_finite()).map(signed).unwrap_or_default();
        // The kind is last, because it alone may hold the separator.
        let data = format!(
            "{};{};{};{};{};{}",
            token.id,
            number(token.policy_logp),
            number(token.reference_logp),
            reward(token.implicit_reward),
            reward(token.true_reward),
            token.kind.as_deref().unwrap_or_default()
        );
        out += &format!(
            "<span class={} tabindex={} data-d=\"{}\">{}</span>",
            scale.class(readout.of(token)),
            if i == 0 { 0 } else { -1 },
            escape(&data),
            visible(&token.text)
        );
    }
    out += "</div>";
    out
}

/// Escaped text in which nothing is invisible: line breaks and control characters get a sign.
fn visible(text: &str) -> String {
    if text.is_empty() {
        return "<i class=mark>\u{2205}</i>".into();
    }
    let mut out = String::new();
    let mut plain = String::new();
    for c in text.chars() {
        let sign = match c {
            '\n' => Some("\u{23ce}".to_owned()),
            '\r' => Some("\u{240d}".to_owned()),
            '\t' => Some("\u{21e5}".to_owned()),
            c if (c as u32) < 0x20 => char::from_u32(0x2400 + c as u32).map(String::from),
            // Controls, zero-width characters and marks that turn the writing direction around.
            '\u{7f}'..='\u{9f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => Some(format!("U+{:04X}", c as u32)),
            _ => None,
        };
        let Some(sign) = sign else {
            plain.push(c);
            continue;
        };
        out += &escape(&plain);
        plain.clear();
        out += &format!("<i class=mark>{sign}</i>");
        if c == '\n' || c == '\t' {
            out.push(c);
        }
    }
    out + &escape(&plain)
}

/// The scale as an HTML legend: its colours, the values at both ends and at zero, and `label`
/// (with its unit) beside.
pub fn scale_legend(scale: DivergingScale, label: &str) -> String {
    let cells: String = (-LEVELS..=LEVELS)
        .map(|level| format!("<span class={}></span>", class_of_level(level)))
        .collect();
    let end = plain(scale.limit);
    let end = if end.contains('.') && !end.contains('e') {
        end.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        end
    };
    format!(
        "<div class=\"scale\"><span class=\"name\">{}</span><span class=\"bar\"><span class=\"cells\">{cells}</span>\
         <span class=\"ends\"><span>\u{2264} \u{2212}{end}</span><span>0</span><span>\u{2265} +{end}</span></span></span></div>",
        escape(label)
    )
}

/// The styles of [`token_spans`] and [`scale_legend`], for light, dark and print.
pub fn token_css() -> String {
    let mut css = String::from(include_str!("tokens.css"));
    css += ".tokens,.scale{";
    css += &variables(&LIGHT);
    css += "}@media screen and (prefers-color-scheme:dark){.tokens,.scale{";
    css += &variables(&DARK);
    css += "}}";
    for level in 1..=LEVELS {
        css += &format!(
            ".tokens .p{level},.scale .p{level}{{background:var(--p{level})}}.tokens>.n{level},.scale .cells .n{level}{{background:var(--n{level});border-bottom-color:var(--nl)}}"
        );
    }
    css
}

fn variables(palette: &Palette) -> String {
    let mut out = format!(
        "--tk:{};--z:{};--nl:{};",
        hex(palette.ink),
        hex(palette.zero),
        hex(palette.negative_line)
    );
    for level in 1..=LEVELS {
        out += &format!(
            "--p{level}:{};--n{level}:{};",
            hex(shade(palette, level)),
            hex(shade(palette, -level))
        );
    }
    out
}

/// The background of a level, mixed from the middle and the end of its side.
fn shade(palette: &Palette, level: i8) -> [u8; 3] {
    let end = if level < 0 {
        palette.negative
    } else {
        palette.positive
    };
    let share = f64::from(level.abs()) / f64::from(LEVELS);
    std::array::from_fn(|i| {
        let (from, to) = (f64::from(palette.zero[i]), f64::from(end[i]));
        (from + share * (to - from)).round() as u8
    })
}

fn hex(colour: [u8; 3]) -> String {
    format!("#{:02x}{:02x}{:02x}", colour[0], colour[1], colour[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What WCAG 2 asks of body text (level AA).
    const LEAST_CONTRAST: f64 = 4.5;

    fn luminance(colour: [u8; 3]) -> f64 {
        let linear = colour.map(|c| {
            let c = f64::from(c) / 255.0;
            if c <= 0.040_45 {
                c / 12.92
            } else {
                ((c + 0.055) / 1.055).powf(2.4)
            }
        });
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    }

    #[test]
    fn text_stands_out_on_every_colour() {
        for palette in [&LIGHT, &DARK] {
            for level in -LEVELS..=LEVELS {
                let (a, b) = (luminance(palette.ink), luminance(shade(palette, level)));
                let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
                assert!(contrast >= LEAST_CONTRAST, "level {level}: {contrast}");
            }
        }
    }

    #[test]
    fn colours_follow_sign_and_size() {
        let scale = DivergingScale::new(2.0).unwrap();
        assert_eq!(scale.class(Some(0.0)), "z");
        assert_eq!(scale.class(Some(2.0)), "p6");
        assert_eq!(scale.class(Some(-1.0)), "n3");
        assert_eq!(scale.class(Some(f64::NEG_INFINITY)), "n6");
        assert_eq!(scale.class(Some(f64::NAN)), "na");
        assert_eq!(scale.class(None), "na");
    }

    #[test]
    #[expect(
        clippy::float_cmp,
        reason = "limits are parsed from decimals, so they are exact"
    )]
    fn scale_ignores_one_outlier_in_a_hundred() {
        let mut values = vec![0.5; 99];
        values.push(-1e6);
        assert_eq!(DivergingScale::covering(values).limit(), 0.5);
        assert_eq!(DivergingScale::covering([0.0, f64::NAN]).limit(), 1.0);
        assert_eq!(DivergingScale::covering([]).limit(), 1.0);
        assert!(DivergingScale::new(0.0).is_none());
    }

    #[test]
    fn markup_and_invisible_characters_show_as_text() {
        let token = Token {
            text: "<script>\n\u{202e}\u{0}".into(),
            kind: Some("\"><b>".into()),
            ..Token::default()
        };
        let scale = DivergingScale::new(1.0).unwrap();
        let html = token_spans(&[token], Readout::TrueReward, scale, "\"><i>");
        assert!(html.contains("&lt;script&gt;"));
        assert!(html.contains("U+202E") && !html.contains('\u{202e}') && !html.contains('\u{0}'));
        assert!(!html.contains("<b>") && !html.contains("<script>"));
    }
}
