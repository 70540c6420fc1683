//! Credit assignment: does a policy trained on labels of whole completions know which token was
//! wrong?
//!
//! Good completions of held-out memos are copied with one wrong value, or with two that training
//! never showed together, and every token of a copy is scored by the policy's implicit reward and
//! by five baselines. See the book's page on the experiment.

mod copies;
mod models;
mod oracle;
mod page;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use lm::{Decoder, Transformer};
use memo_task::{MemoTask, RewardKind};
use report::Token;
use serde::{Deserialize, Serialize};

use super::Target;
use super::statistics::{Leakage, OverSeeds, auroc_of_low, correlation, leakage, roc_of_low};
use crate::error::TrainError;
use crate::folder;
use crate::recipe::Recipe;
use crate::workers::Workers;

use copies::Copies;
use models::Models;

/// The recipe that `r2q reproduce credit` trains by.
const RECIPE: &str = include_str!("credit.toml");

/// The scores of a token, by name; low ones say that it is wrong. The first is the method, the
/// others are baselines.
pub const METHODS: [&str; 6] = [
    "implicit reward",
    SURPRISE,
    "policy logp",
    "SFT on chosen over base",
    "random reference",
    "sequence reward model",
];

/// How unlikely the reference finds a token.
const SURPRISE: &str = "reference surprise";

/// What the experiment takes.
#[derive(Clone, Debug)]
pub struct CreditOptions {
    /// Recipe of the policy: the embedded task with both stages. Its seed is replaced.
    pub recipe: Recipe,
    /// Seeds of data, weights and copies.
    pub seeds: Vec<u64>,
    /// Folder to write into; seeds that are done there, under the same settings, are not repeated.
    pub out: PathBuf,
    /// Good completions that are corrupted, for each seed.
    pub copies: usize,
    /// Copies whose tokens are compared with the oracle.
    pub oracle_copies: usize,
    /// Rollouts of the reference at each token for the oracle; even, since halves are compared.
    pub rollouts: usize,
    /// Name of the device.
    pub device: String,
    /// The command line, for the page.
    pub command: String,
}

impl CreditOptions {
    /// Five seeds at the size that the book reports.
    ///
    /// # Errors
    ///
    /// None but a defect of the recipe within.
    pub fn standard(out: PathBuf) -> Result<Self, TrainError> {
        Ok(Self {
            recipe: Recipe::parse(RECIPE, "credit.toml")?,
            seeds: (1..=5).collect(),
            out,
            copies: 256,
            oracle_copies: 16,
            rollouts: 128,
            device: "cpu".into(),
            command: "cargo xtask reproduce credit".into(),
        })
    }

    fn check(&self) -> Result<(), TrainError> {
        super::check_out(&self.out)?;
        super::check_distinct("credit", "--seeds", &self.seeds)?;
        let refuse = |reason: &str| {
            Err(TrainError::Recipe {
                file: "reproduce credit".into(),
                reason: reason.into(),
            })
        };
        let recipe = &self.recipe;
        if recipe.task.is_none() || recipe.sft.is_none() || recipe.lora.is_some() {
            return refuse("expected a recipe with [task] and [sft] and without [lora]");
        }
        if self.seeds.is_empty() || self.copies == 0 || self.oracle_copies == 0 {
            return refuse("expected at least one seed, one copy and one copy for the oracle");
        }
        if self.rollouts == 0 || !self.rollouts.is_multiple_of(4) {
            return refuse("expected a multiple of 4 rollouts above 0");
        }
        Ok(())
    }

    /// What a seed's figures depend on.
    fn settings(&self, seed: u64) -> Result<String, TrainError> {
        let mut recipe = self.recipe.clone();
        recipe.seed = seed;
        Ok(format!(
            "{}\ncopies {} oracle {} rollouts {} device {}",
            recipe.to_toml()?,
            self.copies,
            self.oracle_copies,
            self.rollouts,
            self.device
        ))
    }
}

/// How well one score finds wrong tokens, for one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodFigures {
    /// AUROC of low scores: the wrong token of each copy against all its other tokens.
    pub auroc: f64,
    /// The same against tokens that state a fact rightly.
    pub auroc_values: f64,
    /// Copies with two errors that training never showed together: the first of them.
    pub auroc_first: f64,
    /// The second of them.
    pub auroc_second: f64,
    /// The second, where it is the only error.
    pub auroc_second_alone: f64,
    /// The third of the wrong tokens that the reference finds likeliest: plausible errors.
    pub auroc_likely: f64,
    /// The third that it finds least likely: errors that training hardly showed.
    pub auroc_unlikely: f64,
    /// Points of the ROC curve behind `auroc`.
    pub roc: Vec<(f64, f64)>,
}

/// The figures of one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// What they depend on.
    pub settings: String,
    /// By the names in [`METHODS`].
    pub methods: BTreeMap<String, MethodFigures>,
    /// Correlation of the implicit reward with the oracle's soft advantage, over tokens.
    pub correlation: f64,
    /// The same over the tokens that were left alone.
    pub correlation_unchanged: f64,
    /// The most correlation that the noise of the rollouts allows, from two halves of them.
    pub correlation_ceiling: f64,
    /// `(soft advantage, implicit reward)` of each token compared, reward units of the labels.
    pub oracle_points: Vec<(f64, f64)>,
    /// What a corruption moves elsewhere.
    pub leakage: Leakage,
    /// Accuracy of the policy's implicit reward on held-out labels.
    pub policy_accuracy: f64,
    /// That of the sequence-level reward model.
    pub reward_model_accuracy: f64,
    /// The most that the noise of the labels allows.
    pub accuracy_ceiling: f64,
    /// A copy with its wrong token, coloured on the page.
    pub example: Vec<Token>,
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
pub struct CreditResults {
    /// The command line.
    pub command: String,
    /// The device.
    pub device: String,
    /// Threads of the machine.
    pub threads: usize,
    /// Figures over seeds: for each method, `auroc` and its siblings.
    pub methods: BTreeMap<String, BTreeMap<String, OverSeeds>>,
    /// Figures over seeds of the method alone.
    pub figures: BTreeMap<String, OverSeeds>,
    /// What was claimed beforehand.
    pub targets: Vec<Target>,
    /// Each seed.
    pub seeds: Vec<SeedResult>,
}

/// Trains, corrupts, scores and writes `results.json` and `report.html` into the folder.
///
/// # Errors
///
/// Options or a recipe that do not fit, or anything that goes wrong in training or on the disk.
pub fn run(options: &CreditOptions) -> Result<CreditResults, TrainError> {
    options.check()?;
    let _lock = folder::enter(&options.out)?;
    let seeds = super::of_seeds(
        &options.out,
        &options.seeds,
        |seed| options.settings(seed),
        |seed, settings, folder| one_seed(options, seed, settings, folder),
        |result| {
            format!(
                "AUROC {:.4}, correlation {:.3}, second error {:.4}, {:.0} s",
                result.methods[METHODS[0]].auroc,
                result.correlation,
                result.methods[METHODS[0]].auroc_second,
                result.seconds
            )
        },
    )?;
    let results = summarise(options, seeds);
    super::write_json(&options.out.join("results.json"), &results)?;
    report::write_atomically(&options.out.join("report.html"), &page::page(&results))?;
    Ok(results)
}

fn one_seed(
    options: &CreditOptions,
    seed: u64,
    settings: String,
    folder: &Path,
) -> Result<SeedResult, TrainError> {
    let began = Instant::now();
    let mut recipe = options.recipe.clone();
    recipe.seed = seed;
    let device = crate::device::device(&options.device)?;
    let workers = Workers::on(&device, recipe.workers);
    let task = MemoTask::new(recipe.task.clone().unwrap_or_default().memo)?;
    let models = models::train_all(&recipe, options, &folder.join("policy"), &workers)?;
    let copies = Copies::draw(&task, options.copies, seed)?;

    let single: Vec<_> = copies.single.iter().map(|c| (&c.prompt, &c.bad)).collect();
    let good: Vec<_> = copies.single.iter().map(|c| (&c.prompt, &c.good)).collect();
    let both: Vec<_> = copies.double.iter().map(|c| (&c.prompt, &c.both)).collect();
    let alone: Vec<_> = copies
        .double
        .iter()
        .map(|c| (&c.prompt, &c.alone))
        .collect();
    let single_scores = models.scores(&single, &workers);
    let both_scores = models.scores(&both, &workers);
    let alone_scores = models.scores(&alone, &workers);
    let good_scores = models.scores(&good, &workers);

    let surprise = METHODS
        .iter()
        .position(|&name| name == SURPRISE)
        .expect("surprise is a baseline");
    let mut likelihood: Vec<f64> = copies
        .single
        .iter()
        .zip(&single_scores[surprise])
        .map(|(copy, scores)| scores[copy.site])
        .collect();
    let at_sites = likelihood.clone();
    likelihood.sort_by(f64::total_cmp);
    let n = likelihood.len();
    let (rare, common) = (likelihood[(n - 1) / 3], likelihood[(n - 1) - (n - 1) / 3]);

    let mut methods = BTreeMap::new();
    let rates: Vec<f64> = (0..=50).map(|i| f64::from(i) / 50.0).collect();
    for (index, name) in METHODS.iter().enumerate() {
        let (mut wrong, mut others, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (copy, scores) in copies.single.iter().zip(&single_scores[index]) {
            for (at, &score) in scores.iter().enumerate() {
                if at == copy.site {
                    wrong.push(score);
                    continue;
                }
                others.push(score);
                if copy.bad.kinds[at] == RewardKind::Right {
                    values.push(score);
                }
            }
        }
        let (mut first, mut second, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (copy, scores) in copies.double.iter().zip(&both_scores[index]) {
            for (at, &score) in scores.iter().enumerate() {
                match at {
                    at if at == copy.first => first.push(score),
                    at if at == copy.second => second.push(score),
                    _ => rest.push(score),
                }
            }
        }
        let (mut lone, mut lone_rest) = (Vec::new(), Vec::new());
        for (copy, scores) in copies.double.iter().zip(&alone_scores[index]) {
            for (at, &score) in scores.iter().enumerate() {
                let into = if at == copy.second {
                    &mut lone
                } else {
                    &mut lone_rest
                };
                into.push(score);
            }
        }
        let area = |positives: &[f64], negatives: &[f64]| {
            auroc_of_low(positives, negatives).ok_or_else(|| TrainError::NotFinite {
                place: format!("seed {seed}, {name}"),
                what: "score of a token",
                value: f64::NAN,
                rows: Vec::new(),
            })
        };
        let among = |keep: &dyn Fn(f64) -> bool| -> Vec<f64> {
            let both = wrong.iter().zip(&at_sites);
            both.filter(|&(_, &likelihood)| keep(likelihood))
                .map(|(&score, _)| score)
                .collect()
        };
        let figures = MethodFigures {
            auroc: area(&wrong, &others)?,
            auroc_values: area(&wrong, &values)?,
            auroc_first: area(&first, &rest)?,
            auroc_second: area(&second, &rest)?,
            auroc_second_alone: area(&lone, &lone_rest)?,
            auroc_likely: area(&among(&|likelihood| likelihood >= common), &others)?,
            auroc_unlikely: area(&among(&|likelihood| likelihood <= rare), &others)?,
            roc: roc_of_low(&wrong, &others, &rates),
        };
        methods.insert((*name).to_string(), figures);
    }

    let texts: Vec<(&[f64], &[f64], usize)> = copies
        .single
        .iter()
        .zip(good_scores[0].iter().zip(&single_scores[0]))
        .map(|(copy, (before, after))| (&before[..], &after[..], copy.site))
        .collect();
    let oracle = compare(
        options,
        &task,
        &models,
        &copies,
        &single_scores[0],
        &workers,
    )?;
    let first = &copies.single[0];
    let example = first
        .bad
        .ids
        .iter()
        .enumerate()
        .map(|(at, &id)| Token {
            text: task.token(id).unwrap_or_default().to_string(),
            id,
            implicit_reward: Some(single_scores[0][0][at]),
            true_reward: Some(first.bad.rewards[at]),
            ..Token::default()
        })
        .collect();
    Ok(SeedResult {
        seed,
        settings,
        methods,
        correlation: oracle.correlation,
        correlation_unchanged: oracle.unchanged,
        correlation_ceiling: oracle.ceiling,
        oracle_points: oracle.points,
        leakage: leakage(&texts).unwrap_or_default(),
        policy_accuracy: models.policy_accuracy,
        reward_model_accuracy: models.reward_model_accuracy,
        accuracy_ceiling: models.accuracy_ceiling,
        example,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The implicit reward against the oracle.
struct Compared {
    points: Vec<(f64, f64)>,
    correlation: f64,
    unchanged: f64,
    ceiling: f64,
}

fn compare(
    options: &CreditOptions,
    task: &MemoTask,
    models: &Models,
    copies: &Copies,
    scores: &[Vec<f64>],
    workers: &Workers,
) -> Result<Compared, TrainError> {
    let n = options.oracle_copies.min(copies.single.len());
    let proposals = oracle::Proposals {
        reference: &Decoder::new(&models.reference),
        policy: &Decoder::new(&models.policy),
    };
    let found = workers.map(n, |index| {
        let copy = &copies.single[index];
        let text = oracle::Text {
            memo: &copy.memo,
            prompt: &copy.prompt,
            ids: &copy.bad.ids,
        };
        // A stream of its own for each copy.
        oracle::advantages(proposals, task, &text, options, index as u64)
    });
    let (mut points, mut unchanged) = (Vec::new(), Vec::new());
    let mut halves = [Vec::new(), Vec::new()];
    for ((found, copy), scores) in found.into_iter().zip(&copies.single).zip(scores) {
        let found = found?;
        for (at, (&advantage, &score)) in found.all.iter().zip(scores).enumerate() {
            points.push((advantage, score));
            if at != copy.site {
                unchanged.push((advantage, score));
            }
        }
        for (all, half) in halves.iter_mut().zip(found.halves) {
            all.extend(half);
        }
    }
    let of = |points: &[(f64, f64)]| {
        let (xs, ys): (Vec<f64>, Vec<f64>) = points.iter().copied().unzip();
        correlation(&xs, &ys).unwrap_or(0.0)
    };
    // Spearman and Brown: what two halves agree on, all of the rollouts agree on with themselves
    // by 2ρ/(1 + ρ); a perfect score then correlates with them by its root.
    let rho = correlation(&halves[0], &halves[1]).unwrap_or(0.0).max(0.0);
    Ok(Compared {
        correlation: of(&points),
        unchanged: of(&unchanged),
        ceiling: (2.0 * rho / (1.0 + rho)).sqrt(),
        points,
    })
}

fn summarise(options: &CreditOptions, seeds: Vec<SeedResult>) -> CreditResults {
    let over = |figure: &dyn Fn(&SeedResult) -> f64| {
        OverSeeds::of(seeds.iter().map(figure).collect()).expect("there are seeds")
    };
    let mut methods = BTreeMap::new();
    for name in METHODS {
        let of = |figure: fn(&MethodFigures) -> f64| over(&|seed| figure(&seed.methods[name]));
        let figures: BTreeMap<String, OverSeeds> = [
            ("auroc".to_string(), of(|f| f.auroc)),
            ("auroc_values".to_string(), of(|f| f.auroc_values)),
            ("auroc_first".to_string(), of(|f| f.auroc_first)),
            ("auroc_second".to_string(), of(|f| f.auroc_second)),
            (
                "auroc_second_alone".to_string(),
                of(|f| f.auroc_second_alone),
            ),
            ("auroc_likely".to_string(), of(|f| f.auroc_likely)),
            ("auroc_unlikely".to_string(), of(|f| f.auroc_unlikely)),
        ]
        .into();
        methods.insert(name.to_string(), figures);
    }
    let figures: BTreeMap<String, OverSeeds> = [
        ("correlation".to_string(), over(&|s| s.correlation)),
        (
            "correlation_unchanged".to_string(),
            over(&|s| s.correlation_unchanged),
        ),
        (
            "correlation_ceiling".to_string(),
            over(&|s| s.correlation_ceiling),
        ),
        ("change_at_site".to_string(), over(&|s| s.leakage.at_site)),
        (
            "change_later_sum".to_string(),
            over(&|s| s.leakage.later_sum),
        ),
        (
            "change_later_size".to_string(),
            over(&|s| s.leakage.later_size),
        ),
        ("leakage".to_string(), over(&|s| s.leakage.ratio)),
        ("policy_accuracy".to_string(), over(&|s| s.policy_accuracy)),
        (
            "reward_model_accuracy".to_string(),
            over(&|s| s.reward_model_accuracy),
        ),
        (
            "accuracy_ceiling".to_string(),
            over(&|s| s.accuracy_ceiling),
        ),
    ]
    .into();
    let targets = targets(&methods, &figures);
    CreditResults {
        command: options.command.clone(),
        device: options.device.clone(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        methods,
        figures,
        targets,
        seeds,
    }
}

/// The claims made before anything was measured.
fn targets(
    methods: &BTreeMap<String, BTreeMap<String, OverSeeds>>,
    figures: &BTreeMap<String, OverSeeds>,
) -> Vec<Target> {
    let ours = &methods[METHODS[0]];
    let auroc = &ours["auroc"];
    let baselines = METHODS[1..]
        .iter()
        .map(|name| (name, &methods[*name]["auroc"]));
    let best = baselines
        .max_by(|a, b| a.1.mean.total_cmp(&b.1.mean))
        .expect("there are baselines");
    let above = METHODS[1..]
        .iter()
        .map(|name| auroc.is_above(&methods[*name]["auroc"]))
        .try_fold(true, |all, above| Some(all && above?));
    let several = auroc.interval.is_some();
    let gap = ours["auroc_second"].mean - ours["auroc_first"].mean;
    let correlation = &figures["correlation"];
    vec![
        Target {
            claim: "AUROC at least 0.95".into(),
            measured: page::with_interval(auroc),
            held: several.then_some(auroc.mean >= 0.95),
        },
        Target {
            claim: "AUROC above every baseline, intervals apart".into(),
            measured: format!("best baseline {}: {}", best.0, page::with_interval(best.1)),
            held: above,
        },
        Target {
            claim: "correlation with the soft advantage at least 0.9".into(),
            measured: page::with_interval(correlation),
            held: several.then_some(correlation.mean >= 0.9),
        },
        Target {
            claim: "AUROC of the second error within 0.03 of the first".into(),
            measured: format!("second minus first {gap:+.4}"),
            held: several.then_some(gap.abs() <= 0.03),
        },
    ]
}

/// Logps of the tokens of some completions under a model.
pub(crate) fn token_logps(
    model: &Transformer,
    rows: &[(&[u32], &[u32])],
    workers: &Workers,
) -> Vec<Vec<f64>> {
    /// Enough rows to keep a core busy, few enough to keep logits small.
    const ROWS: usize = 64;
    let chunks: Vec<_> = rows.chunks(ROWS).collect();
    let scored = workers.map(chunks.len(), |index| {
        let batch = lm::CompletionBatch::new(chunks[index], &model.device());
        let flat: Vec<f32> = model
            .score(&batch, false)
            .flat
            .try_into_vec_as()
            .expect("logps of a working device can be read");
        split(&flat, batch.counts())
    });
    scored.concat()
}

/// Cuts a list into pieces of the given lengths.
fn split(flat: &[f32], counts: &[usize]) -> Vec<Vec<f64>> {
    let mut left = flat;
    let pieces = counts.iter().map(|&count| {
        let (own, rest) = left.split_at(count);
        left = rest;
        own.iter().map(|&x| f64::from(x)).collect()
    });
    pieces.collect()
}
