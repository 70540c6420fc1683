//! `r2q reproduce`: experiments on the paper's claims.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use dpo_loss::Beta;
use trainer::Recipe;
use trainer::reproduce::Target;
use trainer::reproduce::beam::{self, BeamOptions};
use trainer::reproduce::credit::{self, CreditOptions};
use trainer::reproduce::curves::{self, CurvesOptions};
use trainer::reproduce::first_error::{self, FirstErrorOptions};
use trainer::reproduce::identification::{self, IdentificationOptions};

/// What `reproduce` takes.
#[derive(Debug, Args)]
pub(crate) struct ReproduceArgs {
    #[command(subcommand)]
    experiment: Experiment,
}

#[derive(Debug, Subcommand)]
enum Experiment {
    /// Does a policy trained on labels of whole completions know which token was wrong?
    Credit(CreditArgs),
    /// Where do the rewards of chosen and rejected completions go, from which reference?
    Curves(CurvesArgs),
    /// Does a search by likelihood find better completions, and do wider beams write longer ones?
    Beam(BeamArgs),
    /// How close does the learned advantage come to the exact one as labels grow in number?
    Identification(IdentificationArgs),
    /// Does a pretrained model's implicit reward fall where a worked solution first goes wrong?
    FirstError(FirstErrorArgs),
}

#[derive(Debug, Args)]
struct CreditArgs {
    /// Folder to write into; seeds that are done there are not repeated.
    #[arg(long, value_name = "DIR", default_value = "runs/reproduce-credit")]
    out: PathBuf,
    /// Seeds, with commas [default: 1,2,3,4,5].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Another recipe for the policy: the embedded task with both stages.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Good completions that are corrupted, for each seed.
    #[arg(long, value_name = "N")]
    copies: Option<usize>,
    /// Copies whose tokens are compared with the oracle.
    #[arg(long, value_name = "N")]
    oracle_copies: Option<usize>,
    /// Rollouts at each token for the oracle, a multiple of 4.
    #[arg(long, value_name = "N")]
    rollouts: Option<usize>,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct CurvesArgs {
    /// Folder to write into; seeds that are done there are not repeated.
    #[arg(long, value_name = "DIR", default_value = "runs/reproduce-curves")]
    out: PathBuf,
    /// Seeds, with commas [default: 1,2,3].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Strengths of the divergence, in reward units a nat, with commas [default: 0.3,1,3].
    #[arg(long, value_delimiter = ',', value_name = "X,X,...")]
    betas: Vec<f64>,
    /// Another recipe: the embedded task with both stages.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Chosen completions, beside the pairs' own, for the fit that the bound is drawn by.
    #[arg(long, value_name = "N")]
    fit_examples: Option<usize>,
    /// How often a policy is looked at while it trains [default: 4].
    #[arg(long, value_name = "N")]
    evaluations: Option<usize>,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct BeamArgs {
    /// Folder to write into; seeds that are done there are not repeated.
    #[arg(long, value_name = "DIR", default_value = "runs/reproduce-beam")]
    out: PathBuf,
    /// Seeds, with commas [default: 1,2,3].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Strengths of the divergence, in reward units a nat, with commas [default: 0.3,1,3].
    #[arg(long, value_delimiter = ',', value_name = "X,X,...")]
    betas: Vec<f64>,
    /// Widths of beams, rising, and numbers of draws, with commas [default: 2,5,10,20].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    widths: Vec<usize>,
    /// Another recipe: the embedded task with both stages.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Held-out prompts of a seed.
    #[arg(long, value_name = "N")]
    prompts: Option<usize>,
    /// Tokens that the search for the likeliest completion of a prompt computes at the most.
    #[arg(long, value_name = "N")]
    map_states: Option<usize>,
    /// Simulations of the tree search for each token.
    #[arg(long, value_name = "N")]
    simulations: Option<usize>,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct IdentificationArgs {
    /// Folder to write into; seeds that are done there are not repeated.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "runs/reproduce-identification"
    )]
    out: PathBuf,
    /// Seeds, with commas [default: 1,2,3].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Numbers of labelled pairs, rising, with commas [default: 1000,4000,16000,64000].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    pairs: Vec<usize>,
    /// Steps of either learner [default: 1000].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Tokens of the longest completion [default: 5].
    #[arg(long, value_name = "N")]
    horizon: Option<usize>,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct FirstErrorArgs {
    /// Hugging Face folder of the model to begin with, which is the reference.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Questions with a right solution (chosen) and a wrong one (rejected), in text: a line for each
    /// step, with calculator marks as in 2*3=<<2*3=6>>6.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder to write into; seeds that are done there are not repeated.
    #[arg(long, value_name = "DIR", default_value = "runs/reproduce-first-error")]
    out: PathBuf,
    /// Seeds, with commas [default: 1].
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    seeds: Vec<u64>,
    /// Pairs to train on [default: 96].
    #[arg(long, value_name = "N")]
    train_pairs: Option<usize>,
    /// Pairs of other questions whose first error is looked for [default: 64].
    #[arg(long, value_name = "N")]
    eval_pairs: Option<usize>,
    /// Passes over the pairs [default: 1].
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    epochs: Option<f64>,
    /// Strength of the divergence, in reward units a nat [default: 0.1].
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    beta: Option<f64>,
    /// The adapters' learning rate at its height [default: 0.0002].
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    learning_rate: Option<f64>,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl ReproduceArgs {
    pub(crate) fn run(&self, command: String) -> anyhow::Result<()> {
        match &self.experiment {
            Experiment::Credit(args) => args.run(command),
            Experiment::Curves(args) => args.run(command),
            Experiment::Beam(args) => args.run(command),
            Experiment::Identification(args) => args.run(command),
            Experiment::FirstError(args) => args.run(command),
        }
    }
}

impl CreditArgs {
    fn run(&self, command: String) -> anyhow::Result<()> {
        let mut options = CreditOptions::standard(self.out.clone())?;
        options.command = command;
        options.device.clone_from(&self.device);
        if let Some(path) = &self.recipe {
            options.recipe = Recipe::read(path)?;
        }
        if !self.seeds.is_empty() {
            options.seeds.clone_from(&self.seeds);
        }
        options.copies = self.copies.unwrap_or(options.copies);
        options.oracle_copies = self.oracle_copies.unwrap_or(options.oracle_copies);
        options.rollouts = self.rollouts.unwrap_or(options.rollouts);
        say(&credit::run(&options)?.targets, &options.out);
        Ok(())
    }
}

impl CurvesArgs {
    fn run(&self, command: String) -> anyhow::Result<()> {
        let mut options = CurvesOptions::standard(self.out.clone())?;
        options.command = command;
        options.device.clone_from(&self.device);
        if let Some(path) = &self.recipe {
            options.recipe = Recipe::read(path)?;
        }
        if !self.seeds.is_empty() {
            options.seeds.clone_from(&self.seeds);
        }
        if !self.betas.is_empty() {
            options.betas.clone_from(&self.betas);
        }
        options.fit_examples = self.fit_examples.unwrap_or(options.fit_examples);
        options.evaluations = self.evaluations.unwrap_or(options.evaluations);
        say(&curves::run(&options)?.targets, &options.out);
        Ok(())
    }
}

impl BeamArgs {
    fn run(&self, command: String) -> anyhow::Result<()> {
        let mut options = BeamOptions::standard(self.out.clone())?;
        options.command = command;
        options.device.clone_from(&self.device);
        if let Some(path) = &self.recipe {
            options.recipe = Recipe::read(path)?;
        }
        if !self.seeds.is_empty() {
            options.seeds.clone_from(&self.seeds);
        }
        if !self.betas.is_empty() {
            options.betas.clone_from(&self.betas);
        }
        if !self.widths.is_empty() {
            options.widths.clone_from(&self.widths);
        }
        options.prompts = self.prompts.unwrap_or(options.prompts);
        options.map_states = self.map_states.unwrap_or(options.map_states);
        options.simulations = self.simulations.unwrap_or(options.simulations);
        say(&beam::run(&options)?.targets, &options.out);
        Ok(())
    }
}

impl IdentificationArgs {
    fn run(&self, command: String) -> anyhow::Result<()> {
        let mut options = IdentificationOptions::standard(self.out.clone());
        options.command = command;
        options.device.clone_from(&self.device);
        if !self.seeds.is_empty() {
            options.seeds.clone_from(&self.seeds);
        }
        if !self.pairs.is_empty() {
            options.pairs.clone_from(&self.pairs);
        }
        options.steps = self.steps.unwrap_or(options.steps);
        options.horizon = self.horizon.unwrap_or(options.horizon);
        say(&identification::run(&options)?.targets, &options.out);
        Ok(())
    }
}

impl FirstErrorArgs {
    fn run(&self, command: String) -> anyhow::Result<()> {
        let mut options =
            FirstErrorOptions::standard(self.model.clone(), self.data.clone(), self.out.clone());
        options.command = command;
        options.device.clone_from(&self.device);
        if !self.seeds.is_empty() {
            options.seeds.clone_from(&self.seeds);
        }
        options.train_pairs = self.train_pairs.unwrap_or(options.train_pairs);
        options.eval_pairs = self.eval_pairs.unwrap_or(options.eval_pairs);
        options.epochs = self.epochs.unwrap_or(options.epochs);
        if let Some(beta) = self.beta {
            options.beta = Beta::new(beta).context("--beta")?;
        }
        options.learning_rate = self.learning_rate.unwrap_or(options.learning_rate);
        say(&first_error::run(&options)?.targets, &options.out);
        Ok(())
    }
}

/// Says of every target whether it held, and where the page is.
fn say(targets: &[Target], out: &Path) {
    for target in targets {
        let held = match target.held {
            Some(true) => "held",
            Some(false) => "NOT held",
            None => "too few seeds",
        };
        eprintln!("{}: {} ({})", held, target.claim, target.measured);
    }
    eprintln!("page: {}", out.join("report.html").display());
}
