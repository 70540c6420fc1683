//! Does the implicit reward know where a solution first goes wrong: what the paper expects of labels
//! of whole answers (arXiv 2404.12358, section 6), on worked solutions by a pretrained model.
//!
//! Adapters are trained by DPO on right and wrong solutions of some problems. On solutions of other
//! problems each step's mean reward is read, and the lowest step, or the first low one, is held
//! against the first step whose result is wrong. See the book's page.

mod methods;
mod page;
mod solutions;

use std::path::{Path, PathBuf};
use std::time::Instant;

use dpo_loss::Beta;
use judge::Estimate;
use lm::ModelConfig;
use lm::chat::ChatTemplate;
use lm::data::{Boundary, EmptyCompletions, Treatment};
use lm::files::write_atomically;
use lm::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Target;
use crate::error::TrainError;
use crate::folder;
use crate::recipe::{DataRecipe, LoraRecipe, Recipe, Sources};
use crate::run::{RunOptions, check_folder, is_run, train};
use crate::score::{ScoreOptions, score};

pub use methods::{Figures, ReadPair, Step};
use methods::{Found, Method};
use solutions::{Solutions, step_means};

/// What the experiment takes.
#[derive(Clone, Debug)]
pub struct FirstErrorOptions {
    /// Hugging Face folder of the model to begin with, which is the reference.
    pub model: PathBuf,
    /// Preferences in text: a question, a right solution that was chosen, a wrong one that was
    /// rejected, with calculator marks as in `2*3=<<2*3=6>>6` and a line for each step.
    pub data: PathBuf,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Pairs to train on.
    pub train_pairs: usize,
    /// Pairs of other problems whose first error is looked for.
    pub eval_pairs: usize,
    /// Passes over the pairs.
    pub epochs: f64,
    /// Strength of the divergence, reward units a nat.
    pub beta: Beta,
    /// The adapters' learning rate at its height.
    pub learning_rate: f64,
    /// The folder that is written.
    pub out: PathBuf,
    /// Name of the device.
    pub device: String,
    /// The command line, for the page.
    pub command: String,
}

impl FirstErrorOptions {
    /// One seed at the size that the book reports.
    ///
    /// # Panics
    ///
    /// Never: a tenth is a valid strength.
    pub fn standard(model: PathBuf, data: PathBuf, out: PathBuf) -> Self {
        Self {
            model,
            data,
            seeds: vec![1],
            train_pairs: 96,
            eval_pairs: 64,
            epochs: 1.0,
            beta: Beta::new(0.1).expect("a tenth is a valid strength"),
            learning_rate: 2e-4,
            out,
            device: "cpu".into(),
            command: "cargo xtask reproduce first-error".into(),
        }
    }

    fn check(&self) -> Result<(), TrainError> {
        super::check_out(&self.out)?;
        super::check_distinct("first-error", "--seeds", &self.seeds)?;
        if self.seeds.is_empty() || self.train_pairs == 0 || self.eval_pairs == 0 {
            let reason = "expected at least one seed, one pair to train on and one to evaluate on";
            return Err(refuse(reason));
        }
        // Of every seed alike.
        self.recipe(self.seeds[0], &self.out)
            .check("reproduce first-error")
    }

    /// What a seed's figures depend on.
    fn settings(&self, seed: u64) -> String {
        format!(
            "model {} data {} seed {seed} pairs {} and {} epochs {} beta {} rate {} device {}",
            self.model.display(),
            self.data.display(),
            self.train_pairs,
            self.eval_pairs,
            self.epochs,
            self.beta.get(),
            self.learning_rate,
            self.device
        )
    }

    /// The run that trains a seed's policy, on the pairs in `folder`.
    fn recipe(&self, seed: u64, folder: &Path) -> Recipe {
        let data = DataRecipe {
            train: Sources::One(folder.join(TRAIN)),
            sft: None,
            // Every token of the held-out pairs is read behind the run.
            eval: None,
            max_length: MAX_LENGTH,
            boundary: Boundary::Joined,
            malformed_rows: Treatment::Refuse,
            empty_completions: EmptyCompletions::Refuse,
        };
        let mut recipe = Recipe::files("first-error", self.model.clone(), data);
        recipe.seed = seed;
        recipe.workers = 2;
        recipe.lora = Some(LoraRecipe::default());
        recipe.checkpoints.every = 0;
        let stage = &mut recipe.preference;
        stage.beta = self.beta;
        stage.epochs = self.epochs;
        // Long texts of a large vocabulary: two pairs are in memory at a time.
        stage.batch_size = 1;
        stage.accumulation = 8;
        stage.eval_every = 0;
        stage.optimizer.learning_rate = self.learning_rate;
        stage.optimizer.warmup_steps = 2;
        recipe
    }
}

/// The most tokens of a question and a solution.
const MAX_LENGTH: usize = 1024;
/// Names of what lies in a seed's folder.
const TRAIN: &str = "train.jsonl";
const HELD_OUT: &str = "held-out.jsonl";
const RUN: &str = "run";
const SCORES: &str = "scores";

fn refuse(reason: impl Into<String>) -> TrainError {
    TrainError::Recipe {
        file: "reproduce first-error".into(),
        reason: reason.into(),
    }
}

/// What came of one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// What it depends on.
    pub settings: String,
    /// Pairs that were trained on.
    pub train_pairs: usize,
    /// Held-out pairs that could not be read: longer than the model's context, or in characters that
    /// its tokenizer does not know.
    pub unread: usize,
    /// Held-out pairs.
    pub pairs: Vec<ReadPair>,
    /// Time, training included.
    pub seconds: f64,
}

impl super::OfSeed for SeedResult {
    fn settings(&self) -> &str {
        &self.settings
    }
}

/// Everything that came out: what `results.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstErrorResults {
    /// The command line.
    pub command: String,
    /// The device.
    pub device: String,
    /// Threads of the machine.
    pub threads: usize,
    /// Pairs in the file, and those among them whose first error is known.
    pub pairs_in_file: [usize; 2],
    /// How often the right solution of a held-out pair has more implicit reward.
    pub ahead: Estimate,
    /// How often a step that is drawn blindly is the first wrong one.
    pub chance: Estimate,
    /// What was claimed beforehand.
    pub targets: Vec<Target>,
    /// Every way of naming the first wrong step, over the held-out pairs of all seeds.
    pub methods: Vec<Figures>,
    /// Each seed.
    pub seeds: Vec<SeedResult>,
}

/// Trains, reads, and writes `results.json` and `report.html` into the folder.
///
/// A seed that was interrupted goes on where it stopped.
///
/// # Errors
///
/// Data that are no solutions with known errors, or anything that goes wrong in training, scoring or
/// on the disk.
pub fn run(options: &FirstErrorOptions) -> Result<FirstErrorResults, TrainError> {
    options.check()?;
    let all = solutions::read(&options.data)?;
    let known = all.iter().filter(|pair| pair.first_error.is_some()).count();
    let _lock = folder::enter(&options.out)?;
    let seeds = super::of_seeds(
        &options.out,
        &options.seeds,
        |seed| Ok(options.settings(seed)),
        |seed, settings, folder| one_seed(options, &all, seed, settings, folder),
        |result| format!("{:.0} s", result.seconds),
    )?;
    let results = summary(options, [all.len(), known], seeds).ok_or_else(|| refuse(UNREADABLE))?;
    super::write_json(&options.out.join("results.json"), &results)?;
    report::write_atomically(&options.out.join("report.html"), &page::page(&results))?;
    Ok(results)
}

const UNREADABLE: &str = "expected a held-out pair that its tokens spell out, got none: all are longer \
     than the model's context, or in characters that its tokenizer does not know";

fn one_seed(
    options: &FirstErrorOptions,
    all: &[Solutions],
    seed: u64,
    settings: String,
    folder: &Path,
) -> Result<SeedResult, TrainError> {
    let began = Instant::now();
    let (training, held_out) =
        solutions::split(all, (options.train_pairs, options.eval_pairs), seed);
    if training.is_empty() || held_out.is_empty() {
        return Err(TrainError::Policy {
            path: options.data.clone(),
            reason: format!(
                "expected {} pairs of wrong solutions in steps, with calculator marks as in \
                 `2*3=<<2*3=6>>6`, and pairs of other questions to train on; got {} and {}",
                options.eval_pairs,
                held_out.len(),
                training.len()
            ),
        });
    }
    let tokenizer = Tokenizer::from_folder(&options.model)?;
    // What cannot be read is known before the training.
    let window = ModelConfig::read(&options.model)?.max_positions;
    let ids = |text: &str| tokenizer.encode_plain(text).ok();
    let is_read = |pair: &Solutions| {
        let question = ids(&pair.question)?.len();
        let comes_back = |text: &str| {
            let ids = ids(text)?;
            let whole = question + ids.len() < window.min(MAX_LENGTH);
            let back = tokenizer.decode_pieces(&ids).ok()?.concat();
            Some(whole && back.trim() == text.trim())
        };
        Some(comes_back(&pair.right)? && comes_back(&pair.wrong)?)
    };
    if !held_out.iter().any(|pair| is_read(pair) == Some(true)) {
        return Err(refuse(UNREADABLE));
    }
    let chat = ChatTemplate::from_tokenizer(&tokenizer)?.is_some();
    let recipe = options.recipe(seed, folder);
    let run = folder.join(RUN);
    let resume = is_run(&run);
    // A run of other settings keeps the data that it was made from.
    check_folder(&run, &recipe.to_toml()?, resume)?;
    write_pairs(&folder.join(TRAIN), &training, chat)?;
    write_pairs(&folder.join(HELD_OUT), &held_out, chat)?;
    let finished = train(
        &recipe,
        &RunOptions {
            resume,
            out: Some(run),
            device: options.device.clone(),
            cache: None,
            command: options.command.clone(),
        },
    )?;
    let scores = folder.join(SCORES);
    if scores.exists() {
        // Of an attempt that did not end.
        std::fs::remove_dir_all(&scores).map_err(TrainError::io(&scores))?;
    }
    let (adapter, data) = (finished.folder.join("adapter"), folder.join(HELD_OUT));
    score(&ScoreOptions {
        beta: Some(options.beta),
        max_length: MAX_LENGTH,
        candidates: 3,
        page_rows: held_out.len(),
        show: 0,
        device: options.device.clone(),
        command: options.command.clone(),
        ..ScoreOptions::new(adapter, options.model.clone(), data, scores.clone())
    })?;
    let pairs = read_pairs(&scores.join("scores.jsonl"), &held_out)?;
    Ok(SeedResult {
        seed,
        settings,
        train_pairs: training.len(),
        unread: held_out.len() - pairs.len(),
        pairs,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Writes pairs as conversations for a model that has a chat template, else as text.
fn write_pairs(path: &Path, pairs: &[&Solutions], chat: bool) -> Result<(), TrainError> {
    let content = |role: &str, text: &str| -> Value {
        if chat {
            json!([{ "role": role, "content": text }])
        } else {
            text.into()
        }
    };
    let rows = pairs.iter().map(|pair| {
        let question = if chat {
            pair.question.clone()
        } else {
            format!("{}\n", pair.question)
        };
        let row = json!({
            "prompt": content("user", &question),
            "chosen": content("assistant", &pair.right),
            "rejected": content("assistant", &pair.wrong),
        });
        format!("{row}\n")
    });
    let text: String = rows.collect();
    write_atomically(path, |file| {
        std::io::Write::write_all(file, text.as_bytes())
    })
    .map_err(TrainError::io(path))
}

/// A line of `scores.jsonl`, as far as it is read here.
#[derive(Deserialize)]
struct Line {
    row: usize,
    side: String,
    reward: f64,
    tokens: Vec<String>,
    rewards: Vec<Option<f64>>,
    policy_logps: Vec<Option<f64>>,
    reference_logps: Vec<Option<f64>>,
}

impl Line {
    fn steps(&self, solution: &str) -> Option<Vec<Step>> {
        let logps = self.policy_logps.iter().zip(&self.reference_logps);
        let values = self.rewards.iter().zip(logps);
        let values =
            values.map(|(&reward, (&policy, &reference))| Some([reward?, policy?, reference?]));
        let steps = step_means(&self.tokens, values, solution)?.into_iter();
        let step = |[reward, policy_logp, reference_logp]: [f64; 3]| Step {
            reward,
            policy_logp,
            reference_logp,
        };
        Some(steps.map(step).collect())
    }
}

/// What was read of held-out pairs, in their order; those that were cut are left out.
fn read_pairs(path: &Path, held_out: &[&Solutions]) -> Result<Vec<ReadPair>, TrainError> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
    let mut sides: Vec<[Option<Line>; 2]> = held_out.iter().map(|_| [None, None]).collect();
    for line in text.lines() {
        let line: Line = serde_json::from_str(line).map_err(|error| TrainError::Policy {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
        let side = usize::from(line.side != "chosen");
        let row = line.row;
        sides[row][side] = Some(line);
    }
    let pairs = sides.iter().zip(held_out).filter_map(|(sides, pair)| {
        let [Some(right), Some(wrong)] = sides else {
            return None;
        };
        Some(ReadPair {
            problem: pair.problem,
            first_error: pair.first_error?,
            ahead: right.reward > wrong.reward,
            wrong: wrong.steps(&pair.wrong)?,
            right: right.steps(&pair.right)?,
        })
    });
    Ok(pairs.collect())
}

/// `None` without a pair.
fn summary(
    options: &FirstErrorOptions,
    pairs_in_file: [usize; 2],
    seeds: Vec<SeedResult>,
) -> Option<FirstErrorResults> {
    let pairs: Vec<ReadPair> = seeds.iter().flat_map(|seed| seed.pairs.clone()).collect();
    let problems: Vec<usize> = pairs.iter().map(|pair| pair.problem).collect();
    let estimate = |values: &[f64]| Estimate::bootstrap_grouped(values, &problems, 0);
    let ahead: Vec<f64> = pairs
        .iter()
        .map(|pair| f64::from(u8::from(pair.ahead)))
        .collect();
    let chance: Vec<f64> = pairs
        .iter()
        .map(|pair| 1.0 / pair.wrong.len() as f64)
        .collect();
    let found = Method::ALL.map(|method| Found::by(method, &pairs));
    let methods = Method::ALL
        .iter()
        .zip(&found)
        .map(|(&method, found)| found.figures(method, &problems))
        .collect::<Option<Vec<Figures>>>()?;
    let [reward, surprise, _, place] = &found;
    let mut targets = Vec::new();
    let mut claim = |claim: &str, ours: &[f64], theirs: &[f64]| {
        let gaps: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a - b).collect();
        targets.extend(estimate(&gaps).map(|gap| Target {
            claim: claim.into(),
            measured: format!("difference {}", page::signed(&gap)),
            held: Some(gap.ci_low > 0.0),
        }));
    };
    claim(
        "the step of least reward is the first wrong one more often than a step drawn blindly",
        &reward.lowest,
        &chance,
    );
    claim(
        "more often than the step that surprises the reference most",
        &reward.lowest,
        &surprise.lowest,
    );
    claim(
        "more often than the first step of all",
        &reward.lowest,
        &place.lowest,
    );
    if let (Some(reward), Some(surprise)) = (&reward.first_low, &surprise.first_low) {
        claim(
            "the first step of low reward is the first wrong one more often than the first \
             surprising one, at as many false alarms",
            reward,
            surprise,
        );
    }
    Some(FirstErrorResults {
        command: options.command.clone(),
        device: options.device.clone(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        pairs_in_file,
        ahead: estimate(&ahead)?,
        chance: estimate(&chance)?,
        targets,
        methods,
        seeds,
    })
}
