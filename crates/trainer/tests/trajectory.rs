//! A preference run reproduces TRL's, step by step: loss, rewards, logps, gradient norm.
//!
//! `testdata/trl` was made by `testdata/scripts/make_trl_fixture.py`. The variable `R2Q_GOLDEN` may
//! name a directory with a longer run of the same form.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use dpo_loss::{Beta, LossConfig, Objectives, PairLogps};
use lm::Transformer;
use lm::data::PreferencePair;
use serde_json::Value;
use trainer::reference::pair_batch;
use trainer::{Activations, AdamW, Learner, OptimizerRecipe, Schedule, preference_micro_batch};

/// Both sides compute in f32; TRL's own f32 and f64 runs drift 3e-6 apart over as many steps.
const RELATIVE: f64 = 1e-3;
/// Values near zero are compared absolutely: rewards are differences of logps of size 50.
const ABSOLUTE: f64 = 2e-5;

/// Runs of the file that the project ships.
const RUNS: [&str; 7] = [
    "main",
    "ipo_warmup_linear_wd_accum",
    "clip_off",
    "cosine_mpo",
    "max_length_16_keep_start",
    "max_length_drop",
    "sync_ref",
];

struct Golden {
    folder: PathBuf,
    file: Value,
}

fn goldens() -> Vec<Golden> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let mut found = vec![(data.join("trl/trajectory.json"), data)];
    if let Some(root) = std::env::var_os("R2Q_GOLDEN").map(PathBuf::from) {
        found.push((root.join("dpo_trajectory.json"), root));
    }
    found
        .into_iter()
        .map(|(path, folder)| Golden {
            file: serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap(),
            folder,
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let values = value.as_array().unwrap();
    values
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// The pairs that a run sees: without those whose prompt fills its `max_length`, and cut to it.
fn pairs(file: &Value, run: &Value) -> Vec<PreferencePair> {
    let max_length = run["config"]["max_length"].as_u64().unwrap() as usize;
    let rows = file["tokenized_pairs"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate();
    let pairs = rows.filter_map(|(row, pair)| {
        let prompt_ids = ids(&pair["prompt_ids"]);
        let room = max_length
            .checked_sub(prompt_ids.len())
            .filter(|&room| room > 0)?;
        let cut = |name: &str| ids(&pair[name]).into_iter().take(room).collect();
        Some(PreferencePair {
            chosen_ids: cut("chosen_ids"),
            rejected_ids: cut("rejected_ids"),
            prompt_ids,
            row,
        })
    });
    let pairs: Vec<_> = pairs.collect();
    if !run["kept_pair_indices"].is_null() {
        let kept: Vec<u32> = pairs.iter().map(|pair| pair.row as u32).collect();
        assert_eq!(kept, ids(&run["kept_pair_indices"]));
    }
    pairs
}

fn optimizer(config: &Value) -> OptimizerRecipe {
    let number = |name: &str| config[name].as_f64().unwrap();
    OptimizerRecipe {
        learning_rate: number("learning_rate"),
        beta1: number("adam_beta1"),
        beta2: number("adam_beta2"),
        epsilon: number("adam_epsilon"),
        weight_decay: number("weight_decay"),
        max_grad_norm: number("max_grad_norm"),
        schedule: match config["lr_scheduler_type"].as_str().unwrap() {
            "constant" => Schedule::Constant,
            "linear" => Schedule::Linear,
            "cosine" => Schedule::Cosine,
            other => panic!("schedule {other}"),
        },
        warmup_steps: number("warmup_steps") as usize,
    }
}

fn objectives(config: &Value) -> Objectives {
    let names = match &config["loss_type"] {
        Value::String(name) => vec![name.as_str()],
        names => names
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap())
            .collect(),
    };
    let weights = config["loss_weights"].as_array().map(|weights| {
        weights
            .iter()
            .map(|weight| weight.as_f64().unwrap())
            .collect()
    });
    let config = LossConfig {
        loss: names.iter().map(|name| name.parse().unwrap()).collect(),
        loss_weights: weights.unwrap_or_default(),
        ..LossConfig::default()
    };
    Objectives::new(config).unwrap()
}

fn assert_close(got: f64, expected: &Value, what: &str) {
    let expected = expected
        .as_f64()
        .unwrap_or_else(|| panic!("{what} is a number"));
    let error = (got - expected).abs();
    assert!(
        error <= ABSOLUTE + RELATIVE * expected.abs(),
        "{what}: {got} against {expected}"
    );
}

fn reproduce(golden: &Golden, run: &str) {
    let run_value = &golden.file["runs"][run];
    let config = &run_value["config"];
    let steps = run_value["steps"].as_array().unwrap();
    let pairs = pairs(&golden.file, run_value);
    let device = Device::default();
    let weights = golden.file["initial_weights"].as_str().unwrap();
    let initial = Transformer::read(&golden.folder.join(weights), &device).unwrap();
    let hidden_size = initial.config().hidden_size;
    let recipe = optimizer(config);
    let beta = Beta::new(config["beta"].as_f64().unwrap()).unwrap();
    let objectives = objectives(config);
    let batch_size = config["per_device_train_batch_size"].as_u64().unwrap() as usize;
    let accumulation = config["gradient_accumulation_steps"].as_u64().unwrap() as usize;
    let mut learner = Learner::new(initial.clone(), AdamW::new(&recipe));
    let synced = config["sync_ref_model"].as_bool().unwrap_or(false);
    learner.reference = synced.then(|| initial.clone());
    let mut n_tokens = 0;
    for (step, expected) in steps.iter().enumerate() {
        let reference = learner
            .reference
            .as_ref()
            .unwrap_or(&initial)
            .clone()
            .train();
        let learning_rate = recipe.learning_rate_at(step, steps.len());
        let outcome = learner.step(accumulation, learning_rate, |model, micro| {
            let next = (step * accumulation + micro) * batch_size;
            let chosen: Vec<_> = (0..batch_size)
                .map(|i| &pairs[(next + i) % pairs.len()])
                .collect();
            let batch = pair_batch(chosen.into_iter(), hidden_size, &device);
            // By the policy's own path, so that at the first step all pairs are exact ties.
            let sums = reference.score(&batch, false).table.sums().inner();
            let reference = PairLogps::from_halves(sums);
            preference_micro_batch(
                model,
                &batch,
                &reference.into(),
                &objectives,
                beta,
                Activations::Keep,
            )
        });
        if synced
            && (step as u64 + 1).is_multiple_of(config["ref_model_sync_steps"].as_u64().unwrap())
        {
            learner.sync_reference(config["ref_model_mixup_alpha"].as_f64().unwrap());
        }
        let at = |what: &str| format!("{run} step {} {what}", step + 1);
        assert!(outcome.updated);
        assert_close(outcome.loss, &expected["loss"], &at("loss"));
        assert_close(outcome.grad_norm, &expected["grad_norm"], &at("grad_norm"));
        assert_close(
            learning_rate,
            &expected["learning_rate"],
            &at("learning_rate"),
        );
        // What TRL does not log, it cannot vouch for.
        for (name, value) in &outcome.metrics[..10] {
            assert_close(*value, &expected[*name], &at(name));
        }
        n_tokens += outcome.n_tokens;
        assert_close(n_tokens as f64, &expected["num_tokens"], &at("num_tokens"));
    }
    let last = learner.snapshot().to_host();
    let norms = run_value["final_parameter_l2_norms"].as_object().unwrap();
    assert!(norms.len() >= last.len());
    for (name, tensor) in last {
        let squares: f64 = tensor.values.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert_close(
            squares.sqrt(),
            &norms[&name],
            &format!("{run} final norm of {name}"),
        );
    }
}

#[test]
fn a_dpo_run_reproduces_every_figure_of_trl() {
    for (at, golden) in goldens().iter().enumerate() {
        for run in RUNS {
            // Another file has some of them.
            if at == 0 || !golden.file["runs"][run].is_null() {
                reproduce(golden, run);
            }
        }
    }
}
