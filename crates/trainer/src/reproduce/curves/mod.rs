//! Where implicit rewards go in training: the paper's Figure 3 (arXiv 2404.12358, section 5.4).
//!
//! Policies are trained by DPO from three references, each at several `beta`. On fresh pairs the
//! mean reward of the chosen completions cannot exceed `β KL(p_w || π_ref)`, with `p_w` what chosen
//! completions are drawn from: `E_{p_w} r̂ = β (KL(p_w || π_ref) − KL(p_w || π))`.

mod page;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use dpo_loss::Beta;
use lm::data::PreferencePair;
use lm::{CompletionBatch, Decoding, Generate, Sampling, Transformer};
use memo_task::Split;
use serde::{Deserialize, Serialize};

use super::Target;
use super::credit::token_logps;
use super::fit::Descent;
use super::statistics::{OverSeeds, mean};
use crate::error::TrainError;
use crate::evaluate::{sample_completions, true_rewards};
use crate::folder;
use crate::learner::{
    Activations, Compared, Learner, Reference, preference_micro_batch, sft_micro_batch,
};
use crate::prepare::{Prepared, prepare};
use crate::recipe::Recipe;
use crate::reference::{ReferenceLogps, pair_batch};
use crate::workers::Workers;

/// The recipe that `r2q reproduce curves` trains by.
const RECIPE: &str = include_str!("curves.toml");

/// What a policy begins from and is compared with.
pub const REFERENCES: [&str; 3] = ["base", "SFT on chosen", "SFT on both"];

/// What the experiment takes.
#[derive(Clone, Debug)]
pub struct CurvesOptions {
    /// Sizes and optimizers; its `beta` is not used.
    pub recipe: Recipe,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Strengths of the divergence, in reward units a nat.
    pub betas: Vec<f64>,
    /// Chosen completions, beside those of the pairs, that the best fit sees.
    pub fit_examples: usize,
    /// How often a policy is looked at while it trains.
    pub evaluations: usize,
    /// The folder that is written.
    pub out: PathBuf,
    /// Name of the device.
    pub device: String,
    /// The command line, for the page.
    pub command: String,
}

impl CurvesOptions {
    /// Three seeds at the size that the book reports.
    ///
    /// # Errors
    ///
    /// None but a defect of the recipe within.
    pub fn standard(out: PathBuf) -> Result<Self, TrainError> {
        Ok(Self {
            recipe: Recipe::parse(RECIPE, "curves.toml")?,
            seeds: vec![1, 2, 3],
            betas: vec![0.3, 1.0, 3.0],
            fit_examples: 12_000,
            evaluations: 4,
            out,
            device: "cpu".into(),
            command: "cargo xtask reproduce curves".into(),
        })
    }

    fn check(&self) -> Result<Vec<Beta>, TrainError> {
        super::check_out(&self.out)?;
        super::check_distinct("curves", "--seeds", &self.seeds)?;
        super::check_distinct("curves", "--betas", &self.betas)?;
        let refuse = |reason: String| TrainError::Recipe {
            file: "reproduce curves".into(),
            reason,
        };
        let recipe = &self.recipe;
        if recipe.task.is_none() || recipe.sft.is_none() || recipe.lora.is_some() {
            let reason = "expected a recipe with [task] and [sft] and without [lora]";
            return Err(refuse(reason.into()));
        }
        if self.seeds.is_empty() || self.betas.is_empty() || self.evaluations == 0 {
            let reason = "expected at least one seed, one beta and one evaluation";
            return Err(refuse(reason.into()));
        }
        let betas = self
            .betas
            .iter()
            .map(|&beta| Beta::new(beta).map_err(|error| refuse(format!("beta {beta}: {error}"))));
        betas.collect()
    }

    /// What a seed's figures depend on.
    fn settings(&self, seed: u64) -> Result<String, TrainError> {
        let mut recipe = self.recipe.clone();
        recipe.seed = seed;
        Ok(format!(
            "{}\nbetas {:?} fit {} evaluations {} device {}",
            recipe.to_toml()?,
            self.betas,
            self.fit_examples,
            self.evaluations,
            self.device
        ))
    }
}

/// A policy at one time of its training, on fresh pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done.
    pub step: usize,
    /// Mean implicit reward of the chosen completions, reward units.
    pub chosen: f64,
    /// Its standard error.
    pub chosen_error: f64,
    /// Mean implicit reward of the rejected completions, reward units.
    pub rejected: f64,
    /// `chosen` less the bound, reward units.
    pub excess: f64,
    /// The standard error of that difference, pair by pair.
    pub excess_error: f64,
    /// `KL(π || π_ref)` of whole completions, nats, from samples of the policy.
    pub kl: f64,
    /// Mean true reward of those samples.
    pub true_reward: f64,
}

/// The course of one policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// One of [`REFERENCES`].
    pub reference: String,
    /// Reward units a nat.
    pub beta: f64,
    /// `β (CE(p_w, π_ref) − CE(p_w, best fit))`, reward units: at most the bound of the theory.
    pub bound: f64,
    /// From before the first step to behind the last.
    pub points: Vec<Point>,
}

impl Cell {
    fn last(&self) -> &Point {
        &self.points[self.points.len() - 1]
    }

    fn margin(&self) -> f64 {
        self.last().chosen - self.last().rejected
    }
}

/// The figures of one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// What they depend on.
    pub settings: String,
    /// Cross-entropy of fresh chosen completions, nats each, under every reference and the best
    /// fit.
    pub cross_entropies: BTreeMap<String, f64>,
    /// Every reference at every `beta`.
    pub cells: Vec<Cell>,
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
pub struct CurvesResults {
    /// The command line.
    pub command: String,
    /// The device.
    pub device: String,
    /// Threads of the machine.
    pub threads: usize,
    /// Strengths of the divergence.
    pub betas: Vec<f64>,
    /// What was claimed beforehand.
    pub targets: Vec<Target>,
    /// Each seed.
    pub seeds: Vec<SeedResult>,
}

/// Name of the model that is fitted to more chosen completions than any other.
const BEST_FIT: &str = "best fit";

/// Trains every cell and writes `results.json` and `report.html` into the folder.
///
/// # Errors
///
/// Options or a recipe that do not fit, or anything that goes wrong in training or on the disk.
pub fn run(options: &CurvesOptions) -> Result<CurvesResults, TrainError> {
    let betas = options.check()?;
    let _lock = folder::enter(&options.out)?;
    let seeds = super::of_seeds(
        &options.out,
        &options.seeds,
        |seed| options.settings(seed),
        |seed, settings, _| one_seed(options, &betas, seed, settings),
        |result| format!("{} cells, {:.0} s", result.cells.len(), result.seconds),
    )?;
    let results = CurvesResults {
        command: options.command.clone(),
        device: options.device.clone(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        betas: options.betas.clone(),
        targets: targets(&seeds, &options.betas),
        seeds,
    };
    super::write_json(&options.out.join("results.json"), &results)?;
    report::write_atomically(&options.out.join("report.html"), &page::page(&results))?;
    Ok(results)
}

/// Prompts with completions, as token ids.
type Texts<'a> = Vec<(&'a [u32], &'a [u32])>;

fn sums(model: &Transformer, texts: &Texts<'_>, workers: &Workers) -> Vec<f64> {
    let logps = token_logps(model, texts, workers);
    logps.iter().map(|logps| logps.iter().sum()).collect()
}

/// Fine-tunes a copy of a model on completions.
fn fine_tune(
    descent: &Descent<'_>,
    model: &Transformer,
    texts: &Texts<'_>,
    workers: &Workers,
) -> Result<Transformer, TrainError> {
    let micro = |model: &Transformer, batch: &[usize]| {
        let rows: Texts<'_> = batch.iter().map(|&index| texts[index]).collect();
        let batch = CompletionBatch::new(&rows, &model.device());
        sft_micro_batch(model, &batch, Activations::Keep)
    };
    descent.run(model, workers, micro, |_, _| Ok(()))
}

/// What every cell of a seed is looked at with.
struct Fresh<'a> {
    prepared: &'a Prepared,
    chosen: Texts<'a>,
    rejected: Texts<'a>,
    /// Logps of `chosen` under the best fit.
    best: Vec<f64>,
    workers: &'a Workers,
    recipe: &'a Recipe,
}

fn one_seed(
    options: &CurvesOptions,
    betas: &[Beta],
    seed: u64,
    settings: String,
) -> Result<SeedResult, TrainError> {
    let began = Instant::now();
    let mut recipe = options.recipe.clone();
    recipe.seed = seed;
    let device = crate::device::device(&options.device)?;
    let workers = Workers::on(&device, recipe.workers);
    let prepared = prepare(&recipe, &device)?;
    let task = &prepared
        .task
        .as_ref()
        .expect("a checked recipe has a task")
        .task;

    let stage = recipe
        .sft
        .as_ref()
        .expect("a checked recipe has this stage");
    let fine_tune = |model: &Transformer, name: &str, texts: &Texts<'_>| {
        let descent = Descent::fine_tuning(name, texts.len(), stage, seed);
        fine_tune(&descent, model, texts, &workers)
    };

    let examples: Texts<'_> = prepared
        .sft
        .iter()
        .map(|example| (&example.prompt_ids[..], &example.completion_ids[..]))
        .collect();
    let base = fine_tune(&prepared.model, REFERENCES[0], &examples)?;
    let chosen_texts: Texts<'_> = prepared
        .train
        .iter()
        .map(|pair| (&pair.prompt_ids[..], &pair.chosen_ids[..]))
        .collect();
    let on_chosen = fine_tune(&base, REFERENCES[1], &chosen_texts)?;
    let both: Texts<'_> = prepared
        .train
        .iter()
        .flat_map(|pair| {
            [&pair.chosen_ids, &pair.rejected_ids].map(|ids| (&pair.prompt_ids[..], &ids[..]))
        })
        .collect();
    let on_both = fine_tune(&base, REFERENCES[2], &both)?;
    // Other pairs of the same distribution, and those of the policies again.
    let more = task.pairs(Split::Train, options.fit_examples, !seed);
    let further: Texts<'_> = more
        .iter()
        .map(|pair| (&pair.prompt_ids[..], &pair.chosen.ids[..]))
        .chain(chosen_texts.iter().copied())
        .collect();
    let best_fit = fine_tune(&on_chosen, BEST_FIT, &further)?;

    let side = |ids: fn(&PreferencePair) -> &[u32]| -> Texts<'_> {
        let pairs = prepared.eval.iter();
        pairs
            .map(|pair| (&pair.prompt_ids[..], ids(pair)))
            .collect()
    };
    let mut fresh = Fresh {
        prepared: &prepared,
        chosen: side(|pair| &pair.chosen_ids),
        rejected: side(|pair| &pair.rejected_ids),
        best: Vec::new(),
        workers: &workers,
        recipe: &recipe,
    };
    fresh.best = sums(&best_fit, &fresh.chosen, &workers);
    let nats = |logps: &[f64]| -mean(logps).unwrap_or(0.0);
    let mut cross_entropies: BTreeMap<String, f64> = BTreeMap::new();
    cross_entropies.insert(BEST_FIT.into(), nats(&fresh.best));
    let mut cells = Vec::new();
    for (name, reference) in REFERENCES.iter().zip([&base, &on_chosen, &on_both]) {
        let logps = [&fresh.chosen, &fresh.rejected].map(|texts| sums(reference, texts, &workers));
        cross_entropies.insert((*name).into(), nats(&logps[0]));
        let label = format!("logps of {name}");
        let size = recipe.preference.eval_batch_size;
        let against = ReferenceLogps::compute(reference, &prepared.train, size, &workers, &label);
        for &beta in betas {
            cells.push(fresh.cell(options, name, reference, &logps, &against, beta)?);
        }
    }
    Ok(SeedResult {
        seed,
        settings,
        cross_entropies,
        cells,
        seconds: began.elapsed().as_secs_f64(),
    })
}

impl Fresh<'_> {
    /// Trains a policy and looks at it on the way.
    fn cell(
        &self,
        options: &CurvesOptions,
        name: &str,
        reference: &Transformer,
        logps: &[Vec<f64>; 2],
        against: &ReferenceLogps,
        beta: Beta,
    ) -> Result<Cell, TrainError> {
        let pairs = &self.prepared.train;
        let stage = &self.recipe.preference;
        let label = format!("{name}, beta {}", beta.get());
        let micro = |model: &Transformer, indices: &[usize]| {
            let device = model.device();
            let batch = pair_batch(
                indices.iter().map(|&index| &pairs[index]),
                reference.config().hidden_size,
                &device,
            );
            let logps = against.of(indices, &batch, &device);
            let compared: Compared = Reference::Logps(logps.into()).into();
            let objective = &stage.objective;
            preference_micro_batch(model, &batch, &compared, objective, beta, Activations::Keep)
        };
        let descent = Descent::preference(&label, pairs.len(), stage, self.recipe.seed);
        let every = descent.n_steps().div_ceil(options.evaluations).max(1);
        let mut points = vec![self.look(0, reference, reference, logps, beta)?];
        let n_steps = descent.n_steps();
        descent.run(reference, self.workers, micro, |step, learner: &Learner| {
            if step % every == 0 || step == n_steps {
                let policy = learner.snapshot();
                points.push(self.look(step, &policy, reference, logps, beta)?);
            }
            Ok(())
        })?;
        let gain: Vec<f64> = self
            .best
            .iter()
            .zip(&logps[0])
            .map(|(b, r)| b - r)
            .collect();
        Ok(Cell {
            reference: name.into(),
            beta: beta.get(),
            bound: beta.get() * mean(&gain).unwrap_or(0.0),
            points,
        })
    }

    fn look(
        &self,
        step: usize,
        policy: &Transformer,
        reference: &Transformer,
        logps: &[Vec<f64>; 2],
        beta: Beta,
    ) -> Result<Point, TrainError> {
        let beta = beta.get();
        let rewards = |ours: &[f64], theirs: &[f64]| -> Vec<f64> {
            let both = ours.iter().zip(theirs);
            both.map(|(ours, theirs)| beta * (ours - theirs)).collect()
        };
        let chosen = sums(policy, &self.chosen, self.workers);
        let rejected = sums(policy, &self.rejected, self.workers);
        let (reward, reward_error) = with_error(&rewards(&chosen, &logps[0]));
        let (excess, excess_error) = with_error(&rewards(&chosen, &self.best));

        let task = self
            .prepared
            .task
            .as_ref()
            .expect("a checked recipe has a task");
        let prompts: Vec<&[u32]> = task.prompts.iter().map(|(_, ids)| &ids[..]).collect();
        let max_new = self
            .recipe
            .task
            .as_ref()
            .map_or(0, |task| task.max_new_tokens);
        let options = Generate {
            max_new_tokens: max_new,
            eos_ids: vec![task.task.eos_id()],
            decoding: Decoding::Sample(Sampling::default()),
            seed: self.recipe.seed,
        };
        let on = (self.workers, "samples");
        let samples = sample_completions(policy, &prompts, &options, on, None)?;
        let drawn: Texts<'_> = prompts
            .iter()
            .zip(&samples)
            .map(|(prompt, sample)| (*prompt, &sample.ids[..]))
            .collect();
        let ours = sums(policy, &drawn, self.workers);
        let theirs = sums(reference, &drawn, self.workers);
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a - b).collect();
        Ok(Point {
            step,
            chosen: reward,
            chosen_error: reward_error,
            rejected: mean(&rewards(&rejected, &logps[1])).unwrap_or(0.0),
            excess,
            excess_error,
            kl: mean(&ratios).unwrap_or(0.0),
            true_reward: mean(&true_rewards(task, &samples)).unwrap_or(0.0),
        })
    }
}

/// A mean and its standard error, which is infinite for fewer than two values.
fn with_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = mean(values).unwrap_or(0.0);
    if values.len() < 2 {
        return (mean, f64::INFINITY);
    }
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// A figure of one cell over the seeds.
fn over(
    seeds: &[SeedResult],
    reference: &str,
    beta: f64,
    figure: fn(&Cell) -> f64,
) -> Option<OverSeeds> {
    let cells = seeds.iter().filter_map(|seed| {
        let mut cells = seed.cells.iter();
        cells.find(|cell| cell.reference == reference && cell.beta.total_cmp(&beta).is_eq())
    });
    OverSeeds::of(cells.map(figure).collect())
}

/// Standard errors by which a reward may exceed the bound: with some two hundred looks, each at its
/// own error, one in a few thousand does so by this much where the two are equal.
const SLACK: f64 = 3.5;

/// The claims made before anything was measured.
fn targets(seeds: &[SeedResult], betas: &[f64]) -> Vec<Target> {
    let looks = seeds.iter().flat_map(|seed| &seed.cells);
    let worst = looks
        .flat_map(|cell| &cell.points)
        .map(|point| point.excess / point.excess_error)
        .fold(f64::NEG_INFINITY, f64::max);
    let mut targets = vec![Target {
        claim: "the chosen reward never exceeds the bound on fresh pairs".into(),
        measured: format!("at most {worst:.1} standard errors above it"),
        held: Some(worst <= SLACK),
    }];
    let mut claim = |claim: String,
                     figures: &[(&str, OverSeeds)],
                     holds: fn(&[[f64; 2]]) -> bool| {
        let intervals: Option<Vec<[f64; 2]>> = figures.iter().map(|(_, f)| f.interval).collect();
        let measured: Vec<String> = figures
            .iter()
            .map(|(name, figure)| match figure.interval {
                Some([low, high]) => format!("{name} {:.2} [{low:.2}, {high:.2}]", figure.mean),
                None => format!("{name} {:.2} (one seed)", figure.mean),
            })
            .collect();
        targets.push(Target {
            claim,
            measured: measured.join(", "),
            held: intervals.map(|intervals| holds(&intervals)),
        });
    };
    for reference in REFERENCES {
        for &beta in betas {
            let of = |figure| over(seeds, reference, beta, figure);
            let (Some(chosen), Some(rejected), Some(margin)) = (
                of(|cell| cell.last().chosen),
                of(|cell| cell.last().rejected),
                of(Cell::margin),
            ) else {
                continue;
            };
            let ends = [("chosen", chosen), ("rejected", rejected)];
            if reference == REFERENCES[0] {
                claim(
                    format!("{reference}, beta {beta}: the chosen reward ends above 0"),
                    &ends,
                    |intervals| intervals[0][0] > 0.0,
                );
            } else {
                claim(
                    format!("{reference}, beta {beta}: both rewards end below 0"),
                    &ends,
                    |intervals| intervals.iter().all(|interval| interval[1] < 0.0),
                );
            }
            claim(
                format!("{reference}, beta {beta}: the margin grows"),
                &[("margin", margin)],
                |intervals| intervals[0][0] > 0.0,
            );
        }
    }
    targets
}
