//! `r2q reproduce`: experiments on the paper's claims.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use trainer::Recipe;
use trainer::reproduce::credit::{CreditOptions, run};

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

impl ReproduceArgs {
    pub(crate) fn run(&self, command: String) -> anyhow::Result<()> {
        let Experiment::Credit(args) = &self.experiment;
        let mut options = CreditOptions::standard(args.out.clone())?;
        options.command = command;
        options.device.clone_from(&args.device);
        if let Some(path) = &args.recipe {
            options.recipe = Recipe::read(path)?;
        }
        if !args.seeds.is_empty() {
            options.seeds.clone_from(&args.seeds);
        }
        options.copies = args.copies.unwrap_or(options.copies);
        options.oracle_copies = args.oracle_copies.unwrap_or(options.oracle_copies);
        options.rollouts = args.rollouts.unwrap_or(options.rollouts);
        let results = run(&options)?;
        for target in &results.targets {
            let held = match target.held {
                Some(true) => "held",
                Some(false) => "NOT held",
                None => "too few seeds",
            };
            eprintln!("{}: {} ({})", held, target.claim, target.measured);
        }
        eprintln!("page: {}", options.out.join("report.html").display());
        Ok(())
    }
}
