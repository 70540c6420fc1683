//! The run's report: what `report.html` shows.

use std::path::Path;

use judge::Estimate;
use lm::{Decoding, Generate, Sampling, Transformer};
use report::{
    Card, OutcomeRow, Plot, ReferenceLine, Sample, SampleCompletion, Series, Token, TrainingReport,
};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::evaluate::{read_completion, sample_completions};
use crate::prepare::Prepared;
use crate::recipe::Recipe;
use crate::workers::Workers;

/// How many prompts the report shows completions of.
const N_SAMPLES: usize = 8;
/// The most tokens of a completion sampled for the report where no task sets a limit.
const SAMPLE_TOKENS: usize = 96;

/// What sampling on the task's prompts showed; empty without a task.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// Mean true reward of the policy before the preference stage.
    pub sft_reward: Option<Estimate>,
    /// Mean true reward after it.
    pub dpo_reward: Option<Estimate>,
    /// After less before, prompt by prompt.
    pub difference: Option<Estimate>,
    /// Share of prompts won, ties counting half.
    pub win_rate: Option<Estimate>,
    /// Completions before, one for each prompt.
    pub sft: Vec<Vec<u32>>,
    /// Completions after, one for each prompt.
    pub dpo: Vec<Vec<u32>>,
}

/// Writes the page of a run.
///
/// # Errors
///
/// A file that cannot be written, or a model that cannot sample.
#[expect(
    clippy::too_many_arguments,
    reason = "a report draws on every part of a run, once"
)]
pub(crate) fn write_report(
    path: &Path,
    recipe: &Recipe,
    resolved: &str,
    command: &str,
    prepared: &Prepared,
    lines: &[Map<String, Value>],
    summary: &Map<String, Value>,
    judged: &Judged,
    (policy, reference): (&Transformer, &Transformer),
) -> Result<(), TrainError> {
    let ceiling = prepared.task.as_ref().map(|task| task.ceiling);
    let page = TrainingReport {
        title: format!("{}: from preferences to a policy", recipe.name),
        subtitle: format!("{command}\n{}", machine(summary)),
        summary_cards: cards(summary, judged, ceiling),
        outcomes: outcomes(judged),
        curves: curves(lines, ceiling, chosen_bound(recipe)),
        samples: samples(recipe, prepared, judged, policy, reference)?,
        recipe_toml: resolved.to_string(),
        notes: notes(prepared, summary),
    };
    report::write_atomically(path, &page.to_html()?)?;
    Ok(())
}

fn machine(summary: &Map<String, Value>) -> String {
    let field = |name: &str| {
        summary
            .get(name)
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    format!(
        "device {}, {} threads, {} parameters, seed {}",
        field("device").trim_matches('"'),
        field("threads"),
        field("n_parameters"),
        field("seed"),
    )
}

fn cards(summary: &Map<String, Value>, judged: &Judged, ceiling: Option<f64>) -> Vec<Card> {
    let card = |label: &str, value: String, note: String| Card {
        label: label.into(),
        value,
        note,
    };
    let interval = |e: &Estimate| format!("95% interval {:.3} to {:.3}", e.ci_low, e.ci_high);
    let number = |name: &str| summary.get(name).and_then(Value::as_f64);
    let mut cards = Vec::new();
    if let Some(win_rate) = &judged.win_rate {
        let value = format!("{:.1}%", 100.0 * win_rate.mean);
        cards.push(card("Win rate, DPO against SFT", value, interval(win_rate)));
    }
    if let Some(difference) = &judged.difference {
        let value = format!("{:+.2}", difference.mean);
        cards.push(card(
            "True reward gained (reward units)",
            value,
            interval(difference),
        ));
    }
    if let Some(accuracy) = number("eval_reward_accuracy") {
        let note = ceiling.map_or_else(
            || "share of held-out pairs whose chosen side has more implicit reward".into(),
            |ceiling| format!("label noise allows at most {:.1}%", 100.0 * ceiling),
        );
        let value = format!("{:.1}%", 100.0 * accuracy);
        cards.push(card("Held-out reward accuracy", value, note));
    }
    if let Some(margin) = number("eval_reward_margin") {
        let note = "chosen less rejected implicit reward, held-out".into();
        cards.push(card(
            "Reward margin (reward units)",
            format!("{margin:+.3}"),
            note,
        ));
    }
    if let Some(rate) = number("pairs_per_second") {
        cards.push(card(
            "Training speed",
            format!("{rate:.1} pairs/s"),
            String::new(),
        ));
    }
    if let Some(seconds) = number("wall_seconds") {
        let memory = number("peak_rss_bytes")
            .map(|bytes| format!("peak memory {:.2} GB", bytes / 1e9))
            .unwrap_or_default();
        cards.push(card(
            "Wall time of the session",
            format!("{seconds:.0} s"),
            memory,
        ));
    }
    cards
}

fn outcomes(judged: &Judged) -> Vec<OutcomeRow> {
    let row = |policy: &str, metric: &str, estimate: &Option<Estimate>, n: usize| {
        estimate.map(|estimate| OutcomeRow {
            policy: policy.into(),
            metric: metric.into(),
            mean: estimate.mean,
            ci_low: estimate.ci_low,
            ci_high: estimate.ci_high,
            n,
        })
    };
    let n = judged.dpo.len();
    let reward = "true reward of a sampled completion (reward units)";
    [
        row("SFT", reward, &judged.sft_reward, n),
        row("DPO", reward, &judged.dpo_reward, n),
        row(
            "DPO",
            "win rate against SFT (fraction)",
            &judged.win_rate,
            n,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The most that the mean implicit reward of chosen completions can be, where it is known:
/// `β KL(p_chosen ‖ π_ref)` (P11 of the theory chapter), reward units.
fn chosen_bound(recipe: &Recipe) -> Option<f64> {
    Some(recipe.preference.beta.get() * recipe.preference.chosen_kl?)
}

fn curves(lines: &[Map<String, Value>], ceiling: Option<f64>, bound: Option<f64>) -> Vec<Plot> {
    let series = |stage: &str, key: &str, name: &str| Series {
        name: name.into(),
        points: lines
            .iter()
            .filter(|line| line.get("stage").and_then(Value::as_str) == Some(stage))
            .filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?)))
            .collect(),
        band: None,
    };
    let plot = |title: &str, y_label: &str, series: Vec<Series>| Plot {
        title: title.into(),
        x_label: "step".into(),
        y_label: y_label.into(),
        series: series
            .into_iter()
            .filter(|series| !series.points.is_empty())
            .collect(),
        reference_lines: Vec::new(),
    };
    let preference = |key: &str, name: &str| series("preference", key, name);
    let mut accuracies = plot(
        "Reward accuracies",
        "share of pairs",
        vec![
            preference("rewards/accuracies", "train"),
            preference("eval_rewards/accuracies", "held-out"),
        ],
    );
    accuracies
        .reference_lines
        .extend(ceiling.map(|y| ReferenceLine {
            label: "most that label noise allows".into(),
            y,
        }));
    let mut rewards = plot(
        "Implicit rewards",
        "reward units",
        vec![
            preference("rewards/chosen", "chosen"),
            preference("rewards/rejected", "rejected"),
            preference("eval_rewards/chosen", "chosen, held-out"),
            preference("eval_rewards/rejected", "rejected, held-out"),
        ],
    );
    rewards.reference_lines.extend(bound.map(|y| ReferenceLine {
        label: "most that chosen can reach".into(),
        y,
    }));
    vec![
        plot(
            "Fine-tuning loss",
            "nats per token",
            vec![series("sft", "loss", "train")],
        ),
        plot(
            "Preference loss",
            "nats per pair",
            vec![
                preference("loss", "train"),
                preference("eval_loss", "held-out"),
            ],
        ),
        rewards,
        plot(
            "Reward margins",
            "reward units",
            vec![
                preference("rewards/margins", "train"),
                preference("eval_rewards/margins", "held-out"),
            ],
        ),
        accuracies,
        plot(
            "Log-probabilities of completions",
            "nats per completion",
            vec![
                preference("logps/chosen", "chosen"),
                preference("logps/rejected", "rejected"),
            ],
        ),
        plot(
            "Divergence from the reference",
            "nats per token",
            vec![
                preference(
                    "kl_estimate/policy_reference",
                    "KL(policy, reference), estimate",
                ),
                preference(
                    "kl_estimate/reference_policy",
                    "KL(reference, policy), estimate",
                ),
                preference(
                    "eval_kl/policy_reference",
                    "KL(policy, reference), held-out",
                ),
                preference(
                    "eval_kl/reference_policy",
                    "KL(reference, policy), held-out",
                ),
            ],
        ),
        plot(
            "Gradient on the logits",
            "L1 norm per pair",
            vec![
                preference("grad_mass/chosen", "chosen tokens"),
                preference("grad_mass/rejected", "rejected tokens"),
            ],
        ),
        plot(
            "Length of completions",
            "tokens",
            vec![
                preference("length/chosen", "chosen"),
                preference("length/rejected", "rejected"),
            ],
        ),
        plot(
            "Entropy of the next token",
            "nats",
            vec![
                series("sft", "entropy", "fine-tuning"),
                preference("entropy", "preference"),
            ],
        ),
        plot(
            "Gradient norm before clipping",
            "norm",
            vec![
                series("sft", "grad_norm", "fine-tuning"),
                preference("grad_norm", "preference"),
            ],
        ),
        plot(
            "Learning rate",
            "per step",
            vec![
                series("sft", "learning_rate", "fine-tuning"),
                preference("learning_rate", "preference"),
            ],
        ),
    ]
}

fn notes(prepared: &Prepared, summary: &Map<String, Value>) -> Vec<String> {
    let warnings = summary.get("warnings").and_then(Value::as_array);
    let warnings = warnings.into_iter().flatten().filter_map(Value::as_str);
    let files = prepared.reports.iter().map(|(file, report)| {
        let lines: Vec<String> = report
            .lines()
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{what} {count}"))
            .collect();
        format!("{file}: {}", lines.join(", "))
    });
    let class = prepared.tokenizer.replaced_by_class().map(|class| {
        format!("tokenizer_config.json names the class {class}, whose rules replace some of tokenizer.json")
    });
    warnings
        .map(str::to_string)
        .chain(files)
        .chain(class)
        .collect()
}

fn samples(
    recipe: &Recipe,
    prepared: &Prepared,
    judged: &Judged,
    policy: &Transformer,
    reference: &Transformer,
) -> Result<Vec<Sample>, TrainError> {
    if prepared.task.is_some() {
        let rows = judged
            .sft
            .iter()
            .zip(&judged.dpo)
            .take(N_SAMPLES)
            .enumerate();
        return rows
            .map(|(row, (sft, dpo))| {
                let texts = [("SFT", &sft[..]), ("DPO", &dpo[..])];
                let prompt = &prepared.task.as_ref().expect("checked above").prompts[row].1;
                sample(
                    recipe,
                    prepared,
                    prompt,
                    Some(row),
                    &texts,
                    policy,
                    reference,
                )
            })
            .collect();
    }
    let pairs = if prepared.eval.is_empty() {
        &prepared.train
    } else {
        &prepared.eval
    };
    let room = policy.config().max_positions.saturating_sub(SAMPLE_TOKENS);
    let pairs: Vec<_> = pairs
        .iter()
        .filter(|pair| (1..=room).contains(&pair.prompt_ids.len()))
        .take(N_SAMPLES)
        .collect();
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let prompts: Vec<&[u32]> = pairs.iter().map(|pair| &pair.prompt_ids[..]).collect();
    let options = Generate {
        max_new_tokens: SAMPLE_TOKENS,
        eos_ids: prepared.tokenizer.eos_ids().to_vec(),
        decoding: Decoding::Sample(Sampling::default()),
        seed: recipe.seed,
    };
    let workers = Workers::on(&policy.device(), recipe.workers);
    let on = (&workers, "sample for the report");
    let drawn = sample_completions(policy, &prompts, &options, on, None)?;
    pairs
        .iter()
        .zip(&drawn)
        .map(|(pair, drawn)| {
            let texts = [
                ("sampled from the policy", &drawn.ids[..]),
                ("chosen in the data", &pair.chosen_ids[..]),
                ("rejected in the data", &pair.rejected_ids[..]),
            ];
            sample(
                recipe,
                prepared,
                &pair.prompt_ids,
                None,
                &texts,
                policy,
                reference,
            )
        })
        .collect()
}

/// One prompt with some completions, read token by token; `task_row` finds the true reward.
fn sample(
    recipe: &Recipe,
    prepared: &Prepared,
    prompt: &[u32],
    task_row: Option<usize>,
    texts: &[(&str, &[u32])],
    policy: &Transformer,
    reference: &Transformer,
) -> Result<Sample, TrainError> {
    let beta = recipe.preference.beta;
    let tokenizer = &prepared.tokenizer;
    let mut policies = Vec::new();
    for &(label, ids) in texts {
        if ids.is_empty() {
            continue;
        }
        let read = read_completion(policy, reference, beta, prompt, ids);
        let pieces = tokenizer.decode_pieces(ids)?;
        let truth = match (&prepared.task, task_row) {
            (Some(task), Some(row)) => task.task.token_rewards(&task.prompts[row].0, ids),
            _ => Vec::new(),
        };
        let skipped = ids.len() - read.len();
        let tokens: Vec<Token> = read
            .iter()
            .enumerate()
            .map(|(index, token)| {
                let truth = truth.get(index + skipped);
                Token {
                    text: pieces[index + skipped].clone().into_owned(),
                    id: token.id,
                    implicit_reward: Some(f64::from(token.implicit_reward)),
                    true_reward: truth.map(|truth| truth.reward),
                    policy_logp: Some(f64::from(token.policy_logp)),
                    reference_logp: Some(f64::from(token.reference_logp)),
                    kind: truth.map(|truth| {
                        let kind = serde_json::to_value(truth.kind).unwrap_or_default();
                        kind.as_str().unwrap_or_default().replace('_', " ")
                    }),
                }
            })
            .collect();
        policies.push(SampleCompletion {
            label: label.into(),
            total_implicit: Some(
                tokens
                    .iter()
                    .filter_map(|token| token.implicit_reward)
                    .sum(),
            ),
            total_true: (!truth.is_empty()).then(|| truth.iter().map(|token| token.reward).sum()),
            tokens,
        });
    }
    Ok(Sample {
        prompt: tokenizer.decode(prompt, false)?,
        policies,
    })
}
