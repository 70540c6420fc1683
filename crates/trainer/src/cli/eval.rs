//! `r2q eval`: one policy against another.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use judge::{
    EvalOptions, EvalOutcome, Judge, Judgement, LengthUnit, RewardJudge, Rule, Sample, evaluate,
    pair_samples,
};
use report::{Card, OutcomeRow, SampleCompletion, Token, TrainingReport};
use serde::Serialize;
use trainer::{Policy, Prompts, Workers, device, folder, policy_shape, sample_prompts};

use super::{
    JudgeArgs, PromptArgs, Referee, SamplingArgs, read_samples, with_progress, write_rows,
};

/// What `eval` takes.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Policy A: a Hugging Face folder, a PEFT folder, or a file of its completions as `sample`
    /// writes it.
    #[arg(long, value_name = "DIR|FILE")]
    policy_a: PathBuf,
    /// Policy B, likewise.
    #[arg(long, value_name = "DIR|FILE")]
    policy_b: PathBuf,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Completions of each prompt.
    #[arg(long, default_value_t = 1)]
    n: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    judge: JudgeArgs,
    /// The folder to write.
    #[arg(long, value_name = "DIR", default_value = "runs/eval")]
    out: PathBuf,
    /// Go on with an evaluation that broke off: its completions and answers are used again.
    #[arg(long)]
    resume: bool,
}

/// One judged pair, as it is written.
#[derive(Serialize)]
struct JudgedPair<'a> {
    prompt: &'a str,
    a: &'a str,
    b: &'a str,
    judgement: &'a Judgement,
}

/// What an evaluation has of a side before it samples.
enum Side {
    /// Its completions.
    There(Vec<Sample>),
    /// Prompts, in the policy's tokens.
    ToSample(Prompts),
}

impl Side {
    /// Completions, empty ones where they are still to be sampled: prompts are what they pair by.
    fn to_pair(&self, n: usize) -> Cow<'_, [Sample]> {
        match self {
            Self::There(samples) => Cow::Borrowed(samples),
            Self::ToSample(prompts) => {
                let samples = prompts.texts.iter().map(|prompt| Sample::new(prompt, ""));
                let all = samples.flat_map(|sample| std::iter::repeat_n(sample, n));
                Cow::Owned(all.collect())
            }
        }
    }
}

impl EvalArgs {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.judge.check()?;
        self.check_folder()?;
        // The cheap things first: what is wrong with B should not cost the sampling from A.
        let a = self.side(&self.policy_a, "a")?;
        let b = self.side(&self.policy_b, "b")?;
        pair_samples(&a.to_pair(self.n), &b.to_pair(self.n))?;
        let is_new = !self.out.exists();
        let _lock = folder::enter(&self.out)?;
        // Another process may have been at work in it since.
        self.check_folder()?;
        let done = self.evaluate(a, b);
        if done.is_err() && !self.resume && !self.samples_file("a").is_file() {
            // Nothing is lost, and the next attempt may have other settings.
            std::fs::remove_file(self.settings_file()).ok();
            let answers = self.answers_file();
            if answers.metadata().is_ok_and(|answers| answers.len() == 0) {
                std::fs::remove_file(answers).ok();
            }
            if is_new {
                // Only if nothing is in it.
                std::fs::remove_dir(&self.out).ok();
            }
        }
        done
    }

    /// Refuses a folder of something else, or of an evaluation with other settings.
    fn check_folder(&self) -> anyhow::Result<()> {
        let out = &self.out;
        if self.resume {
            let begun = self.settings_file();
            let old = std::fs::read_to_string(&begun)
                .with_context(|| format!("{}: no evaluation to resume", out.display()))?;
            if old != self.settings() {
                bail!(
                    "{}: was begun with other settings; resume with the same ones",
                    begun.display()
                );
            }
        } else {
            folder::check_empty(out, "give --resume to go on, or --out another folder")?;
        }
        Ok(())
    }

    /// What a side begins with. What is wrong with a policy is told, unless it is that its weights do
    /// not fit.
    fn side(&self, policy: &Path, side: &str) -> anyhow::Result<Side> {
        if self.is_kept(side) {
            return Ok(Side::There(read_samples(&self.samples_file(side))?));
        }
        if !policy.exists() {
            bail!(
                "--policy-{side}: {}: no such file or folder",
                policy.display()
            );
        }
        if policy.is_file() {
            return Ok(Side::There(read_samples(policy)?));
        }
        let options = self.sampling.options(self.n)?;
        self.prompts.source(&options)?;
        device(&self.sampling.device)?;
        let (config, tokenizer) = policy_shape(policy)?;
        let prompts = self.prompts.read(&tokenizer, &options)?;
        config
            .check_prompts(&prompts.ids, options.max_new_tokens)
            .with_context(|| policy.display().to_string())?;
        Ok(Side::ToSample(prompts))
    }

    fn evaluate(&self, a: Side, b: Side) -> anyhow::Result<()> {
        // Who judges is settled before anything is sampled.
        let judge: Box<dyn Judge> = match self.judge.referee(&self.answers_file())? {
            Referee::Reward(reward) => {
                let band = self.judge.tie_band;
                Box::new(RewardJudge::new(reward, Rule::Strict { band })?)
            }
            Referee::Server(judge) => judge,
        };
        let begun = self.settings_file();
        lm::files::write_atomically(&begun, |file| {
            std::io::Write::write_all(file, self.settings().as_bytes())
        })
        .with_context(|| begun.display().to_string())?;
        let a = self.samples(a, &self.policy_a, "a")?;
        let b = self.samples(b, &self.policy_b, "b")?;
        let outcome = self.judged(&a, &b, &*judge)?;
        if outcome.errors > 0 {
            bail!(
                "{} of {} pairs were not judged: {}; the figures are of the others, and --resume \
                 asks for what is missing",
                outcome.errors,
                outcome.n_pairs,
                outcome.first_error.as_deref().unwrap_or("no reason given")
            );
        }
        Ok(())
    }

    fn settings_file(&self) -> PathBuf {
        self.out.join("settings.txt")
    }

    fn answers_file(&self) -> PathBuf {
        self.out.join("answers.jsonl")
    }

    fn samples_file(&self, side: &str) -> PathBuf {
        self.out.join(format!("samples.{side}.jsonl"))
    }

    /// Whether a side's completions are there from before.
    fn is_kept(&self, side: &str) -> bool {
        self.resume && self.samples_file(side).is_file()
    }

    /// What completions and questions depend on.
    fn settings(&self) -> String {
        format!(
            "a {:?}\nb {:?}\nprompts {:?}\nn {}\nsampling {:?}\n",
            self.policy_a, self.policy_b, self.prompts, self.n, self.sampling
        )
    }

    /// The completions of a side: read, or sampled and kept.
    fn samples(&self, found: Side, policy: &Path, side: &str) -> anyhow::Result<Vec<Sample>> {
        let samples = match found {
            Side::There(samples) if self.is_kept(side) => return Ok(samples),
            Side::There(samples) => samples,
            Side::ToSample(prompts) => {
                let options = self.sampling.options(self.n)?;
                let policy = Policy::read(policy, &device(&self.sampling.device)?)?;
                let workers = Workers::on(&policy.model.device(), self.sampling.workers);
                let label = format!("sample from {}", side.to_uppercase());
                sample_prompts(&policy, &prompts, &options, (&workers, &label), None)?
            }
        };
        write_rows(&self.samples_file(side), &samples)?;
        Ok(samples)
    }

    fn judged(&self, a: &[Sample], b: &[Sample], judge: &dyn Judge) -> anyhow::Result<EvalOutcome> {
        let pairs = pair_samples(a, b)?;
        let counted = |sample: &Sample| sample.metadata.contains_key("n_tokens");
        let options = EvalOptions {
            seed: self.sampling.seed,
            length_unit: if a.iter().chain(b).all(counted) {
                LengthUnit::Tokens
            } else {
                LengthUnit::Characters
            },
        };
        let outcome = with_progress("judge", "pairs", |progress| {
            evaluate(&pairs, judge, &options, progress)
        })?;
        let rows: Vec<JudgedPair<'_>> = pairs
            .iter()
            .zip(&outcome.judgements)
            .map(|(pair, judgement)| JudgedPair {
                prompt: pair.prompt(),
                a: &pair.a.completion,
                b: &pair.b.completion,
                judgement,
            })
            .collect();
        write_rows(&self.out.join("judgements.jsonl"), &rows)?;
        let path = self.out.join("outcome.json");
        let text = serde_json::to_string_pretty(&outcome)?;
        lm::files::write_atomically(&path, |file| {
            std::io::Write::write_all(file, text.as_bytes())
        })
        .with_context(|| path.display().to_string())?;
        let page = self.page(&outcome, &rows).to_html()?;
        report::write_atomically(&self.out.join("report.html"), &page)?;
        self.say(&outcome);
        Ok(outcome)
    }

    fn say(&self, outcome: &EvalOutcome) {
        eprintln!();
        if let Some(rate) = &outcome.win_rate {
            eprintln!(
                "{:28} {:6.3}  95% interval [{:.3}, {:.3}]",
                "A's win rate", rate.mean, rate.ci_low, rate.ci_high
            );
        }
        if let Some(controlled) = &outcome.length_controlled {
            let rate = &controlled.win_rate;
            eprintln!(
                "{:28} {:6.3}  95% interval [{:.3}, {:.3}]",
                "at equal length", rate.mean, rate.ci_low, rate.ci_high
            );
        }
        eprintln!(
            "{} wins, {} ties, {} losses, {} without a verdict, {} not judged",
            outcome.wins, outcome.ties, outcome.losses, outcome.unparsed, outcome.errors
        );
        eprintln!("report: {}", self.out.join("report.html").display());
    }

    fn page(&self, outcome: &EvalOutcome, pairs: &[JudgedPair<'_>]) -> TrainingReport {
        /// Pairs that the page shows.
        const SHOWN: usize = 24;
        let card = |label: &str, value: String, note: String| Card {
            label: label.into(),
            value,
            note,
        };
        let mut cards = Vec::new();
        let mut outcomes = Vec::new();
        let decided = outcome.wins + outcome.ties + outcome.losses;
        let mut row = |policy: &str, metric: &str, estimate: &judge::Estimate, n: usize| {
            outcomes.push(OutcomeRow {
                policy: policy.into(),
                metric: metric.into(),
                mean: estimate.mean,
                ci_low: estimate.ci_low,
                ci_high: estimate.ci_high,
                n,
            });
        };
        for (label, rate) in [
            ("A's win rate (fraction)", outcome.win_rate.as_ref()),
            (
                "A's win rate at equal length (fraction)",
                outcome.length_controlled.as_ref().map(|it| &it.win_rate),
            ),
        ] {
            if let Some(rate) = rate {
                let note = format!("95% interval {:.3} to {:.3}", rate.ci_low, rate.ci_high);
                cards.push(card(label, format!("{:.3}", rate.mean), note));
                row("A", label, rate, decided);
            }
        }
        for (policy, reward) in [("A", &outcome.mean_reward_a), ("B", &outcome.mean_reward_b)] {
            if let Some(reward) = reward {
                row(
                    policy,
                    "reward of a completion (reward units)",
                    reward,
                    decided,
                );
            }
        }
        cards.push(card(
            "Pairs",
            outcome.n_pairs.to_string(),
            format!(
                "{} wins, {} ties, {} losses, {} without a verdict, {} not judged",
                outcome.wins, outcome.ties, outcome.losses, outcome.unparsed, outcome.errors
            ),
        ));
        if let (Some(a), Some(b)) = (outcome.mean_length_a, outcome.mean_length_b) {
            let unit = match outcome.length_unit {
                LengthUnit::Tokens => "tokens",
                LengthUnit::Characters => "characters",
            };
            let value = format!("{a:.1} and {b:.1}");
            cards.push(card("Mean lengths of A and B", value, unit.into()));
        }
        let mut notes = Vec::new();
        if let Some(position) = &outcome.position {
            notes.push(format!(
                "asked in both orders, the judge disagreed with itself on {} of {} pairs",
                position.n_disagreed, position.n_pairs
            ));
        }
        if let Some(error) = &outcome.first_error {
            notes.push(format!("{} pairs were not judged: {error}", outcome.errors));
        }
        let text = |label: &str, text: &str| SampleCompletion {
            label: label.into(),
            tokens: vec![Token {
                text: text.into(),
                ..Token::default()
            }],
            total_implicit: None,
            total_true: None,
        };
        TrainingReport {
            title: "A against B".into(),
            subtitle: format!(
                "A: {}\nB: {}\njudge: {}",
                self.policy_a.display(),
                self.policy_b.display(),
                outcome.judge
            ),
            summary_cards: cards,
            outcomes,
            samples: pairs
                .iter()
                .take(SHOWN)
                .map(|pair| report::Sample {
                    prompt: pair.prompt.into(),
                    policies: vec![text("A", pair.a), text("B", pair.b)],
                })
                .collect(),
            notes,
            ..TrainingReport::default()
        }
    }
}
