//! The page of the beam experiment.

use report::{Plot, ReferenceLine, Series, escape};

use super::super::page::{figure, targets_table};
use super::methods::{Chooser, Method, Ranking};
use super::{BeamResults, Row};
use crate::reproduce::statistics::OverSeeds;

/// `+0.12 [-0.03, +0.27]`.
pub(super) fn signed(figure: &OverSeeds) -> String {
    match figure.interval {
        Some([low, high]) => format!("{:+.2} [{low:+.2}, {high:+.2}]", figure.mean),
        None => format!("{:+.2} (one seed)", figure.mean),
    }
}

fn plain(figure: &OverSeeds) -> String {
    match figure.interval {
        Some([low, high]) => format!("{:.2} [{low:.2}, {high:.2}]", figure.mean),
        None => format!("{:.2}", figure.mean),
    }
}

/// Columns of the tables.
const COLUMNS: [(&str, &str); 10] = [
    ("true_reward", "True reward"),
    ("gain", "over greedy"),
    ("implicit_reward", "Implicit reward"),
    ("logp", "log π, nats"),
    ("tokens", "Tokens"),
    ("cut", "Cut off"),
    ("wins_chosen", "Wins over chosen"),
    ("wins_greedy", "Wins over greedy"),
    ("states", "Tokens computed"),
    ("certified", "Proven"),
];

/// What is drawn over the width: key, name, unit.
const METRICS: [(&str, &str, &str); 4] = [
    ("true_reward", "True reward", "reward units"),
    ("implicit_reward", "Implicit reward", "reward units"),
    ("tokens", "Length", "tokens"),
    ("wins_greedy", "Wins over greedy", "fraction"),
];

pub(super) fn page(results: &BeamResults) -> String {
    let seeds: Vec<String> = results.seeds.iter().map(|s| s.seed.to_string()).collect();
    let seconds: f64 = results.seeds.iter().map(|s| s.seconds).sum();
    let chosen: Vec<String> = results
        .seeds
        .iter()
        .map(|s| format!("{:.2} in {:.1} tokens", s.chosen_reward, s.chosen_tokens))
        .collect();
    let mut body = format!(
        "<h1>Beam search</h1><p class=\"subtitle\">{}\nseeds {}; {} on {} threads; {seconds:.0} s \
         in all. Intervals are Student's 95% over seeds.</p><p>Policies trained by DPO decode \
         held-out prompts in every way below, and each completion has its true reward. True reward \
         of the chosen completions, by seed: {}. Wins count a tie as half.</p>",
        escape(&results.command),
        seeds.join(", "),
        escape(&results.device),
        results.threads,
        chosen.join(", "),
    );
    body += &targets_table(&results.targets);
    for &beta in &results.betas {
        body += &format!("<h2>beta {beta}</h2><div class=\"plots\">");
        // A search for log-ratios goes where no other does, and would flatten the others' curves.
        for (rankings, chooser, metrics) in [
            (&Ranking::ALL[..2], Chooser::Likelihood, &METRICS[..]),
            (&Ranking::ALL[2..], Chooser::ImplicitReward, &METRICS[..3]),
        ] {
            for &metric in metrics {
                body += &figure(&by_width(results, beta, (rankings, chooser), metric));
            }
        }
        body += "</div><div class=\"scroll\"><table><thead><tr><th>Decoding</th>";
        for (_, heading) in COLUMNS {
            body += &format!("<th>{heading}</th>");
        }
        body += "</tr></thead><tbody>";
        for row in results.rows.iter().filter(|row| is(row, beta)) {
            body += &format!("<tr><td class=\"metric\">{}</td>", escape(&row.method));
            for (key, _) in COLUMNS {
                body += &format!("<td>{}</td>", plain(&row.figures[key]));
            }
            body += "</tr>";
        }
        body += "</tbody></table></div>";
    }
    report::page("Beam search", &body)
}

fn is(row: &Row, beta: f64) -> bool {
    row.beta.total_cmp(&beta).is_eq()
}

/// A figure over the width of the beam, or the number of draws.
fn by_width(
    results: &BeamResults,
    beta: f64,
    (rankings, chooser): (&[Ranking], Chooser),
    (key, label, unit): (&str, &str, &str),
) -> Plot {
    let value = |method: Method| {
        let name = method.name();
        let mut rows = results.rows.iter();
        let row = rows.find(|row| is(row, beta) && row.method == name)?;
        Some(row.figures.get(key)?.mean)
    };
    let series = |name: String, method: &dyn Fn(usize) -> Method, first: Option<f64>| Series {
        name,
        points: first
            .map(|value| (1.0, value))
            .into_iter()
            .chain(
                results
                    .widths
                    .iter()
                    .filter_map(|&width| Some((width as f64, value(method(width))?))),
            )
            .collect(),
        ..Series::default()
    };
    let mut all: Vec<Series> = rankings
        .iter()
        .map(|&ranking| {
            // A beam of one is greedy.
            let likelihood = ranking == Ranking::Likelihood;
            let first = likelihood.then(|| value(Method::Greedy)).flatten();
            series(ranking.name(), &|width| Method::Beam(width, ranking), first)
        })
        .collect();
    all.push(series(
        format!("best of N, {}", chooser.name()),
        &|n| Method::BestOf(n, chooser),
        value(Method::Sample),
    ));
    let line = |label: &str, method| {
        Some(ReferenceLine {
            label: label.into(),
            y: value(method)?,
        })
    };
    Plot {
        title: format!("{label}, by {}, β {beta}", rankings[0].name()),
        x_label: "beams, or draws".into(),
        y_label: unit.into(),
        series: all,
        reference_lines: [line("greedy", Method::Greedy), line("MAP", Method::Map)]
            .into_iter()
            .flatten()
            .collect(),
    }
}
