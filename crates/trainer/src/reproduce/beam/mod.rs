//! Does a search by likelihood find better completions: the paper's Figure 2 (arXiv 2404.12358,
//! section 5.2).
//!
//! Policies are trained by DPO at several `beta`, and each decodes held-out prompts by sampling,
//! greedily, by beams of rising width, by tree search, by best-of-N and, where it can be proven,
//! with the likeliest completion of all. Each completion has its true reward. See the book's page.

mod methods;
mod page;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use dpo_loss::Beta;
use lm::{CompletionBatch, PrefixCache, Transformer};
use memo_task::{Pair, Split};
use serde::{Deserialize, Serialize};

use super::Target;
use super::credit::token_logps;
use super::fit::Descent;
use super::statistics::{OverSeeds, mean};
use crate::error::TrainError;
use crate::evaluate::wins;
use crate::folder;
use crate::learner::{Activations, Compared, Reference, preference_micro_batch, sft_micro_batch};
use crate::prepare::{Prepared, prepare};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::reference::{ReferenceLogps, pair_batch};
use crate::workers::Workers;

use methods::{Caches, Found, Limits, Method, Ranking};

/// The recipe that `r2q reproduce beam` trains by.
const RECIPE: &str = include_str!("beam.toml");

/// What the experiment takes.
#[derive(Clone, Debug)]
pub struct BeamOptions {
    /// The embedded task with both stages; its `beta` is not used.
    pub recipe: Recipe,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Strengths of the divergence, in reward units a nat.
    pub betas: Vec<f64>,
    /// Widths of beams, rising, and numbers of draws to choose from.
    pub widths: Vec<usize>,
    /// Held-out prompts of a seed.
    pub prompts: usize,
    /// States that the search for the likeliest completion expands at the most, for each prompt.
    pub map_states: usize,
    /// Simulations of the tree search for each token.
    pub simulations: usize,
    /// The folder that is written.
    pub out: PathBuf,
    /// Name of the device.
    pub device: String,
    /// The command line, for the page.
    pub command: String,
}

/// The widest beam: a wider one would fill the memory before anything could be said.
const WIDEST: usize = 1 << 12;

impl BeamOptions {
    /// Three seeds at the size that the book reports.
    ///
    /// # Errors
    ///
    /// None but a defect of the recipe within.
    pub fn standard(out: PathBuf) -> Result<Self, TrainError> {
        Ok(Self {
            recipe: Recipe::parse(RECIPE, "beam.toml")?,
            seeds: vec![1, 2, 3],
            betas: vec![0.3, 1.0, 3.0],
            widths: vec![2, 5, 10, 20],
            prompts: 96,
            map_states: 4000,
            simulations: 16,
            out,
            device: "cpu".into(),
            command: "cargo xtask reproduce beam".into(),
        })
    }

    fn check(&self) -> Result<Vec<Beta>, TrainError> {
        super::check_out(&self.out)?;
        super::check_distinct("beam", "--seeds", &self.seeds)?;
        super::check_distinct("beam", "--betas", &self.betas)?;
        let recipe = &self.recipe;
        if recipe.task.is_none() || recipe.sft.is_none() || recipe.lora.is_some() {
            let reason = "expected a recipe with [task] and [sft] and without [lora]";
            return Err(refuse(reason));
        }
        if self.seeds.is_empty() || self.betas.is_empty() || self.widths.is_empty() {
            return Err(refuse("expected at least one seed, one beta and one width"));
        }
        if !self.widths.is_sorted_by(|a, b| a < b) || self.widths[0] < 2 {
            let reason = format!("expected rising widths from 2, found {:?}", self.widths);
            return Err(refuse(reason));
        }
        if self.widest() > WIDEST {
            let reason = format!("expected widths up to {WIDEST}, got {}", self.widest());
            return Err(refuse(reason));
        }
        if self.prompts == 0 || self.map_states == 0 || self.simulations == 0 {
            let reason = "expected at least one prompt, one state for MAP and one simulation";
            return Err(refuse(reason));
        }
        let betas = self
            .betas
            .iter()
            .map(|&beta| Beta::new(beta).map_err(|error| refuse(format!("beta {beta}: {error}"))));
        betas.collect()
    }

    /// The width of the paper's claim, or the narrowest.
    fn middle(&self) -> usize {
        let paper = self.widths.iter().find(|&&width| width == 5);
        *paper.unwrap_or(&self.widths[0])
    }

    fn widest(&self) -> usize {
        self.widths[self.widths.len() - 1]
    }

    /// What a seed's figures depend on.
    fn settings(&self, seed: u64) -> Result<String, TrainError> {
        let mut recipe = self.recipe.clone();
        recipe.seed = seed;
        Ok(format!(
            "{}\nbetas {:?} widths {:?} prompts {} map {} simulations {} device {}",
            recipe.to_toml()?,
            self.betas,
            self.widths,
            self.prompts,
            self.map_states,
            self.simulations,
            self.device
        ))
    }
}

fn refuse(reason: impl Into<String>) -> TrainError {
    TrainError::Recipe {
        file: "reproduce beam".into(),
        reason: reason.into(),
    }
}

/// What one way of decoding came to: means over the prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which way.
    pub method: String,
    /// True reward, reward units.
    pub true_reward: f64,
    /// The same less that of the greedy completion of the same prompt.
    pub gain: f64,
    /// `β Σ log(π/π_ref)`, reward units.
    pub implicit_reward: f64,
    /// `Σ log π`, nats.
    pub logp: f64,
    /// Tokens, the end token included.
    pub tokens: f64,
    /// The share that was cut at the most tokens allowed.
    pub cut: f64,
    /// How often it is better than the chosen completion of the prompt; a tie counts half.
    pub wins_chosen: f64,
    /// How often it is better than the greedy completion; a tie counts half.
    pub wins_greedy: f64,
    /// Tokens through the policy for each prompt.
    pub states: f64,
    /// The share that is proven to be the likeliest of all.
    pub certified: f64,
}

impl Outcome {
    /// The figures with their names, in the order of the page's table.
    fn figures(&self) -> [(&'static str, f64); 10] {
        [
            ("true_reward", self.true_reward),
            ("gain", self.gain),
            ("implicit_reward", self.implicit_reward),
            ("logp", self.logp),
            ("tokens", self.tokens),
            ("cut", self.cut),
            ("wins_chosen", self.wins_chosen),
            ("wins_greedy", self.wins_greedy),
            ("states", self.states),
            ("certified", self.certified),
        ]
    }
}

/// One policy's outcomes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Reward units a nat.
    pub beta: f64,
    /// Every way of decoding.
    pub outcomes: Vec<Outcome>,
}

/// The figures of one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// What they depend on.
    pub settings: String,
    /// Mean true reward of the chosen completions of the prompts.
    pub chosen_reward: f64,
    /// Mean tokens of the chosen completions.
    pub chosen_tokens: f64,
    /// Every `beta`.
    pub cells: Vec<Cell>,
    /// Time, training included.
    pub seconds: f64,
}

/// A way of decoding at one `beta`, over seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Reward units a nat.
    pub beta: f64,
    /// Which way.
    pub method: String,
    /// By the names of the fields of [`Outcome`].
    pub figures: BTreeMap<String, OverSeeds>,
}

impl super::OfSeed for SeedResult {
    fn settings(&self) -> &str {
        &self.settings
    }
}

/// Everything that came out: what `results.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BeamResults {
    /// The command line.
    pub command: String,
    /// The device.
    pub device: String,
    /// Threads of the machine.
    pub threads: usize,
    /// Strengths of the divergence.
    pub betas: Vec<f64>,
    /// Widths of the beams.
    pub widths: Vec<usize>,
    /// What was claimed beforehand.
    pub targets: Vec<Target>,
    /// Over seeds.
    pub rows: Vec<Row>,
    /// Each seed.
    pub seeds: Vec<SeedResult>,
}

/// Trains, decodes and writes `results.json` and `report.html` into the folder.
///
/// # Errors
///
/// Options or a recipe that do not fit, or anything that goes wrong in training or on the disk.
pub fn run(options: &BeamOptions) -> Result<BeamResults, TrainError> {
    let betas = options.check()?;
    let _lock = folder::enter(&options.out)?;
    let seeds = super::of_seeds(
        &options.out,
        &options.seeds,
        |seed| options.settings(seed),
        |seed, settings, _| one_seed(options, &betas, seed, settings),
        |result| format!("{:.0} s", result.seconds),
    )?;
    let results = BeamResults {
        command: options.command.clone(),
        device: options.device.clone(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        betas: options.betas.clone(),
        widths: options.widths.clone(),
        targets: targets(options, &seeds),
        rows: rows(options, &seeds),
        seeds,
    };
    super::write_json(&options.out.join("results.json"), &results)?;
    report::write_atomically(&options.out.join("report.html"), &page::page(&results))?;
    Ok(results)
}

fn one_seed(
    options: &BeamOptions,
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
    let reference = fine_tune(&recipe, &prepared, &workers)?;
    let task = &prepared
        .task
        .as_ref()
        .expect("a checked recipe has a task")
        .task;
    let pairs = task.pairs(Split::Eval, options.prompts, seed);
    let chosen: Vec<f64> = pairs
        .iter()
        .map(|pair| pair.chosen.total_reward())
        .collect();
    let lengths: Vec<f64> = pairs
        .iter()
        .map(|pair| pair.chosen.ids.len() as f64)
        .collect();
    let size = recipe.preference.eval_batch_size;
    let against = ReferenceLogps::compute(
        &reference,
        &prepared.train,
        size,
        &workers,
        "logps of the reference",
    );
    let mut cells = Vec::new();
    for &beta in betas {
        let policy = prefer(&recipe, &prepared, &reference, &against, beta, &workers)?;
        let models = [&policy, &reference];
        cells.push(cell(
            options, &recipe, task, &pairs, models, beta, &workers,
        )?);
    }
    Ok(SeedResult {
        seed,
        settings,
        chosen_reward: mean(&chosen).unwrap_or(0.0),
        chosen_tokens: mean(&lengths).unwrap_or(0.0),
        cells,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The reference.
fn fine_tune(
    recipe: &Recipe,
    prepared: &Prepared,
    workers: &Workers,
) -> Result<Transformer, TrainError> {
    let stage = recipe
        .sft
        .as_ref()
        .expect("a checked recipe has this stage");
    let examples = &prepared.sft;
    let descent = Descent::fine_tuning("SFT", examples.len(), stage, recipe.seed);
    let micro = |model: &Transformer, batch: &[usize]| {
        let rows: Vec<(&[u32], &[u32])> = batch
            .iter()
            .map(|&index| &examples[index])
            .map(|example| (&example.prompt_ids[..], &example.completion_ids[..]))
            .collect();
        let batch = CompletionBatch::new(&rows, &model.device());
        sft_micro_batch(model, &batch, Activations::Keep)
    };
    descent.run(&prepared.model, workers, micro, |_, _| Ok(()))
}

/// A policy.
fn prefer(
    recipe: &Recipe,
    prepared: &Prepared,
    reference: &Transformer,
    against: &ReferenceLogps,
    beta: Beta,
    workers: &Workers,
) -> Result<Transformer, TrainError> {
    let (pairs, stage) = (&prepared.train, &recipe.preference);
    let label = format!("policy, beta {}", beta.get());
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
    let descent = Descent::preference(&label, pairs.len(), stage, recipe.seed);
    descent.run(reference, workers, micro, |_, _| Ok(()))
}

/// Prompts that share the laid-out weights of a policy and its reference.
const PROMPTS: usize = 4;

fn cell(
    options: &BeamOptions,
    recipe: &Recipe,
    task: &memo_task::MemoTask,
    pairs: &[Pair],
    [policy, reference]: [&Transformer; 2],
    beta: Beta,
    workers: &Workers,
) -> Result<Cell, TrainError> {
    let limits = Limits {
        widths: &options.widths,
        max_new_tokens: recipe.task.as_ref().map_or(1, |task| task.max_new_tokens),
        map_states: options.map_states,
        simulations: options.simulations,
    };
    let label = format!("decoding, beta {}", beta.get());
    let progress = Mutex::new(Progress::new(&label, "prompts", pairs.len(), 0));
    let chunks: Vec<&[Pair]> = pairs.chunks(PROMPTS).collect();
    let found = workers.map(chunks.len(), |index| {
        let mut caches = Caches {
            alone: PrefixCache::new(policy),
            beside: PrefixCache::new(policy).with_reference(reference)?,
        };
        let mut all = Vec::new();
        for (at, pair) in chunks[index].iter().enumerate() {
            // Draws of its own for each prompt.
            let seed = recipe.seed ^ ((index * PROMPTS + at) as u64) << 32;
            let prompt = (&pair.memo, &pair.prompt_ids[..]);
            let found = methods::decode(&mut caches, limits, task, prompt, seed)
                .map_err(|error| refuse(error.to_string()))?;
            all.push(found);
            let mut progress = progress.lock().expect("no worker panics holding the lock");
            progress.advance(1, "");
        }
        Ok::<_, TrainError>(all)
    });
    let mut by_prompt: Vec<Vec<Found>> = Vec::new();
    for found in found {
        by_prompt.extend(found?);
    }
    let methods = Method::all(&options.widths);
    // Everything by method, prompts within.
    let texts: Vec<(&[u32], &[u32])> = (0..methods.len())
        .flat_map(|method| {
            let prompts = pairs.iter().zip(&by_prompt);
            prompts.map(move |(pair, found)| (&pair.prompt_ids[..], &found[method].ids[..]))
        })
        .collect();
    let sums = |model| -> Vec<f64> {
        let logps = token_logps(model, &texts, workers);
        logps.iter().map(|logps| logps.iter().sum()).collect()
    };
    let (logps, reference_logps) = (sums(policy), sums(reference));
    let truth = |method: usize| -> Vec<f64> {
        let prompts = pairs.iter().zip(&by_prompt);
        prompts
            .map(|(pair, found)| {
                let rewards = task.token_rewards(&pair.memo, &found[method].ids);
                rewards.iter().map(|token| token.reward).sum()
            })
            .collect()
    };
    let greedy = methods
        .iter()
        .position(|&method| method == Method::Greedy)
        .expect("greedy is a method");
    let greedy = truth(greedy);
    let chosen: Vec<f64> = pairs
        .iter()
        .map(|pair| pair.chosen.total_reward())
        .collect();
    let average = |values: &[f64]| mean(values).unwrap_or(0.0);
    let n = pairs.len();
    let outcomes = methods.iter().enumerate().map(|(index, method)| {
        let own = truth(index);
        let of = |value: fn(&Found) -> f64| {
            let values: Vec<f64> = by_prompt.iter().map(|found| value(&found[index])).collect();
            average(&values)
        };
        let ours = average(&logps[index * n..][..n]);
        let theirs = average(&reference_logps[index * n..][..n]);
        Outcome {
            method: method.name(),
            true_reward: average(&own),
            gain: average(&own) - average(&greedy),
            implicit_reward: beta.get() * (ours - theirs),
            logp: ours,
            tokens: of(|found| found.ids.len() as f64),
            cut: of(|found| f64::from(u8::from(found.cut))),
            wins_chosen: average(&wins(&own, &chosen)),
            wins_greedy: average(&wins(&own, &greedy)),
            states: of(|found| found.states as f64),
            certified: of(|found| f64::from(u8::from(found.certified))),
        }
    });
    Ok(Cell {
        beta: beta.get(),
        outcomes: outcomes.collect(),
    })
}

/// A figure of every seed, from its outcomes at one `beta`.
fn over(
    seeds: &[SeedResult],
    beta: f64,
    figure: impl Fn(&dyn Fn(Method) -> Outcome) -> f64,
) -> OverSeeds {
    let values = seeds.iter().map(|seed| {
        let outcome = |method: Method| {
            let mut cells = seed.cells.iter();
            let cell = cells.find(|cell| cell.beta.total_cmp(&beta).is_eq());
            let mut outcomes = cell.into_iter().flat_map(|cell| &cell.outcomes);
            let name = method.name();
            let found = outcomes.find(|outcome| outcome.method == name);
            found.expect("every seed has every outcome").clone()
        };
        figure(&outcome)
    });
    OverSeeds::of(values.collect()).expect("there are seeds")
}

fn rows(options: &BeamOptions, seeds: &[SeedResult]) -> Vec<Row> {
    let mut rows = Vec::new();
    for &beta in &options.betas {
        for method in Method::all(&options.widths) {
            let names = seeds[0].cells[0].outcomes[0].figures();
            let figures = names.iter().enumerate().map(|(at, (name, _))| {
                let figure = over(seeds, beta, |outcome| outcome(method).figures()[at].1);
                ((*name).to_string(), figure)
            });
            rows.push(Row {
                beta,
                method: method.name(),
                figures: figures.collect(),
            });
        }
    }
    rows
}

/// The claims made before anything was measured.
fn targets(options: &BeamOptions, seeds: &[SeedResult]) -> Vec<Target> {
    let (middle, widest) = (options.middle(), options.widest());
    let beam = |width| Method::Beam(width, Ranking::Likelihood);
    let by_length = |width| Method::Beam(width, Ranking::LikelihoodByLength);
    let mut targets = Vec::new();
    for &beta in &options.betas {
        let mut claim =
            |claim: String, figures: &[(&str, OverSeeds)], holds: &dyn Fn(&[[f64; 2]]) -> bool| {
                let intervals: Option<Vec<[f64; 2]>> =
                    figures.iter().map(|(_, figure)| figure.interval).collect();
                let measured: Vec<String> = figures
                    .iter()
                    .map(|(name, figure)| format!("{name} {}", page::signed(figure)))
                    .collect();
                targets.push(Target {
                    claim: format!("beta {beta}: {claim}"),
                    measured: measured.join(", "),
                    held: intervals.map(|intervals| holds(&intervals)),
                });
            };
        let gain = over(seeds, beta, |of| of(beam(middle)).gain);
        claim(
            format!("{middle} beams by likelihood have more true reward than greedy"),
            &[("difference", gain)],
            &|intervals| intervals[0][0] > 0.0,
        );
        let points = over(seeds, beta, |of| {
            of(beam(middle)).wins_chosen - of(Method::Sample).wins_chosen
        });
        let enough = points.mean >= 0.1;
        claim(
            format!("{middle} beams win 10 points more often against the chosen than samples do"),
            &[("difference", points)],
            &|intervals| enough && intervals[0][0] > 0.0,
        );
        if widest > middle {
            let truth = over(seeds, beta, |of| {
                of(beam(widest)).true_reward - of(beam(middle)).true_reward
            });
            let implicit = over(seeds, beta, |of| {
                of(beam(widest)).implicit_reward - of(beam(middle)).implicit_reward
            });
            claim(
                format!(
                    "from {middle} to {widest} beams the true reward falls and the implicit rises"
                ),
                &[("true", truth), ("implicit", implicit)],
                &|intervals| intervals[0][1] < 0.0 && intervals[1][0] > 0.0,
            );
        }
        let plain = over(seeds, beta, |of| {
            of(beam(widest)).tokens - of(Method::Greedy).tokens
        });
        let divided = over(seeds, beta, |of| {
            of(by_length(widest)).tokens - of(Method::Greedy).tokens
        });
        claim(
            format!("{widest} beams write more tokens than greedy by likelihood over length only"),
            &[("likelihood", plain), ("over length", divided)],
            &|intervals| intervals[0][0] <= 0.0 && intervals[1][0] > 0.0,
        );
    }
    targets
}
