//! Commands of the program besides training.

mod devices;
mod eval;
mod prefer;
mod reproduce;
mod sample;
mod search;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use judge::{
    CommandReward, HttpJudge, HttpJudgeConfig, JudgementCache, MemoReward, Reward, Sample,
};
use lm::Sampling;
use lm::tokenizer::Tokenizer;
use trainer::{PromptSource, Prompts, SampleOptions, folder};

pub(crate) use devices::DevicesArgs;
pub(crate) use eval::EvalArgs;
pub(crate) use prefer::PreferArgs;
pub(crate) use reproduce::ReproduceArgs;
pub(crate) use sample::SampleArgs;
pub(crate) use search::SearchArgs;

/// Which prompts.
#[derive(Debug, Args)]
#[group(required = false, multiple = false)]
pub(crate) struct PromptArgs {
    /// Prompts: JSON lines with a column `prompt`, a string or a list of messages.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// This many held-out prompts of the embedded memo task.
    #[arg(long, value_name = "N")]
    memo_prompts: Option<usize>,
}

impl PromptArgs {
    /// Where the prompts come from.
    fn source(&self, options: &SampleOptions) -> anyhow::Result<PromptSource> {
        match (&self.prompts, self.memo_prompts) {
            (Some(path), None) => Ok(PromptSource::File(path.clone())),
            (None, Some(n)) => {
                check_count("--memo-prompts", n, 1..=MOST_AT_ONCE)?;
                check_completions(n, options)?;
                let seed = options.seed;
                Ok(PromptSource::Memo { n, seed })
            }
            _ => bail!("which prompts? give --prompts FILE or --memo-prompts N"),
        }
    }

    /// The prompts to sample from, in a policy's tokens.
    fn read(&self, tokenizer: &Tokenizer, options: &SampleOptions) -> anyhow::Result<Prompts> {
        let prompts = self.source(options)?.read(tokenizer)?;
        check_completions(prompts.texts.len(), options)?;
        Ok(prompts)
    }
}

/// How to sample.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// The most tokens of a completion.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Divides the logits; 1 is the policy's own distribution.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    temperature: f64,
    /// Keep the most likely tokens only.
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the fewest most likely tokens whose probability reaches this.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of prompts, samples, labels and intervals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Batches sampled side by side, each on one thread.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Where to compute: cpu, wgpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl SamplingArgs {
    fn options(&self, n: usize) -> anyhow::Result<SampleOptions> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        };
        sampling.check()?;
        check_count("--n", n, 1..=MOST_AT_ONCE)?;
        check_count("--max-new-tokens", self.max_new_tokens, 1..=usize::MAX)?;
        check_count("--workers", self.workers, 1..=MOST_WORKERS)?;
        Ok(SampleOptions {
            n,
            max_new_tokens: self.max_new_tokens,
            sampling,
            seed: self.seed,
        })
    }
}

/// Who says what is better.
#[derive(Debug, Args)]
pub(crate) struct JudgeArgs {
    /// The embedded task's true reward (`memo`).
    #[arg(long, value_name = "TASK", value_parser = ["memo"], group = "who")]
    judge: Option<String>,
    /// A command that reads completions as JSON lines and writes `{"id": .., "reward": ..}`.
    #[arg(long, value_name = "LINE", group = "who")]
    judge_command: Option<String>,
    /// A server with an OpenAI-compatible /v1/chat/completions.
    #[arg(long, value_name = "URL", group = "who", requires = "judge_model")]
    judge_url: Option<String>,
    /// A TOML file with all settings of such a server.
    #[arg(long, value_name = "FILE", group = "who")]
    judge_config: Option<PathBuf>,
    /// The model to ask the server for.
    #[arg(long, value_name = "NAME")]
    judge_model: Option<String>,
    /// The environment variable that holds the server's API key.
    #[arg(long, value_name = "VARIABLE")]
    judge_key_env: Option<String>,
    /// Longest wait for the command's next reward, seconds.
    #[arg(long, allow_negative_numbers = true, default_value_t = 60.0)]
    deadline: f64,
    /// Two rewards that differ by at most this are a tie.
    #[arg(long, allow_negative_numbers = true, default_value_t = judge::SAME_REWARD)]
    tie_band: f64,
}

const NOBODY_JUDGES: &str = "who judges? give --judge memo, --judge-command LINE, --judge-url URL \
     with --judge-model NAME, or --judge-config FILE";

/// A reward, or a judge that has none.
enum Referee {
    Reward(Box<dyn Reward>),
    Server(Box<HttpJudge>),
}

impl JudgeArgs {
    /// What the arguments name; answers of a server are kept in `cache`.
    fn referee(&self, cache: &Path) -> anyhow::Result<Referee> {
        let server = |mut config: HttpJudgeConfig| -> anyhow::Result<Referee> {
            if self.judge_key_env.is_some() {
                config.api_key_env.clone_from(&self.judge_key_env);
            }
            // What is wrong with the settings leaves no file behind.
            HttpJudge::new(config.clone(), JudgementCache::in_memory())?;
            make_folder_of(cache)?;
            let judge = HttpJudge::new(config, JudgementCache::open(cache)?)?;
            if !judge.cache().is_empty() {
                eprintln!("{}: {} answers kept", cache.display(), judge.cache().len());
            }
            Ok(Referee::Server(Box::new(judge)))
        };
        if self.judge.is_some() {
            return Ok(Referee::Reward(Box::new(MemoReward::new(
                Default::default(),
            )?)));
        }
        if let Some(line) = &self.judge_command {
            let deadline = Duration::try_from_secs_f64(self.deadline)
                .with_context(|| format!("--deadline {}", self.deadline))?;
            return Ok(Referee::Reward(Box::new(CommandReward::shell(
                line, deadline,
            )?)));
        }
        if let (Some(url), Some(model)) = (&self.judge_url, &self.judge_model) {
            return server(HttpJudgeConfig::new(url, model));
        }
        if let Some(path) = &self.judge_config {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let mut config: HttpJudgeConfig =
                toml::from_str(&text).with_context(|| path.display().to_string())?;
            if let Some(model) = &self.judge_model {
                config.model.clone_from(model);
            }
            return server(config);
        }
        bail!(NOBODY_JUDGES)
    }

    /// Refuses arguments that name no judge.
    fn check(&self) -> anyhow::Result<()> {
        let named = self.judge.is_some() || self.judge_command.is_some();
        if !named && self.judge_url.is_none() && self.judge_config.is_none() {
            bail!(NOBODY_JUDGES);
        }
        Ok(())
    }
}

/// Completions, one or more, of a JSON lines file.
fn read_samples(path: &Path) -> anyhow::Result<Vec<Sample>> {
    let name = path.display().to_string();
    let file = std::fs::File::open(path).with_context(|| name.clone())?;
    let samples: Vec<Sample> = judge::read_jsonl(std::io::BufReader::new(file), &name)?;
    if samples.is_empty() {
        bail!("{name}: expected at least one completion, got none");
    }
    Ok(samples)
}

/// Writes rows as JSON lines, whole or not at all, in a folder that is made if need be.
fn write_rows<T: serde::Serialize>(path: &Path, rows: &[T]) -> anyhow::Result<()> {
    make_folder_of(path)?;
    lm::files::write_atomically(path, |file| judge::write_jsonl(file, rows))
        .with_context(|| path.display().to_string())
}

/// Makes the folder that a file is to be in, if need be.
fn make_folder_of(path: &Path) -> anyhow::Result<()> {
    match path.parent() {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())
        }
        None => Ok(()),
    }
}

/// Refuses to write over a file, and to work for one that could not be written.
fn check_new(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    // A link to nothing is there, too: what is behind it would be made, or could not be.
    if path.symlink_metadata().is_ok() {
        bail!("{name}: is there already; give --out another name");
    }
    let text = path.to_string_lossy();
    let last = text.rsplit(std::path::is_separator).next();
    if last.is_none_or(|last| ["", ".", ".."].contains(&last)) {
        bail!("{name}: expected the name of a file, got that of a folder");
    }
    lm::files::check_writable(path).with_context(|| name.to_string())
}

/// Refuses to write into a folder that holds something, and to work for one that could not be made.
fn check_new_folder(path: &Path) -> anyhow::Result<()> {
    folder::check_empty(path, "give --out another folder")?;
    // In the folder, or in the nearest above it that is there.
    lm::files::check_writable(&path.join("report.html")).with_context(|| path.display().to_string())
}

/// The most of what is held or computed side by side: more is a slip of the hand, and would fill the
/// memory before anything could be said.
const MOST_AT_ONCE: usize = 1 << 16;
/// The most completions of one command: all are held until they are written.
const MOST_COMPLETIONS: usize = 1 << 22;
/// More threads than any machine has cores.
const MOST_WORKERS: usize = 1 << 12;

/// Refuses more completions than are held at once.
fn check_completions(prompts: usize, options: &SampleOptions) -> anyhow::Result<()> {
    let completions = prompts.saturating_mul(options.n);
    check_count("prompts times --n", completions, 0..=MOST_COMPLETIONS)
}

/// Refuses a count outside of its range.
pub(crate) fn check_count(
    flag: &str,
    count: usize,
    allowed: RangeInclusive<usize>,
) -> anyhow::Result<()> {
    let (least, most) = allowed.into_inner();
    if count < least {
        bail!("{flag}: expected at least {least}, got {count}");
    }
    if count > most {
        bail!("{flag}: expected at most {most}, got {count}");
    }
    Ok(())
}

/// What Ctrl-C sets from now on, so that what is there can be written; a second one ends the program.
fn stop_on_ctrl_c() -> anyhow::Result<&'static AtomicBool> {
    /// What a shell reports of a program that SIGINT ended.
    const INTERRUPTED: i32 = 130;
    static STOPPED: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        // Who asks twice does not want to wait for the batch at hand.
        if STOPPED.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED);
        }
    })
    .context("Ctrl-C")?;
    Ok(&STOPPED)
}

/// Runs work that tells how far it is, with a bar.
fn with_progress<T, E>(
    label: &str,
    unit: &'static str,
    work: impl FnOnce(&mut dyn FnMut(judge::Progress)) -> Result<T, E>,
) -> Result<T, E> {
    let mut bar: Option<trainer::Progress> = None;
    let mut done = 0;
    let result = work(&mut |at| {
        bar.get_or_insert_with(|| trainer::Progress::new(label, unit, at.total, 0))
            .advance(at.done - done, "");
        done = at.done;
    });
    if let Some(bar) = bar {
        bar.finish();
    }
    result
}

/// Mean number of tokens of some completions.
fn mean_tokens(samples: &[Sample]) -> f64 {
    let tokens = samples
        .iter()
        .filter_map(|sample| sample.metadata.get("n_tokens")?.as_f64());
    tokens.sum::<f64>() / samples.len().max(1) as f64
}
