//! The soft advantage of a token under the task's true reward, by weighted rollouts.

use lm::{Decoder, KvCache, LmError, Sampling, sample};
use mdp_core::log_sum_exp;
use memo_task::{Memo, MemoTask, Reader};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::CreditOptions;
use crate::error::TrainError;

/// A completion of a memo.
pub(super) struct Text<'a> {
    pub memo: &'a Memo,
    pub prompt: &'a [u32],
    pub ids: &'a [u32],
}

/// Soft advantages of a text's tokens, reward units of the labels.
pub(super) struct Advantages {
    /// From all rollouts.
    pub all: Vec<f64>,
    /// From the first half of them, and from the second.
    pub halves: [Vec<f64>; 2],
}

/// The model that values are of, and one that finds good completions more often.
#[derive(Clone, Copy)]
pub(super) struct Proposals<'a> {
    pub reference: &'a Decoder<'a>,
    pub policy: &'a Decoder<'a>,
}

/// Where both models have read the same text.
struct State {
    caches: [KvCache; 2],
    /// Logits of the next token, `[rows * vocab]` each.
    logits: [Vec<f32>; 2],
}

/// `A(s,a) = r + V(s') − V(s)`, with `V(s) = β log E exp(G/β)` over completions of the reference,
/// `G` the reward that is still to come (P8 of the theory; equation 8 of arXiv 2404.12358). Rewards
/// are the task's times its label sharpness, the scale of its labels.
///
/// The expectation is made of a few good completions that the reference seldom draws. So half of
/// the completions come from the policy, and each is weighted by `π_ref / (½ π_ref + ½ π)` of the
/// whole of it: the mean is the reference's whatever the policy is, and no weight exceeds 2.
pub(super) fn advantages(
    proposals: Proposals<'_>,
    task: &MemoTask,
    text: &Text<'_>,
    options: &CreditOptions,
    stream: u64,
) -> Result<Advantages, TrainError> {
    let beta = options.recipe.preference.beta.get();
    let sharpness = task.config().label_sharpness;
    let max_new = options
        .recipe
        .task
        .as_ref()
        .map_or(0, |task| task.max_new_tokens);
    let mut rng = ChaCha8Rng::seed_from_u64(options.rollouts as u64);
    rng.set_stream(stream);
    let room = text.ids.len() + max_new;
    let (reference, logits) = proposals.reference.prefill(&[text.prompt], room)?;
    let (policy, others) = proposals.policy.prefill(&[text.prompt], room)?;
    let mut state = State {
        caches: [reference, policy],
        logits: [host(logits), host(others)],
    };
    let mut reader = task.reader(text.memo);
    let soft = |drawn: &[Drawn]| -> f64 {
        let term = |drawn: &Drawn| drawn.log_weight + sharpness * drawn.reward / beta;
        let terms: Vec<f64> = drawn.iter().map(term).collect();
        beta * (log_sum_exp(&terms) - (drawn.len() as f64).ln())
    };
    let mut values: [Vec<f64>; 3] = Default::default();
    let mut rewards = Vec::with_capacity(text.ids.len());
    for &id in text.ids {
        let limits = (options.rollouts, max_new);
        let drawn = rollouts(proposals, &state, &reader, limits, &mut rng)?;
        let (one, other) = drawn.split_at(drawn.len() / 2);
        for (values, drawn) in values.iter_mut().zip([&drawn[..], one, other]) {
            values.push(soft(drawn));
        }
        rewards.push(sharpness * reader.step(id).reward);
        state.logits = proposals.step(&[id], &mut state.caches);
    }
    let advantages = |values: &[f64]| -> Vec<f64> {
        // A completion ends with its last token; nothing is to come behind it.
        let next = values.iter().skip(1).chain(std::iter::once(&0.0));
        let terms = rewards.iter().zip(next).zip(values);
        terms
            .map(|((reward, next), value)| reward + next - value)
            .collect()
    };
    Ok(Advantages {
        all: advantages(&values[0]),
        halves: [advantages(&values[1]), advantages(&values[2])],
    })
}

impl Proposals<'_> {
    /// Reads one token a row with both models; their logits.
    fn step(&self, ids: &[u32], caches: &mut [KvCache; 2]) -> [Vec<f32>; 2] {
        let [reference, policy] = caches;
        [
            host(self.reference.step(ids, reference)),
            host(self.policy.step(ids, policy)),
        ]
    }
}

fn host(logits: burn::tensor::Tensor<2>) -> Vec<f32> {
    logits
        .try_into_vec_as()
        .expect("logits of a working device can be read")
}

/// A completion that was drawn from a state.
struct Drawn {
    /// The true reward that came.
    reward: f64,
    /// Log of how much more often the reference draws it than the two models together.
    log_weight: f64,
}

/// The log-probability of `token`, in nats.
fn logp(logits: &[f32], token: u32) -> f64 {
    let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    logits[token as usize] - log_sum_exp(&logits)
}

/// Completions from a state, by the reference and the policy in turn.
fn rollouts(
    proposals: Proposals<'_>,
    state: &State,
    reader: &Reader<'_>,
    (n, max_new): (usize, usize),
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Drawn>, LmError> {
    let vocab = state.logits[0].len();
    let mut rewards = vec![0.0; n];
    let mut logps = vec![[0.0; 2]; n];
    let mut caches = state
        .caches
        .each_ref()
        .map(|cache| cache.select(&vec![0; n]));
    let mut logits = state.logits.each_ref().map(|logits| logits.repeat(n));
    let mut alive: Vec<(usize, Reader<'_>)> = (0..n).map(|row| (row, reader.clone())).collect();
    for n_new in 1.. {
        let mut tokens = Vec::new();
        let mut kept = Vec::new();
        let mut rest = Vec::new();
        for (slot, (row, mut reader)) in alive.into_iter().enumerate() {
            let own = logits
                .each_ref()
                .map(|logits| &logits[slot * vocab..(slot + 1) * vocab]);
            let token = sample(own[row % 2], &Sampling::default(), rng)
                .ok_or(LmError::Logits { tokens: n_new - 1 })?;
            for (sum, own) in logps[row].iter_mut().zip(own) {
                *sum += logp(own, token);
            }
            rewards[row] += reader.step(token).reward;
            if reader.ended() {
                continue;
            }
            if n_new == max_new {
                rewards[row] += reader.truncation();
                continue;
            }
            tokens.push(token);
            kept.push(slot);
            rest.push((row, reader));
        }
        if kept.is_empty() {
            break;
        }
        if kept.len() < caches[0].rows() {
            caches = caches.each_ref().map(|cache| cache.select(&kept));
        }
        alive = rest;
        logits = proposals.step(&tokens, &mut caches);
    }
    let half = std::f64::consts::LN_2;
    let drawn = rewards.into_iter().zip(logps).map(|(reward, logps)| Drawn {
        reward,
        log_weight: logps[0] - (log_sum_exp(&logps) - half),
    });
    Ok(drawn.collect())
}

#[cfg(test)]
mod tests {
    use lm::{LlamaShape, ModelConfig, Transformer};
    use memo_task::{MemoConfig, Split};

    use super::*;

    /// Of a mean of hundreds of draws whose size is about 1.
    const SAMPLING_ERROR: f64 = 0.1;

    fn shape(task: &MemoTask) -> ModelConfig {
        let shape = LlamaShape {
            vocab_size: task.vocab_size(),
            hidden_size: 8,
            intermediate_size: 8,
            n_layers: 1,
            n_heads: 2,
            n_kv_heads: 2,
            max_positions: 128,
            tied: true,
            eos_id: task.eos_id(),
            pad_id: task.pad_id(),
        };
        ModelConfig::llama(&shape).unwrap()
    }

    #[test]
    fn advantages_add_up_to_the_reward_less_the_value_of_the_prompt() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let device = burn::tensor::Device::default();
        let reference = Transformer::init(shape(&task), 1, &device).unwrap();
        let policy = Transformer::init(shape(&task), 2, &device).unwrap();
        let mut options = CreditOptions::standard("unused".into()).unwrap();
        options.rollouts = 512;
        if let Some(task) = &mut options.recipe.task {
            task.max_new_tokens = 1;
        }
        let example = &task.examples(Split::Prompts, 1, 5)[0];
        let good = task.best_completion(&example.memo).unwrap();
        let text = Text {
            memo: &example.memo,
            prompt: &example.prompt_ids,
            ids: &good.ids,
        };
        let both = Proposals {
            reference: &Decoder::new(&reference),
            policy: &Decoder::new(&policy),
        };
        let found = advantages(both, &task, &text, &options, 0).unwrap();
        assert_eq!(found.all.len(), good.ids.len());
        // A perfect text earns 0, and so the sum is −V(s_0). One token is drawn behind the prompt,
        // so that V(s_0) can be added up over the vocabulary.
        let sharpness = task.config().label_sharpness;
        let (_, logits) = both.reference.prefill(&[text.prompt], 1).unwrap();
        let logits = host(logits);
        let terms: Vec<f64> = (0..task.vocab_size() as u32)
            .map(|token| {
                let mut reader = task.reader(text.memo);
                let mut reward = reader.step(token).reward;
                if !reader.ended() {
                    reward += reader.truncation();
                }
                logp(&logits, token) + sharpness * reward
            })
            .collect();
        let exact = -log_sum_exp(&terms);
        let sum: f64 = found.all.iter().sum();
        assert!((sum - exact).abs() < SAMPLING_ERROR, "{sum} for {exact}");
        // Twice the same rollouts.
        let again = advantages(both, &task, &text, &options, 0).unwrap();
        assert_eq!(found.all, again.all);
        assert_ne!(found.halves[0], found.halves[1]);
    }

    #[test]
    fn a_value_of_the_reference_does_not_depend_on_who_draws() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let device = burn::tensor::Device::default();
        let reference = Transformer::init(shape(&task), 1, &device).unwrap();
        let policy = Transformer::init(shape(&task), 7, &device).unwrap();
        let both = Proposals {
            reference: &Decoder::new(&reference),
            policy: &Decoder::new(&policy),
        };
        let example = &task.examples(Split::Prompts, 1, 5)[0];
        let (cache, logits) = both.reference.prefill(&[&example.prompt_ids], 4).unwrap();
        let (other, others) = both.policy.prefill(&[&example.prompt_ids], 4).unwrap();
        let state = State {
            caches: [cache, other],
            logits: [host(logits), host(others)],
        };
        let reader = task.reader(&example.memo);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let drawn = rollouts(both, &state, &reader, (2048, 2), &mut rng).unwrap();
        // Weights average to 1 under any proposal, and none exceeds 2.
        let weights: Vec<f64> = drawn.iter().map(|drawn| drawn.log_weight.exp()).collect();
        assert!(weights.iter().all(|&weight| weight <= 2.0 + 1e-9));
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        assert!((mean - 1.0).abs() < SAMPLING_ERROR, "{mean}");
    }
}
