//! Losses and their gradients are TRL's.
//!
//! `testdata/losses` was made by `testdata/scripts/make_loss_fixtures.py`. The variable `R2Q_GOLDEN`
//! may name a directory with a `dpo_golden.json`: a batch scored by a model, with TRL's losses.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor};
use common::{Rows, largest_gap, longest, number, ones, table, vector};
use dpo_loss::{
    Beta, LossConfig, Objectives, PairBatch, PairInputs, PairTable, PairTokens, TokenLogps,
    UnpairedBatch, UnpairedLoss, UnpairedObjective, kl_estimate,
};
use serde::Deserialize;

/// Doubles on both sides; numbers in the file have thirteen digits.
const F64_TOLERANCE: f64 = 1e-11;

/// Sums of single-precision numbers of order ten.
const F32_TOLERANCE: f64 = 1e-5;

#[derive(Deserialize)]
struct Golden {
    batches: BTreeMap<String, Tables>,
    cases: Vec<Case>,
    unpaired: Vec<UnpairedCase>,
}

#[derive(Deserialize)]
struct Tables {
    policy: Rows,
    reference: Rows,
    log_sum_sq_probs: Rows,
}

#[derive(Deserialize)]
struct Case {
    batch: String,
    config: serde_json::Map<String, serde_json::Value>,
    loss: f64,
    /// None where the peer has the loss but fails in its backward pass.
    gradient: Option<Rows>,
}

#[derive(Deserialize)]
struct UnpairedCase {
    batch: String,
    config: UnpairedConfig,
    loss: f64,
    gradient: Rows,
}

#[derive(Deserialize)]
struct UnpairedConfig {
    loss: [UnpairedLoss; 1],
    beta: f64,
    #[serde(default = "one")]
    desirable_weight: f64,
    #[serde(default = "one")]
    undesirable_weight: f64,
    policy_kl_logps: Vec<f64>,
    reference_kl_logps: Vec<f64>,
    desirable: Vec<bool>,
}

fn one() -> f64 {
    1.0
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/losses/golden.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The recipe's keys, without β.
fn parse(mut config: serde_json::Map<String, serde_json::Value>) -> (Objectives, Beta) {
    let beta = config.remove("beta").unwrap().as_f64().unwrap();
    let config: LossConfig = serde_json::from_value(config.into()).unwrap();
    (Objectives::new(config).unwrap(), Beta::new(beta).unwrap())
}

/// The loss and its gradient by the policy's token logps.
fn run(
    tables: &Tables,
    objectives: &Objectives,
    beta: Beta,
    seq: usize,
    dtype: DType,
) -> (f64, Vec<f64>) {
    let device = Device::default().autodiff();
    let read = |rows: &Rows| table(rows, seq, &device).cast(dtype);
    let tokens = |values: Tensor<2>, rows: &Rows| {
        let mask = read(&ones(rows));
        PairTokens::from_halves(TokenLogps { values, mask })
    };
    let policy = read(&tables.policy).require_grad();
    let batch = PairBatch {
        policy: tokens(policy.clone(), &tables.policy),
        reference: tokens(read(&tables.reference), &tables.reference).into(),
        inputs: PairInputs {
            log_sum_sq_probs: Some(PairTable::from_halves(read(&tables.log_sum_sq_probs))),
            ..PairInputs::default()
        },
    };
    let loss = objectives.loss(&batch, beta).unwrap();
    let gradients = loss.backward();
    let gradient = policy.grad(&gradients).unwrap();
    assert_eq!(loss.dtype(), dtype);
    (
        number(loss),
        gradient.cast(DType::F64).try_into_vec_as().unwrap(),
    )
}

#[test]
fn every_case_of_the_fixture_has_trls_loss_and_gradient() {
    let golden = golden();
    let mut worst = (0.0_f64, 0.0_f64);
    let mut names = std::collections::BTreeSet::new();
    for case in &golden.cases {
        let tables = &golden.batches[&case.batch];
        let (objectives, beta) = parse(case.config.clone());
        // Two columns of padding on the right, which TRL's batch had not.
        let seq = longest(&tables.policy) + 2;
        let (loss, gradient) = run(tables, &objectives, beta, seq, DType::F64);
        // Losses and gradients here are of order one, IPO's and SPPO's of order a hundred.
        let scale = case.loss.abs().max(1.0);
        let gap = (loss - case.loss).abs() / scale;
        let gradient_gap = case.gradient.as_ref().map_or(0.0, |expected| {
            largest_gap(&gradient, seq, expected) / scale
        });
        assert!(
            gap < F64_TOLERANCE && gradient_gap < F64_TOLERANCE,
            "{:?} on {}: {loss} against {}, gradient off by {gradient_gap:e}",
            case.config,
            case.batch,
            case.loss
        );
        let (single, slopes) = run(tables, &objectives, beta, seq, DType::F32);
        let single_gap = (single - case.loss).abs() / scale;
        let slope_gap = case
            .gradient
            .as_ref()
            .map_or(0.0, |expected| largest_gap(&slopes, seq, expected) / scale);
        assert!(
            single_gap < F32_TOLERANCE && slope_gap < F32_TOLERANCE,
            "{:?} in single precision: off by {single_gap:e} and {slope_gap:e}",
            case.config
        );
        worst = (worst.0.max(gap), worst.1.max(gradient_gap));
        names.extend(objectives.terms().map(|(objective, _)| objective.name()));
    }
    println!(
        "{} cases of {} losses: loss off by {:e}, gradient by {:e}",
        golden.cases.len(),
        names.len(),
        worst.0,
        worst.1
    );
    assert!(golden.cases.len() > 90 && names.len() == 18, "{names:?}");
}

#[test]
fn every_unpaired_case_of_the_fixture_has_trls_loss_and_gradient() {
    let golden = golden();
    for case in &golden.unpaired {
        let device = Device::default().autodiff();
        let tables = &golden.batches[&case.batch];
        let seq = longest(&tables.policy);
        let policy = table(&tables.policy, seq, &device).require_grad();
        let reference = table(&tables.reference, seq, &device);
        let rows = tables.policy.len();
        let config = &case.config;
        let labels: Vec<f64> = config
            .desirable
            .iter()
            .map(|&d| f64::from(u8::from(d)))
            .collect();
        let batch = UnpairedBatch {
            policy: policy.clone().sum_dim(1).reshape([rows]),
            reference: reference.sum_dim(1).reshape([rows]),
            desirable: vector(&labels, &device),
        };
        let objective = UnpairedObjective {
            loss: config.loss[0],
            desirable_weight: config.desirable_weight,
            undesirable_weight: config.undesirable_weight,
        };
        let kl = kl_estimate(
            vector(&config.policy_kl_logps, &device),
            vector(&config.reference_kl_logps, &device),
        );
        let beta = Beta::new(config.beta).unwrap();
        let loss = objective.losses(&batch, kl, beta).unwrap().mean();
        let gradients = loss.backward();
        let gradient: Vec<f64> = policy.grad(&gradients).unwrap().try_into_vec_as().unwrap();
        assert!((number(loss) - case.loss).abs() < F64_TOLERANCE);
        assert!(largest_gap(&gradient, seq, &case.gradient) < F64_TOLERANCE);
    }
    assert_eq!(golden.unpaired.len(), 4);
}

#[derive(Deserialize)]
struct Scored {
    dtypes: BTreeMap<String, ScoredAt>,
}

#[derive(Deserialize)]
struct ScoredAt {
    policy: Model,
    reference: Model,
    losses: BTreeMap<String, ScoredLoss>,
}

#[derive(Deserialize)]
struct Model {
    log_probs: Halves,
    log_sum_sq_probs: Halves,
}

#[derive(Deserialize)]
struct Halves {
    chosen: Rows,
    rejected: Rows,
}

impl Halves {
    fn rows(&self) -> Rows {
        [self.chosen.clone(), self.rejected.clone()].concat()
    }
}

#[derive(Deserialize)]
struct ScoredLoss {
    settings: Settings,
    loss: f64,
    #[serde(default)]
    loss_each_pair_alone: Vec<f64>,
}

#[derive(Deserialize)]
struct Settings {
    lt: serde_json::Value,
    #[serde(default)]
    ls: f64,
    beta: Option<f64>,
    weights: Option<Vec<f64>>,
    f: Option<serde_json::Value>,
    ld: Option<f64>,
    #[serde(default)]
    wpo: bool,
}

/// What the peer's file promises: doubles that were written in full.
const SCORED_TOLERANCE: f64 = 1e-6;

#[test]
fn losses_of_scored_batches_are_trls() {
    let Some(folder) = std::env::var_os("R2Q_GOLDEN") else {
        return;
    };
    let text = fs::read_to_string(Path::new(&folder).join("dpo_golden.json")).unwrap();
    let scored: Scored = serde_json::from_str(&text).unwrap();
    for (dtype, at) in &scored.dtypes {
        let tables = Tables {
            policy: at.policy.log_probs.rows(),
            reference: at.reference.log_probs.rows(),
            log_sum_sq_probs: at.policy.log_sum_sq_probs.rows(),
        };
        let seq = longest(&tables.policy);
        let mut worst = 0.0_f64;
        for (name, golden) in &at.losses {
            let settings = &golden.settings;
            let mut config = serde_json::json!({
                "loss": settings.lt,
                "label_smoothing": settings.ls,
                "use_weighting": settings.wpo,
                "loss_weights": settings.weights.clone().unwrap_or_default(),
                "beta": settings.beta.unwrap_or(0.1),
            });
            if let Some(f) = &settings.f {
                config["f_divergence_type"] = f.clone();
            }
            if let Some(ld) = settings.ld {
                config["ld_alpha"] = ld.into();
            }
            let serde_json::Value::Object(config) = config else {
                unreachable!("made as an object")
            };
            let (objectives, beta) = parse(config);
            let (loss, _) = run(&tables, &objectives, beta, seq, DType::F64);
            let mut gap = (loss - golden.loss).abs();
            let n = at.policy.log_probs.chosen.len();
            for (pair, expected) in golden.loss_each_pair_alone.iter().enumerate() {
                let alone = |rows: &Rows| vec![rows[pair].clone(), rows[n + pair].clone()];
                let tables = Tables {
                    policy: alone(&tables.policy),
                    reference: alone(&tables.reference),
                    log_sum_sq_probs: alone(&tables.log_sum_sq_probs),
                };
                let (loss, _) = run(&tables, &objectives, beta, seq, DType::F64);
                gap = gap.max((loss - expected).abs() / expected.abs().max(1.0));
            }
            // Single precision on the peer's side loses digits of losses near a hundred.
            let scale = if dtype == "float64" {
                1.0
            } else {
                golden.loss.abs().max(10.0)
            };
            assert!(
                gap < SCORED_TOLERANCE * scale,
                "{dtype} {name}: off by {gap:e}"
            );
            worst = worst.max(gap);
        }
        println!(
            "{dtype}: {} losses, off by {worst:e} at most",
            at.losses.len()
        );
    }
}
