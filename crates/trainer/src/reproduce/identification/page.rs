//! The page of the experiment.

use mdp_core::MdpError;
use report::{
    Band, DivergingScale, Plot, Readout, Series, Token, escape, scale_legend, token_spans,
};

use super::super::page::{figure, targets_table};
use super::{BINS, IdentificationResults, LEARNERS, REWARDS, key, tree};
use crate::reproduce::statistics::OverSeeds;

/// `0.912 [0.901, 0.923]`.
pub(super) fn with_interval(figure: &OverSeeds) -> String {
    match figure.interval {
        Some([low, high]) => format!("{:.3} [{low:.3}, {high:.3}]", figure.mean),
        None => format!("{:.3} (one seed)", figure.mean),
    }
}

pub(super) fn page(results: &IdentificationResults) -> Result<String, MdpError> {
    let seeds: Vec<String> = results.seeds.iter().map(|s| s.seed.to_string()).collect();
    let seconds: f64 = results.seeds.iter().map(|s| s.seconds).sum();
    let mut body = format!(
        "<h1>Identification</h1><p class=\"subtitle\">{}\nseeds {}; {} on {} threads; \
         {seconds:.0} s in all. Intervals are Student's 95% over seeds.</p><p>A language model and \
         a table were trained by DPO on the same labels. How far is the advantage that each \
         learned, <code>β log(π/π_ref)</code>, from the exact one?</p>",
        escape(&results.command),
        seeds.join(", "),
        escape(&results.device),
        results.threads
    );
    body += &targets_table(&results.targets);
    body += "<h2>Error by number of pairs</h2><div class=\"plots\">";
    for reward in REWARDS {
        for name in ["error", "unweighted error", "correlation"] {
            let plot = by_pairs(results, reward, name);
            body += &figure(&plot);
        }
    }
    body += "</div><h2>Error by visits of the state</h2>";
    for reward in REWARDS {
        body += &by_visits(results, reward);
    }
    body += "<h2>Residuals</h2>";
    body += &maps(results)?;
    Ok(report::page("Identification", &body))
}

fn by_pairs(results: &IdentificationResults, reward: &str, figure: &str) -> Plot {
    let series = LEARNERS.map(|learner| {
        let (mut points, mut band) = (Vec::new(), Vec::new());
        for &pairs in &results.pairs {
            let Some(over) = results.figures.get(&key(reward, learner, pairs, figure)) else {
                continue;
            };
            let x = (pairs as f64).log10();
            points.push((x, over.mean));
            if let Some([low, high]) = over.interval {
                band.push((x, low, high));
            }
        }
        Series {
            name: learner.into(),
            points,
            band: (!band.is_empty()).then(|| Band {
                label: "95% interval".into(),
                points: band,
            }),
        }
    });
    let unit = if figure == "correlation" {
        "correlation"
    } else {
        "reward units"
    };
    Plot {
        title: format!("{reward} reward: {figure}"),
        x_label: "pairs (logarithm to base 10)".into(),
        y_label: unit.into(),
        series: series.into(),
        ..Plot::default()
    }
}

fn by_visits(results: &IdentificationResults, reward: &str) -> String {
    let mut out = format!(
        "<h3>{reward} reward</h3><div class=\"scroll\"><table><thead><tr><th>Pairs</th>\
         <th>Learner</th>"
    );
    for (bin, low) in BINS.iter().enumerate() {
        out += &match BINS.get(bin + 1) {
            Some(high) if high - low > 1 => format!("<th>{low} to {} visits</th>", high - 1),
            Some(_) => format!("<th>{low} visits</th>"),
            None => format!("<th>{low} visits and more</th>"),
        };
    }
    out += "<th>Largest</th></tr></thead><tbody>";
    for &pairs in &results.pairs {
        for learner in LEARNERS {
            out += &format!("<tr><td>{pairs}</td><td>{learner}</td>");
            let bins = BINS.iter().map(|low| format!("error from {low} visits"));
            for figure in bins.chain(["largest".to_string()]) {
                let over = results.figures.get(&key(reward, learner, pairs, &figure));
                out += &format!("<td>{}</td>", over.map(with_interval).unwrap_or_default());
            }
            out += "</tr>";
        }
    }
    out + "</tbody></table></div>"
}

/// `β log(π/π*)` at every state and token, one line for each depth, for the first seed.
fn maps(results: &IdentificationResults) -> Result<String, MdpError> {
    let Some(first) = results.seeds.first() else {
        return Ok(String::new());
    };
    let tree = tree(results.horizon)?;
    let all = first.cells.iter().flat_map(|cell| cell.learners.values());
    let scale = DivergingScale::covering(all.flat_map(|f| f.residuals.iter().copied()));
    let mut out = format!(
        "<p>Seed {}: each box is a token at a state, one line for each position; its text is \
         the state's tokens and then the token, 3 being the end. Where the tooltip says reward, it gives \
         the residual.</p><div class=\"panel\"><div \
         class=\"scales\">{}</div></div>",
        first.seed,
        scale_legend(scale, "β log(π/π*) (reward units)")
    );
    for cell in &first.cells {
        for learner in LEARNERS {
            out += &format!(
                "<details><summary>{} reward, {} pairs, {learner}</summary>",
                cell.reward, cell.pairs
            );
            for depth in 0..tree.horizon() {
                let pairs = tree.level(depth).flat_map(|state| tree.row(state));
                let tokens: Vec<Token> = pairs
                    .map(|pair| {
                        let tokens = tree.pair_tokens(pair);
                        let text = tokens.iter().map(u32::to_string);
                        Token {
                            text: text.collect::<String>() + " ",
                            id: (pair % tree.vocab()) as u32,
                            implicit_reward: Some(cell.learners[learner].residuals[pair]),
                            kind: Some(format!(
                                "residual; visits of the state {}",
                                cell.visits[pair / tree.vocab()]
                            )),
                            ..Token::default()
                        }
                    })
                    .collect();
                let label = format!("residuals at position {}", depth + 1);
                out += &token_spans(&tokens, Readout::ImplicitReward, scale, &label);
            }
            out += "</details>";
        }
    }
    Ok(out)
}
