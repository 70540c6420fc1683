//! The page of a training run.

use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};

use crate::error::ReportError;
use crate::number::{signed, with_interval};
use crate::outcomes::{OutcomeRow, whisker_svg};
use crate::page::page;
use crate::plot::Plot;
use crate::tokens::{DivergingScale, Readout, Token, scale_legend, token_spans};

/// What the page of a training run shows. Whatever is empty leaves its section out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainingReport {
    /// The name of the run.
    pub title: String,
    /// Command, machine, date; line breaks are kept. May be empty.
    #[serde(default)]
    pub subtitle: String,
    /// The key numbers, in order.
    #[serde(default)]
    pub summary_cards: Vec<Card>,
    /// Before and after: rows of one metric together, policies in the same order in each.
    #[serde(default)]
    pub outcomes: Vec<OutcomeRow>,
    /// Line plots over steps, in order. One whose series are all empty is left out.
    #[serde(default)]
    pub curves: Vec<Plot>,
    /// Completions to read, with their tokens coloured.
    #[serde(default)]
    pub samples: Vec<Sample>,
    /// The resolved recipe as TOML. May be empty.
    #[serde(default)]
    pub recipe_toml: String,
    /// Sentences that a reader should see before the numbers, such as dropped rows.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One key number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// What it is.
    pub label: String,
    /// The number with its unit, as text.
    pub value: String,
    /// What it is to be read with, such as an interval or a ceiling. May be empty.
    #[serde(default)]
    pub note: String,
}

/// A prompt and what policies wrote for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The conditioning text.
    pub prompt: String,
    /// A completion for each policy, in order.
    pub policies: Vec<SampleCompletion>,
}

/// One completion, token by token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleCompletion {
    /// Which policy wrote it.
    pub label: String,
    /// Its tokens in order.
    pub tokens: Vec<Token>,
    /// Sum of the implicit rewards, in reward units.
    #[serde(default)]
    pub total_implicit: Option<f64>,
    /// Sum of the true rewards, in reward units, where the task knows them.
    #[serde(default)]
    pub total_true: Option<f64>,
}

impl TrainingReport {
    /// The page as one HTML document that needs no other file.
    ///
    /// All text is escaped. Numbers that are not finite are shown as such and never drawn. Both
    /// kinds of reward have one colour scale each, shared by all samples.
    ///
    /// # Errors
    ///
    /// [`ReportError::Template`] when the built-in template does not render, which no input is
    /// known to cause.
    pub fn to_html(&self) -> Result<String, ReportError> {
        let mut environment = Environment::new();
        // The ending makes minijinja escape; only what is marked `safe` in the template, and was
        // escaped where it was made, goes through.
        environment.add_template("training.html", include_str!("training.html"))?;
        let curves: Vec<_> = self
            .curves
            .iter()
            .filter(|plot| plot.has_points())
            .map(|plot| context! { svg => plot.to_svg(), caption => plot.caption() })
            .collect();
        let (scales, samples) = self.samples();
        let sections: Vec<_> = [
            ("outcomes", "Before and after", !self.outcomes.is_empty()),
            ("curves", "Training curves", !curves.is_empty()),
            ("samples", "Sampled completions", !samples.is_empty()),
            ("recipe", "Resolved recipe", !self.recipe_toml.is_empty()),
        ]
        .into_iter()
        .filter(|section| section.2)
        .map(|(id, name, _)| context! { id, name })
        .collect();
        let body = environment
            .get_template("training.html")?
            .render(context! {
                title => visible_nul(&self.title),
                subtitle => visible_nul(&self.subtitle),
                sections,
                cards => self.cards(),
                notes => self.notes.iter().map(|n| visible_nul(n)).collect::<Vec<_>>(),
                outcomes => self.outcome_rows(),
                whiskers => self.whiskers(),
                curves,
                scales,
                samples,
                recipe => visible_nul(&self.recipe_toml),
            })?;
        Ok(page(&self.title, &body))
    }

    fn cards(&self) -> Vec<minijinja::Value> {
        self.summary_cards
            .iter()
            .map(|card| {
                context! {
                    label => visible_nul(&card.label),
                    value => visible_nul(&card.value),
                    note => visible_nul(&card.note),
                }
            })
            .collect()
    }

    fn outcome_rows(&self) -> Vec<minijinja::Value> {
        let mut before: Option<&str> = None;
        self.outcomes
            .iter()
            .map(|row| {
                let (mean, low, high) = with_interval(row.mean, row.ci_low, row.ci_high);
                let first = before.replace(&row.metric) != Some(&row.metric);
                context! {
                    first,
                    metric => visible_nul(&row.metric),
                    policy => visible_nul(&row.policy),
                    mean,
                    low,
                    high,
                    mean_key => sort_key(row.mean),
                    low_key => sort_key(row.ci_low),
                    n => row.n,
                }
            })
            .collect()
    }

    /// One picture for each metric, since metrics have different units.
    fn whiskers(&self) -> Vec<String> {
        let policies = in_order(self.outcomes.iter().map(|row| row.policy.as_str()));
        in_order(self.outcomes.iter().map(|row| row.metric.as_str()))
            .into_iter()
            .map(|metric| {
                let rows: Vec<&OutcomeRow> = self
                    .outcomes
                    .iter()
                    .filter(|row| row.metric == metric)
                    .collect();
                whisker_svg(metric, &rows, &policies)
            })
            .collect()
    }

    /// The legends of the colour scales that are used, and the samples.
    fn samples(&self) -> (Vec<String>, Vec<minijinja::Value>) {
        let readouts = [
            (Readout::ImplicitReward, "implicit reward"),
            (Readout::TrueReward, "true reward"),
        ];
        let mut known = Vec::new();
        let mut legends = Vec::new();
        for (readout, name) in readouts {
            let tokens = self.samples.iter().flat_map(|s| &s.policies);
            let values: Vec<f64> = tokens
                .flat_map(|c| &c.tokens)
                .filter_map(|t| readout.of(t))
                .collect();
            if !values.is_empty() {
                let scale = DivergingScale::covering(values);
                legends.push(scale_legend(
                    scale,
                    &format!("{name} of a token (reward units)"),
                ));
                known.push((readout, name, scale));
            }
        }
        let samples = self
            .samples
            .iter()
            .map(|sample| {
                let completions: Vec<_> = sample
                    .policies
                    .iter()
                    .map(|c| completion(c, &known))
                    .collect();
                context! { prompt => visible_nul(&sample.prompt), completions }
            })
            .collect();
        (legends, samples)
    }
}

fn completion(
    completion: &SampleCompletion,
    known: &[(Readout, &str, DivergingScale)],
) -> minijinja::Value {
    let mut readouts = Vec::new();
    let mut count = Some(match completion.tokens.len() {
        0 => "no tokens".to_owned(),
        1 => "1 token".to_owned(),
        n => format!("{n} tokens"),
    });
    for (readout, name, scale) in known {
        if completion.tokens.iter().any(|t| readout.of(t).is_some()) {
            let label = format!("{}: {name} of each token", completion.label);
            let html = token_spans(&completion.tokens, *readout, *scale, &label);
            readouts.push(context! { name => *name, html });
        }
    }
    if readouts.is_empty() && !completion.tokens.is_empty() {
        // Nothing to colour by; the text is still there to read, and may stand in one piece.
        count = None;
        let scale = DivergingScale::covering([]);
        let html = token_spans(
            &completion.tokens,
            Readout::ImplicitReward,
            scale,
            &completion.label,
        );
        readouts.push(context! { name => "", html });
    }
    let totals: Vec<String> = [
        ("implicit reward", completion.total_implicit),
        ("true reward", completion.total_true),
    ]
    .into_iter()
    .filter_map(|(name, total)| Some(format!("{name} {}", signed(total?))))
    .chain(count)
    .collect();
    context! { label => visible_nul(&completion.label), totals, readouts }
}

/// What the script sorts by: numbers that are not finite come last.
fn sort_key(value: f64) -> String {
    if value.is_finite() {
        value.to_string()
    } else {
        "Infinity".into()
    }
}

/// NUL cannot be written in HTML; everything else is left to the template's escaping.
fn visible_nul(text: &str) -> String {
    text.replace('\0', "\u{2400}")
}

/// Each name once, in the order of first appearance.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut out = Vec::new();
    for name in names {
        if !out.contains(&name) {
            out.push(name);
        }
    }
    out
}
