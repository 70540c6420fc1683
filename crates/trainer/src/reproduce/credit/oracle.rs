//! The soft advantage of a token under the task's true reward, by rollouts of the reference.

use lm::{KvCache, Sampling, Transformer, sample};
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

/// `A(s,a) = r + V(s') − V(s)`, with `V(s) = β log E exp(G/β)` over completions drawn from the
/// reference, `G` the reward that is still to come (P8 of the theory; equation 8 of arXiv
/// 2404.12358). Rewards are the task's times its label sharpness, the scale of its labels.
pub(super) fn advantages(
    reference: &Transformer,
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
    let (mut cache, mut logits) = reference.prefill(&[text.prompt], text.ids.len() + max_new)?;
    let mut reader = task.reader(text.memo);
    let soft = |returns: &[f64]| -> f64 {
        let terms: Vec<f64> = returns.iter().map(|g| sharpness * g / beta).collect();
        beta * (log_sum_exp(&terms) - (returns.len() as f64).ln())
    };
    let mut values: [Vec<f64>; 3] = Default::default();
    let mut rewards = Vec::with_capacity(text.ids.len());
    for &id in text.ids {
        let start = (&cache, host(logits));
        let returns = rollouts(
            reference,
            start,
            &reader,
            (options.rollouts, max_new),
            &mut rng,
        );
        let (one, other) = returns.split_at(returns.len() / 2);
        for (values, returns) in values.iter_mut().zip([&returns[..], one, other]) {
            values.push(soft(returns));
        }
        rewards.push(sharpness * reader.step(id).reward);
        logits = reference.step(&[id], &mut cache);
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

fn host(logits: burn::tensor::Tensor<2>) -> Vec<f32> {
    logits
        .try_into_vec_as()
        .expect("logits of a working device can be read")
}

/// True rewards still to come, of completions that the reference draws from a state.
fn rollouts(
    reference: &Transformer,
    (cache, logits): (&KvCache, Vec<f32>),
    reader: &Reader<'_>,
    (n, max_new): (usize, usize),
    rng: &mut ChaCha8Rng,
) -> Vec<f64> {
    let vocab = logits.len();
    let mut returns = vec![0.0; n];
    let mut cache = cache.select(&vec![0; n]);
    let mut logits = logits.repeat(n);
    let mut alive: Vec<(usize, Reader<'_>)> = (0..n).map(|row| (row, reader.clone())).collect();
    for n_new in 1.. {
        let mut tokens = Vec::new();
        let mut kept = Vec::new();
        let mut rest = Vec::new();
        for (slot, (row, mut reader)) in alive.into_iter().enumerate() {
            let own = &logits[slot * vocab..(slot + 1) * vocab];
            let token = sample(own, &Sampling::default(), rng);
            returns[row] += reader.step(token).reward;
            if reader.ended() {
                continue;
            }
            if n_new == max_new {
                returns[row] += reader.truncation();
                continue;
            }
            tokens.push(token);
            kept.push(slot);
            rest.push((row, reader));
        }
        if kept.is_empty() {
            break;
        }
        if kept.len() < cache.rows() {
            cache = cache.select(&kept);
        }
        alive = rest;
        logits = host(reference.step(&tokens, &mut cache));
    }
    returns
}

#[cfg(test)]
mod tests {
    use lm::{LlamaShape, ModelConfig};
    use memo_task::{MemoConfig, Split};

    use super::*;

    #[test]
    fn advantages_add_up_to_the_reward_less_the_value_of_the_prompt() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
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
        let config = ModelConfig::llama(&shape).unwrap();
        let model = Transformer::init(config, 1, &burn::tensor::Device::default()).unwrap();
        let mut options = CreditOptions::standard("unused".into()).unwrap();
        options.rollouts = 4;
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
        let found = advantages(&model, &task, &text, &options, 0).unwrap();
        assert_eq!(found.all.len(), good.ids.len());
        // A perfect text earns 0, and so the sum is −V(s_0). After one token nothing is said but
        // perhaps one fact: six or seven are missing, the text is cut off or ends, at 5 nats each
        // reward unit; the token itself costs no more than a contradiction.
        let sum: f64 = found.all.iter().sum();
        assert!(
            (5.0 * 6.0 * 0.7..=5.0 * (7.0 * 0.7 + 2.0)).contains(&sum),
            "{sum}"
        );
        // Twice the same rollouts.
        let again = advantages(&model, &task, &text, &options, 0).unwrap();
        assert_eq!(found.all, again.all);
        assert_ne!(found.halves[0], found.halves[1]);
    }
}
