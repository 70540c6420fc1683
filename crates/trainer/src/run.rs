//! A run from recipe to report.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use lm::data::PreferencePair;
use lm::files::{write_atomically, write_folder_atomically};
use lm::tokenizer::Tokenizer;
use lm::{CompletionBatch, Generated, Transformer};
use serde_json::{Map, Value, json};

use crate::checkpoint::{self, digest_of};
use crate::error::TrainError;
use crate::evaluate::{preference_metrics, sample_completions, true_rewards, wins};
use crate::learner::{Learner, pair_logps, preference_micro_batch, sft_micro_batch};
use crate::metrics::MetricsLog;
use crate::optimizer::AdamW;
use crate::page::{Judged, write_report};
use crate::prepare::{Prepared, prepare};
use crate::recipe::{PreferenceRecipe, Recipe};
use crate::reference::{ReferenceLogps, pair_batch};
use crate::stage::{Done, Place, Stage};
use crate::statistics::Estimate;

/// Where a run goes, and on what.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run's folder; `None` takes the first free one of `runs/<name>`, `runs/<name>-2`, ...
    pub out: Option<PathBuf>,
    /// Name of the device.
    pub device: String,
    /// Go on with the run in the folder instead of beginning one.
    pub resume: bool,
    /// The command line, for the report.
    pub command: String,
}

/// The folder of a finished run, and what `summary.json` holds.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The run's folder.
    pub folder: PathBuf,
    /// The summary.
    pub summary: Map<String, Value>,
}

/// Trains, evaluates and reports.
///
/// # Errors
///
/// Anything wrong with the recipe, model, data or disk; what was whole before stays whole.
pub fn train(recipe: &Recipe, options: &RunOptions) -> Result<Finished, TrainError> {
    let began = Instant::now();
    let device = crate::device::device(&options.device)?;
    let folder = choose_folder(recipe, options)?;
    let resolved = recipe.to_toml()?;
    // Data and model are read before the folder is made, so that bad input leaves nothing behind.
    let prepared = prepare(recipe, &device)?;
    begin_folder(&folder, &resolved, options.resume)?;
    eprintln!("run: {}", folder.display());
    let run = Run {
        recipe,
        digest: digest_of(resolved.as_bytes()),
        folder,
        device,
        prepared,
        session: began,
    };
    run.finish(options, &resolved)
}

struct Run<'a> {
    recipe: &'a Recipe,
    digest: String,
    folder: PathBuf,
    device: Device,
    prepared: Prepared,
    session: Instant,
}

/// Names of what a run's folder holds.
mod names {
    pub(super) const RECIPE: &str = "recipe.toml";
    pub(super) const METRICS: &str = "metrics.jsonl";
    pub(super) const SUMMARY: &str = "summary.json";
    pub(super) const REPORT: &str = "report.html";
    pub(super) const MODEL: &str = "model";
    pub(super) const SFT: &str = "sft";
    pub(super) const CHECKPOINTS: &str = "checkpoints";
}

fn choose_folder(recipe: &Recipe, options: &RunOptions) -> Result<PathBuf, TrainError> {
    if let Some(out) = &options.out {
        return Ok(out.clone());
    }
    let candidate = |number: usize| {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        Path::new("runs").join(format!("{}{suffix}", recipe.name))
    };
    let free = (1..)
        .find(|&number| !candidate(number).exists())
        .expect("some number is free");
    match (options.resume, free) {
        (false, _) => Ok(candidate(free)),
        (true, 1) => Err(TrainError::RunFolder {
            path: candidate(1),
            reason: "no such run to resume; leave --resume out to begin one".into(),
        }),
        (true, free) => Ok(candidate(free - 1)),
    }
}

fn begin_folder(folder: &Path, resolved: &str, resume: bool) -> Result<(), TrainError> {
    let path = folder.join(names::RECIPE);
    if resume {
        let old = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        if old != resolved {
            return Err(TrainError::RunFolder {
                path: folder.to_path_buf(),
                reason: "its recipe.toml differs from this one; resume with the same recipe".into(),
            });
        }
        return Ok(());
    }
    let taken = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if taken {
        return Err(TrainError::RunFolder {
            path: folder.to_path_buf(),
            reason: "not empty; give --resume to go on with the run, or --out another folder".into(),
        });
    }
    std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    write_atomically(&path, |file| file.write_all(resolved.as_bytes()))
        .map_err(TrainError::io(&path))
}

impl Run<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn place<'a>(&'a self, checkpoints: &'a Path) -> Place<'a> {
        Place {
            checkpoints,
            saving: &self.recipe.checkpoints,
            recipe: &self.digest,
        }
    }

    fn finish(&self, options: &RunOptions, resolved: &str) -> Result<Finished, TrainError> {
        let reference = self.fine_tune()?;
        let (policy, done) = self.prefer(&reference)?;
        write_model(&self.path(names::MODEL), &policy, &self.prepared.tokenizer)?;

        let mut summary = Map::new();
        let lines = crate::metrics::read(&self.path(names::METRICS))?;
        let last = lines.iter().rev().find(|line| line.contains_key("eval_loss"));
        if let Some(last) = last {
            summary.insert("eval_reward_accuracy".into(), last["eval_rewards/accuracies"].clone());
            summary.insert("eval_reward_margin".into(), last["eval_rewards/margins"].clone());
            summary.insert("n_eval_pairs".into(), self.prepared.eval.len().into());
        }
        let judged = self.judge(&reference, &policy, &mut summary)?;
        let pairs = (done.step * self.recipe.preference.batch_size * self.recipe.preference.accumulation)
            .min((self.recipe.preference.epochs * self.prepared.train.len() as f64).ceil() as usize);
        summary.insert("pairs_per_second".into(), (pairs as f64 / done.seconds).into());
        summary.insert("preference_seconds".into(), done.seconds.into());
        summary.insert("wall_seconds".into(), self.session.elapsed().as_secs_f64().into());
        if let Some(bytes) = peak_rss_bytes() {
            summary.insert("peak_rss_bytes".into(), bytes.into());
        }
        summary.insert("device".into(), options.device.clone().into());
        summary.insert("threads".into(), rayon::current_num_threads().into());
        summary.insert("n_parameters".into(), policy.config().n_parameters().into());
        summary.insert("seed".into(), self.recipe.seed.into());

        let path = self.path(names::SUMMARY);
        let text = serde_json::to_string_pretty(&summary).unwrap_or_default();
        write_atomically(&path, |file| writeln!(file, "{text}")).map_err(TrainError::io(&path))?;
        write_report(
            &self.path(names::REPORT),
            self.recipe,
            resolved,
            &options.command,
            &self.prepared,
            &lines,
            &summary,
            &judged,
            (&policy, &reference),
        )?;
        Ok(Finished {
            folder: self.folder.clone(),
            summary,
        })
    }

    /// The fine-tuning stage, or the model as it came.
    fn fine_tune(&self) -> Result<Transformer, TrainError> {
        let Some(sft) = &self.recipe.sft else {
            return Ok(self.prepared.model.clone());
        };
        let finished = self.path(names::SFT);
        if finished.join("config.json").is_file() {
            return Ok(Transformer::read(&finished, &self.device)?);
        }
        let stage = Stage {
            name: "sft",
            unit: "examples",
            n_examples: self.prepared.sft.len(),
            epochs: sft.epochs,
            max_steps: 0,
            batch_size: sft.batch_size,
            accumulation: sft.accumulation,
            eval_every: 0,
            optimizer: &sft.optimizer,
            seed: self.recipe.seed,
        };
        let optimizer = AdamW::new(&sft.optimizer);
        let (mut learner, done) = self.begin(&stage, self.prepared.model.clone(), optimizer)?;
        let mut log = self.log(|at, step| at == stage.name && step <= done.step)?;
        let checkpoints = self.path(names::CHECKPOINTS);
        let examples = &self.prepared.sft;
        stage.run(
            &mut learner,
            done,
            &mut log,
            &self.place(&checkpoints),
            |model, batch| {
                let rows: Vec<(&[u32], &[u32])> = batch
                    .iter()
                    .map(|&index| {
                        let example = &examples[index];
                        (&example.prompt_ids[..], &example.completion_ids[..])
                    })
                    .collect();
                sft_micro_batch(model, &CompletionBatch::new(&rows, &self.device))
            },
            |_| Ok(Map::new()),
        )?;
        let model = learner.snapshot();
        write_model(&finished, &model, &self.prepared.tokenizer)?;
        Ok(model)
    }

    /// The preference stage.
    fn prefer(&self, reference: &Transformer) -> Result<(Transformer, Done), TrainError> {
        let recipe = &self.recipe.preference;
        let (train, eval) = (&self.prepared.train, &self.prepared.eval);
        let train_logps = self.reference_logps(reference, train, "train", recipe)?;
        let eval_logps = self.reference_logps(reference, eval, "eval", recipe)?;
        let stage = Stage {
            name: "preference",
            unit: "pairs",
            n_examples: train.len(),
            epochs: recipe.epochs,
            max_steps: recipe.max_steps,
            batch_size: recipe.batch_size,
            accumulation: recipe.accumulation,
            eval_every: recipe.eval_every,
            optimizer: &recipe.optimizer,
            seed: self.recipe.seed.wrapping_add(1),
        };
        let optimizer = AdamW::new(&recipe.optimizer);
        let (mut learner, done) = self.begin(&stage, reference.clone(), optimizer)?;
        let mut log = self.log(|at, step| {
            at != stage.name || (step <= done.step && done.step > 0)
        })?;
        let checkpoints = self.path(names::CHECKPOINTS);
        let done = stage.run(
            &mut learner,
            done,
            &mut log,
            &self.place(&checkpoints),
            |model, batch| {
                let pairs = batch.iter().map(|&index| &train[index]);
                let pick = |values: &[f32]| -> Vec<f32> { batch.iter().map(|&i| values[i]).collect() };
                let (chosen, rejected) = (pick(&train_logps.chosen), pick(&train_logps.rejected));
                preference_micro_batch(
                    model,
                    &pair_batch(pairs, &self.device),
                    &pair_logps(&chosen, &rejected, &self.device),
                    recipe.beta,
                )
            },
            |model| {
                Ok(preference_metrics(model, eval, &eval_logps, recipe.beta, recipe.eval_batch_size))
            },
        )?;
        Ok((learner.snapshot(), done))
    }

    fn reference_logps(
        &self,
        reference: &Transformer,
        pairs: &[PreferencePair],
        split: &str,
        recipe: &PreferenceRecipe,
    ) -> Result<ReferenceLogps, TrainError> {
        let path = self.path(&format!("reference_logps.{split}.safetensors"));
        if let Some(logps) = ReferenceLogps::read(&path, &self.digest, pairs.len()) {
            return Ok(logps);
        }
        let label = format!("reference logps, {split}");
        let logps = ReferenceLogps::compute(reference, pairs, recipe.eval_batch_size, &label);
        logps.write(&path, &self.digest)?;
        Ok(logps)
    }

    /// A learner at the stage's newest whole checkpoint, or at its start.
    fn begin(
        &self,
        stage: &Stage<'_>,
        model: Transformer,
        optimizer: AdamW,
    ) -> Result<(Learner, Done), TrainError> {
        let checkpoints = self.path(names::CHECKPOINTS);
        let (newest, damaged) = checkpoint::newest(&checkpoints, stage.name, &self.digest)?;
        for line in damaged {
            eprintln!("warning: {line}; passed over");
        }
        let Some((path, position)) = newest else {
            return Ok((Learner::new(model, optimizer), Done::default()));
        };
        eprintln!("resuming from {}", path.display());
        let learner = checkpoint::load(&path, &position, optimizer, &self.device)?;
        let done = Done {
            step: position.step,
            n_tokens: position.n_tokens,
            seconds: position.seconds,
        };
        Ok((learner, done))
    }

    fn log(&self, keep: impl Fn(&str, usize) -> bool) -> Result<MetricsLog, TrainError> {
        MetricsLog::open(&self.path(names::METRICS), keep)
    }

    /// Samples from reference and policy on the task's held-out prompts, and compares them.
    fn judge(
        &self,
        reference: &Transformer,
        policy: &Transformer,
        summary: &mut Map<String, Value>,
    ) -> Result<Judged, TrainError> {
        let (Some(task), Some(numbers)) = (&self.prepared.task, &self.recipe.task) else {
            return Ok(Judged::default());
        };
        let prompts: Vec<&[u32]> = task.prompts.iter().map(|(_, ids)| &ids[..]).collect();
        let seed = self.recipe.seed;
        let sample = |model: &Transformer, label: &str| -> Result<Vec<Generated>, TrainError> {
            let most = numbers.max_new_tokens;
            sample_completions(model, &prompts, most, &[task.task.eos_id()], seed, label)
        };
        let sft = sample(reference, "sample from SFT")?;
        let dpo = sample(policy, "sample from DPO")?;
        let (before, after) = (true_rewards(task, &sft), true_rewards(task, &dpo));
        let differences: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        let estimate = |values: &[f64]| {
            Estimate::bootstrap(values, seed).expect("the recipe was checked: there are prompts")
        };
        let judged = Judged {
            sft_reward: Some(estimate(&before)),
            dpo_reward: Some(estimate(&after)),
            difference: Some(estimate(&differences)),
            win_rate: Some(estimate(&wins(&after, &before))),
            sft: sft.into_iter().map(|completion| completion.ids).collect(),
            dpo: dpo.into_iter().map(|completion| completion.ids).collect(),
        };
        let lengths = |texts: &[Vec<u32>]| {
            texts.iter().map(Vec::len).sum::<usize>() as f64 / texts.len() as f64
        };
        summary.insert(
            "true_reward".into(),
            json!({"sft": judged.sft_reward, "dpo": judged.dpo_reward, "difference": judged.difference}),
        );
        summary.insert("win_rate_vs_sft".into(), json!(judged.win_rate));
        summary.insert("eval_reward_accuracy_ceiling".into(), task.ceiling.into());
        summary.insert("n_prompts".into(), prompts.len().into());
        summary.insert(
            "completion_tokens".into(),
            json!({"sft": lengths(&judged.sft), "dpo": lengths(&judged.dpo)}),
        );
        Ok(judged)
    }
}

/// Writes a Hugging Face folder, weights, configuration and tokenizer, whole or not at all.
fn write_model(
    path: &Path,
    model: &Transformer,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    write_folder_atomically(path, |inner| -> Result<(), ModelIo> {
        tokenizer.save(inner)?;
        model.write(inner)?;
        Ok(())
    })
    .map_err(|error| match error {
        ModelIo::Io(source) => TrainError::io(path)(source),
        ModelIo::Model(error) => error.into(),
        ModelIo::Tokenizer(error) => error.into(),
    })
}

enum ModelIo {
    Io(std::io::Error),
    Model(lm::LmError),
    Tokenizer(lm::tokenizer::TokenizerError),
}

impl From<std::io::Error> for ModelIo {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<lm::LmError> for ModelIo {
    fn from(error: lm::LmError) -> Self {
        Self::Model(error)
    }
}

impl From<lm::tokenizer::TokenizerError> for ModelIo {
    fn from(error: lm::tokenizer::TokenizerError) -> Self {
        Self::Tokenizer(error)
    }
}

/// The most memory that this process has held, where the system tells it.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
