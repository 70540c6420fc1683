//! Judging policies: held-out preferences, and sampled completions under the true reward.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Tensor;
use dpo_loss::{Beta, Objectives, position_kls};
use implicit_reward::token_rewards;
use lm::data::PreferencePair;
use lm::{CompletionBatch, Generate, Generated, Transformer};
use memo_task::TokenReward;
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::learner::{Compared, preference_outcome};
use crate::prepare::PreparedTask;
use crate::progress::Progress;
use crate::reference::pair_batch;
use crate::workers::Workers;

/// Means over held-out pairs of the loss and of the metrics, named with `eval_` in front.
///
/// Each pair counts the same, whatever batch it is in, except that `logits/*`, `entropy`,
/// `kl_estimate/*` and `mean_token_accuracy` are means over the tokens of a batch. `compared`
/// gives what the pairs of a batch, by index, are compared with.
///
/// Returns nothing for no pairs.
///
/// # Panics
///
/// If `batch_size` is zero, or the device fails.
pub fn preference_metrics(
    model: &Transformer,
    pairs: &[PreferencePair],
    compared: impl Fn(&[usize], &CompletionBatch) -> Compared + Sync,
    (objectives, beta): (&Objectives, Beta),
    batch_size: usize,
    workers: &Workers,
) -> Map<String, Value> {
    let device = model.device();
    let indices: Vec<usize> = (0..pairs.len()).collect();
    let chunks: Vec<&[usize]> = indices.chunks(batch_size).collect();
    let outcomes = workers.map(chunks.len(), |index| -> (Vec<&'static str>, Vec<f32>) {
        let chunk = chunks[index];
        let batch = pair_batch(
            chunk.iter().map(|&index| &pairs[index]),
            model.config().hidden_size,
            &device,
        );
        let compared = compared(chunk, &batch);
        let hidden = model.completion_hidden(&batch);
        let outcome = preference_outcome(model, hidden, &batch, &compared, objectives, beta);
        let values = Tensor::cat(vec![outcome.loss, outcome.values], 0)
            .try_into_vec_as()
            .expect("values of a working device can be read");
        (outcome.names, values)
    });
    let Some((names, _)) = outcomes.first() else {
        return Map::new();
    };
    let mut sums = vec![0.0; names.len() + 1];
    for (chunk, (_, values)) in chunks.iter().zip(&outcomes) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += f64::from(*value) * chunk.len() as f64;
        }
    }
    std::iter::once(&"loss")
        .chain(names)
        .zip(sums)
        .map(|(name, sum)| {
            (
                format!("eval_{name}"),
                Value::from(sum / pairs.len() as f64),
            )
        })
        .collect()
}

/// Names of the divergences from the reference, policy first, in an evaluation's metrics.
pub const DIVERGENCE_METRICS: [&str; 2] = ["kl/policy_reference", "kl/reference_policy"];

/// How far a policy has gone from its reference, at the states of some completions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergences {
    /// `KL(π‖π_ref)` of the next token, nats: the mean over completion tokens.
    pub policy_reference: f64,
    /// `KL(π_ref‖π)` of the next token, nats: the mean over completion tokens.
    pub reference_policy: f64,
    /// What chosen and rejected completions lost beyond what the divergence explains.
    pub unexplained: Unexplained,
}

/// The change of the logps of completions that `KL(π_ref‖π)` does not explain.
///
/// Where a completion's tokens were drawn from the reference, `log π/π_ref + KL(π_ref‖π)` is zero
/// in the mean at every token, so the log-ratio of the whole completion is in the mean less than
/// nothing by the sum of its KLs and no more (P12 of the theory chapter). A log-ratio far below
/// says that the completions are not of the reference's making, or that mass leaves them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unexplained {
    /// Mean of `log π/π_ref` over the chosen completions, nats.
    pub chosen: f64,
    /// Mean of `log π/π_ref` over the rejected completions, nats.
    pub rejected: f64,
    /// Mean over completions of the sum of `KL(π_ref‖π)` over their tokens, nats.
    pub explained: f64,
    /// Standard error of the mean of both log-ratios plus `explained`, nats.
    pub standard_error: f64,
}

impl Unexplained {
    /// A sentence for the user, where both sides fell and by more than the divergence explains,
    /// beyond doubt.
    pub fn warning(&self) -> Option<String> {
        // Three standard errors: one false alarm in 700 looks.
        const DOUBT: f64 = 3.0;
        let excess = (self.chosen + self.rejected) / 2.0 + self.explained;
        (self.chosen < 0.0 && self.rejected < 0.0 && excess < -DOUBT * self.standard_error).then(
            || {
                format!(
                    "logps of chosen and rejected completions both fell, by {:.2} and {:.2} nats, \
                     and the policy's divergence from the reference explains {:.2} of that: \
                     probability goes to completions that the data do not hold. A loss term `sft`, \
                     a smaller learning rate or a larger beta would hold it.",
                    -self.chosen, -self.rejected, self.explained
                )
            },
        )
    }
}

/// The divergences between policy and reference at the tokens of some pairs, exact at each state.
///
/// Returns `None` for no pairs.
///
/// # Panics
///
/// If `batch_size` is zero, or the device fails.
pub fn divergences(
    policy: &Transformer,
    reference: &Transformer,
    pairs: &[PreferencePair],
    batch_size: usize,
    workers: &Workers,
) -> Option<Divergences> {
    let device = policy.device();
    let chunks: Vec<&[PreferencePair]> = pairs.chunks(batch_size).collect();
    let rows = workers.map(chunks.len(), |index| -> (usize, Vec<f32>, Vec<f32>) {
        let hidden_size = policy.config().hidden_size;
        let batch = pair_batch(chunks[index].iter(), hidden_size, &device);
        let (ours, theirs) = (
            policy.completion_logits(&batch),
            reference.completion_logits(&batch),
        );
        let sums = |flat| batch.table(flat).sums();
        let forward = sums(position_kls(ours.clone(), theirs.clone()));
        let backward = sums(position_kls(theirs.clone(), ours.clone()));
        let ratios = batch.scored(ours, false).flat - batch.scored(theirs, false).flat;
        let host = |tensors: Vec<Tensor<1>>| -> Vec<f32> {
            Tensor::cat(tensors, 0)
                .try_into_vec_as()
                .expect("values of a working device can be read")
        };
        let n_tokens = batch.counts().iter().sum();
        (
            n_tokens,
            host(vec![forward]),
            host(vec![backward, sums(ratios)]),
        )
    });
    if rows.is_empty() {
        return None;
    }
    let (mut n_tokens, mut forward, mut backward) = (0, 0.0, 0.0);
    let (mut chosen, mut rejected, mut excess) = (0.0, 0.0, Vec::with_capacity(pairs.len()));
    for (tokens, one, other) in rows {
        n_tokens += tokens;
        forward += one.iter().map(|&x| f64::from(x)).sum::<f64>();
        let (kls, ratios) = other.split_at(other.len() / 2);
        backward += kls.iter().map(|&x| f64::from(x)).sum::<f64>();
        let n = ratios.len() / 2;
        for pair in 0..n {
            let (win, lose) = (f64::from(ratios[pair]), f64::from(ratios[n + pair]));
            chosen += win;
            rejected += lose;
            let explained = f64::from(kls[pair]) + f64::from(kls[n + pair]);
            excess.push((win + lose + explained) / 2.0);
        }
    }
    let n = excess.len() as f64;
    let mean = excess.iter().sum::<f64>() / n;
    // One pair says nothing of how far another would be from it.
    let variance = excess.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let variance = if n < 2.0 { f64::INFINITY } else { variance };
    Some(Divergences {
        policy_reference: forward / n_tokens as f64,
        reference_policy: backward / n_tokens as f64,
        unexplained: Unexplained {
            chosen: chosen / n,
            rejected: rejected / n,
            explained: backward / (2.0 * n),
            standard_error: (variance / n).sqrt(),
        },
    })
}

/// One completion of each prompt, from the policy, with a bar that bears a label.
///
/// Where `stop` becomes true, no batch but the first is begun: the completions of the first prompts
/// come back, as far as none is missing.
///
/// # Errors
///
/// A prompt that with the new tokens exceeds the model's longest sequence, or logits from which
/// nothing can be drawn.
pub fn sample_completions<P: AsRef<[u32]> + Sync>(
    policy: &Transformer,
    prompts: &[P],
    options: &Generate,
    (workers, label): (&Workers, &str),
    stop: Option<&AtomicBool>,
) -> Result<Vec<Generated>, TrainError> {
    // Enough rows to keep the cores busy, few enough to keep the cache small.
    const ROWS: usize = 64;
    let progress = Mutex::new(Progress::new(label, "completions", prompts.len(), 0));
    let chunks: Vec<&[P]> = prompts.chunks(ROWS).collect();
    let completions = workers.map(chunks.len(), |index| {
        if index > 0 && stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return None;
        }
        let seed = options.seed.wrapping_mul(0x9e37_79b9);
        let options = Generate {
            seed: seed.wrapping_add(index as u64),
            ..options.clone()
        };
        let completions = policy.generate(chunks[index], &options);
        if let Ok(mut progress) = progress.lock() {
            progress.advance(chunks[index].len(), "");
        }
        Some(completions)
    });
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    let first = completions.into_iter().map_while(|completions| completions);
    let completions: Result<Vec<_>, _> = first.collect();
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
    let host = |tensor: Tensor<2>| -> Vec<f32> {
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

    #[test]
    fn a_fall_that_the_divergence_explains_is_no_alarm() {
        let fall = |chosen, rejected, explained| Unexplained {
            chosen,
            rejected,
            explained,
            standard_error: 0.1,
        };
        assert_eq!(fall(-1.0, -2.0, 1.4).warning(), None);
        assert_eq!(fall(0.5, -9.0, 0.0).warning(), None, "the chosen side rose");
        let warning = fall(-1.0, -2.0, 1.0).warning().unwrap();
        assert!(warning.contains("1.00 and 2.00 nats"), "{warning}");
    }
}
