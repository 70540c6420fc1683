//! The r2q program: `cargo xtask train` hands over to it.

mod cli;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use lm::data::{Boundary, EmptyCompletions, Treatment};
use trainer::score::{ScoreOptions, score};
use trainer::{
    DataRecipe, Recipe, ReferenceCache, RunOptions, Shortage, Sources, train, within_memory,
};

/// Training allocates and frees tensors of megabytes all the time.
#[global_allocator]
static ALLOCATOR: allocator::MiMalloc = allocator::MiMalloc;

#[derive(Debug, Parser)]
#[command(name = "r2q", bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a policy from preferences.
    ///
    /// With no arguments: the embedded memo task, from a fresh model through supervised
    /// fine-tuning and DPO to a report. With --model and --data: a preference stage on a Hugging
    /// Face folder and a preference file.
    Train(TrainArgs),
    /// Sample completions of prompts from a policy.
    Sample(cli::SampleArgs),
    /// Make a preference file of several completions of each prompt, by a reward or a judge.
    Prefer(cli::PreferArgs),
    /// Let a judge compare two policies: win rate, intervals, and the same at equal length.
    Eval(cli::EvalArgs),
    /// Read the rewards of every token off a policy and its reference.
    ///
    /// Writes a line of JSON for each completion, a page to look at, and a summary.
    Score(ScoreArgs),
    /// Search for completions with a policy and its reference: beam, best-first, tree search.
    ///
    /// Writes a line of JSON for each prompt, and a page with the tree.
    Search(cli::SearchArgs),
    /// Run an experiment on a claim of the paper.
    Reproduce(cli::ReproduceArgs),
    /// List the devices to compute on: those that this machine and build can use, and why the
    /// others cannot be.
    Devices(cli::DevicesArgs),
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// A recipe file (TOML); the other flags override it, but for those that go with --data.
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// A Hugging Face folder to begin with.
    #[arg(long, value_name = "DIR", requires = "data")]
    model: Option<PathBuf>,
    /// Preference pairs: JSON lines, a JSON array, or Parquet.
    #[arg(
        long,
        value_name = "FILE",
        requires = "model",
        conflicts_with = "recipe"
    )]
    data: Option<PathBuf>,
    /// Held-out preference pairs.
    #[arg(long, value_name = "FILE", requires = "data")]
    eval_data: Option<PathBuf>,
    /// Folder of the run [default: runs/NAME, or the next free number].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with an interrupted run.
    #[arg(long)]
    resume: bool,
    /// Seed of weights, data and order.
    #[arg(long)]
    seed: Option<u64>,
    /// Strength of the KL penalty, in reward units per nat.
    #[arg(long, allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Learning rate of the preference stage.
    #[arg(long, allow_negative_numbers = true)]
    learning_rate: Option<f64>,
    /// Pairs in a micro-batch of the preference stage.
    #[arg(long)]
    batch_size: Option<usize>,
    /// Passes over the pairs.
    #[arg(long, allow_negative_numbers = true)]
    epochs: Option<f64>,
    /// The most steps of the preference stage.
    #[arg(long)]
    max_steps: Option<usize>,
    /// Prompt and completion together are cut to this many tokens.
    #[arg(long, requires = "data")]
    max_length: Option<usize>,
    /// Encode prompt and completion apart, for tokenizers that merge across spaces.
    #[arg(long, requires = "data")]
    encode_apart: bool,
    /// Leave out rows that are not preferences, instead of refusing the file.
    #[arg(long, requires = "data")]
    drop_malformed_rows: bool,
    /// What to do with an empty completion: refuse (an error), drop (leave the row out), or keep
    /// (its end of text alone, as TRL does).
    #[arg(long, value_name = "WAY", requires = "data", default_value = "refuse")]
    empty_completions: EmptyWay,
    /// Compute the reference's logps anew, and keep none for later runs.
    #[arg(long)]
    no_cache: bool,
    /// Where to compute: cpu, wgpu, cuda or cuda:N; several, such as cuda:0,cuda:1, share the batches
    /// of a training step.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Debug, Args)]
struct ScoreArgs {
    /// The policy: a Hugging Face folder, or a PEFT folder whose base is here.
    #[arg(long, value_name = "DIR")]
    policy: PathBuf,
    /// Its reference: a Hugging Face folder with the same tokens [default: the base of a PEFT
    /// folder].
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Preference pairs or single completions: JSON lines, a JSON array, or Parquet.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// The folder to write, new or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Reward units per nat [default: of the run that the policy lies in, or 0.1].
    #[arg(long, allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Prompt and completion together are cut to this many tokens.
    #[arg(long, default_value_t = ScoreOptions::MAX_LENGTH)]
    max_length: usize,
    /// Encode prompt and completion apart, for tokenizers that merge across spaces.
    #[arg(long)]
    encode_apart: bool,
    /// Leave out rows without the columns they need, instead of refusing the file.
    #[arg(long)]
    drop_malformed_rows: bool,
    /// What to do with an empty completion: refuse, drop, or keep (its end of text alone).
    #[arg(long, value_name = "WAY", default_value = "refuse")]
    empty_completions: EmptyWay,
    /// The most rows to score.
    #[arg(long, value_name = "N")]
    max_rows: Option<usize>,
    /// Rows of the data in a batch.
    #[arg(long, value_name = "N", default_value_t = ScoreOptions::BATCH_SIZE)]
    batch_size: usize,
    /// Alternatives to keep at each token: the policy's most likely ones.
    #[arg(long, value_name = "K", default_value_t = ScoreOptions::CANDIDATES)]
    top_k: usize,
    /// Rows on the page, the first ones.
    #[arg(long, value_name = "N", default_value_t = ScoreOptions::PAGE_ROWS)]
    page_rows: usize,
    /// Rows to print in colour, up to 20.
    #[arg(long, value_name = "N", default_value_t = ScoreOptions::SHOW)]
    show: usize,
    /// Time the models' forward passes alone on the same batches too.
    #[arg(long)]
    bench: bool,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum EmptyWay {
    Refuse,
    Drop,
    Keep,
}

/// What is logged unless `RUST_LOG` says otherwise. On drivers that keep no time, `CubeCL` warns for
/// each shape of each kernel that it chose one without measuring.
const LOGGED: &str = "warn,cubecl_runtime=error";

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOGGED)),
        )
        .with_writer(std::io::stderr)
        .init();
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // Training says which batch it was at; the other commands have one kind of batch each.
    let (place, lower) = match &cli.command {
        Command::Train(_) => ("train", "the model's or the batches' size"),
        Command::Score(_) => ("score", "--batch-size or --max-length"),
        Command::Search(_) => ("search", "--width, --batch or --cache-mib"),
        Command::Sample(_) | Command::Prefer(_) | Command::Eval(_) => {
            ("sampling", "--n or --max-new-tokens")
        }
        Command::Reproduce(_) | Command::Devices(_) => {
            ("this command", "the size of the experiment")
        }
    };
    let shortage = || Shortage {
        place: place.into(),
        lower: lower.into(),
        rows: Vec::new(),
    };
    let result = within_memory(|| run(cli.command, &matches), shortage);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, matches: &ArgMatches) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => run_train(&args),
        Command::Sample(args) => args.run(),
        Command::Prefer(args) => args.run(),
        Command::Eval(args) => args.run(),
        Command::Score(args) => run_score(&args),
        Command::Search(args) => {
            let (_, given) = matches.subcommand().context("no command")?;
            args.run(given)
        }
        Command::Reproduce(args) => {
            let command: Vec<String> = std::env::args().skip(1).collect();
            args.run(format!("cargo xtask {}", command.join(" ")))
        }
        Command::Devices(args) => args.run(),
    }
}

/// An error with its causes, each said once: most of our errors already end with their cause.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run_train(args: &TrainArgs) -> anyhow::Result<()> {
    let recipe = recipe(args)?;
    let command: Vec<String> = std::env::args().skip(1).collect();
    let options = RunOptions {
        out: args.out.clone(),
        device: args.device.clone(),
        resume: args.resume,
        cache: ReferenceCache::of_the_user().filter(|_| !args.no_cache),
        command: format!("cargo xtask {}", command.join(" ")),
    };
    let finished = train(&recipe, &options)?;
    let number = |path: &[&str]| {
        let mut value = finished.summary.get(path[0])?;
        for key in &path[1..] {
            value = value.get(key)?;
        }
        value.as_f64()
    };
    let interval = |name: &[&str]| {
        let at = |leaf: &'static str| number(&[name, &[leaf]].concat());
        Some((at("mean")?, at("ci_low")?, at("ci_high")?))
    };
    eprintln!();
    for (label, name) in [
        ("true reward, SFT", &["true_reward", "sft"][..]),
        ("true reward, DPO", &["true_reward", "dpo"]),
        ("difference", &["true_reward", "difference"]),
        ("win rate", &["win_rate_vs_sft"]),
    ] {
        if let Some((mean, low, high)) = interval(name) {
            eprintln!("{label:22} {mean:8.3}  95% interval [{low:.3}, {high:.3}]");
        }
    }
    if let Some(accuracy) = number(&["eval_reward_accuracy"]) {
        let ceiling = number(&["eval_reward_accuracy_ceiling"])
            .map(|ceiling| format!("  label noise allows {ceiling:.3}"))
            .unwrap_or_default();
        eprintln!("{:22} {accuracy:8.3}{ceiling}", "eval reward accuracy");
    }
    eprintln!("report: {}", finished.folder.join("report.html").display());
    eprintln!("model:  {}", finished.folder.join("model").display());
    Ok(())
}

/// The name of a run on the model of a folder: the folder's, in the characters that a name may have.
fn run_name(model: &Path) -> String {
    // `.` and `..` have a name too; a link has its own.
    let whole = match model.file_name() {
        Some(_) => model.to_path_buf(),
        None => std::fs::canonicalize(model).unwrap_or_default(),
    };
    let name = whole.file_name().unwrap_or_default().to_string_lossy();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name: String = name
        .trim_start_matches('.')
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .collect();
    if name.is_empty() {
        "model".into()
    } else {
        name
    }
}

/// The recipe that the flags name, with what they override.
fn recipe(args: &TrainArgs) -> anyhow::Result<Recipe> {
    let mut recipe = match (&args.recipe, &args.model, &args.data) {
        (Some(path), _, _) => Recipe::read(path)?,
        (None, Some(model), Some(data)) => {
            let name = run_name(model);
            let data = DataRecipe {
                train: Sources::One(data.clone()),
                sft: None,
                eval: args.eval_data.clone(),
                max_length: args.max_length.unwrap_or(1024),
                malformed_rows: if args.drop_malformed_rows {
                    Treatment::Drop
                } else {
                    Treatment::Refuse
                },
                empty_completions: args.empty_completions.into(),
                boundary: if args.encode_apart {
                    Boundary::Apart
                } else {
                    Boundary::Joined
                },
            };
            Recipe::files(&name, model.clone(), data)
        }
        _ => Recipe::memo(),
    };
    let preference = &mut recipe.preference;
    if let Some(seed) = args.seed {
        recipe.seed = seed;
    }
    if let Some(beta) = args.beta {
        preference.beta = dpo_loss::Beta::new(beta).context("--beta")?;
    }
    if let Some(learning_rate) = args.learning_rate {
        preference.optimizer.learning_rate = learning_rate;
    }
    if let Some(batch_size) = args.batch_size {
        preference.batch_size = batch_size;
    }
    if let Some(epochs) = args.epochs {
        preference.epochs = epochs;
    }
    if let Some(max_steps) = args.max_steps {
        preference.max_steps = max_steps;
    }
    recipe.check("command line")?;
    Ok(recipe)
}

impl From<EmptyWay> for EmptyCompletions {
    fn from(way: EmptyWay) -> Self {
        match way {
            EmptyWay::Refuse => Self::Refuse,
            EmptyWay::Drop => Self::Drop,
            EmptyWay::Keep => Self::Keep,
        }
    }
}

fn run_score(args: &ScoreArgs) -> anyhow::Result<()> {
    let command: Vec<String> = std::env::args().skip(1).collect();
    for (flag, count, least) in [
        ("--max-length", args.max_length, 2),
        ("--max-rows", args.max_rows.unwrap_or(1), 1),
        ("--batch-size", args.batch_size, 1),
    ] {
        cli::check_count(flag, count, least..=usize::MAX)?;
    }
    let reference = match &args.reference {
        Some(reference) => reference.clone(),
        None => trainer::base_of_adapter(&args.policy)?.context(
            "--reference: expected a folder, since --policy is no PEFT folder with a base",
        )?,
    };
    let options = ScoreOptions {
        policy: args.policy.clone(),
        reference,
        data: args.data.clone(),
        out: args.out.clone(),
        beta: args
            .beta
            .map(dpo_loss::Beta::new)
            .transpose()
            .context("--beta")?,
        max_length: args.max_length,
        boundary: if args.encode_apart {
            Boundary::Apart
        } else {
            Boundary::Joined
        },
        malformed_rows: if args.drop_malformed_rows {
            Treatment::Drop
        } else {
            Treatment::Refuse
        },
        empty_completions: args.empty_completions.into(),
        max_rows: args.max_rows,
        batch_size: args.batch_size,
        candidates: args.top_k,
        page_rows: args.page_rows,
        show: args.show,
        device: args.device.clone(),
        bench: args.bench,
        command: format!("cargo xtask {}", command.join(" ")),
    };
    let outcome = score(&options)?;
    // A reader of the pipe may have had enough.
    std::io::stdout()
        .write_all(outcome.terminal(std::io::stdout().is_terminal()).as_bytes())
        .ok();
    eprintln!("lines:  {}", args.out.join("scores.jsonl").display());
    eprintln!("page:   {}", args.out.join("scores.html").display());
    Ok(())
}
