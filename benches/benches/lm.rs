//! What do logps, a training step and a decoding step cost?
//!
//! The model is the one that `cargo xtask train` makes: a Llama of 2 blocks and hidden size 128,
//! with the vocabulary of the memo task. Throughput is in logits for `token_logps`, in pairs for
//! `training_step` and in tokens for `decoding_step`. Ids: `p` pairs, `s` tokens of prompt and
//! completion, `b` batch, `r` rows, `v` vocabulary.

#![allow(missing_docs, reason = "criterion generates the items")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dpo_loss::{Beta, Objectives, token_logps};
use lm::{CompletionBatch, Decoder, LlamaShape, ModelConfig, Transformer};
use trainer::{Activations, AdamW, Learner, OptimizerRecipe, pair_logps, preference_micro_batch};

/// Rows and vocabulary: a batch of the memo task, and of a model with a real vocabulary.
const HEADS: [(usize, usize); 2] = [(512, 512), (256, 8192)];

/// Pairs of a training step.
const PAIRS: usize = 8;
/// Tokens of a prompt.
const PROMPT: usize = 48;
/// Tokens of a completion.
const COMPLETION: usize = 24;
/// Vocabulary of the memo task.
const VOCAB: usize = 269;
/// Steps that a cache is made for: attention reads 48 to 176 tokens.
const DECODED: usize = 128;

fn memo_model(device: &Device) -> Transformer {
    let shape = LlamaShape {
        vocab_size: VOCAB,
        hidden_size: 128,
        intermediate_size: 256,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 4,
        max_positions: 256,
        tied: true,
        eos_id: 1,
        pad_id: 0,
    };
    let config = ModelConfig::llama(&shape).expect("the sizes divide");
    Transformer::init(config, 1, device).expect("the sizes divide")
}

fn ids(n: usize, seed: usize) -> Vec<u32> {
    benches::ids(n, seed, VOCAB)
}

fn wait(device: &Device) {
    device.sync().expect("a working device finishes its work");
}

fn logps(c: &mut Criterion) {
    let device = Device::default();
    let mut group = c.benchmark_group("token_logps");
    for (rows, vocab) in HEADS {
        let size = format!("r{rows}_v{vocab}");
        let normal = Distribution::Normal(0.0, 3.0);
        let logits = Tensor::<2>::random([rows, vocab], normal, &device);
        let targets: Vec<i64> = (0..rows).map(|row| (row * 31 % vocab) as i64).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
        group.throughput(Throughput::Elements((rows * vocab) as u64));
        group.bench_function(BenchmarkId::new("forward", &size), |b| {
            b.iter(|| {
                black_box(token_logps(logits.clone(), targets.clone()));
                wait(&device);
            });
        });
        group.bench_function(BenchmarkId::new("forward_backward", &size), |b| {
            let tracked = device.clone().autodiff();
            let logits = Tensor::<2>::from_data(logits.to_data(), &tracked).require_grad();
            let targets = Tensor::<1, Int>::from_data(targets.to_data(), &tracked);
            b.iter(|| {
                let total = token_logps(logits.clone(), targets.clone()).sum();
                black_box(logits.grad(&total.backward()));
                wait(&device);
            });
        });
    }
    group.finish();
}

fn training_step(c: &mut Criterion) {
    let device = Device::default();
    let optimizer = AdamW::new(&OptimizerRecipe::default());
    let mut learner = Learner::new(memo_model(&device), optimizer);
    let texts: Vec<(Vec<u32>, Vec<u32>)> = (0..2 * PAIRS)
        .map(|row| (ids(PROMPT, row % PAIRS), ids(COMPLETION, 100 + row)))
        .collect();
    let rows: Vec<(&[u32], &[u32])> = texts.iter().map(|(p, c)| (&p[..], &c[..])).collect();
    let objectives = Objectives::default();
    let beta = Beta::new(0.1).expect("a tenth is a valid strength");
    // About what a fresh model gives: 24 tokens at the logarithm of the vocabulary.
    let reference = [-137.0; PAIRS];

    let mut group = c.benchmark_group("training_step");
    group.throughput(Throughput::Elements(PAIRS as u64));
    let size = format!("p{PAIRS}_s{PROMPT}+{COMPLETION}");
    group.bench_function(BenchmarkId::new("dpo", size), |b| {
        b.iter(|| {
            // Making the batch is part of a step, as it is in a run.
            let outcome = learner.step(1, 1e-6, |model, _| {
                let batch = CompletionBatch::new(&rows, &device);
                let reference = pair_logps(&reference, &reference, &device);
                preference_micro_batch(
                    model,
                    &batch,
                    &reference.into(),
                    &objectives,
                    beta,
                    Activations::Keep,
                )
            });
            wait(&device);
            assert!(outcome.updated, "the loss stays a number");
            black_box(outcome.loss)
        });
    });
    group.finish();
}

fn decoding_step(c: &mut Criterion) {
    let device = Device::default();
    let model = memo_model(&device);
    let mut group = c.benchmark_group("decoding_step");
    let decoders = [
        ("tensors", Decoder::of_tensors(&model)),
        ("own", Decoder::new(&model)),
    ];
    for (name, decoder) in &decoders {
        for batch in [1, 16] {
            let prompts: Vec<Vec<u32>> = (0..batch).map(|row| ids(PROMPT, row)).collect();
            let next = ids(batch, 7);
            group.throughput(Throughput::Elements(batch as u64));
            group.bench_function(BenchmarkId::new(*name, format!("b{batch}")), |b| {
                b.iter_custom(|n_steps| decode(decoder, &prompts, &next, n_steps));
            });
        }
    }
    group.finish();
}

/// Time of `n_steps` cached steps; reading the prompts again when a cache is full is left out.
fn decode(model: &Decoder<'_>, prompts: &[Vec<u32>], next: &[u32], n_steps: u64) -> Duration {
    let mut cache = None;
    let mut spent = Duration::ZERO;
    for _ in 0..n_steps {
        let mut open = cache.take().unwrap_or_else(|| {
            let (cache, logits) = model
                .prefill(prompts, DECODED)
                .expect("the prompts fit the model");
            black_box(logits.to_data());
            cache
        });
        let began = Instant::now();
        // Reading the logits ends the step, as choosing a token does.
        black_box(model.step(next, &mut open).to_data());
        spent += began.elapsed();
        cache = (open.room() > 0).then_some(open);
    }
    spent
}

criterion_group!(benches, logps, training_step, decoding_step);
criterion_main!(benches);
