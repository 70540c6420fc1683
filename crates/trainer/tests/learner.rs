//! A training step is the same however its pairs are cut into micro-batches.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use dpo_loss::{Beta, LossConfig, Objective, Objectives, PairLogps};
use lm::data::PreferencePair;
use lm::weights::HostTensor;
use lm::{CompletionBatch, LlamaShape, ModelConfig, Transformer};
use trainer::reference::{ReferenceLogps, pair_batch};
use trainer::{
    Activations, AdamW, Compared, Learner, MicroBatch, OptimizerRecipe, Reference, Workers,
    preference_micro_batch, sft_micro_batch,
};

/// The same sums in another order, in f32, after three updates of 1e-3.
const ORDER_TOLERANCE: f32 = 1e-5;

fn model(seed: u64) -> Transformer {
    let config = ModelConfig::llama(&LlamaShape {
        vocab_size: 32,
        hidden_size: 16,
        intermediate_size: 32,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        max_positions: 32,
        tied: false,
        eos_id: 1,
        pad_id: 0,
    });
    Transformer::init(config.unwrap(), seed, &Device::default()).unwrap()
}

/// Eight pairs, no two of one length.
fn pairs() -> Vec<PreferencePair> {
    let ids = |from: usize, count: usize| -> Vec<u32> {
        (0..count)
            .map(|i| 2 + ((from * 7 + i * 11) % 30) as u32)
            .collect()
    };
    (0..8)
        .map(|row| PreferencePair {
            prompt_ids: ids(row, 1 + row % 3),
            chosen_ids: ids(row + 9, 1 + row),
            rejected_ids: ids(row + 20, 9 - row),
            row,
        })
        .collect()
}

/// Weights after three updates on all pairs, in micro-batches of `size`.
fn trained(objective: Objective, size: usize, workers: usize) -> BTreeMap<String, HostTensor> {
    trained_by(objective, size, |learner| {
        learner.with_workers(Workers::new(workers))
    })
}

fn trained_by(
    objective: Objective,
    size: usize,
    set: impl Fn(Learner) -> Learner,
) -> BTreeMap<String, HostTensor> {
    let (pairs, device) = (pairs(), Device::default());
    let mut config = LossConfig::single(objective);
    if objective == Objective::ExoPair {
        config.label_smoothing = 1e-3;
    }
    let objectives = Objectives::new(config).unwrap();
    let reference = ReferenceLogps::compute(&model(2), &pairs, 8, &Workers::new(1), "test");
    let optimizer = AdamW::new(&OptimizerRecipe::default());
    let mut learner = set(Learner::new(model(1), optimizer));
    for _ in 0..3 {
        let outcome = learner.step(pairs.len() / size, 1e-3, |model, micro| {
            let indices: Vec<usize> = (micro * size..(micro + 1) * size).collect();
            let chosen = indices.iter().map(|&index| &pairs[index]);
            let batch = pair_batch(chosen, 16, &device);
            let tokens = reference.of(&indices, &batch, &device);
            let compared: Compared = Reference::Logps(tokens.into()).into();
            let beta = Beta::new(0.5).unwrap();
            preference_micro_batch(
                model,
                &batch,
                &compared,
                &objectives,
                beta,
                Activations::Keep,
            )
        });
        assert!(outcome.updated);
    }
    learner.snapshot().to_host()
}

fn apart(a: &BTreeMap<String, HostTensor>, b: &BTreeMap<String, HostTensor>) -> f32 {
    let pairs = a
        .iter()
        .flat_map(|(name, a)| a.values.iter().zip(&b[name].values));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn accumulation_is_one_batch_for_losses_that_are_means_over_pairs() {
    for objective in [
        Objective::Sigmoid,
        Objective::Ipo,
        Objective::Hinge,
        Objective::ExoPair,
        Objective::NcaPair,
        Objective::ApoZero,
        Objective::Simpo,
    ] {
        let one = trained(objective, 8, 1);
        for (size, workers) in [(1, 1), (2, 1), (1, 2)] {
            let apart = apart(&one, &trained(objective, size, workers));
            assert!(apart < ORDER_TOLERANCE, "{objective} in {size}s: {apart}");
        }
    }
}

#[test]
fn accumulation_weighs_pairs_of_unlike_length_otherwise_for_means_over_tokens() {
    // A mean over the tokens of each micro-batch, then over micro-batches, as in TRL: tokens of
    // short completions weigh more in small micro-batches.
    for objective in [Objective::Sft, Objective::Orpo] {
        let apart = apart(&trained(objective, 8, 1), &trained(objective, 1, 1));
        assert!(apart > 10.0 * ORDER_TOLERANCE, "{objective}: {apart}");
    }
}

#[test]
fn metrics_are_means_by_what_each_micro_batch_has_of_them() {
    let (pairs, device) = (pairs(), Device::default());
    let mut learner = Learner::new(model(1), AdamW::new(&OptimizerRecipe::default()));
    let values = [[2.0_f32, 1.0], [6.0, f32::NAN]];
    let weights = [vec![3.0, 1.0], vec![1.0, 0.0]];
    let outcome = learner.step(2, 1e-3, |model, micro| {
        let pair = &pairs[micro];
        let rows = [(&pair.prompt_ids[..], &pair.chosen_ids[..])];
        let batch = CompletionBatch::new(&rows, &device);
        MicroBatch {
            names: vec!["a", "b"],
            values: Tensor::from_floats(values[micro], &device),
            weights: weights[micro].clone(),
            ..sft_micro_batch(model, &batch, Activations::Keep)
        }
    });
    assert_eq!(outcome.metrics, [("a", 3.0), ("b", 1.0)]);
}

#[test]
fn devices_do_together_what_one_that_accumulates_does_alone() {
    let alone = trained(Objective::Sigmoid, 1, 1);
    // As many as there are micro-batches, a number that does not divide it, and more.
    for count in [2, 3, 8, 9] {
        let devices = vec![Device::default(); count];
        let together = trained_by(Objective::Sigmoid, 1, |learner| {
            learner.with_devices(&devices)
        });
        assert!(apart(&alone, &together) <= 0.0, "{count} devices");
    }
}

#[test]
fn sums_of_stored_token_logps_are_the_scores_of_the_reference() {
    let (pairs, device) = (pairs(), Device::default());
    let stored = ReferenceLogps::compute(&model(2), &pairs, 3, &Workers::new(2), "test");
    let batch = pair_batch(pairs.iter(), 16, &device);
    let sums = PairLogps::from_halves(model(2).score(&batch, false).table.sums());
    for (stored, scored) in [
        (stored.chosen.sums(), sums.chosen),
        (stored.rejected.sums(), sums.rejected),
    ] {
        let scored: Vec<f32> = scored.try_into_vec_as().unwrap();
        for (stored, scored) in stored.iter().zip(&scored) {
            assert!((stored - scored).abs() < ORDER_TOLERANCE * (1.0 + scored.abs()));
        }
    }
}
