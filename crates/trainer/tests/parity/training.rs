//! Training steps: logps, losses, gradients by what an update makes of them, on each architecture.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::Device;
use dpo_loss::{Beta, LossConfig, Objective, Objectives};
use lm::data::PreferencePair;
use lm::{CompletionBatch, LoraConfig, Precision, Transformer};
use trainer::reference::{ReferenceLogps, pair_batch};
use trainer::{
    Activations, AdamW, Compared, Learner, OptimizerRecipe, Reference, Workers,
    preference_micro_batch, sft_micro_batch,
};

use super::common::testdata;
use super::{LOGP_TOLERANCE, assert_close, devices, on_both};

const LEARNING_RATE: f64 = 1e-3;
/// What an update divided by the learning rate may be off by. With the optimizer's epsilon below
/// it is a smooth function of the gradient, and at most 1: this is f32 noise of the gradient's and
/// of the weight's last digit (1e-7 over the learning rate), where a wrong sign is off by 1e-1.
const UPDATE_TOLERANCE: f64 = 2e-3;

/// AdamW divides by the gradient's size, which would make a step of full size of a gradient that is
/// all rounding; an epsilon of the gradients' order keeps such gradients small.
fn optimizer() -> AdamW {
    AdamW::new(&OptimizerRecipe {
        epsilon: 1e-1,
        ..OptimizerRecipe::default()
    })
}

/// The tiny models of every architecture.
pub(crate) fn folders() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(testdata("lm")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 7, "the seven fixtures are there");
    folders
}

/// Four pairs, no two of one length, in the smallest vocabulary of the fixtures.
fn pairs() -> Vec<PreferencePair> {
    let ids = |from: usize, count: usize| -> Vec<u32> {
        (0..count)
            .map(|i| 3 + ((from * 7 + i * 11) % 60) as u32)
            .collect()
    };
    (0..4)
        .map(|row| PreferencePair {
            prompt_ids: ids(row, 2 + row % 3),
            chosen_ids: ids(row + 9, 1 + row),
            rejected_ids: ids(row + 20, 5 - row),
            row,
        })
        .collect()
}

/// What is compared of a learner's steps: named numbers.
type Figures = BTreeMap<String, Vec<f32>>;

/// Two steps of preference training from a model, with two micro-batches each.
fn preference_steps(model: Transformer, device: &Device, activations: Activations) -> Figures {
    steps_together(model, &[device.clone()], activations)
}

/// The same on several devices, of which the model is on the first.
fn steps_together(model: Transformer, devices: &[Device], activations: Activations) -> Figures {
    let device = &devices[0];
    let pairs = pairs();
    let objectives = LossConfig {
        loss: vec![Objective::Sigmoid, Objective::Sft],
        ..LossConfig::default()
    };
    let objectives = Objectives::new(objectives).unwrap();
    let hidden_size = model.config().hidden_size;
    let other = Transformer::init(model.config().clone(), 5, device).unwrap();
    let reference = ReferenceLogps::compute(&other, &pairs, 3, &Workers::on(device, 1), "parity");
    let mut figures = Figures::new();
    figures.insert("reference, chosen".into(), reference.chosen.values().into());
    let rejected = reference.rejected.values().into();
    figures.insert("reference, rejected".into(), rejected);
    let before = model.to_host();
    let mut learner = Learner::new(model, optimizer()).with_devices(devices);
    for step in 0..2 {
        let outcome = learner.step(2, LEARNING_RATE, |model, micro| {
            let indices = [2 * micro, 2 * micro + 1];
            let chosen = indices.iter().map(|&index| &pairs[index]);
            let device = model.device().without_autodiff();
            let batch = pair_batch(chosen, hidden_size, &device);
            let tokens = reference.of(&indices, &batch, &device);
            let compared: Compared = Reference::Logps(tokens.into()).into();
            let beta = Beta::new(0.5).unwrap();
            preference_micro_batch(model, &batch, &compared, &objectives, beta, activations)
        });
        assert!(outcome.updated);
        let metrics = outcome.metrics.iter().map(|&(_, value)| value as f32);
        let numbers = [outcome.loss as f32, outcome.grad_norm as f32];
        figures.insert(
            format!("loss, norm, metrics {step}"),
            numbers.into_iter().chain(metrics).collect(),
        );
    }
    let after = learner.snapshot();
    // Adapters are apart from the weights that a folder holds.
    let after = if after.lora_config().is_some() {
        after.merge().to_host()
    } else {
        after.to_host()
    };
    for (name, after) in after {
        let moved = after.values.iter().zip(&before[&name].values);
        let moved = moved.map(|(after, before)| (after - before) / LEARNING_RATE as f32);
        figures.insert(format!("update of {name}"), moved.collect());
    }
    figures
}

fn assert_figures(found: &[Figures; 2], what: &str) {
    let [cpu, device] = found;
    let moved = |figures: &Figures| {
        let updates = figures
            .iter()
            .filter(|(name, _)| name.starts_with("update"));
        updates
            .flat_map(|(_, values)| values)
            .fold(0.0_f32, |most, x| most.max(x.abs()))
    };
    assert!(moved(cpu) > 0.1, "{what}: the weights move");
    for (name, cpu) in cpu {
        let tolerance = if name.starts_with("update") {
            UPDATE_TOLERANCE
        } else {
            LOGP_TOLERANCE
        };
        assert_close(cpu, &device[name], tolerance, &format!("{what}: {name}"));
    }
}

#[test]
fn preference_steps_agree_on_every_architecture() {
    for folder in folders() {
        let found = on_both(|device| {
            let model = Transformer::read(&folder, device).unwrap();
            preference_steps(model, device, Activations::Keep)
        });
        assert_figures(&found, &folder.display().to_string());
    }
}

#[test]
fn steps_that_compute_activations_again_agree() {
    let found = on_both(|device| {
        let model = Transformer::read(&testdata("lm/qwen3"), device).unwrap();
        preference_steps(model, device, Activations::Recompute)
    });
    assert_figures(&found, "qwen3");
}

#[test]
fn steps_of_adapters_agree() {
    let lora = LoraConfig {
        rank: 4,
        alpha: 16.0,
        rank_stabilized: false,
        targets: vec!["all-linear".into()],
    };
    for name in ["llama_untied", "gpt2"] {
        let found = on_both(|device| {
            let model = Transformer::read(&testdata("lm").join(name), device).unwrap();
            let model = model.with_lora(&lora, 3).unwrap();
            preference_steps(model, device, Activations::Keep)
        });
        assert_figures(&found, name);
    }
}

/// What logps in bf16 may be off by, relative to `1 + |x|`: eight bits in every product, in another
/// order of sums. Those of f32 itself are as far from them.
const BF16_TOLERANCE: f64 = 3e-2;

#[test]
fn logps_in_bf16_agree_where_the_device_has_it() {
    let device = &devices()[1];
    if !Precision::Bf16.is_supported(device) {
        eprintln!("this device does not compute in bf16: not compared");
        return;
    }
    for folder in folders() {
        let [cpu, device] = on_both(|device| {
            let model = Transformer::read(&folder, device).unwrap();
            let model = model.with_precision(Precision::Bf16);
            let logps = ReferenceLogps::compute(
                &model,
                &pairs(),
                3,
                &Workers::on(device, 1),
                "parity, bf16",
            );
            [logps.chosen.values(), logps.rejected.values()].concat()
        });
        assert_close(&cpu, &device, BF16_TOLERANCE, &folder.display().to_string());
    }
}

#[test]
fn fine_tuning_steps_agree() {
    let pairs = pairs();
    let rows: Vec<(&[u32], &[u32])> = pairs
        .iter()
        .map(|pair| (&pair.prompt_ids[..], &pair.chosen_ids[..]))
        .collect();
    let [cpu, device] = on_both(|device| {
        let model = Transformer::read(&testdata("lm/llama_tied"), device).unwrap();
        let mut learner = Learner::new(model, optimizer());
        let steps = (0..3).map(|_| {
            let outcome = learner.step(1, LEARNING_RATE, |model, _| {
                let batch = CompletionBatch::new(&rows, device);
                sft_micro_batch(model, &batch, Activations::Keep)
            });
            outcome.loss as f32
        });
        steps.collect::<Vec<f32>>()
    });
    assert_close(&cpu, &device, LOGP_TOLERANCE, "losses of three steps");
    assert!(cpu[2] < cpu[0], "three steps learn: {cpu:?}");
}

#[test]
fn two_devices_train_together_as_one_alone() {
    let [cpu, device] = devices();
    let run = |devices: &[Device]| {
        let model = Transformer::read(&testdata("lm/llama_tied"), &devices[0]).unwrap();
        steps_together(model, devices, Activations::Keep)
    };
    let alone = [run(&[cpu.clone()]), run(&[device.clone(), device.clone()])];
    assert_figures(&alone, "two copies on the device");
    // Values go from one backend to the other and back.
    let mixed = [alone[0].clone(), run(&[device.clone(), cpu.clone()])];
    assert_figures(&mixed, "the device and the processor");
    let mixed = [alone[0].clone(), run(&[cpu, device])];
    assert_figures(&mixed, "the processor and the device");
}

/// Kernels are chosen by their time, once for a shape and a process: after that, nothing is left to
/// chance.
#[test]
fn a_step_gives_the_same_bits_again_in_the_same_process() {
    let device = &devices()[1];
    let run = || {
        let model = Transformer::read(&testdata("lm/llama_tied"), device).unwrap();
        preference_steps(model, device, Activations::Keep)
    };
    // The first run is that in which kernels are chosen.
    run();
    assert_eq!(run(), run());
}
