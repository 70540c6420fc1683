//! The page of the reward curves.

use report::{Plot, ReferenceLine, Series, escape};

use super::super::page::{figure, targets_table};
use super::super::statistics::mean;
use super::{Cell, CurvesResults, Point, REFERENCES};

pub(super) fn page(results: &CurvesResults) -> String {
    let seeds: Vec<String> = results.seeds.iter().map(|s| s.seed.to_string()).collect();
    let seconds: f64 = results.seeds.iter().map(|s| s.seconds).sum();
    let mut body = format!(
        "<h1>Reward curves</h1><p class=\"subtitle\">{}\nseeds {}; {} on {} threads; {seconds:.0} s \
         in all. Intervals are Student's 95% over seeds.</p><p>Policies are trained by DPO from \
         three references at {} strengths, and looked at on fresh pairs. The mean reward of the \
         chosen completions cannot exceed β KL(p_w ‖ π_ref), where p_w is what they are drawn from. \
         The bound drawn takes a fit to many more chosen completions for p_w, which can only lower \
         it.</p>",
        escape(&results.command),
        seeds.join(", "),
        escape(&results.device),
        results.threads,
        results.betas.len(),
    );
    body += &targets_table(&results.targets);
    for reference in REFERENCES {
        body += &format!("<h2>Reference: {reference}</h2><div class=\"plots\">");
        for &beta in &results.betas {
            let cells = cells(results, reference, beta);
            body += &figure(&rewards(reference, beta, &cells));
        }
        body += "</div>";
    }
    body += "<h2>Distance and quality</h2><div class=\"plots\">";
    for &beta in &results.betas {
        let of = |title: &str, y_label: &str, value: fn(&Point) -> f64| Plot {
            title: format!("{title}, β {beta}"),
            x_label: "step".into(),
            y_label: y_label.into(),
            series: REFERENCES
                .iter()
                .map(|reference| Series {
                    name: (*reference).into(),
                    points: over_seeds(&cells(results, reference, beta), value),
                    ..Series::default()
                })
                .collect(),
            ..Plot::default()
        };
        let kl = of("KL(π ‖ π_ref) of samples", "nats a completion", |p| {
            p.kl
        });
        let quality = of("True reward of samples", "reward units", |p| p.true_reward);
        body += &figure(&kl);
        body += &figure(&quality);
    }
    body += "</div><h2>How well each model knows fresh chosen completions</h2><div class=\"scroll\">\
             <table><thead><tr><th>Model</th><th>Cross-entropy, nats a completion, by seed</th></tr>\
             </thead><tbody>";
    if let Some(first) = results.seeds.first() {
        for name in first.cross_entropies.keys() {
            let values: Vec<String> = results
                .seeds
                .iter()
                .filter_map(|seed| seed.cross_entropies.get(name))
                .map(|value| format!("{value:.2}"))
                .collect();
            body += &format!(
                "<tr><td class=\"metric\">{}</td><td>{}</td></tr>",
                escape(name),
                values.join(", ")
            );
        }
    }
    body += "</tbody></table></div>";
    report::page("Reward curves", &body)
}

/// A cell of every seed.
fn cells<'a>(results: &'a CurvesResults, reference: &str, beta: f64) -> Vec<&'a Cell> {
    let all = results.seeds.iter().flat_map(|seed| &seed.cells);
    all.filter(|cell| cell.reference == reference && cell.beta.total_cmp(&beta).is_eq())
        .collect()
}

/// The mean over seeds at each look.
fn over_seeds(cells: &[&Cell], value: fn(&Point) -> f64) -> Vec<(f64, f64)> {
    let n = cells
        .iter()
        .map(|cell| cell.points.len())
        .min()
        .unwrap_or(0);
    let at = |index: usize| {
        let values: Vec<f64> = cells
            .iter()
            .map(|cell| value(&cell.points[index]))
            .collect();
        Some((cells.first()?.points[index].step as f64, mean(&values)?))
    };
    (0..n).filter_map(at).collect()
}

fn rewards(reference: &str, beta: f64, cells: &[&Cell]) -> Plot {
    let bounds: Vec<f64> = cells.iter().map(|cell| cell.bound).collect();
    let series = |name: &str, value: fn(&Point) -> f64| Series {
        name: name.into(),
        points: over_seeds(cells, value),
        ..Series::default()
    };
    Plot {
        title: format!("{reference}, β {beta}"),
        x_label: "step".into(),
        y_label: "implicit reward (reward units)".into(),
        series: vec![
            series("chosen", |point| point.chosen),
            series("rejected", |point| point.rejected),
        ],
        reference_lines: vec![
            ReferenceLine {
                label: "bound".into(),
                y: mean(&bounds).unwrap_or(0.0),
            },
            ReferenceLine {
                label: "no change".into(),
                y: 0.0,
            },
        ],
    }
}
