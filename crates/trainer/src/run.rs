//! A run from recipe to report.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
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
use crate::workers::Workers;

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
    check_folder(&folder, &resolved, options.resume)?;
    // Data and model are read before the folder is made, so that bad input leaves nothing behind.
    let prepared = prepare(recipe, &device)?;
    let inputs = inputs_digest(&prepared, recipe)?;
    let lock = begin_folder(&folder, &resolved, &inputs, options.resume)?;
    eprintln!("run: {}", folder.display());
    let run = Run {
        recipe,
        digest: digest_of(format!("{resolved}{inputs}").as_bytes()),
        _lock: lock,
        folder,
        device,
        prepared,
        session: began,
        workers: Workers::new(recipe.workers),
    };
    run.finish(options, &resolved)
}

struct Run<'a> {
    recipe: &'a Recipe,
    /// Digest of recipe, data and model.
    digest: String,
    /// Held as long as the run is at work in its folder.
    _lock: File,
    folder: PathBuf,
    device: Device,
    prepared: Prepared,
    session: Instant,
    workers: Workers,
}

/// The stage after fine-tuning, and the parts of its data.
const PREFERENCE: &str = "preference";
const TRAIN: &str = "train";
const EVAL: &str = "eval";

/// Names of what a run's folder holds.
mod names {
    pub(super) const RECIPE: &str = "recipe.toml";
    pub(super) const INPUTS: &str = "inputs.sha256";
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
        let suffix = if number == 1 {
            String::new()
        } else {
            format!("-{number}")
        };
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

/// Refuses a folder that the run cannot use; writes nothing.
fn check_folder(folder: &Path, resolved: &str, resume: bool) -> Result<(), TrainError> {
    let refuse = |reason: &str| {
        Err(TrainError::RunFolder {
            path: folder.to_path_buf(),
            reason: reason.into(),
        })
    };
    if resume {
        let path = folder.join(names::RECIPE);
        return match std::fs::read_to_string(&path) {
            Ok(old) if old == resolved => Ok(()),
            Ok(_) => refuse("its recipe.toml differs from this one; resume with the same recipe"),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                refuse("no run to resume; leave --resume out to begin one")
            }
            Err(error) => Err(TrainError::io(&path)(error)),
        };
    }
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(TrainError::io(folder)(error)),
    };
    for entry in entries {
        let name = entry.map_err(TrainError::io(folder))?.file_name();
        // A run that was killed before its recipe was written has left at most these.
        if name != names::INPUTS && !checkpoint::is_temporary(&name) {
            return refuse(
                "not empty; give --resume to go on with the run, or --out another folder",
            );
        }
    }
    Ok(())
}

/// Makes the folder, or enters it again, and keeps other processes out of it.
fn begin_folder(
    folder: &Path,
    resolved: &str,
    inputs: &str,
    resume: bool,
) -> Result<File, TrainError> {
    std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    let refuse = |reason: &str| {
        Err(TrainError::RunFolder {
            path: folder.to_path_buf(),
            reason: reason.into(),
        })
    };
    let path = folder.join(names::INPUTS);
    let mut lock = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(&path)
        .map_err(TrainError::io(&path))?;
    // The system lets go of the lock when the process ends, however it ends. Where a file system
    // has no locks, the run goes on without.
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        return refuse("another process is at work in it");
    }
    check_folder(folder, resolved, resume)?;
    checkpoint::clean(folder)?;
    checkpoint::clean(&folder.join(names::CHECKPOINTS))?;
    let mut old = String::new();
    lock.read_to_string(&mut old)
        .map_err(TrainError::io(&path))?;
    if old.trim_end() != inputs {
        if resume {
            return refuse("its data or model have changed since the run began; begin a new run");
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{inputs}"))
            .and_then(|()| lock.sync_all())
            .map_err(TrainError::io(&path))?;
    }
    if !resume {
        let path = folder.join(names::RECIPE);
        write_atomically(&path, |file| file.write_all(resolved.as_bytes()))
            .map_err(TrainError::io(&path))?;
    }
    Ok(lock)
}

/// A digest of what a recipe names but does not hold: the tokens of the data, and the files of
/// the model to begin with.
fn inputs_digest(prepared: &Prepared, recipe: &Recipe) -> Result<String, TrainError> {
    let mut bytes = Vec::new();
    let mut add = |ids: &[u32]| {
        bytes.extend((ids.len() as u64).to_le_bytes());
        bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    };
    for example in &prepared.sft {
        add(&example.prompt_ids);
        add(&example.completion_ids);
    }
    for pair in prepared.train.iter().chain(&prepared.eval) {
        add(&pair.prompt_ids);
        add(&pair.chosen_ids);
        add(&pair.rejected_ids);
    }
    for (_, prompt) in prepared.task.iter().flat_map(|task| &task.prompts) {
        add(prompt);
    }
    let mut digests = digest_of(&bytes);
    if let Some(folder) = &recipe.model.path {
        let entries = std::fs::read_dir(folder).map_err(TrainError::io(folder))?;
        let mut files: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name == "config.json" || name.ends_with(".safetensors")
            })
            .collect();
        files.sort();
        for path in files {
            digests += &checkpoint::digest(&path).map_err(TrainError::io(&path))?;
        }
    }
    Ok(digest_of(digests.as_bytes()))
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
        write_model(
            &self.path(names::MODEL),
            &policy,
            &self.prepared.tokenizer,
            false,
        )?;

        let mut summary = Map::new();
        let lines = crate::metrics::read(&self.path(names::METRICS))?;
        let last = lines
            .iter()
            .rev()
            .find(|line| line.contains_key("eval_loss"));
        if let Some(last) = last {
            summary.insert(
                "eval_reward_accuracy".into(),
                last["eval_rewards/accuracies"].clone(),
            );
            summary.insert(
                "eval_reward_margin".into(),
                last["eval_rewards/margins"].clone(),
            );
            summary.insert("n_eval_pairs".into(), self.prepared.eval.len().into());
        }
        let judged = self.judge(&reference, &policy, &mut summary)?;
        let pairs = (done.step
            * self.recipe.preference.batch_size
            * self.recipe.preference.accumulation)
            .min(
                (self.recipe.preference.epochs * self.prepared.train.len() as f64).ceil() as usize,
            );
        summary.insert(
            "pairs_per_second".into(),
            (pairs as f64 / done.seconds).into(),
        );
        summary.insert("preference_seconds".into(), done.seconds.into());
        summary.insert(
            "wall_seconds".into(),
            self.session.elapsed().as_secs_f64().into(),
        );
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
        if finished.exists() {
            match checkpoint::verify_files(&finished) {
                Ok(()) => return Ok(Transformer::read(&finished, &self.device)?),
                Err(error) => eprintln!("warning: {error}; passed over"),
            }
        }
        // Nothing of the next stage may outlive the weights that it began with.
        checkpoint::forget(&self.path(names::CHECKPOINTS), PREFERENCE)?;
        for split in [TRAIN, EVAL] {
            let path = self.logps_path(split);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(TrainError::io(&path)(error));
                }
                _ => {}
            }
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
        let (examples, device) = (&self.prepared.sft, &self.device);
        stage
            .run(
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
                    sft_micro_batch(model, &CompletionBatch::new(&rows, device))
                },
                |_| Ok(Map::new()),
            )
            .map_err(|error| error.with_rows(|index| examples[index].row))?;
        let model = learner.snapshot();
        write_model(&finished, &model, &self.prepared.tokenizer, true)?;
        Ok(model)
    }

    /// The preference stage.
    fn prefer(&self, reference: &Transformer) -> Result<(Transformer, Done), TrainError> {
        let recipe = &self.recipe.preference;
        let (train, eval) = (&self.prepared.train, &self.prepared.eval);
        let train_logps = self.reference_logps(reference, train, TRAIN, recipe)?;
        let eval_logps = self.reference_logps(reference, eval, EVAL, recipe)?;
        let stage = Stage {
            name: PREFERENCE,
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
        let mut log =
            self.log(|at, step| at != stage.name || (step <= done.step && done.step > 0))?;
        let checkpoints = self.path(names::CHECKPOINTS);
        let device = &self.device;
        let done = stage.run(
            &mut learner,
            done,
            &mut log,
            &self.place(&checkpoints),
            |model, batch| {
                let pairs = batch.iter().map(|&index| &train[index]);
                let pick =
                    |values: &[f32]| -> Vec<f32> { batch.iter().map(|&i| values[i]).collect() };
                let (chosen, rejected) = (pick(&train_logps.chosen), pick(&train_logps.rejected));
                preference_micro_batch(
                    model,
                    &pair_batch(pairs, model.config().hidden_size, device),
                    &pair_logps(&chosen, &rejected, device),
                    &recipe.objective,
                    recipe.beta,
                )
            },
            |model| {
                Ok(preference_metrics(
                    model,
                    eval,
                    &eval_logps,
                    (&recipe.objective, recipe.beta),
                    recipe.eval_batch_size,
                    &self.workers,
                ))
            },
        );
        let done = done.map_err(|error| error.with_rows(|index| train[index].row))?;
        Ok((learner.snapshot(), done))
    }

    fn reference_logps(
        &self,
        reference: &Transformer,
        pairs: &[PreferencePair],
        split: &str,
        recipe: &PreferenceRecipe,
    ) -> Result<ReferenceLogps, TrainError> {
        let path = self.logps_path(split);
        if let Some(logps) = ReferenceLogps::read(&path, &self.digest, pairs.len()) {
            return Ok(logps);
        }
        if path.exists() {
            let path = path.display();
            eprintln!("warning: {path}: damaged; the logps are computed again");
        }
        let label = format!("reference logps, {split}");
        let logps = ReferenceLogps::compute(
            reference,
            pairs,
            recipe.eval_batch_size,
            &recipe.objective,
            &self.workers,
            &label,
        );
        let sides = logps.chosen.iter().zip(&logps.rejected).zip(pairs);
        for ((chosen, rejected), pair) in sides {
            if let Some(value) = [chosen, rejected].into_iter().find(|x| !x.is_finite()) {
                return Err(TrainError::NotFinite {
                    place: label,
                    what: "logp",
                    value: f64::from(*value),
                    rows: vec![pair.row],
                });
            }
        }
        logps.write(&path, &self.digest)?;
        Ok(logps)
    }

    fn logps_path(&self, split: &str) -> PathBuf {
        self.path(&format!("reference_logps.{split}.safetensors"))
    }

    /// A learner at the stage's newest whole checkpoint, or at its start.
    fn begin(
        &self,
        stage: &Stage<'_>,
        model: Transformer,
        optimizer: AdamW,
    ) -> Result<(Learner, Done), TrainError> {
        let checkpoints = self.path(names::CHECKPOINTS);
        let newest = checkpoint::newest(&checkpoints, stage.name, &self.digest)?;
        for line in newest.damaged {
            eprintln!("warning: {line}; passed over");
        }
        let Some((path, position)) = newest.whole else {
            let learner = Learner::new(model, optimizer).with_workers(self.workers.clone());
            return Ok((learner, Done::default()));
        };
        eprintln!("resuming from {}", path.display());
        let learner = checkpoint::load(&path, &position, optimizer, &self.device)?
            .with_workers(self.workers.clone());
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
            let eos = [task.task.eos_id()];
            sample_completions(model, &prompts, most, &eos, seed, &self.workers, label)
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
///
/// A manifest lets a later session tell whether the folder is still as it was written.
fn write_model(
    path: &Path,
    model: &Transformer,
    tokenizer: &Tokenizer,
    manifest: bool,
) -> Result<(), TrainError> {
    write_folder_atomically(path, |inner| -> Result<(), ModelIo> {
        tokenizer.save(inner)?;
        model.write(inner)?;
        if manifest {
            checkpoint::write_manifest(inner)?;
        }
        Ok(())
    })
    .map_err(|error| match error {
        // The name under which it was being filled would tell nobody anything.
        ModelIo::Io(source)
        | ModelIo::Model(lm::LmError::Io { source, .. })
        | ModelIo::Tokenizer(lm::tokenizer::TokenizerError::Io { source, .. }) => {
            TrainError::io(path)(source)
        }
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
