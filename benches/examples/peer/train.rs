//! DPO steps on the same pairs over and over, the reference's logps computed before.

use std::path::PathBuf;
use std::time::Instant;

use crate::decode::PrecisionName;
use anyhow::ensure;
use burn::tensor::Device;
use clap::Args;
use dpo_loss::{Beta, Objectives};
use lm::CompletionBatch;
use serde_json::json;
use trainer::{
    Activations, AdamW, Learner, OptimizerRecipe, Workers, pair_logps, preference_micro_batch,
};

#[derive(Debug, Args)]
pub(crate) struct Train {
    /// Hugging Face folder of the model.
    #[arg(long)]
    model: PathBuf,
    /// JSON file of pairs: the token ids of prompt, chosen and rejected completion for each.
    #[arg(long)]
    pairs: PathBuf,
    /// Compute the prompt for each completion anew, as peers do.
    #[arg(long)]
    unshared: bool,
    /// Parts of the step that are computed side by side, each on one thread.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Parts of the step in all, of which the others wait; by default as many as workers.
    #[arg(long)]
    parts: Option<usize>,
    #[arg(long)]
    beta: f64,
    #[arg(long)]
    learning_rate: f64,
    /// Steps before the first that counts.
    #[arg(long)]
    warm_up: usize,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What matrix products are computed in.
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionName,
}

type Pair = (Vec<u32>, Vec<u32>, Vec<u32>);

pub(crate) fn serve(case: &Train) -> anyhow::Result<()> {
    let model = crate::decode::read_model(&case.model, &case.device, case.precision)?;
    let device = model.device();
    let pairs: Vec<Pair> = crate::read_json(&case.pairs)?;
    let n_parts = case.parts.unwrap_or(case.workers);
    ensure!(case.workers > 0, "expected at least one worker, got none");
    ensure!(
        n_parts > 0 && !pairs.is_empty() && pairs.len().is_multiple_of(n_parts),
        "expected a multiple of {n_parts} pairs, got {}",
        pairs.len()
    );
    let parts: Vec<&[Pair]> = pairs.chunks(pairs.len() / n_parts).collect();
    let hidden_size = model.config().hidden_size;
    let batch = |part: &[Pair]| batch(part, case.unshared, hidden_size, &device);
    // By part: of the chosen completions, then of the rejected ones.
    let reference: Vec<Vec<f32>> = parts
        .iter()
        .map(|part| {
            model
                .score(&batch(part), false)
                .table
                .sums()
                .try_into_vec_as()
        })
        .collect::<Result<_, _>>()
        .map_err(|error| anyhow::anyhow!("logps could not be read: {error:?}"))?;

    let optimizer = OptimizerRecipe {
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        ..OptimizerRecipe::default()
    };
    let (objectives, beta) = (Objectives::default(), Beta::new(case.beta)?);
    // Nothing else holds the weights: their logps are all that is needed of the reference.
    let mut learner = Learner::new(model, AdamW::new(&optimizer))
        .with_workers(Workers::on(&device, case.workers));
    crate::serve(&json!({}), case.warm_up, || {
        let began = Instant::now();
        let outcome = learner.step(parts.len(), case.learning_rate, |model, index| {
            // Making the batch is part of a step, as it is in a run.
            let batch = batch(parts[index]);
            let (chosen, rejected) = reference[index].split_at(parts[index].len());
            let reference = pair_logps(chosen, rejected, &device);
            preference_micro_batch(
                model,
                &batch,
                &reference.into(),
                &objectives,
                beta,
                Activations::Keep,
            )
        });
        device.sync()?;
        let seconds = began.elapsed().as_secs_f64();
        let held = device.memory_pool_usage().map(|usage| usage.bytes_reserved);
        Ok(json!({ "seconds": seconds, "loss": outcome.loss, "device_bytes": held }))
    })
}

fn batch(pairs: &[Pair], unshared: bool, hidden_size: usize, device: &Device) -> CompletionBatch {
    if unshared {
        let chosen = pairs.iter().map(|(prompt, c, _)| (&prompt[..], &c[..]));
        let rejected = pairs.iter().map(|(prompt, _, r)| (&prompt[..], &r[..]));
        CompletionBatch::new(&chosen.chain(rejected).collect::<Vec<_>>(), device)
    } else {
        let pairs: Vec<(&[u32], &[u32], &[u32])> = pairs
            .iter()
            .map(|(p, c, r)| (&p[..], &c[..], &r[..]))
            .collect();
        CompletionBatch::for_pairs(&pairs, hidden_size, device)
    }
}
