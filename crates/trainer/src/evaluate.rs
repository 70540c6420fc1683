//! Judging policies: held-out preferences, and sampled completions under the true reward.

use std::sync::Mutex;

use dpo_loss::{Beta, Objectives};
use implicit_reward::token_rewards;
use lm::data::PreferencePair;
use lm::{CompletionBatch, Decoding, Generate, Generated, Sampling, Transformer};
use memo_task::TokenReward;
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::learner::{PREFERENCE_METRICS, pair_logps, preference_loss, preference_values};
use crate::prepare::PreparedTask;
use crate::progress::Progress;
use crate::reference::{ReferenceLogps, pair_batch};
use crate::workers::Workers;

/// Means over held-out pairs of the loss and of TRL's metrics, named with `eval_` in front.
///
/// Each pair counts the same, whatever batch it is in, except that `logits/*`, `entropy` and
/// `mean_token_accuracy` are means over the tokens of a batch.
///
/// Returns nothing for no pairs.
///
/// # Panics
///
/// If `batch_size` is zero, `reference` is shorter than `pairs`, or the device fails.
pub fn preference_metrics(
    model: &Transformer,
    pairs: &[PreferencePair],
    reference: &ReferenceLogps,
    (objectives, beta): (&Objectives, Beta),
    batch_size: usize,
    workers: &Workers,
) -> Map<String, Value> {
    let device = model.device();
    let indices: Vec<usize> = (0..pairs.len()).collect();
    let chunks: Vec<&[usize]> = indices.chunks(batch_size).collect();
    let values = workers.map(chunks.len(), |index| -> Vec<f32> {
        let chunk = chunks[index];
        let batch = pair_batch(
            chunk.iter().map(|&index| &pairs[index]),
            model.config().hidden_size,
            &device,
        );
        let pick = |values: &[f32]| -> Vec<f32> { chunk.iter().map(|&i| values[i]).collect() };
        let reference = pair_logps(
            &pick(&reference.chosen),
            &pick(&reference.rejected),
            &device,
        );
        let scored = model.score(&batch, true);
        let (loss, policy) = preference_loss(&scored, &reference, objectives, beta);
        let values = preference_values(&scored, &batch, &policy, &reference, beta);
        burn::tensor::Tensor::cat(vec![loss, values], 0)
            .try_into_vec_as()
            .expect("values of a working device can be read")
    });
    let mut sums = vec![0.0; PREFERENCE_METRICS.len() + 1];
    for (chunk, values) in chunks.iter().zip(values) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += f64::from(value) * chunk.len() as f64;
        }
    }
    if pairs.is_empty() {
        return Map::new();
    }
    std::iter::once("loss")
        .chain(PREFERENCE_METRICS)
        .zip(sums)
        .map(|(name, sum)| {
            (
                format!("eval_{name}"),
                Value::from(sum / pairs.len() as f64),
            )
        })
        .collect()
}

/// One completion of each prompt, drawn from the policy at temperature 1.
///
/// # Errors
///
/// A prompt that with `max_new_tokens` exceeds the model's longest sequence.
pub fn sample_completions<P: AsRef<[u32]> + Sync>(
    policy: &Transformer,
    prompts: &[P],
    max_new_tokens: usize,
    eos_ids: &[u32],
    seed: u64,
    workers: &Workers,
    label: &str,
) -> Result<Vec<Generated>, TrainError> {
    // Enough rows to keep the cores busy, few enough to keep the cache small.
    const ROWS: usize = 64;
    let progress = Mutex::new(Progress::new(label, "prompts", prompts.len(), 0));
    let chunks: Vec<&[P]> = prompts.chunks(ROWS).collect();
    let completions = workers.map(chunks.len(), |index| {
        let options = Generate {
            max_new_tokens,
            eos_ids: eos_ids.to_vec(),
            decoding: Decoding::Sample(Sampling::default()),
            seed: seed.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64),
        };
        let completions = policy.generate(chunks[index], &options);
        if let Ok(mut progress) = progress.lock() {
            progress.advance(chunks[index].len(), "");
        }
        completions
    });
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    let completions: Result<Vec<_>, _> = completions.into_iter().collect();
    Ok(completions?.concat())
}

/// Summed true reward of each completion, in the order of the task's prompts.
pub fn true_rewards(task: &PreparedTask, completions: &[Generated]) -> Vec<f64> {
    completions
        .iter()
        .zip(&task.prompts)
        .map(|(completion, (memo, _))| {
            let rewards = task.task.token_rewards(memo, &completion.ids);
            rewards.iter().map(|token: &TokenReward| token.reward).sum()
        })
        .collect()
}

/// Wins of `ours` over `theirs`, pair by pair: 1, 0, or 0.5 for a tie.
pub fn wins(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    // Rewards are sums of a few tenths; two that differ by rounding alone are equal.
    const SAME: f64 = 1e-9;
    ours.iter()
        .zip(theirs)
        .map(|(ours, theirs)| match ours - theirs {
            difference if difference > SAME => 1.0,
            difference if difference < -SAME => 0.0,
            _ => 0.5,
        })
        .collect()
}

/// A completion's tokens as a policy and its reference see them.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadToken {
    /// Token id.
    pub id: u32,
    /// `log π(a|s)`, nats.
    pub policy_logp: f32,
    /// `log π_ref(a|s)`, nats.
    pub reference_logp: f32,
    /// `β log (π / π_ref)`, reward units.
    pub implicit_reward: f32,
}

/// Reads the implicit reward off every token of one completion.
///
/// # Panics
///
/// If there is no token to predict (the first one after an empty prompt is not), or the device
/// fails.
pub fn read_completion(
    policy: &Transformer,
    reference: &Transformer,
    beta: Beta,
    prompt: &[u32],
    completion: &[u32],
) -> Vec<ReadToken> {
    let batch = CompletionBatch::new(&[(prompt, completion)], &policy.device());
    let policy = policy.score(&batch, false).flat.unsqueeze::<2>();
    let reference = reference.score(&batch, false).flat.unsqueeze::<2>();
    let rewards = token_rewards(policy.clone(), reference.clone(), beta);
    let host = |tensor: burn::tensor::Tensor<2>| -> Vec<f32> {
        tensor
            .try_into_vec_as()
            .expect("logps of a working device can be read")
    };
    let (policy, reference, rewards) = (host(policy), host(reference), host(rewards));
    // The first token of an empty prompt is not predicted.
    let skipped = completion.len() - policy.len();
    completion[skipped..]
        .iter()
        .enumerate()
        .map(|(index, &id)| ReadToken {
            id,
            policy_logp: policy[index],
            reference_logp: reference[index],
            implicit_reward: rewards[index],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wins_count_ties_as_halves() {
        assert_eq!(
            wins(&[1.0, 0.0, -0.3], &[0.0, 1.0, -0.1 - 0.2]),
            [1.0, 0.0, 0.5]
        );
    }
}
