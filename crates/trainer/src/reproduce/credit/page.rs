//! The page of the experiment.

use report::{
    DivergingScale, OutcomeRow, Plot, Readout, ReferenceLine, Series, escape, scale_legend,
    token_spans, whisker_svg,
};

use super::super::page::{figure, targets_table};
use super::{CreditResults, METHODS};
use crate::reproduce::statistics::{OverSeeds, mean};

/// `0.912 [0.901, 0.923]`.
pub(super) fn with_interval(figure: &OverSeeds) -> String {
    match figure.interval {
        Some([low, high]) => format!("{:.4} [{low:.4}, {high:.4}]", figure.mean),
        None => format!("{:.4} (one seed)", figure.mean),
    }
}

pub(super) fn page(results: &CreditResults) -> String {
    let n = results.seeds.len();
    let mut body = String::from("<h1>Credit assignment</h1>");
    let seeds: Vec<String> = results.seeds.iter().map(|s| s.seed.to_string()).collect();
    let seconds: f64 = results.seeds.iter().map(|s| s.seconds).sum();
    body += &format!(
        "<p class=\"subtitle\">{}\nseeds {}; {} on {} threads; {seconds:.0} s in all. Intervals are \
         Student's 95% over seeds.</p><p>The policy was trained on labels of whole completions. \
         Good completions were copied with one wrong value: does a low score find it?</p>",
        escape(&results.command),
        seeds.join(", "),
        escape(&results.device),
        results.threads
    );
    body += &targets_table(&results.targets);
    body += "<h2>Which score finds the wrong token</h2><div class=\"plots\">";
    for (key, label) in [
        ("auroc", "AUROC, against all other tokens"),
        ("auroc_values", "AUROC, against right values"),
        ("auroc_second", "AUROC of the second of two errors"),
    ] {
        let rows: Vec<OutcomeRow> = METHODS
            .iter()
            .map(|name| {
                let figure = &results.methods[*name][key];
                let [ci_low, ci_high] = figure.interval.unwrap_or([f64::NAN; 2]);
                OutcomeRow {
                    policy: (*name).into(),
                    metric: label.into(),
                    mean: figure.mean,
                    ci_low,
                    ci_high,
                    n,
                }
            })
            .collect();
        let rows: Vec<&OutcomeRow> = rows.iter().collect();
        body += &format!("<figure>{}</figure>", whisker_svg(label, &rows, &METHODS));
    }
    body += &figure(&roc(results));
    body += &figure(&against_oracle(results));
    body += "</div><h2>All figures</h2><div class=\"scroll\"><table><thead><tr><th>Score</th>\
             <th>AUROC</th><th>Against right values</th><th>First of two</th><th>Second of two</th>\
             <th>Second alone</th><th>Likely errors</th><th>Unlikely errors</th></tr></thead><tbody>";
    for name in METHODS {
        body += &format!("<tr><td>{}</td>", escape(name));
        for key in [
            "auroc",
            "auroc_values",
            "auroc_first",
            "auroc_second",
            "auroc_second_alone",
            "auroc_likely",
            "auroc_unlikely",
        ] {
            body += &format!("<td>{}</td>", with_interval(&results.methods[name][key]));
        }
        body += "</tr>";
    }
    body += "</tbody></table></div><p>Likely errors are the third of the wrong tokens to which the \
             reference gives the most probability, unlikely ones the third to which it gives the \
             least.</p><div class=\"scroll\"><table><tbody>";
    for (key, label) in [
        (
            "correlation",
            "correlation of implicit reward and soft advantage",
        ),
        ("correlation_unchanged", "the same over unchanged tokens"),
        (
            "correlation_ceiling",
            "the most that the noise of the rollouts allows",
        ),
        (
            "change_at_site",
            "change of the implicit reward at the wrong token, reward units",
        ),
        (
            "change_later_sum",
            "its summed change at later tokens, reward units",
        ),
        (
            "change_later_size",
            "summed size of the changes at later tokens, reward units",
        ),
        (
            "leakage",
            "leakage: that size over the change at the wrong token",
        ),
        (
            "policy_accuracy",
            "accuracy of the policy on held-out labels",
        ),
        (
            "reward_model_accuracy",
            "accuracy of the sequence reward model",
        ),
        (
            "accuracy_ceiling",
            "the most that the noise of the labels allows",
        ),
    ] {
        body += &format!(
            "<tr><td class=\"metric\">{label}</td><td>{}</td></tr>",
            with_interval(&results.figures[key])
        );
    }
    body += "</tbody></table></div><h2>A copy</h2>";
    if let Some(first) = results.seeds.first() {
        let values = first
            .example
            .iter()
            .filter_map(|token| token.implicit_reward);
        let scale = DivergingScale::covering(values);
        let name = "implicit reward";
        body += &format!(
            "<div class=\"panel\"><div class=\"scales\">{}</div>{}</div>",
            scale_legend(scale, "implicit reward (reward units)"),
            token_spans(&first.example, Readout::ImplicitReward, scale, name)
        );
    }
    report::page("Credit assignment", &body)
}

/// The ROC curves, in the mean over seeds.
fn roc(results: &CreditResults) -> Plot {
    let series = METHODS.map(|name| {
        let curves: Vec<_> = results.seeds.iter().map(|s| &s.methods[name].roc).collect();
        let n = curves.iter().map(|curve| curve.len()).min().unwrap_or(0);
        let point = |at: usize| {
            let found: Vec<f64> = curves.iter().map(|curve| curve[at].1).collect();
            Some((curves.first()?[at].0, mean(&found)?))
        };
        Series {
            name: name.into(),
            points: (0..n).filter_map(point).collect(),
            ..Series::default()
        }
    });
    Plot {
        title: "Found, by the rate of false alarms".into(),
        x_label: "right tokens alarmed (fraction)".into(),
        y_label: "wrong tokens found (fraction)".into(),
        series: series.into(),
        ..Plot::default()
    }
}

/// Mean implicit reward of tokens sorted by soft advantage, in groups of equal size.
fn against_oracle(results: &CreditResults) -> Plot {
    const GROUPS: usize = 20;
    let mut points: Vec<(f64, f64)> = results
        .seeds
        .iter()
        .flat_map(|seed| seed.oracle_points.iter().copied())
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let size = points.len().div_ceil(GROUPS).max(1);
    let groups = points.chunks(size).map(|group| {
        let n = group.len() as f64;
        let sum = group
            .iter()
            .fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (sum.0 / n, sum.1 / n)
    });
    let measured: Vec<(f64, f64)> = groups.collect();
    Plot {
        title: "Implicit reward by soft advantage".into(),
        x_label: "soft advantage (reward units)".into(),
        y_label: "reward units".into(),
        series: vec![
            Series {
                name: "implicit reward".into(),
                points: measured.clone(),
                ..Series::default()
            },
            Series {
                name: "equal".into(),
                points: measured.iter().map(|p| (p.0, p.0)).collect(),
                ..Series::default()
            },
        ],
        reference_lines: vec![ReferenceLine {
            label: "none".into(),
            y: 0.0,
        }],
    }
}
