//! The page of the experiment on first errors.

use judge::Estimate;
use report::{Plot, Series, escape};

use super::super::page::{figure, targets_table};
use super::methods::{FALSE_ALARMS, Method, ReadPair};
use super::{FirstErrorResults, RUN, SCORES};
use crate::reproduce::statistics::mean;

/// Steps before and behind the first error that are drawn.
const AROUND: isize = 3;

/// `+0.12 [-0.03, +0.27]`.
pub(super) fn signed(of: &Estimate) -> String {
    format!("{:+.3} [{:+.3}, {:+.3}]", of.mean, of.ci_low, of.ci_high)
}

fn plain(of: &Estimate) -> String {
    format!("{:.3} [{:.3}, {:.3}]", of.mean, of.ci_low, of.ci_high)
}

pub(super) fn page(results: &FirstErrorResults) -> String {
    let list = |of: &dyn Fn(&super::SeedResult) -> String| -> String {
        results.seeds.iter().map(of).collect::<Vec<_>>().join(", ")
    };
    let pairs: Vec<&ReadPair> = results.seeds.iter().flat_map(|seed| &seed.pairs).collect();
    let seconds: f64 = results.seeds.iter().map(|seed| seed.seconds).sum();
    let unread: usize = results.seeds.iter().map(|seed| seed.unread).sum();
    let [in_file, known] = results.pairs_in_file;
    let mut body = format!(
        "<h1>First errors</h1><p class=\"subtitle\">{}\nseeds {}; {} on {} threads; {seconds:.0} s \
         in all. Intervals are the bootstrap's 95% over questions, for the policies at hand.</p>\
         <p>Policies trained by DPO on {} pairs of a right and a wrong solution read {} wrong \
         solutions of other questions, step by step. The right solution of a pair has more implicit \
         reward in {} of the pairs. A step is a line, and its reward the mean over its tokens; the \
         first wrong step is the first one whose result no right solution of the question in the \
         file comes to. {known} of {in_file} wrong solutions have one, and a second step beside it. \
         A step that is right by another way than the file's counts as wrong here.{}</p>",
        escape(&results.command),
        list(&|seed| seed.seed.to_string()),
        escape(&results.device),
        results.threads,
        list(&|seed| seed.train_pairs.to_string()),
        pairs.len(),
        plain(&results.ahead),
        if unread > 0 {
            format!(
                " {unread} pairs are left out: longer than the model's context, or in characters that its tokenizer does not know."
            )
        } else {
            String::new()
        },
    );
    body += &targets_table(&results.targets);
    body += &format!(
        "<h2>Ways of naming the first wrong step</h2><div class=\"scroll\"><table><thead><tr>\
         <th>Less of it is suspicious</th><th>The least is the first error</th>\
         <th>The first below the threshold is</th><th>Threshold</th><th>AUROC</th></tr></thead>\
         <tbody>{}<tr><td class=\"metric\">a step drawn blindly</td><td>{}</td><td></td><td></td>\
         <td>0.500</td></tr></tbody></table></div><p>Below its threshold lie {:.0}% of the steps of \
         right solutions, for each way alike. AUROC: how often a first wrong step has less than a \
         step of a right solution, or one before the error.</p>",
        rows(results),
        plain(&results.chance),
        100.0 * FALSE_ALARMS,
    );
    body += &format!("<div class=\"plots\">{}</div>", figure(&around(&pairs)));
    let links = results.seeds.iter().map(|seed| {
        let folder = format!("seed-{}", seed.seed);
        format!(
            "<li>seed {}: <a href=\"{folder}/{SCORES}/scores.html\">every token of the held-out \
             solutions</a>, <a href=\"{folder}/{RUN}/report.html\">its training</a></li>",
            seed.seed
        )
    });
    body += &format!("<ul>{}</ul>", links.collect::<String>());
    report::page("First errors", &body)
}

fn rows(results: &FirstErrorResults) -> String {
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.3}"));
    let row = |of: &super::Figures| {
        format!(
            "<tr><td class=\"metric\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&of.method),
            plain(&of.lowest),
            of.first_low.as_ref().map_or_else(String::new, plain),
            number(of.threshold),
            number(of.auroc)
        )
    };
    results.methods.iter().map(row).collect()
}

/// Means by the distance from the first error, in deviations of the steps of right solutions.
fn around(pairs: &[&ReadPair]) -> Plot {
    let series = [Method::Reward, Method::Surprise, Method::PolicyLogp].map(|method| {
        let right: Vec<f64> = pairs
            .iter()
            .flat_map(|pair| method.of(&pair.right))
            .collect();
        let center = mean(&right).unwrap_or(0.0);
        let squares: Vec<f64> = right.iter().map(|x| (x - center).powi(2)).collect();
        let deviation = mean(&squares).unwrap_or(0.0).sqrt().max(f64::MIN_POSITIVE);
        let at = |offset: isize| -> Option<(f64, f64)> {
            let value = |pair: &&ReadPair| {
                let place = pair.first_error.checked_add_signed(offset)?;
                Some(method.value(place, pair.wrong.get(place)?))
            };
            let values: Vec<f64> = pairs.iter().filter_map(value).collect();
            Some((offset as f64, (mean(&values)? - center) / deviation))
        };
        Series {
            name: method.name().into(),
            points: (-AROUND..=AROUND).filter_map(at).collect(),
            band: None,
        }
    });
    Plot {
        title: "Around the first error".into(),
        x_label: "steps from the first wrong one".into(),
        y_label: "mean, in deviations of right solutions' steps".into(),
        series: series.into(),
        reference_lines: Vec::new(),
    }
}
