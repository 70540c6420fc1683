//! Identification: how close the advantage that a policy learned from labels comes to the exact
//! one, as labels grow in number.
//!
//! The reference is a small language model with fresh weights over a tree that can be enumerated,
//! so the exact soft advantage is known at every state and token. A language model and a table
//! descend the same DPO loss on the same labels. See the book's page on the experiment.

mod fit;
mod page;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use lm::Transformer;
use mdp_core::{
    Beta, MdpError, PairTable, SoftSolution, TabularMdp, TabularPolicy, Tree, WeightedPair,
    bellman_residuals, bradley_terry, occupancies, sample_completion, solve,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Target;
use super::statistics::{OverSeeds, correlation};
use crate::error::TrainError;
use crate::folder;
use crate::workers::Workers;

/// Tokens of the tree, the last of which ends a completion.
const VOCAB: usize = 4;
const EOS: u32 = 3;

/// What is trained: names in the results.
pub const LEARNERS: [&str; 2] = ["language model", "table"];

/// The true rewards: one that repeats from state to state, and one that does not.
pub const REWARDS: [&str; 2] = ["bigram", "independent"];

/// Lower ends of the bins of visits of a state.
pub const BINS: [u64; 5] = [0, 1, 10, 100, 1000];

/// What the experiment takes.
#[derive(Clone, Debug)]
pub struct IdentificationOptions {
    /// Seeds of weights, rewards and labels.
    pub seeds: Vec<u64>,
    /// Folder to write into; seeds that are done there, under the same settings, are not repeated.
    pub out: PathBuf,
    /// Numbers of labelled pairs, rising.
    pub pairs: Vec<usize>,
    /// Steps of either learner.
    pub steps: usize,
    /// Tokens of the longest completion.
    pub horizon: usize,
    /// Name of the device.
    pub device: String,
    /// The command line, for the page.
    pub command: String,
}

impl IdentificationOptions {
    /// Three seeds at the size that the book describes.
    #[must_use]
    pub fn standard(out: PathBuf) -> Self {
        Self {
            seeds: vec![1, 2, 3],
            out,
            pairs: vec![1000, 4000, 16_000, 64_000],
            steps: 1000,
            horizon: 5,
            device: "cpu".into(),
            command: "cargo xtask reproduce identification".into(),
        }
    }

    fn check(&self) -> Result<(), TrainError> {
        super::check_out(&self.out)?;
        super::check_distinct("identification", "--seeds", &self.seeds)?;
        let refuse = |reason: &str| {
            Err(TrainError::Recipe {
                file: "reproduce identification".into(),
                reason: reason.into(),
            })
        };
        if self.seeds.is_empty() || self.steps == 0 {
            return refuse("expected at least one seed and one step");
        }
        if self.pairs.len() < 2 || self.pairs[0] < FEWEST || !self.pairs.is_sorted_by(|a, b| a < b)
        {
            return refuse(&format!(
                "expected at least two rising numbers of pairs, from {FEWEST}"
            ));
        }
        let most = self.pairs[self.pairs.len() - 1];
        if most > MOST {
            return refuse(&format!("expected at most {MOST} pairs, got {most}"));
        }
        if !(2..=6).contains(&self.horizon) {
            return refuse("expected a horizon from 2 to 6 tokens");
        }
        Ok(())
    }

    /// What a seed's figures depend on.
    fn settings(&self, seed: u64) -> String {
        format!(
            "seed {seed} pairs {:?} steps {} horizon {} device {}",
            self.pairs, self.steps, self.horizon, self.device
        )
    }
}

/// The fewest pairs: of a tenth as many that are held out, one alone often has nothing to compare.
const FEWEST: usize = 20;
/// The most pairs; all are held at once.
const MOST: usize = 10_000_000;

/// The error of one learner on one set of labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Root of the mean square of `β log(π/π*)`, weighted as the reference visits; reward units.
    pub error: f64,
    /// The same over all states and tokens alike.
    pub error_unweighted: f64,
    /// The largest size of it.
    pub largest: f64,
    /// Correlation of the learned advantage with the exact one, over all states and tokens.
    pub correlation: f64,
    /// For each of [`BINS`]: states, and the mean square over their tokens.
    pub by_visits: Vec<(usize, f64)>,
    /// `β log(π/π*)` at each state and token, in the order of the tree; reward units.
    pub residuals: Vec<f64>,
}

/// One true reward with one number of pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// One of [`REWARDS`].
    pub reward: String,
    /// Pairs drawn.
    pub pairs: usize,
    /// How often the two sides of the pairs went through each state.
    pub visits: Vec<u64>,
    /// By the names in [`LEARNERS`].
    pub learners: BTreeMap<String, Figures>,
}

/// The figures of one seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// What they depend on.
    pub settings: String,
    /// Every reward with every number of pairs.
    pub cells: Vec<Cell>,
    /// Time, training included.
    pub seconds: f64,
}

impl SeedResult {
    fn figures(&self, reward: &str, pairs: usize, learner: &str) -> Option<&Figures> {
        let cell = self
            .cells
            .iter()
            .find(|cell| cell.reward == reward && cell.pairs == pairs)?;
        cell.learners.get(learner)
    }
}

impl super::OfSeed for SeedResult {
    fn settings(&self) -> &str {
        &self.settings
    }
}

/// Everything that came out: what `results.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdentificationResults {
    /// The command line.
    pub command: String,
    /// The device.
    pub device: String,
    /// Threads of the machine.
    pub threads: usize,
    /// Numbers of pairs, rising.
    pub pairs: Vec<usize>,
    /// Tokens of the longest completion.
    pub horizon: usize,
    /// Figures over seeds, by `reward / learner / pairs / figure`.
    pub figures: BTreeMap<String, OverSeeds>,
    /// What was claimed beforehand.
    pub targets: Vec<Target>,
    /// Each seed.
    pub seeds: Vec<SeedResult>,
}

/// The name of a figure in [`IdentificationResults::figures`].
fn key(reward: &str, learner: &str, pairs: usize, figure: &str) -> String {
    format!("{reward} / {learner} / {pairs} / {figure}")
}

/// Trains both learners on every set of labels and writes `results.json` and `report.html`.
///
/// # Errors
///
/// Options that do not fit, or anything that goes wrong in training or on the disk.
pub fn run(options: &IdentificationOptions) -> Result<IdentificationResults, TrainError> {
    options.check()?;
    let _lock = folder::enter(&options.out)?;
    let seeds = super::of_seeds(
        &options.out,
        &options.seeds,
        |seed| Ok(options.settings(seed)),
        |seed, settings, _| one_seed(options, seed, settings),
        |result| format!("{:.0} s", result.seconds),
    )?;
    let results = summarise(options, seeds);
    super::write_json(&options.out.join("results.json"), &results)?;
    report::write_atomically(&options.out.join("report.html"), &page::page(&results)?)?;
    Ok(results)
}

/// The tree; its prompt gives the model a token before the first.
fn tree(horizon: usize) -> Result<Tree, MdpError> {
    Ok(Tree::new(VOCAB, horizon, EOS)?.with_prompt([EOS]))
}

/// Reward units per nat of the label.
fn beta() -> Beta {
    Beta::new(1.0).expect("1 is above 0")
}

fn one_seed(
    options: &IdentificationOptions,
    seed: u64,
    settings: String,
) -> Result<SeedResult, TrainError> {
    let began = Instant::now();
    let device = crate::device::device(&options.device)?;
    let tree = tree(options.horizon)?;
    let model = fit::fresh_model(&tree, seed, &device)?;
    let reference = fit::tabulate(&tree, &model)?;
    let mut jobs = Vec::new();
    for (index, reward) in REWARDS.iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1 + index as u64);
        let mdp = process(&reference, reward, &mut rng)?;
        let solution = solve(&mdp, beta())?;
        for &pairs in &options.pairs {
            jobs.push((*reward, pairs, solution.clone(), rng.clone()));
        }
    }
    let workers = Workers::one_per_core(&device);
    let cells = workers.map(jobs.len(), |index| {
        let (reward, pairs, solution, rng) = &jobs[index];
        one_cell(options, reward, *pairs, solution, &model, rng.clone())
    });
    Ok(SeedResult {
        seed,
        settings,
        cells: cells.into_iter().collect::<Result<_, _>>()?,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// A process with one of the [`REWARDS`], each of mean 0 and standard deviation 1.
fn process(
    reference: &TabularPolicy,
    reward: &str,
    rng: &mut ChaCha8Rng,
) -> Result<TabularMdp, MdpError> {
    // Uniform on ±√3: standard deviation 1, and no reward that labels could hardly reach.
    let draw = |rng: &mut ChaCha8Rng| 3f64.sqrt() * (2.0 * rng.random::<f64>() - 1.0);
    if reward == "bigram" {
        let table: Vec<f64> = (0..VOCAB * VOCAB).map(|_| draw(rng)).collect();
        return TabularMdp::from_fn(reference.clone(), |tokens, action| {
            let last = tokens.last().copied().unwrap_or(EOS);
            table[last as usize * VOCAB + action as usize]
        });
    }
    TabularMdp::from_fn(reference.clone(), |_, _| draw(rng))
}

/// Labelled pairs and what they went through.
struct Labels {
    table: PairTable,
    visits: Vec<u64>,
}

/// Both sides drawn from the reference, one Bradley-Terry label each.
fn draw_labels(mdp: &TabularMdp, n: usize, rng: &mut ChaCha8Rng) -> Result<Labels, MdpError> {
    let tree = mdp.tree();
    let returns = tree.path_sums(mdp.rewards());
    let mut counts: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    let mut visits = vec![0; tree.n_states()];
    for _ in 0..n {
        let a = sample_completion(mdp, mdp.reference(), rng)?;
        let b = sample_completion(mdp, mdp.reference(), rng)?;
        for pair in tree.path(a).into_iter().chain(tree.path(b)) {
            visits[pair / tree.vocab()] += 1;
        }
        let a_wins = rng.random::<f64>() < bradley_terry(returns[a], returns[b]);
        *counts
            .entry(if a_wins { (a, b) } else { (b, a) })
            .or_default() += 1.0;
    }
    let pairs = counts
        .into_iter()
        .map(|((chosen, rejected), weight)| WeightedPair {
            chosen,
            rejected,
            weight,
        })
        .collect();
    let table = PairTable::new(tree.clone(), pairs)?;
    Ok(Labels { table, visits })
}

fn one_cell(
    options: &IdentificationOptions,
    reward: &str,
    pairs: usize,
    solution: &SoftSolution,
    model: &Transformer,
    mut rng: ChaCha8Rng,
) -> Result<Cell, TrainError> {
    let mdp = solution.mdp();
    let labels = draw_labels(mdp, pairs, &mut rng)?;
    // A tenth more, on which both learners choose the step at which they stop.
    let held_out = draw_labels(mdp, pairs.div_ceil(10), &mut rng)?.table;
    let data = fit::Data {
        mdp,
        beta: solution.beta(),
        train: &labels.table,
        held_out: &held_out,
        steps: options.steps,
    };
    let mut learners = BTreeMap::new();
    let trained = [fit::language_model(&data, model)?, fit::table(&data)?];
    for (name, policy) in LEARNERS.iter().zip(trained) {
        let figures = figures(solution, &policy, &labels.visits)?;
        learners.insert((*name).to_string(), figures);
    }
    Ok(Cell {
        reward: reward.into(),
        pairs,
        visits: labels.visits,
        learners,
    })
}

/// The learned advantage against the exact one.
fn figures(
    solution: &SoftSolution,
    policy: &TabularPolicy,
    visits: &[u64],
) -> Result<Figures, MdpError> {
    let mdp = solution.mdp();
    let residuals = bellman_residuals(solution, policy)?;
    let exact = solution.kl_form().advantages();
    let learned: Vec<f64> = exact.iter().zip(&residuals).map(|(a, e)| a + e).collect();
    let occupancy = occupancies(mdp, mdp.reference())?;
    let (mut weighted, mut weights) = (0.0, 0.0);
    let mut bins = vec![(0, 0.0); BINS.len()];
    for (state, row) in residuals.chunks_exact(VOCAB).enumerate() {
        let reference = mdp.reference().row(state);
        for (error, logp) in row.iter().zip(reference) {
            let weight = occupancy[state] * logp.exp();
            weighted += weight * error * error;
            weights += weight;
        }
        let square = row.iter().map(|e| e * e).sum::<f64>() / VOCAB as f64;
        let bin = BINS.partition_point(|&low| low <= visits[state]) - 1;
        bins[bin].0 += 1;
        bins[bin].1 += square;
    }
    for (states, square) in &mut bins {
        *square /= (*states).max(1) as f64;
    }
    let squares: f64 = residuals.iter().map(|e| e * e).sum();
    Ok(Figures {
        error: (weighted / weights).sqrt(),
        error_unweighted: (squares / residuals.len() as f64).sqrt(),
        largest: residuals.iter().fold(0.0, |most, e| most.max(e.abs())),
        correlation: correlation(&exact, &learned).unwrap_or(0.0),
        by_visits: bins,
        residuals,
    })
}

/// Least squares of log error on log pairs.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let x_mean = logs.iter().map(|p| p.0).sum::<f64>() / n;
    let y_mean = logs.iter().map(|p| p.1).sum::<f64>() / n;
    let xy: f64 = logs.iter().map(|p| (p.0 - x_mean) * (p.1 - y_mean)).sum();
    let xx: f64 = logs.iter().map(|p| (p.0 - x_mean).powi(2)).sum();
    xy / xx
}

fn summarise(options: &IdentificationOptions, seeds: Vec<SeedResult>) -> IdentificationResults {
    let mut found = BTreeMap::new();
    for reward in REWARDS {
        for learner in LEARNERS {
            let mut slopes = Vec::new();
            for seed in &seeds {
                let points: Vec<(f64, f64)> = options
                    .pairs
                    .iter()
                    .filter_map(|&n| Some((n as f64, seed.figures(reward, n, learner)?.error)))
                    .collect();
                slopes.push(slope(&points));
            }
            if let Some(over) = OverSeeds::of(slopes) {
                found.insert(key(reward, learner, 0, "slope"), over);
            }
            for &pairs in &options.pairs {
                let mut add = |name: &str, of: &dyn Fn(&Figures) -> Option<f64>| {
                    let values = seeds
                        .iter()
                        .filter_map(|seed| of(seed.figures(reward, pairs, learner)?))
                        .collect();
                    if let Some(over) = OverSeeds::of(values) {
                        found.insert(key(reward, learner, pairs, name), over);
                    }
                };
                add("error", &|f| Some(f.error));
                add("unweighted error", &|f| Some(f.error_unweighted));
                add("largest", &|f| Some(f.largest));
                add("correlation", &|f| Some(f.correlation));
                for (bin, low) in BINS.iter().enumerate() {
                    add(&format!("error from {low} visits"), &|f| {
                        let (states, square) = f.by_visits[bin];
                        (states > 0).then(|| square.sqrt())
                    });
                }
                add("error below 10 visits", &rare_error);
            }
        }
    }
    IdentificationResults {
        command: options.command.clone(),
        device: options.device.clone(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        pairs: options.pairs.clone(),
        horizon: options.horizon,
        targets: targets(&found, &options.pairs),
        figures: found,
        seeds,
    }
}

/// The error at states that were visited fewer than ten times; none if there are none.
fn rare_error(figures: &Figures) -> Option<f64> {
    let (mut states, mut squares) = (0, 0.0);
    for (&low, &(n, square)) in BINS.iter().zip(&figures.by_visits) {
        if low < 10 {
            states += n;
            squares += n as f64 * square;
        }
    }
    (states > 0).then(|| (squares / states as f64).sqrt())
}

/// The claims made before anything was measured.
fn targets(found: &BTreeMap<String, OverSeeds>, pairs: &[usize]) -> Vec<Target> {
    let [model, table] = LEARNERS;
    let (first, last) = (pairs[0], pairs[pairs.len() - 1]);
    let mut targets = Vec::new();
    for reward in REWARDS {
        let mut add = |claim: String, figures: &[String], holds: &dyn Fn(&[f64]) -> bool| {
            let wanted = figures.len();
            let figures: Vec<&OverSeeds> = figures.iter().filter_map(|k| found.get(k)).collect();
            let means: Vec<f64> = figures.iter().map(|f| f.mean).collect();
            let several = figures.iter().all(|f| f.interval.is_some());
            let all: Vec<String> = figures.iter().map(|f| page::with_interval(f)).collect();
            let whole = figures.len() == wanted;
            targets.push(Target {
                claim: format!("{reward} reward: {claim}"),
                measured: all.join("; "),
                held: (several && whole).then(|| holds(&means)),
            });
        };
        add(
            "the table's error falls with the number of pairs at a log-log slope from -0.65 to \
             -0.35"
                .into(),
            &[key(reward, table, 0, "slope")],
            &|v| (-0.65..=-0.35).contains(&v[0]),
        );
        add(
            format!("the language model's correlation is at least 0.95 at {last} pairs"),
            &[key(reward, model, last, "correlation")],
            &|v| v[0] >= 0.95,
        );
        add(
            format!(
                "at {first} pairs the language model's error at states visited fewer than 10 \
                 times is below the table's"
            ),
            &[model, table].map(|l| key(reward, l, first, "error below 10 visits")),
            &|v| v[0] < v[1],
        );
        add(
            format!("the language model's largest residual at {last} pairs is below 0.5"),
            &[key(reward, model, last, "largest")],
            &|v| v[0] < 0.5,
        );
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few hundred f64 operations on numbers of size 10.
    const ROUNDING: f64 = 1e-10;

    fn solution(reward: &str) -> SoftSolution {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let reference = TabularPolicy::random(tree(3).unwrap(), 1.0, &mut rng).unwrap();
        solve(&process(&reference, reward, &mut rng).unwrap(), beta()).unwrap()
    }

    #[test]
    fn the_exact_optimum_has_no_error_and_the_reference_has_all_of_it() {
        for reward in REWARDS {
            let solution = solution(reward);
            let visits = vec![0; solution.mdp().tree().n_states()];
            let exact = figures(&solution, &solution.optimal_policy(), &visits).unwrap();
            assert!(exact.largest < ROUNDING && exact.error < ROUNDING);
            assert!((exact.correlation - 1.0).abs() < ROUNDING);
            let none = figures(&solution, solution.mdp().reference(), &visits).unwrap();
            let advantages = solution.kl_form().advantages();
            for (residual, advantage) in none.residuals.iter().zip(advantages) {
                assert!((residual + advantage).abs() < ROUNDING);
            }
            assert_eq!(none.by_visits[0].0, visits.len());
            assert!((none.by_visits[0].1.sqrt() - none.error_unweighted).abs() < ROUNDING);
        }
    }

    #[test]
    fn the_root_is_visited_by_both_sides_of_every_pair() {
        let solution = solution("bigram");
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let labels = draw_labels(solution.mdp(), 200, &mut rng).unwrap();
        assert_eq!(labels.visits[0], 400);
        let next: u64 = solution
            .mdp()
            .tree()
            .level(1)
            .map(|s| labels.visits[s])
            .sum();
        assert!(next < 400 && next > 0);
    }

    #[test]
    fn a_root_law_has_slope_minus_a_half() {
        let points = [10.0, 100.0, 1000.0].map(|x: f64| (x, 3.0 / x.sqrt()));
        assert!((slope(&points) + 0.5).abs() < ROUNDING);
    }
}
