//! `r2q prefer`: preference rows from completions.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use judge::{
    Comparison, Judge, Judgement, Labelling, Pairing, PreferenceOptions, Sample, Verdict,
    preferences, score,
};
use serde::Serialize;

use super::{JudgeArgs, Referee, check_new, read_rows, write_rows};

/// What `prefer` takes.
#[derive(Debug, Args)]
pub(crate) struct PreferArgs {
    /// Completions, several of each prompt: JSON lines, as `sample` writes them.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    #[command(flatten)]
    judge: JudgeArgs,
    /// Which completions of a prompt are compared; a server's are neighbours.
    #[arg(long, value_enum, default_value_t = Pairs::BestWorst)]
    pairs: Pairs,
    /// Draw labels by the Bradley-Terry model at this many nats a reward unit, instead of choosing
    /// the higher reward.
    #[arg(long, value_name = "SHARPNESS")]
    bradley_terry: Option<f64>,
    /// Seed of drawn labels.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Use completions that were cut off, too.
    #[arg(long)]
    keep_unfinished: bool,
    /// The file to write, JSON lines in TRL's format.
    #[arg(long, value_name = "FILE", default_value = "preferences.jsonl")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pairs {
    BestWorst,
    All,
    Neighbours,
}

impl From<Pairs> for Pairing {
    fn from(pairs: Pairs) -> Self {
        match pairs {
            Pairs::BestWorst => Self::BestWorst,
            Pairs::All => Self::AllPairs,
            Pairs::Neighbours => Self::Neighbours,
        }
    }
}

/// A row whose label is a judge's and not a reward's.
#[derive(Serialize)]
struct JudgedRow<'a> {
    prompt: &'a str,
    chosen: &'a str,
    rejected: &'a str,
}

impl PreferArgs {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        check_new(&self.out)?;
        let samples: Vec<Sample> = read_rows(&self.samples)?;
        match self
            .judge
            .referee(&self.out.with_extension("judgements.jsonl"))?
        {
            Referee::Reward(reward) => {
                let options = PreferenceOptions {
                    pairing: self.pairs.into(),
                    labelling: match self.bradley_terry {
                        None => Labelling::HigherReward,
                        Some(sharpness) => Labelling::BradleyTerry {
                            sharpness,
                            seed: self.seed,
                        },
                    },
                    band: self.judge.tie_band,
                    keep_unfinished: self.keep_unfinished,
                };
                let mut bar = trainer::Progress::new("score", "completions", samples.len(), 0);
                let mut done = 0;
                let scored = score(&samples, &reward, &mut |at| {
                    bar.advance(at.done - done, "");
                    done = at.done;
                })?;
                bar.finish();
                let (rows, report) = preferences(&scored, &options)?;
                write_rows(&self.out, &rows)?;
                eprint!("{report}");
            }
            Referee::Server(judge) => self.by_server(&samples, &*judge)?,
        }
        eprintln!("preferences: {}", self.out.display());
        Ok(())
    }

    /// Rows from verdicts over neighbouring completions of each prompt.
    fn by_server(&self, samples: &[Sample], judge: &impl Judge) -> anyhow::Result<()> {
        let mut waiting: HashMap<&str, &Sample> = HashMap::new();
        let (mut pairs, mut unfinished, mut same) = (Vec::new(), 0, 0);
        for (index, sample) in samples.iter().enumerate() {
            if !self.keep_unfinished && !sample.finished(index)? {
                unfinished += 1;
                continue;
            }
            match waiting.remove(sample.prompt.as_str()) {
                None => {
                    waiting.insert(&sample.prompt, sample);
                }
                Some(first) if first.completion == sample.completion => same += 1,
                Some(first) => pairs.push(Comparison {
                    a: first.clone(),
                    b: sample.clone(),
                }),
            }
        }
        let mut bar = trainer::Progress::new("judge", "pairs", pairs.len(), 0);
        let mut done = 0;
        let judgements = judge.judge(&pairs, &mut |at| {
            bar.advance(at.done - done, "");
            done = at.done;
        })?;
        bar.finish();
        let (mut rows, mut ties, mut unparsed, mut failed) = (Vec::new(), 0, 0, None);
        let mut n_failed = 0;
        for (pair, judgement) in pairs.iter().zip(&judgements) {
            let (chosen, rejected) = match judgement {
                Judgement::Decided(decision) => match decision.verdict {
                    Verdict::A => (&pair.a, &pair.b),
                    Verdict::B => (&pair.b, &pair.a),
                    Verdict::Tie => {
                        ties += 1;
                        continue;
                    }
                },
                Judgement::Unparsed { .. } => {
                    unparsed += 1;
                    continue;
                }
                Judgement::Failed { reason } => {
                    n_failed += 1;
                    failed.get_or_insert(reason);
                    continue;
                }
            };
            rows.push(JudgedRow {
                prompt: pair.prompt(),
                chosen: &chosen.completion,
                rejected: &rejected.completion,
            });
        }
        if let Some(reason) = failed {
            anyhow::bail!(
                "{n_failed} of {} pairs were not judged: {reason}; the other answers are kept, and \
                 the same command asks for what is missing",
                pairs.len()
            );
        }
        write_rows(&self.out, &rows)?;
        eprintln!(
            "{} rows of {} pairs; dropped: {ties} ties, {unparsed} without a verdict; before that \
             {unfinished} completions cut off and {same} pairs of equal ones",
            rows.len(),
            pairs.len()
        );
        Ok(())
    }
}
