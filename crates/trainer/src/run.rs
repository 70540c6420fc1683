//! A run from recipe to report.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use dpo_loss::{Contrast, PairTable, TokenLogps, contrastive_weights};
use lm::data::{PreferencePair, SftExample};
use lm::files::write_atomically;
use lm::tokenizer::Tokenizer;
use lm::{
    CompletionBatch, Decoding, Generate, Generated, ParameterInfo, Precision, Sampling, Transformer,
};
use serde_json::{Map, Value, json};

use crate::cache::{ReferenceCache, model_digest};
use crate::checkpoint::{self, Beside, digest_of};
use crate::error::TrainError;
use crate::evaluate::{
    DIVERGENCE_METRICS, divergences, preference_metrics, sample_completions, true_rewards, wins,
};
use crate::failure::{Shortage, within_memory};
use crate::folder;
use crate::learner::{
    Activations, Compared, Learner, Reference, preference_micro_batch, sft_micro_batch,
};
use crate::metrics::MetricsLog;
use crate::optimizer::AdamW;
use crate::order::Source;
use crate::page::{Judged, write_report};
use crate::prepare::{Prepared, prepare};
use crate::recipe::{ContrastRecipe, PreferenceRecipe, Recipe};
use crate::reference::{ReferenceLogps, pair_batch};
use crate::stage::{Calls, Done, Place, Stage};
use crate::unpaired::Labelled;
use crate::workers::Workers;
use judge::Estimate;

/// Where a run goes, and on what.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run's folder; `None` takes the first free one of `runs/<name>`, `runs/<name>-2`, ...
    pub out: Option<PathBuf>,
    /// Name of the device.
    pub device: String,
    /// Go on with the run in the folder instead of beginning one.
    pub resume: bool,
    /// Where reference logps are kept from one run to the next; `None` keeps none.
    pub cache: Option<ReferenceCache>,
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
    let devices = crate::device::device_list(&options.device)?;
    check_devices(recipe, devices.len())?;
    let device = &devices[0];
    let folder = choose_folder(recipe, options)?;
    let resolved = recipe.to_toml()?;
    check_folder(&folder, &resolved, options.resume)?;
    // Data and model are read before the folder is made, so that bad input leaves nothing behind.
    let prepared = prepare(recipe, device)?;
    let inputs = inputs_digest(&prepared, recipe)?;
    let lock = begin_folder(&folder, &resolved, &inputs, options.resume)?;
    eprintln!("run: {}", folder.display());
    let run = Run {
        recipe,
        digest: digest_of(format!("{resolved}{inputs}").as_bytes()),
        base: base_of_adapters(recipe, &folder),
        _lock: lock,
        folder,
        workers: Workers::on(device, recipe.workers),
        devices,
        prepared,
        session: began,
        cache: options.cache.clone(),
        device_name: options.device.clone(),
    };
    run.finish(options, &resolved)
}

/// The model that adapters are trained on, by its whole path: nobody knows from where they will be
/// read.
fn base_of_adapters(recipe: &Recipe, folder: &Path) -> Option<String> {
    let whole = |path: &Path| {
        // What a link points to may change. On Windows the form without links is one that few read.
        let whole = if cfg!(windows) {
            std::path::absolute(path)
        } else {
            path.canonicalize()
        };
        whole.unwrap_or_else(|_| path.to_path_buf())
    };
    let base = match recipe.sft {
        Some(_) => Some(whole(folder).join(names::SFT)),
        None => recipe.model.path.as_deref().map(whole),
    };
    base.map(|base| base.to_string_lossy().into_owned())
}

/// Every device has a batch in every step.
fn check_devices(recipe: &Recipe, devices: usize) -> Result<(), TrainError> {
    let sft = recipe.sft.as_ref().map(|sft| ("sft", sft.accumulation));
    let preference = ("preference", recipe.preference.accumulation);
    for (stage, accumulation) in sft.into_iter().chain([preference]) {
        if accumulation < devices {
            return Err(TrainError::Recipe {
                file: recipe.name.clone(),
                reason: format!(
                    "key `{stage}.accumulation`: {devices} devices share the batches of a step and \
                     need {devices} of them or more, got {accumulation}; with \
                     `{stage}.batch_size` divided by as much as this is raised, a step stays the same"
                ),
            });
        }
    }
    Ok(())
}

struct Run<'a> {
    recipe: &'a Recipe,
    /// Digest of recipe, data and model.
    digest: String,
    /// Folder of the model that adapters are trained on, if there is one.
    base: Option<String>,
    /// Held as long as the run is at work in its folder.
    _lock: [Option<File>; 2],
    folder: PathBuf,
    /// Where training computes; all else does on the first.
    devices: Vec<Device>,
    prepared: Prepared,
    session: Instant,
    workers: Workers,
    cache: Option<ReferenceCache>,
    device_name: String,
}

/// The stage after fine-tuning, and the parts of its data.
const PREFERENCE: &str = "preference";
const TRAIN: &str = "train";
const EVAL: &str = "eval";
/// Where an evaluation says that something is wrong, in words.
const WARNING: &str = "eval_warning";

/// Held-out pairs on which whole distributions are compared at each evaluation: enough for the
/// third digit, few enough to cost little.
const DIVERGENCE_PAIRS: usize = 256;

/// Names of what a run's folder holds.
pub(crate) mod names {
    pub(crate) const RECIPE: &str = "recipe.toml";
    pub(crate) const INPUTS: &str = "inputs.sha256";
    pub(crate) const METRICS: &str = "metrics.jsonl";
    pub(crate) const SUMMARY: &str = "summary.json";
    pub(crate) const REPORT: &str = "report.html";
    pub(crate) const MODEL: &str = "model";
    pub(crate) const ADAPTER: &str = "adapter";
    pub(crate) const SFT: &str = "sft";
    pub(crate) const CHECKPOINTS: &str = "checkpoints";
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

/// Whether a folder holds a run that can be gone on with: what was killed before its recipe was written
/// is begun again.
pub(crate) fn is_run(folder: &Path) -> bool {
    folder.join(names::RECIPE).is_file()
}

/// Refuses a folder that the run cannot use; writes nothing.
pub(crate) fn check_folder(folder: &Path, resolved: &str, resume: bool) -> Result<(), TrainError> {
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
    // A run that was killed before its recipe was written has left at most its inputs' digest.
    let held = folder::names(folder)?;
    if held.iter().any(|name| name != names::INPUTS) {
        return refuse("not empty; give --resume to go on with the run, or --out another folder");
    }
    Ok(())
}

/// Makes the folder, or enters it again, and keeps other processes out of it.
fn begin_folder(
    folder: &Path,
    resolved: &str,
    inputs: &str,
    resume: bool,
) -> Result<[Option<File>; 2], TrainError> {
    let other_commands = folder::lock(folder)?;
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
    // The file as well as the folder, which cannot be locked everywhere.
    folder::check_alone(folder, &lock)?;
    check_folder(folder, resolved, resume)?;
    folder::clean(folder)?;
    folder::clean(&folder.join(names::CHECKPOINTS))?;
    let mut old = String::new();
    lock.read_to_string(&mut old)
        .map_err(TrainError::io(&path))?;
    if old.trim_end() != inputs {
        if resume {
            return refuse(
                "its data or model have changed since the run began, or another version read them; begin a new run",
            );
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
    Ok([other_commands, Some(lock)])
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
    for labels in prepared.desirable.iter().flatten() {
        let labels: Vec<u32> = labels.iter().map(|&label| u32::from(label)).collect();
        add(&labels);
    }
    for weights in prepared.token_weights.iter().flatten() {
        let values = weights
            .chosen
            .values()
            .iter()
            .chain(weights.rejected.values());
        let bits: Vec<u32> = values.map(|weight| weight.to_bits()).collect();
        add(&bits);
    }
    for (_, prompt) in prepared.task.iter().flat_map(|task| &task.prompts) {
        add(prompt);
    }
    let mut digests = digest_of(&bytes);
    if let Some(folder) = &recipe.model.path {
        digests += &model_digest(folder)?;
    }
    if let Some(contrast) = &recipe.preference.contrast {
        digests += &model_digest(&contrast.positive)?;
        digests += &model_digest(&contrast.negative)?;
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
            beside: Beside {
                tokenizer: &self.prepared.tokenizer,
                base: self.base.as_deref(),
            },
        }
    }

    fn finish(&self, options: &RunOptions, resolved: &str) -> Result<Finished, TrainError> {
        let reference = self.fine_tune()?;
        let (policy, done) = self.prefer(&reference)?;
        let tokenizer = &self.prepared.tokenizer;
        if policy.lora_config().is_some() {
            let base = self.base.as_deref();
            write_adapter(&self.path(names::ADAPTER), &policy, tokenizer, base)?;
        }
        write_model(&self.path(names::MODEL), &policy.merge(), tokenizer, false)?;

        let mut summary = Map::new();
        let lines = crate::metrics::read(&self.path(names::METRICS))?;
        let last = lines
            .iter()
            .rev()
            .find(|line| line.contains_key("eval_loss"));
        if let Some(last) = last {
            for (key, metric) in [
                ("eval_reward_accuracy", "eval_rewards/accuracies"),
                ("eval_reward_margin", "eval_rewards/margins"),
            ] {
                if let Some(value) = last.get(metric) {
                    summary.insert(key.into(), value.clone());
                }
            }
            summary.insert("n_eval_pairs".into(), self.prepared.eval.len().into());
        }
        let judged = self.judge(&reference, &policy, &mut summary)?;
        let pairs = self.preference_stage().n_seen(done.step);
        if let Some(best) = &done.best {
            summary.insert("best_step".into(), best.step.into());
            summary.insert("best_value".into(), best.value.into());
        }
        // The first of its kind says it all.
        let warning = lines.iter().find_map(|line| {
            let warning = line.get(WARNING)?.as_str()?;
            Some(format!(
                "{PREFERENCE} step {}: {warning}",
                line.get("step")?
            ))
        });
        let mut warnings = self.recipe.preference.warnings();
        warnings.extend(warning);
        summary.insert("warnings".into(), warnings.into());
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
        let trained = match policy.lora_config() {
            Some(_) => policy.n_trainable_parameters(),
            None => self
                .recipe
                .trainable(policy.clone())?
                .n_trainable_parameters(),
        };
        summary.insert("n_trained_parameters".into(), trained.into());
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
                Ok(()) => {
                    let model = Transformer::read(&finished, &self.devices[0])?;
                    return Ok(model.with_precision(self.recipe.precision));
                }
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
            sources: vec![Source {
                examples: 0..self.prepared.sft.len(),
                weight: 1.0,
            }],
            lengths: sft.group_by_length.then(|| {
                let length =
                    |example: &SftExample| example.prompt_ids.len() + example.completion_ids.len();
                self.prepared.sft.iter().map(length).collect()
            }),
            sync: None,
            best: None,
            epochs: sft.epochs,
            max_steps: 0,
            batch_size: sft.batch_size,
            accumulation: sft.accumulation,
            eval_every: 0,
            optimizer: &sft.optimizer,
            seed: self.recipe.seed,
        };
        let optimizer = AdamW::new(&sft.optimizer);
        let (mut learner, done) = self.begin(
            &stage,
            &self.prepared.model,
            self.prepared.model.clone(),
            optimizer,
        )?;
        let mut log = self.log(|at, step| at == stage.name && step <= done.step)?;
        let checkpoints = self.path(names::CHECKPOINTS);
        let examples = &self.prepared.sft;
        let n_predicted = |batch: &[usize]| -> usize {
            let of = |example: &SftExample| {
                let first = usize::from(example.prompt_ids.is_empty());
                example.completion_ids.len().saturating_sub(first)
            };
            batch.iter().map(|&index| of(&examples[index])).sum()
        };
        let calls = Calls {
            micro: |model: &Transformer,
                    _: Option<&Transformer>,
                    step: &[Vec<usize>],
                    at: usize| {
                let rows: Vec<(&[u32], &[u32])> = step[at]
                    .iter()
                    .map(|&index| {
                        let example = &examples[index];
                        (&example.prompt_ids[..], &example.completion_ids[..])
                    })
                    .collect();
                let batch = CompletionBatch::new(&rows, &model.device().without_autodiff());
                let micro = sft_micro_batch(model, &batch, self.activations());
                // The step's loss is the mean over its tokens, however they are divided.
                let in_step: usize = step.iter().map(|batch| n_predicted(batch)).sum();
                let share = n_predicted(&step[at]) as f64 / in_step as f64;
                micro.weighted(share * step.len() as f64)
            },
            evaluate: |_: &Learner, _| Ok(Map::new()),
            row: |index: usize| examples[index].row.to_string(),
        };
        let place = self.place(&checkpoints);
        stage.run(&mut learner, done, &mut log, &place, calls)?;
        let model = learner.snapshot();
        write_model(&finished, &model, &self.prepared.tokenizer, true)?;
        Ok(model)
    }

    fn preference_stage(&self) -> Stage<'_> {
        let recipe = &self.recipe.preference;
        let train = &self.prepared.train;
        Stage {
            name: PREFERENCE,
            unit: if recipe.unpaired.is_some() {
                "examples"
            } else {
                "pairs"
            },
            sources: self.prepared.sources.clone(),
            lengths: recipe.group_by_length.then(|| {
                let length = |pair: &PreferencePair| {
                    pair.prompt_ids.len() + pair.chosen_ids.len() + pair.rejected_ids.len()
                };
                train.iter().map(length).collect()
            }),
            sync: recipe.sync_reference.as_ref(),
            best: recipe.best.as_ref(),
            epochs: recipe.epochs,
            max_steps: recipe.max_steps,
            batch_size: recipe.batch_size,
            accumulation: recipe.accumulation,
            eval_every: recipe.eval_every,
            optimizer: &recipe.optimizer,
            seed: self.recipe.seed.wrapping_add(1),
        }
    }

    /// The preference stage: its policy, and where it ended.
    fn prefer(&self, start: &Transformer) -> Result<(Transformer, Done), TrainError> {
        let recipe = &self.recipe.preference;
        let (train, eval) = (&self.prepared.train, &self.prepared.eval);
        let train_against = self.against(start, train, TRAIN)?;
        let eval_against = self.against(start, eval, EVAL)?;
        for warning in recipe.warnings() {
            eprintln!("warning: {warning}");
        }
        let stage = self.preference_stage();
        let policy = match &self.recipe.lora {
            Some(lora) => start.clone().with_lora(&lora.into(), self.recipe.seed)?,
            None => self.recipe.trainable(start.clone())?,
        };
        eprintln!("{}", self.cost(&policy));
        let optimizer = AdamW::new(&recipe.optimizer);
        let (mut learner, done) = self.begin(&stage, start, policy, optimizer)?;
        if recipe.sync_reference.is_some() && learner.reference.is_none() {
            learner.reference = Some(start.clone());
        }
        let mut log =
            self.log(|at, step| at != stage.name || (step <= done.step && done.step > 0))?;
        let checkpoints = self.path(names::CHECKPOINTS);
        let compared = |against: &Against,
                        batch: &CompletionBatch,
                        pairs: &[usize],
                        moved: Option<&Transformer>| {
            against.compared(pairs, batch, moved.unwrap_or(start))
        };
        let mut warned = false;
        let labels = |side: usize| match &self.prepared.desirable {
            Some(labels) => &labels[side][..],
            None => &[],
        };
        let labelled = |pairs, against: &Against, side| {
            let logps = against.logps.as_ref()?;
            let objective = recipe.unpaired.as_ref()?;
            Some((objective, Labelled::new(pairs, labels(side), logps)))
        };
        let train_labelled = labelled(train, &train_against, 0);
        let eval_labelled = labelled(eval, &eval_against, 1);
        let calls = Calls {
            micro: |model: &Transformer,
                    moved: Option<&Transformer>,
                    step: &[Vec<usize>],
                    at: usize| {
                let pairs = &step[at][..];
                if let Some((objective, labelled)) = &train_labelled {
                    let loss = (*objective, recipe.beta);
                    return labelled.micro_batch(model, pairs, loss, self.activations());
                }
                let batch = self.batch(train, pairs, model);
                let compared = compared(&train_against, &batch, pairs, moved);
                let (loss, beta) = (&recipe.objective, recipe.beta);
                preference_micro_batch(model, &batch, &compared, loss, beta, self.activations())
            },
            evaluate: |learner: &Learner, step: usize| {
                let model = learner.snapshot();
                let moved = learner.reference.as_ref();
                if let Some((objective, labelled)) = &eval_labelled {
                    let (loss, size) = ((*objective, recipe.beta), recipe.eval_batch_size);
                    return Ok(labelled.metrics(&model, loss, size, &self.workers));
                }
                let mut values = preference_metrics(
                    &model,
                    eval,
                    |pairs, batch| compared(&eval_against, batch, pairs, moved),
                    (&recipe.objective, recipe.beta),
                    recipe.eval_batch_size,
                    &self.workers,
                );
                let some = &eval[..eval.len().min(DIVERGENCE_PAIRS)];
                let reference = moved.unwrap_or(start);
                let (size, workers) = (recipe.eval_batch_size, &self.workers);
                if let Some(found) = divergences(&model, reference, some, size, workers) {
                    let found_values = [found.policy_reference, found.reference_policy];
                    for (name, value) in DIVERGENCE_METRICS.iter().zip(found_values) {
                        values.insert(format!("eval_{name}"), value.into());
                    }
                    if let Some(warning) = found.unexplained.warning() {
                        if !std::mem::replace(&mut warned, true) {
                            eprintln!("warning: {PREFERENCE} step {step}: {warning}");
                        }
                        values.insert(WARNING.into(), warning.into());
                    }
                }
                Ok(values)
            },
            row: |index: usize| self.prepared.row(index),
        };
        let done = stage.run(
            &mut learner,
            done,
            &mut log,
            &self.place(&checkpoints),
            calls,
        )?;
        let policy = match &done.best {
            Some(best) if best.step != done.step => {
                let path = checkpoint::best_path(&checkpoints, stage.name);
                checkpoint::verify_files(&path)?;
                eprintln!("{PREFERENCE}: taking the weights of step {}", best.step);
                checkpoint::read_weights(&path, start)?
            }
            _ => learner.snapshot(),
        };
        Ok((policy, done))
    }

    fn activations(&self) -> Activations {
        if self.recipe.gradient_checkpointing {
            Activations::Recompute
        } else {
            Activations::Keep
        }
    }

    /// What training the policy takes, in words: parameters, and memory for the longest pairs.
    fn cost(&self, policy: &Transformer) -> String {
        let recipe = &self.recipe.preference;
        let lengths = self.prepared.train.iter().map(|pair| {
            let completions = pair.chosen_ids.len() + pair.rejected_ids.len();
            let longest = pair.chosen_ids.len().max(pair.rejected_ids.len());
            let row = pair.prompt_ids.len() + longest;
            (2 * pair.prompt_ids.len() + completions, completions, row)
        });
        let (tokens, predicted, row) = lengths.max().unwrap_or_default();
        let at_once = recipe.batch_size * self.workers.count();
        let memory = policy.training_memory(row);
        let recompute = self.recipe.gradient_checkpointing;
        let total = memory.total(tokens * at_once, predicted * at_once, recompute);
        let kept = memory.weights + memory.gradients + memory.optimizer;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        format!(
            "policy: {} parameters, {} of them trained; memory about {:.0} MB: weights {:.0}, \
             gradients {:.0}, optimizer {:.0}, activations of the longest pairs {:.0}",
            policy
                .parameter_list()
                .iter()
                .map(ParameterInfo::count)
                .sum::<usize>(),
            policy.n_trainable_parameters(),
            megabytes(total),
            megabytes(memory.weights),
            megabytes(memory.gradients),
            megabytes(memory.optimizer),
            megabytes(total - kept),
        )
    }

    /// A batch of some of the pairs.
    fn batch(
        &self,
        of: &[PreferencePair],
        pairs: &[usize],
        model: &Transformer,
    ) -> CompletionBatch {
        let pairs = pairs.iter().map(|&index| &of[index]);
        let device = model.device().without_autodiff();
        pair_batch(pairs, model.config().hidden_size, &device)
    }

    /// What the pairs of a split are compared with.
    fn against(
        &self,
        start: &Transformer,
        pairs: &[PreferencePair],
        split: &str,
    ) -> Result<Against, TrainError> {
        let recipe = &self.recipe.preference;
        // A loss over whole distributions, or a reference that changes, needs the model itself.
        let live = recipe.objective.needs().position_kls || recipe.sync_reference.is_some();
        let logps = if live {
            None
        } else {
            Some(self.reference_logps(start, pairs, split, recipe)?)
        };
        let contrast = match &recipe.contrast {
            None => None,
            Some(contrast) => {
                let read = |folder: &Path, side: &str| -> Result<ReferenceLogps, TrainError> {
                    let model = Transformer::read(folder, &self.devices[0])?
                        .with_precision(self.recipe.precision);
                    let label = format!("logps of the {side} model, {split}");
                    let size = recipe.eval_batch_size;
                    Ok(ReferenceLogps::compute(
                        &model,
                        pairs,
                        size,
                        &self.workers,
                        &label,
                    ))
                };
                Some((
                    read(&contrast.positive, "positive")?,
                    read(&contrast.negative, "negative")?,
                    contrast.clone(),
                ))
            }
        };
        let weights = self.prepared.token_weights.as_ref();
        Ok(Against {
            logps,
            contrast,
            weights: weights.map(|[train, eval]| if split == TRAIN { train } else { eval }.clone()),
        })
    }

    fn reference_logps(
        &self,
        reference: &Transformer,
        pairs: &[PreferencePair],
        split: &str,
        recipe: &PreferenceRecipe,
    ) -> Result<ReferenceLogps, TrainError> {
        let path = self.logps_path(split);
        if let Some(logps) = ReferenceLogps::read(&path, &self.digest, pairs) {
            return Ok(logps);
        }
        if path.exists() {
            let path = path.display();
            eprintln!("warning: {path}: damaged; the logps are computed again");
        }
        let label = format!("reference logps, {split}");
        let key = match &self.cache {
            Some(_) if !pairs.is_empty() => Some(self.cache_key(pairs, recipe.eval_batch_size)?),
            _ => None,
        };
        let cached = self.cache.as_ref().zip(key.as_deref());
        if let Some((cache, key)) = cached
            && let Some(logps) = cache.get(key, pairs)
        {
            let path = cache.path(key);
            eprintln!(
                "{label}: {} pairs from the cache, {}",
                pairs.len(),
                path.display()
            );
            logps.write(&self.logps_path(split), &self.digest)?;
            return Ok(logps);
        }
        let size = recipe.eval_batch_size;
        let logps = within_memory(
            || {
                let workers = &self.workers;
                Ok::<_, TrainError>(ReferenceLogps::compute(
                    reference, pairs, size, workers, &label,
                ))
            },
            || Shortage {
                place: format!("{label}, batches of {size} pairs"),
                lower: "`preference.eval_batch_size` or `data.max_length`".into(),
                rows: Vec::new(),
            },
        )?;
        if let Some((pair, value)) = logps.not_finite() {
            return Err(TrainError::NotFinite {
                place: label,
                what: "logp",
                value: f64::from(value),
                rows: vec![pairs[pair].row.to_string()],
            });
        }
        logps.write(&path, &self.digest)?;
        if let Some((cache, key)) = cached
            && let Err(error) = cache.put(key, &logps)
        {
            eprintln!("warning: the cache of reference logps was not written: {error}");
        }
        Ok(logps)
    }

    /// The cache's key for some pairs under the reference.
    fn cache_key(&self, pairs: &[PreferencePair], size: usize) -> Result<String, TrainError> {
        let model = match (&self.recipe.sft, &self.recipe.model.path) {
            (Some(_), _) => model_digest(&self.path(names::SFT))?,
            (None, Some(folder)) => model_digest(folder)?,
            // A fresh model is a function of these.
            (None, None) => format!("fresh {} {:?}", self.recipe.seed, self.recipe.model),
        };
        let device = self.device_name.split(',').next().unwrap_or_default();
        let device = match self.recipe.precision {
            Precision::F32 => device.to_string(),
            Precision::Bf16 => format!("{device} bf16"),
        };
        Ok(ReferenceCache::key(&model, pairs, size, &device))
    }

    fn logps_path(&self, split: &str) -> PathBuf {
        self.path(&format!("reference_logps.{split}.safetensors"))
    }

    /// A learner at the stage's newest whole checkpoint, or at its start.
    fn begin(
        &self,
        stage: &Stage<'_>,
        base: &Transformer,
        model: Transformer,
        optimizer: AdamW,
    ) -> Result<(Learner, Done), TrainError> {
        let checkpoints = self.path(names::CHECKPOINTS);
        let newest = checkpoint::newest(&checkpoints, stage.name, &self.digest)?;
        let placed = |learner: Learner| {
            learner
                .with_workers(self.workers.clone())
                .with_devices(&self.devices)
        };
        if newest.damaged.is_empty() {
            // A run that was killed right after saving has one more than it keeps.
            checkpoint::prune(&checkpoints, stage.name, self.recipe.checkpoints.keep)?;
        }
        for line in newest.damaged {
            eprintln!("warning: {line}; passed over");
        }
        let Some((path, position)) = newest.whole else {
            let learner = placed(Learner::new(model, optimizer));
            return Ok((learner, Done::default()));
        };
        eprintln!("resuming from {}", path.display());
        let model = checkpoint::read_weights(&path, base)?;
        let model = match model.lora_config() {
            Some(_) => model,
            None => self.recipe.trainable(model)?,
        };
        let learner = placed(checkpoint::load(&path, &position, model, optimizer)?);
        let done = Done {
            step: position.step,
            n_tokens: position.n_tokens,
            seconds: position.seconds,
            best: position.best,
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
        let options = Generate {
            max_new_tokens: numbers.max_new_tokens,
            eos_ids: vec![task.task.eos_id()],
            decoding: Decoding::Sample(Sampling::default()),
            seed,
        };
        let sample = |model: &Transformer, label: &str| -> Result<Vec<Generated>, TrainError> {
            sample_completions(model, &prompts, &options, (&self.workers, label), None)
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

/// What the pairs of a split are compared with.
struct Against {
    /// The reference's logps; none where the model itself is asked.
    logps: Option<ReferenceLogps>,
    /// Logps of a model of good completions and of one of bad ones.
    contrast: Option<(ReferenceLogps, ReferenceLogps, ContrastRecipe)>,
    /// Weights of tokens from the data.
    weights: Option<ReferenceLogps>,
}

impl Against {
    /// What some pairs, laid out as `batch`, are compared with.
    fn compared(
        &self,
        pairs: &[usize],
        batch: &CompletionBatch,
        reference: &Transformer,
    ) -> Compared {
        let device = &batch.device();
        let reference = match &self.logps {
            Some(logps) => Reference::Logps(logps.of(pairs, batch, device).into()),
            None => Reference::Model(Box::new(reference.clone().to_device(device))),
        };
        let token_weights = self.contrast.as_ref().map(|(positive, negative, recipe)| {
            let positive = positive.of(pairs, batch, device);
            let negative = negative.of(pairs, batch, device);
            let weights = |positive: &TokenLogps, negative: &TokenLogps, scale: f64| {
                let contrast = Contrast {
                    scale,
                    low: recipe.low,
                    high: recipe.high,
                };
                contrastive_weights(positive, negative, contrast)
            };
            PairTable {
                chosen: weights(&positive.chosen, &negative.chosen, recipe.scale),
                rejected: weights(&positive.rejected, &negative.rejected, -recipe.scale),
            }
        });
        let of_data = self.weights.as_ref().map(|weights| {
            let table = weights.of(pairs, batch, device);
            PairTable {
                chosen: table.chosen.values,
                rejected: table.rejected.values,
            }
        });
        Compared {
            reference,
            token_weights: token_weights.or(of_data),
        }
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
    checkpoint::write_whole(path, |inner| {
        tokenizer.save(inner)?;
        model.write(inner)?;
        if manifest {
            checkpoint::write_manifest(inner)?;
        }
        Ok(())
    })
}

/// Writes a PEFT folder, adapters and tokenizer, whole or not at all; `base` is the folder of the
/// model beneath.
fn write_adapter(
    path: &Path,
    model: &Transformer,
    tokenizer: &Tokenizer,
    base: Option<&str>,
) -> Result<(), TrainError> {
    checkpoint::write_whole(path, |inner| {
        tokenizer.save(inner)?;
        model.write_adapter(inner, base)?;
        Ok(())
    })
}

/// The most memory that this process has held, where the system tells it.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
