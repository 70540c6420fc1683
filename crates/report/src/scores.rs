//! The page of scored completions: thousands of tokens, drawn when they come into view.

use std::collections::BTreeMap;

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};
use serde_json::json;

use crate::number::signed;
use crate::page::{escape, page_with};
use crate::tokens::{DivergingScale, scale_legend};
use crate::training::Card;

/// Script of the page: builds a row's tokens when it comes near the window.
const JS: &str = include_str!("scores.js");
const CSS: &str = include_str!("scores.css");
/// Digits after the point of the logps in the page: the file of scores has them all.
const DIGITS: f64 = 1e4;
/// Passages that two completions share are looked for up to this product of their lengths.
const LARGEST_COMPARISON: usize = 4_000_000;
/// Passages shared by chance, shorter than this, count as different.
const SHORTEST_SHARED: usize = 3;
/// Differences are shown where more than one in this many tokens of the shorter one is shared.
const LEAST_SHARED: usize = 5;

/// A prompt with one completion or with several to compare, token by token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoredRow {
    /// Where it stands in the data.
    pub name: String,
    /// The conditioning text.
    pub prompt: String,
    /// Its completions; of two, the first is the chosen one.
    pub completions: Vec<ScoredCompletion>,
}

/// A completion as a policy and its reference see it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoredCompletion {
    /// What it is, such as `chosen`.
    pub label: String,
    /// Sum of the implicit rewards of its tokens, in reward units.
    pub total: f64,
    /// Its tokens in order.
    pub tokens: Vec<ScoredToken>,
}

/// A token with what is read off it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoredToken {
    /// Its text, which may be empty or hold line breaks.
    pub text: String,
    /// Its id in the vocabulary.
    pub id: u32,
    /// What was read; nothing for a token that is not scored, as of a user's turn.
    pub readout: Option<TokenScores>,
}

/// The numbers of a token, in nats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenScores {
    /// Log-probability under the policy.
    pub policy_logp: f64,
    /// Log-probability under the reference.
    pub reference_logp: f64,
    /// Entropy of the policy's distribution.
    pub entropy: f64,
    /// Divergence of the policy's distribution from the reference's.
    pub kl: f64,
    /// What else might have stood there: id, policy's logp, reference's logp.
    pub alternatives: Vec<(u32, f64, f64)>,
}

/// A row as the page holds it: compact, and independent of the rows around it.
#[derive(Debug, Clone)]
pub struct PageRow {
    json: String,
    rewards: Vec<f64>,
    /// Ids of the alternatives.
    ids: Vec<u32>,
}

impl PageRow {
    /// Encodes a row whose rewards are `beta` reward units per nat.
    pub fn new(row: &ScoredRow, beta: f64) -> Self {
        let ids = |c: &ScoredCompletion| c.tokens.iter().map(|t| t.id).collect::<Vec<u32>>();
        let marks = match &row.completions[..] {
            [a, b] => {
                let (a, b) = differing(&ids(a), &ids(b));
                // Of two texts that share next to nothing, everything differs; lines would not help.
                let shared = a.iter().filter(|differs| !**differs).count();
                if shared * LEAST_SHARED > a.len().min(b.len()) {
                    vec![a, b]
                } else {
                    Vec::new()
                }
            }
            _ => Vec::new(),
        };
        let tokens = || row.completions.iter().flat_map(|c| &c.tokens);
        let readouts = || tokens().filter_map(|token| token.readout.as_ref());
        let mut ids: Vec<u32> = readouts()
            .flat_map(|readout| readout.alternatives.iter().map(|(id, ..)| *id))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        let completions: Vec<EncodedCompletion<'_>> = row
            .completions
            .iter()
            .enumerate()
            .map(|(at, completion)| encode(completion, marks.get(at)))
            .collect();
        Self {
            json: in_script(&Encoded {
                n: &row.name,
                p: &row.prompt,
                c: completions,
            }),
            rewards: readouts()
                .map(|r| beta * (r.policy_logp - r.reference_logp))
                .collect(),
            ids,
        }
    }
}

/// A page of scored rows, filled row by row.
#[derive(Debug, Clone)]
pub struct ScorePage {
    beta: f64,
    rows: Vec<String>,
    rewards: Vec<f64>,
    /// Texts of the alternatives' ids.
    words: BTreeMap<u32, String>,
}

impl ScorePage {
    /// An empty page for rewards of `beta` reward units per nat.
    pub fn new(beta: f64) -> Self {
        Self {
            beta,
            rows: Vec::new(),
            rewards: Vec::new(),
            words: BTreeMap::new(),
        }
    }

    /// Rows so far.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// Adds a row; `word` gives the text of an alternative's id.
    pub fn add(&mut self, row: PageRow, word: impl Fn(u32) -> String) {
        self.rows.push(row.json);
        self.rewards.extend(row.rewards);
        for id in row.ids {
            self.words.entry(id).or_insert_with(|| word(id));
        }
    }

    /// The page as one HTML document that needs no other file.
    ///
    /// `subtitle` may hold line breaks and, as `cards` and `notes`, may be empty. All text from data
    /// reaches the reader as text: it stands in a block of JSON without a single `<` and enters the
    /// document through `textContent`.
    pub fn to_html(&self, title: &str, subtitle: &str, cards: &[Card], notes: &[String]) -> String {
        let scale = DivergingScale::covering(self.rewards.iter().copied());
        let mut body = format!(
            "<h1>{}</h1>\n<p class=\"subtitle\">{}</p>\n<dl class=\"cards\">",
            escape(title),
            escape(subtitle)
        );
        for card in cards {
            body += &format!(
                "<div class=\"card\"><dt>{}</dt><dd class=\"value\">{}</dd><dd class=\"note\">{}</dd></div>",
                escape(&card.label),
                escape(&card.value),
                escape(&card.note)
            );
        }
        body += "</dl>\n";
        if !notes.is_empty() {
            let notes = notes
                .iter()
                .map(|note| format!("<li>{}</li>", escape(note)));
            body += &format!("<ul class=\"notes\">{}</ul>\n", notes.collect::<String>());
        }
        body += &format!(
            "<div class=\"bar-top\"><div class=\"controls\">{CONTROLS}</div>{}</div>\n\
             <noscript><p>This page draws its tokens with a script; the file of scores beside it \
             holds the same numbers.</p></noscript>\n\
             <main id=\"rows\"></main>\n",
            scale_legend(scale, "implicit reward of a token (reward units)")
        );
        let words: BTreeMap<String, &String> = self
            .words
            .iter()
            .map(|(id, text)| (id.to_string(), text))
            .collect();
        body += &format!(
            "<script type=\"application/json\" id=\"data\">{{\"beta\":{},\"limit\":{},\"words\":{},\"rows\":[{}]}}</script>",
            json!(self.beta),
            json!(scale.limit()),
            in_script(&json!(words)),
            self.rows.join(",\n")
        );
        page_with(title, &body, CSS, JS)
    }
}

const CONTROLS: &str = "<label>Sort <select id=\"sort\"><option value=\"file\">as in the file\
<option value=\"up\">margin, smallest first<option value=\"down\">margin, largest first\
<option value=\"size\">size of the margin</select></label> \
<label>Show <select id=\"show\"><option value=\"all\">all<option value=\"right\">chosen ahead\
<option value=\"wrong\">rejected ahead or tied</select></label> \
<label>Find <input id=\"find\" type=\"search\" size=\"14\"></label> \
<label><input id=\"marks\" type=\"checkbox\" checked> line above what differs</label> \
<span id=\"count\" role=\"status\"></span>";

/// A row as the script reads it.
#[derive(Serialize)]
struct Encoded<'a> {
    /// Its name.
    n: &'a str,
    /// The prompt.
    p: &'a str,
    /// Its completions.
    c: Vec<EncodedCompletion<'a>>,
}

/// A completion as the script reads it: arrays with an entry for each token.
#[derive(Serialize)]
struct EncodedCompletion<'a> {
    /// Its label.
    l: &'a str,
    /// The sum of its rewards.
    s: f64,
    /// Texts.
    t: Vec<&'a str>,
    /// Ids.
    i: Vec<u32>,
    /// Logps under the policy.
    a: Vec<Option<f64>>,
    /// Logps under the reference.
    b: Vec<Option<f64>>,
    /// Entropies.
    e: Vec<Option<f64>>,
    /// Divergences.
    k: Vec<Option<f64>>,
    /// Alternatives.
    x: Vec<Alternatives<'a>>,
    /// A digit for each token: 1 where the two completions differ.
    d: String,
}

/// Id, policy's logp, reference's logp of one after the other.
struct Alternatives<'a>(&'a [(u32, f64, f64)]);

impl Serialize for Alternatives<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(3 * self.0.len()))?;
        for &(id, policy, reference) in self.0 {
            list.serialize_element(&id)?;
            list.serialize_element(&rounded(policy))?;
            list.serialize_element(&rounded(reference))?;
        }
        list.end()
    }
}

fn rounded(x: f64) -> f64 {
    let x = (x * DIGITS).round() / DIGITS;
    // Minus zero is a digit more, and says nothing.
    if x.abs() > 0.0 { x } else { 0.0 }
}

fn encode<'a>(
    completion: &'a ScoredCompletion,
    marks: Option<&Vec<bool>>,
) -> EncodedCompletion<'a> {
    let tokens = &completion.tokens;
    let column = |of: &dyn Fn(&TokenScores) -> f64| -> Vec<Option<f64>> {
        let readouts = tokens.iter().map(|token| token.readout.as_ref());
        readouts.map(|r| r.map(|r| rounded(of(r)))).collect()
    };
    let alternatives = |token: &'a ScoredToken| {
        let readout = token.readout.as_ref();
        Alternatives(readout.map_or(&[], |readout| &readout.alternatives[..]))
    };
    EncodedCompletion {
        l: &completion.label,
        s: completion.total,
        t: tokens.iter().map(|token| &token.text[..]).collect(),
        i: tokens.iter().map(|token| token.id).collect(),
        a: column(&|r| r.policy_logp),
        b: column(&|r| r.reference_logp),
        e: column(&|r| r.entropy),
        k: column(&|r| r.kl),
        x: tokens.iter().map(alternatives).collect(),
        d: marks
            .into_iter()
            .flatten()
            .map(|&differs| if differs { '1' } else { '0' })
            .collect(),
    }
}

/// JSON that may stand in a script element: nothing in it ends the element or opens a comment.
fn in_script(value: &impl Serialize) -> String {
    let text = serde_json::to_string(value).expect("numbers and texts are JSON");
    let mut out = String::with_capacity(text.len());
    let mut rest = &text[..];
    // Outside of strings JSON has none of these.
    while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        let (before, from) = rest.split_at(at);
        let mut behind = from.chars();
        let special = behind.next().map_or(0, u32::from);
        out += before;
        out += &format!("\\u{special:04x}");
        rest = behind.as_str();
    }
    out + rest
}

/// Which tokens of two completions are not of a passage that both have, in the same order.
///
/// Their common start and end are shared at any length; between them, the longest common
/// subsequence in runs of at least three tokens.
fn differing(a: &[u32], b: &[u32]) -> (Vec<bool>, Vec<bool>) {
    let (mut in_a, mut in_b) = (vec![true; a.len()], vec![true; b.len()]);
    let shorter = a.len().min(b.len());
    let start = (0..shorter).take_while(|&i| a[i] == b[i]).count();
    let same_end = |i: &usize| a[a.len() - 1 - i] == b[b.len() - 1 - i];
    let end = (0..shorter - start).take_while(same_end).count();
    in_a[..start].fill(false);
    in_b[..start].fill(false);
    in_a[a.len() - end..].fill(false);
    in_b[b.len() - end..].fill(false);
    let (x, y) = (&a[start..a.len() - end], &b[start..b.len() - end]);
    if x.is_empty() || y.is_empty() || x.len() * y.len() > LARGEST_COMPARISON {
        return (in_a, in_b);
    }
    // lengths[i][j]: of the longest common subsequence of x[i..] and y[j..].
    let width = y.len() + 1;
    let mut lengths = vec![0_u16; (x.len() + 1) * width];
    for i in (0..x.len()).rev() {
        for j in (0..y.len()).rev() {
            lengths[i * width + j] = if x[i] == y[j] {
                lengths[(i + 1) * width + j + 1].saturating_add(1)
            } else {
                lengths[(i + 1) * width + j].max(lengths[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < x.len() && j < y.len() {
        let run = (0..x.len().min(y.len()))
            .take_while(|&n| i + n < x.len() && j + n < y.len() && x[i + n] == y[j + n])
            .count();
        if run > 0 {
            if run >= SHORTEST_SHARED {
                in_a[start + i..start + i + run].fill(false);
                in_b[start + j..start + j + run].fill(false);
            }
            i += run;
            j += run;
        } else if lengths[(i + 1) * width + j] >= lengths[i * width + j + 1] {
            i += 1;
        } else {
            j += 1;
        }
    }
    (in_a, in_b)
}

/// A completion's tokens for a terminal: coloured backgrounds, negative ones underlined.
///
/// Without `colour`, the reward stands behind each token whose size reaches half of the scale.
/// Nothing in the data reaches the terminal as a control character; `scale` is the one of
/// [`DivergingScale::covering`]. Ends without a line break.
///
/// # Examples
///
/// ```
/// use report::{DivergingScale, ScoredToken, TokenScores, terminal_tokens};
///
/// let token = ScoredToken {
///     text: "red\u{1b}[31m".into(),
///     readout: Some(TokenScores { policy_logp: -1.0, reference_logp: -3.0, ..Default::default() }),
///     ..Default::default()
/// };
/// let scale = DivergingScale::new(0.2).unwrap();
/// let text = terminal_tokens(&[token], 0.1, scale, false);
/// assert_eq!(text, "red\u{241b}[31m[+0.200]");
/// ```
pub fn terminal_tokens(
    tokens: &[ScoredToken],
    beta: f64,
    scale: DivergingScale,
    colour: bool,
) -> String {
    let mut out = String::new();
    for token in tokens {
        let reward = token
            .readout
            .as_ref()
            .map(|r| beta * (r.policy_logp - r.reference_logp));
        let text = printable(&token.text);
        match reward.filter(|reward| reward.is_finite()) {
            Some(reward) if colour => {
                // A line break inside of a colour would paint the rest of the line.
                for (i, line) in text.split('\n').enumerate() {
                    if i > 0 {
                        out.push('\n');
                    }
                    out += &scale.terminal(reward, line);
                }
            }
            Some(reward) if reward.abs() >= scale.limit() / 2.0 => {
                out += &format!("{text}[{}]", signed(reward));
            }
            _ => out += &text,
        }
    }
    out
}

/// Text in which control characters and marks of direction are visible; line breaks stay.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' => '\n',
            c if (c as u32) < 0x20 => char::from_u32(0x2400 + c as u32).unwrap_or(' '),
            '\u{7f}'..='\u{9f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => '\u{fffd}',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(a: &[u32], b: &[u32]) -> (String, String) {
        let text = |marks: Vec<bool>| marks.iter().map(|&m| if m { '1' } else { '0' }).collect();
        let (a, b) = differing(a, b);
        (text(a), text(b))
    }

    #[test]
    fn a_replaced_passage_is_all_that_differs() {
        let (a, b) = marks(&[1, 2, 3, 9, 4, 5], &[1, 2, 3, 7, 8, 4, 5]);
        assert_eq!((&a[..], &b[..]), ("000100", "0001100"));
    }

    #[test]
    fn a_shared_passage_in_the_middle_is_found_and_chance_tokens_are_not() {
        let (a, b) = marks(&[9, 1, 2, 3, 4, 8], &[7, 7, 1, 2, 3, 4, 6]);
        assert_eq!((&a[..], &b[..]), ("100001", "1100001"));
        let (a, b) = marks(&[9, 1, 8], &[7, 1, 6]);
        assert_eq!((&a[..], &b[..]), ("111", "111"));
    }

    #[test]
    fn equal_empty_and_contained_completions_have_marks_too() {
        assert_eq!(marks(&[1, 2], &[1, 2]), ("00".into(), "00".into()));
        assert_eq!(marks(&[], &[1]), (String::new(), "1".into()));
        assert_eq!(marks(&[1, 1, 1], &[1]), ("011".into(), "0".into()));
    }

    #[test]
    fn json_in_a_script_element_has_no_character_that_could_end_it() {
        let text = in_script(&json!({"</script>": "<!-- & \u{2028}"}));
        assert!(!text.contains(['<', '>', '&', '\u{2028}']), "{text}");
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["</script>"], "<!-- & \u{2028}");
    }
}
