//! Scoring a data file with a policy and its reference, token by token: `r2q score`.
//!
//! The file is read a window at a time, so that memory does not grow with it; what is written is a
//! line of JSON for each completion, a page of the first rows, and a summary.

mod read;
mod rows;
mod write;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use dpo_loss::Beta;
use lm::chat::ChatTemplate;
use lm::data::{Boundary, DataError, DataReport, EmptyCompletions, TokenizeOptions, Treatment};
use lm::tokenizer::Tokenizer;
use lm::{ModelConfig, Transformer};
use report::{DivergingScale, ScorePage, ScoredRow, ScoredToken, terminal_tokens};
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::folder;
use crate::prepare::same_tokens;
use crate::progress::Progress;
use crate::sampling::{Policy, beta_of_run, policy_shape};
use crate::workers::Workers;

use read::Models;
use rows::{Encoder, Item, Rows};
use write::{Figures, Room, Vocabulary, Written};

/// Rows that are read, scored and written together.
const WINDOW: usize = 256;
/// The most rows that are kept for the terminal.
const SHOWN: usize = 20;
/// The most tokens of a batch, padding included.
const BATCH_TOKENS: usize = 16_384;

/// What to score, and how.
#[derive(Clone, Debug)]
pub struct ScoreOptions {
    /// Hugging Face folder of the policy, or a PEFT folder whose base is here.
    pub policy: PathBuf,
    /// Hugging Face folder of its reference: of the same tokens.
    pub reference: PathBuf,
    /// Preference rows, or rows with single completions.
    pub data: PathBuf,
    /// The folder to write: new, or empty.
    pub out: PathBuf,
    /// Reward units per nat; `None` takes it from the recipe of the run that the policy lies in,
    /// or 0.1.
    pub beta: Option<Beta>,
    /// Prompt and completion together are cut to this many tokens.
    pub max_length: usize,
    /// How prompt and completion meet.
    pub boundary: Boundary,
    /// Rows that are none.
    pub malformed_rows: Treatment,
    /// Rows whose completion says nothing.
    pub empty_completions: EmptyCompletions,
    /// The most rows to score; `None` scores all.
    pub max_rows: Option<usize>,
    /// Rows of data in a batch.
    pub batch_size: usize,
    /// Alternatives to keep at each token.
    pub candidates: usize,
    /// Rows on the page: the first ones.
    pub page_rows: usize,
    /// Rows for the terminal, of those on the page.
    pub show: usize,
    /// Where to compute.
    pub device: String,
    /// Whether to time the models alone on the same batches too.
    pub bench: bool,
    /// The command line, for the page.
    pub command: String,
}

impl ScoreOptions {
    /// Default of `max_length`, tokens.
    pub const MAX_LENGTH: usize = 1024;
    /// Default of `batch_size`.
    pub const BATCH_SIZE: usize = 8;
    /// Default of `candidates`.
    pub const CANDIDATES: usize = 5;
    /// Default of `page_rows`.
    pub const PAGE_ROWS: usize = 500;
    /// Default of `show`.
    pub const SHOW: usize = 2;

    /// Scores all rows on the CPU; a row that cannot be scored is refused.
    pub fn new(policy: PathBuf, reference: PathBuf, data: PathBuf, out: PathBuf) -> Self {
        Self {
            policy,
            reference,
            data,
            out,
            beta: None,
            max_length: Self::MAX_LENGTH,
            boundary: Boundary::Joined,
            malformed_rows: Treatment::Refuse,
            empty_completions: EmptyCompletions::Refuse,
            max_rows: None,
            batch_size: Self::BATCH_SIZE,
            candidates: Self::CANDIDATES,
            page_rows: Self::PAGE_ROWS,
            show: Self::SHOW,
            device: "cpu".into(),
            bench: false,
            command: "cargo xtask score".into(),
        }
    }
}

/// A finished scoring.
#[derive(Clone, Debug)]
pub struct ScoreOutcome {
    /// What `summary.json` holds.
    pub summary: Map<String, Value>,
    /// The first rows, as many as were to be shown.
    pub rows: Vec<ScoredRow>,
    /// β of the rewards.
    pub beta: Beta,
}

impl ScoreOutcome {
    /// The rows and the summary for a terminal: tokens on blue where they earned more than nothing,
    /// on orange and underlined where less. Without `colour`, the larger rewards as numbers.
    pub fn terminal(&self, colour: bool) -> String {
        let beta = self.beta.get();
        let tokens = self.rows.iter().flat_map(|row| &row.completions);
        let readouts = tokens.flat_map(|completion| &completion.tokens);
        let scale = DivergingScale::covering(
            readouts
                .filter_map(|token| token.readout.as_ref())
                .map(|readout| beta * (readout.policy_logp - readout.reference_logp)),
        );
        let mut text = String::new();
        for row in &self.rows {
            let prompt = ScoredToken {
                text: row.prompt.clone(),
                ..ScoredToken::default()
            };
            let prompt = terminal_tokens(&[prompt], beta, scale, false);
            text += &format!("{}\n{prompt}\n", row.name);
            for completion in &row.completions {
                let tokens = terminal_tokens(&completion.tokens, beta, scale, colour);
                text += &format!(
                    "-- {} {:+.3}\n{tokens}\n",
                    completion.label, completion.total
                );
            }
            text.push('\n');
        }
        for (key, value) in &self.summary {
            if value.is_u64() {
                text += &format!("{key:28} {value:>12}\n");
            } else if let Some(value) = value.as_f64() {
                text += &format!("{key:28} {value:>12.4}\n");
            }
        }
        text
    }
}

/// Names of what is written.
const FILES: [&str; 3] = ["scores.jsonl", "scores.html", "summary.json"];

/// Scores every completion of a file and writes `scores.jsonl`, `scores.html` and `summary.json`.
///
/// Each file is whole or absent; the lines come first and the summary last. Of conversations,
/// assistant turns alone are scored.
///
/// # Errors
///
/// Anything wrong with the models, the tokenizers or the data, by file and place; a logit that is
/// not finite; a folder that cannot be written or is not empty.
///
/// # Panics
///
/// If the device fails.
pub fn score(options: &ScoreOptions) -> Result<ScoreOutcome, TrainError> {
    folder::check_empty(&options.out, "give --out another folder")?;
    let is_new = !options.out.exists();
    let outcome = score_file(options);
    if outcome.is_err() && is_new {
        // Only if nothing is in it.
        std::fs::remove_dir(&options.out).ok();
    }
    outcome
}

fn score_file(options: &ScoreOptions) -> Result<ScoreOutcome, TrainError> {
    let began = Instant::now();
    let device = crate::device::device(&options.device)?;
    let (encoder, beta, config) = prepare(options)?;
    let n_rows = rows::count(&options.data, options.malformed_rows, options.max_rows)?;
    let models = read_models(options, &device)?;
    let vocabulary = Vocabulary::new(&encoder.tokenizer, config.vocab_size);
    let _lock = folder::enter(&options.out)?;
    // Another process may have been at work in it since.
    folder::check_empty(&options.out, "give --out another folder")?;

    let mut run = Run {
        options,
        beta,
        encoder: &encoder,
        models: &models,
        vocabulary: &vocabulary,
        workers: Workers::one_per_core(&device),
        page: ScorePage::new(beta.get()),
        rows: Vec::new(),
        figures: Figures::default(),
        report: DataReport::default(),
        spent: Spent::default(),
    };
    let lines = options.out.join(FILES[0]);
    write_lines(&lines, |file| run.all(n_rows, file))?;
    if run.figures.n_rows() == 0 {
        let error = DataError::AllDropped {
            rows: run.report.rows,
            reasons: run.report.drop_summary(),
        };
        std::fs::remove_file(&lines).ok();
        return Err(TrainError::DataFile {
            path: options.data.clone(),
            source: Box::new(error),
        });
    }
    eprintln!("{}", run.report);
    let summary = run.summary(began.elapsed());
    let page = write::page(
        &run.page,
        options,
        &summary,
        &run.report,
        run.figures.n_rows(),
    );
    report::write_atomically(&options.out.join(FILES[1]), &page)?;
    write_json(&options.out.join(FILES[2]), &summary)?;
    Ok(ScoreOutcome {
        summary,
        rows: run.rows,
        beta,
    })
}

/// The cheap things first: a wrong path should not cost the reading of a model.
fn prepare(options: &ScoreOptions) -> Result<(Encoder, Beta, ModelConfig), TrainError> {
    let (config, tokenizer) = policy_shape(&options.policy)?;
    let reference = ModelConfig::read(&options.reference)?;
    let differ = |reason: String| TrainError::Score {
        place: options.reference.display().to_string(),
        reason,
    };
    if config.vocab_size != reference.vocab_size {
        return Err(differ(format!(
            "expected the policy's vocabulary of {}, got {}",
            config.vocab_size, reference.vocab_size
        )));
    }
    let theirs = Tokenizer::from_folder(&options.reference)?;
    same_tokens("the policy", &tokenizer, &theirs).map_err(differ)?;
    let window = config.max_positions.min(reference.max_positions);
    let template = ChatTemplate::from_tokenizer(&tokenizer)?;
    let tokenize = TokenizeOptions {
        max_length: Some(options.max_length.min(window)),
        window: Some(window),
        boundary: options.boundary,
        empty_completions: options.empty_completions,
        ..TokenizeOptions::new(config.vocab_size)
    };
    let beta = match options.beta {
        Some(beta) => beta,
        None => beta_of_run(&options.policy)?,
    };
    let encoder = Encoder {
        tokenizer,
        template,
        options: tokenize,
    };
    Ok((encoder, beta, config))
}

fn read_models(options: &ScoreOptions, device: &Device) -> Result<Models, TrainError> {
    Ok(Models {
        // A merged adapter costs no more than the model does.
        policy: Policy::read(&options.policy, device)?.model.merge(),
        reference: Transformer::read(&options.reference, device)?,
        candidates: options.candidates,
    })
}

/// Time of the parts of a run.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    /// From rows in memory to lines on their way to the disk.
    scoring: Duration,
    /// The models alone, on the same batches; with `bench`.
    bare: Duration,
}

struct Run<'a> {
    options: &'a ScoreOptions,
    beta: Beta,
    encoder: &'a Encoder,
    models: &'a Models,
    vocabulary: &'a Vocabulary<'a>,
    workers: Workers,
    page: ScorePage,
    rows: Vec<ScoredRow>,
    figures: Figures,
    report: DataReport,
    spent: Spent,
}

impl Run<'_> {
    /// Scores the file window by window; a line for each completion goes to `file`.
    fn all(&mut self, n_rows: usize, file: &mut impl Write) -> Result<(), TrainError> {
        let options = self.options;
        let mut rows = Rows::open(&options.data, options.malformed_rows, options.max_rows)?;
        let mut progress = Progress::new("score", "rows", n_rows, 0);
        loop {
            let began = Instant::now();
            let mut untimed = Duration::ZERO;
            let window = rows.next_window(WINDOW)?;
            if window.is_empty() {
                break;
            }
            let n = window.len();
            let items = self.encoder.encode(window, &mut self.report)?;
            let batches = batches(&items, options.batch_size);
            let run_bare = |index: usize| {
                let items: Vec<&Item> = batches[index].iter().map(|&i| &items[i]).collect();
                self.models.run_bare(&items);
            };
            if options.bench && self.figures.n_rows() == 0 {
                // What a first batch costs besides, fresh memory and a card's kernels, is neither's.
                let began = Instant::now();
                self.workers
                    .map(self.workers.count().min(batches.len()), run_bare);
                untimed = began.elapsed();
            }
            // How many of these rows the page has room for, by their place in the window.
            let room = Room {
                page: options.page_rows.saturating_sub(self.page.n_rows()),
                terminal: options.show.min(SHOWN).saturating_sub(self.rows.len()),
            };
            let written = self.workers.map(batches.len(), |index| {
                self.batch(&items, &batches[index], room)
            });
            let written: Vec<Vec<(usize, Written)>> =
                written.into_iter().collect::<Result<_, TrainError>>()?;
            let mut written: Vec<(usize, Written)> = written.into_iter().flatten().collect();
            written.sort_by_key(|(index, _)| *index);
            for (_, written) in written {
                file.write_all(&written.lines)
                    .map_err(TrainError::io(&options.out))?;
                self.figures.add(&written.figures);
                if let Some(encoded) = written.for_page {
                    self.page
                        .add(encoded, |id| self.vocabulary.word(id).to_owned());
                }
                self.rows.extend(written.for_terminal);
            }
            self.spent.scoring += began.elapsed() - untimed;
            if options.bench {
                let began = Instant::now();
                self.workers.map(batches.len(), run_bare);
                self.spent.bare += began.elapsed();
            }
            let n_tokens = self.figures.n_tokens() as f64;
            let rate = n_tokens / self.spent.scoring.as_secs_f64().max(1e-9);
            progress.advance(n, &format!("{rate:.0} tokens/s"));
        }
        self.report += rows.dropped();
        progress.finish();
        Ok(())
    }

    /// Scores a batch: what is written of each of its rows, by their places in the window.
    fn batch(
        &self,
        items: &[Item],
        batch: &[usize],
        room: Room,
    ) -> Result<Vec<(usize, Written)>, TrainError> {
        let chosen: Vec<&Item> = batch.iter().map(|&index| &items[index]).collect();
        let readouts = self.models.read(&chosen)?;
        batch
            .iter()
            .zip(readouts)
            .map(|(&index, readouts)| {
                let item = &items[index];
                let written = Written::new(
                    item,
                    &readouts,
                    self.beta,
                    (&self.encoder.tokenizer, self.vocabulary),
                    room.at(index),
                )?;
                Ok((index, written))
            })
            .collect()
    }

    fn summary(&self, wall: Duration) -> Map<String, Value> {
        let mut summary = self.figures.summary(self.beta);
        let options = self.options;
        let mut add = |key: &str, value: Value| summary.insert(key.to_string(), value);
        add("policy", options.policy.display().to_string().into());
        add("reference", options.reference.display().to_string().into());
        add("data", options.data.display().to_string().into());
        add("rows_read", self.report.rows.into());
        add("rows_dropped", self.report.n_dropped().into());
        let seconds = self.spent.scoring.as_secs_f64();
        add("wall_seconds", wall.as_secs_f64().into());
        add("score_seconds", seconds.into());
        let rate = self.figures.n_tokens() as f64 / seconds.max(1e-9);
        add("tokens_per_second", rate.into());
        if options.bench {
            let bare = self.spent.bare.as_secs_f64();
            add("bare_forward_seconds", bare.into());
            add(
                "throughput_of_bare_forward",
                (bare / seconds.max(1e-9)).into(),
            );
        }
        add("device", options.device.clone().into());
        add("workers", self.workers.count().into());
        if let Some(bytes) = peak_rss_bytes() {
            add("peak_rss_bytes", bytes.into());
        }
        summary
    }
}

/// Places of rows in a window, in batches of like length, longest first: little padding, and the
/// last batch to end is a small one.
fn batches(items: &[Item], batch_size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(items[index].longest()), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let fits = |batch: &Vec<usize>| {
            let padded = items[batch[0]].padded_tokens() * (batch.len() + 1);
            batch.len() < batch_size && padded <= BATCH_TOKENS
        };
        match batches.last_mut().filter(|batch| fits(batch)) {
            Some(batch) => batch.push(index),
            None => batches.push(vec![index]),
        }
    }
    batches
}

/// Runs `write` on a file that appears whole or not at all.
fn write_lines(
    path: &Path,
    write: impl FnOnce(&mut io::BufWriter<&mut std::fs::File>) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut failed = None;
    let done = lm::files::write_atomically(path, |file| {
        write(file).map_err(|error| {
            failed = Some(error);
            io::Error::other("scoring failed")
        })
    });
    match failed {
        Some(error) => Err(error),
        None => done.map_err(TrainError::io(path)),
    }
}

fn write_json(path: &Path, value: &Map<String, Value>) -> Result<(), TrainError> {
    lm::files::write_atomically(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
    .map_err(TrainError::io(path))
}

/// The most memory this process has held, where the system says so.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
