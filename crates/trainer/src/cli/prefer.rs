//! `r2q prefer`: preference rows from completions.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use judge::{Labelling, Pairing, PreferenceOptions, judged_preferences, preferences, score};

use super::{JudgeArgs, Referee, check_new, read_samples, with_progress, write_rows};

/// What `prefer` takes.
#[derive(Debug, Args)]
pub(crate) struct PreferArgs {
    /// Completions, several of each prompt: JSON lines, as `sample` writes them.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    #[command(flatten)]
    judge: JudgeArgs,
    /// Which completions of a prompt are compared.
    #[arg(long, value_enum, default_value_t = Pairs::BestWorst)]
    pairs: Pairs,
    /// Draw labels by the Bradley-Terry model at this many nats a reward unit, instead of choosing
    /// the higher reward.
    #[arg(long, allow_negative_numbers = true, value_name = "SHARPNESS")]
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

impl PreferArgs {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.judge.check()?;
        check_new(&self.out)?;
        let samples = read_samples(&self.samples)?;
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
        // Answers may be dear.
        options.check(&samples)?;
        let referee = self
            .judge
            .referee(&self.out.with_extension("answers.jsonl"))?;
        let (rows, report) = match referee {
            Referee::Reward(reward) => {
                let scored = with_progress("score", "completions", |progress| {
                    score(&samples, &reward, progress)
                })?;
                preferences(&scored, &options)?
            }
            Referee::Server(judge) => with_progress("judge", "pairs", |progress| {
                judged_preferences(&samples, &*judge, &options, progress)
            })?,
        };
        if report.n_errors > 0 {
            bail!(
                "{} comparisons were not judged; the answers that came are kept, and the same \
                 command asks for what is missing",
                report.n_errors
            );
        }
        write_rows(&self.out, &rows)?;
        eprintln!(
            "{} rows of {} completions of {} prompts",
            report.n_rows, report.n_samples, report.n_prompts
        );
        for (count, what) in [
            (report.n_unfinished, "completions were cut off"),
            (report.n_duplicates, "completions repeated another one"),
            (report.n_single, "prompts had nothing to compare"),
            (report.n_ties, "pairs were ties"),
            (report.n_unparsed, "comparisons had no verdict"),
            (
                report.n_incomplete,
                "prompts were left out for want of a comparison",
            ),
            (report.n_flipped, "labels were drawn against the reward"),
        ] {
            if count > 0 {
                eprintln!("  {count} {what}");
            }
        }
        eprintln!("preferences: {}", self.out.display());
        Ok(())
    }
}
