//! Writes the page of a made-up run, to see what a report looks like.
//!
//! `cargo run -p report --example demo -- /tmp/report.html`

use std::path::PathBuf;

use report::{
    Band, Card, OutcomeRow, Plot, ReferenceLine, ReportError, Sample, SampleCompletion, Series,
    Token, TrainingReport, write_atomically,
};

const STEPS: u32 = 2000;

fn main() -> Result<(), ReportError> {
    let path = std::env::args().nth(1).map_or_else(
        || std::env::temp_dir().join("r2q-report-demo.html"),
        PathBuf::from,
    );
    write_atomically(&path, &demo().to_html()?)?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn demo() -> TrainingReport {
    TrainingReport {
        title: "memo task, DPO with beta 0.1".into(),
        subtitle: "made-up numbers, to show the page\ncargo run -p report --example demo".into(),
        summary_cards: vec![
            card("true reward, DPO", "+1.32", "95% interval 1.21 to 1.43"),
            card("win rate against SFT", "0.84", "95% interval 0.79 to 0.88"),
            card("eval reward accuracy", "0.861", "label noise allows 0.883"),
            card("pairs per second", "412", "2 cores, CPU"),
            card("wall time", "2 min 41 s", "SFT 58 s, DPO 1 min 43 s"),
        ],
        outcomes: vec![
            outcome("true reward (reward units)", "base", -2.41, 0.21),
            outcome("true reward (reward units)", "SFT", 0.12, 0.14),
            outcome("true reward (reward units)", "DPO", 1.32, 0.11),
            outcome("win rate against SFT (fraction)", "SFT", 0.5, 0.04),
            outcome("win rate against SFT (fraction)", "DPO", 0.84, 0.045),
            outcome("length (tokens)", "SFT", 41.3, 0.9),
            outcome("length (tokens)", "DPO", 36.8, 0.7),
        ],
        curves: curves(),
        samples: vec![sample()],
        recipe_toml: "[task]\nname = \"memo\"\nseed = 7\n\n[preference]\nbeta = 0.1\nlr = 5e-5\nwarmup_steps = 100\n".into(),
        notes: vec!["12 of 4,096 pairs were dropped: 9 prompts were longer than the window, 3 completions were empty.".into()],
    }
}

fn card(label: &str, value: &str, note: &str) -> Card {
    let [label, value, note] = [label, value, note].map(String::from);
    Card { label, value, note }
}

fn outcome(metric: &str, policy: &str, mean: f64, half: f64) -> OutcomeRow {
    OutcomeRow {
        policy: policy.into(),
        metric: metric.into(),
        mean,
        ci_low: mean - half,
        ci_high: mean + half,
        n: 256,
    }
}

fn curves() -> Vec<Plot> {
    let done = |step: u32| 1.0 - (-f64::from(step) / 500.0).exp();
    let lr = |step: u32| 5e-5 * (f64::from(step) / 100.0).min(f64::from(STEPS - step) / 1900.0);
    let mut accuracy = plot(
        "Reward accuracy",
        "accuracy (fraction)",
        vec![
            series("train", 0.09, |s| 0.5 + 0.38 * done(s)),
            eval("eval", |s| 0.5 + 0.36 * done(s)),
        ],
    );
    accuracy.reference_lines.push(ReferenceLine {
        label: "ceiling by label noise".into(),
        y: 0.883,
    });
    vec![
        plot(
            "DPO loss",
            "loss (nats)",
            vec![
                series("train", 0.08, |s| 0.693 - 0.36 * done(s)),
                eval("eval", |s| 0.693 - 0.33 * done(s)),
            ],
        ),
        plot(
            "Implicit rewards",
            "reward (reward units)",
            vec![
                series("chosen", 0.3, |s| 0.4 * done(s)),
                series("rejected", 0.4, |s| -1.9 * done(s)),
            ],
        ),
        plot(
            "Margin",
            "margin (reward units)",
            vec![
                series("train", 0.5, |s| 2.3 * done(s)),
                eval("eval", |s| 2.1 * done(s)),
            ],
        ),
        accuracy,
        plot(
            "Log-probabilities of completions",
            "log-probability (nats)",
            vec![
                series("chosen", 6.0, |s| -48.0 + 3.0 * done(s)),
                series("rejected", 8.0, |s| -55.0 - 20.0 * done(s)),
            ],
        ),
        plot(
            "Learning rate",
            "learning rate (per step)",
            vec![series("AdamW", 0.0, lr)],
        ),
        plot(
            "Gradient norm before clipping",
            "norm (loss / parameter)",
            vec![series("global norm", 0.8, |s| 3.0 - done(s))],
        ),
    ]
}

fn plot(title: &str, y_label: &str, series: Vec<Series>) -> Plot {
    Plot {
        title: title.into(),
        x_label: "step".into(),
        y_label: y_label.into(),
        series,
        reference_lines: Vec::new(),
    }
}

/// A curve with made-up noise.
fn series(name: &str, noise: f64, curve: impl Fn(u32) -> f64) -> Series {
    let wobble = |step: u32| ((f64::from(step) * 12.9898).sin() * 43_758.545_3).fract();
    let point = |step| (f64::from(step), curve(step) + noise * wobble(step));
    Series {
        name: name.into(),
        points: (0..=STEPS).map(point).collect(),
        band: None,
    }
}

/// A few points with an interval around them.
fn eval(name: &str, curve: impl Fn(u32) -> f64) -> Series {
    let steps = || (0..=STEPS).step_by(200).map(|s| (f64::from(s), curve(s)));
    Series {
        name: name.into(),
        points: steps().collect(),
        band: Some(Band {
            label: "95% interval".into(),
            points: steps().map(|(x, y)| (x, y - 0.03, y + 0.03)).collect(),
        }),
    }
}

fn sample() -> Sample {
    let good = "Ilse Marrow meets the harbour board in Varna on 14 May at 09:30; the budget is 3,200 euros.";
    let bad = "Ilse Marrow meets the harbour board in Lisbon on 14 May at 09:30, as was <b>said</b> before, and the budget is large.";
    Sample {
        prompt: "Memo\nWho: Ilse Marrow, with the harbour board\nWhere: Varna\nWhen: 14 May, 09:30\nBudget: 3,200 euros\n\nSummarise the memo in one sentence.".into(),
        policies: vec![completion("SFT", bad, &[(" Lisbon", -1.0), (" said", -0.2), (" before", -0.2), (" large", -1.0)]), completion("DPO", good, &[])],
    }
}

fn completion(label: &str, text: &str, wrong: &[(&str, f64)]) -> SampleCompletion {
    let mut tokens = Vec::new();
    for (i, text) in text.split_inclusive(' ').enumerate() {
        let worth = wrong.iter().find(|w| text.contains(w.0.trim()));
        let true_reward = worth.map_or(if i % 4 == 1 { 0.5 } else { 0.0 }, |w| w.1);
        let noise = ((i as f64 * 7.77).sin() * 999.0).fract();
        // Both at most 0, and their difference noisily follows the true reward.
        let logratio = 7.0 * true_reward + noise;
        let policy_logp = -0.4 + logratio.min(0.0);
        tokens.push(Token {
            text: text.into(),
            id: 100 + i as u32,
            implicit_reward: Some(0.1 * logratio),
            true_reward: Some(true_reward),
            policy_logp: Some(policy_logp),
            reference_logp: Some(policy_logp - logratio),
            kind: worth.map(|_| "contradiction".into()),
        });
    }
    tokens.push(Token {
        text: "\n".into(),
        id: 2,
        implicit_reward: None,
        true_reward: Some(0.0),
        ..Token::default()
    });
    SampleCompletion {
        label: label.into(),
        total_implicit: Some(tokens.iter().filter_map(|t| t.implicit_reward).sum()),
        total_true: Some(tokens.iter().filter_map(|t| t.true_reward).sum()),
        tokens,
    }
}
