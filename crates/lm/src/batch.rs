//! Batches of prompts with completions, and the logps of the completions under a model.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dpo_loss::{TokenLogps, TokenStats, token_logps, token_stats};

use crate::model::Transformer;

/// Rows of prompt and completion, padded on the right.
///
/// Only completion tokens are predicted: the model's head runs on the positions before them and
/// nowhere else. The first token of an empty prompt has nothing before it and is not predicted.
#[derive(Clone, Debug)]
pub struct CompletionBatch {
    /// Token ids, `[batch, seq]`.
    ids: Tensor<2, Int>,
    /// `row * seq + column` of each completion token, `[n_tokens]`.
    places: Tensor<1, Int>,
    /// The same, one to the left: where each is predicted from.
    sources: Tensor<1, Int>,
    /// Each completion token, `[n_tokens]`.
    targets: Tensor<1, Int>,
    /// Completion tokens that are predicted, by row.
    counts: Vec<usize>,
    /// Prompt and completion tokens of all rows, padding left out.
    n_tokens: usize,
}

impl CompletionBatch {
    /// A batch of `(prompt, completion)` rows.
    ///
    /// # Panics
    ///
    /// If there is no row, or no completion token to predict.
    pub fn new(rows: &[(&[u32], &[u32])], device: &Device) -> Self {
        let lengths = rows.iter().map(|(prompt, completion)| prompt.len() + completion.len());
        let n_tokens = lengths.clone().sum();
        let seq = lengths.max().expect("a batch has rows");
        let mut ids = vec![0_i64; rows.len() * seq];
        let (mut places, mut sources, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let mut counts = Vec::with_capacity(rows.len());
        for (row, (prompt, completion)) in rows.iter().enumerate() {
            for (column, &id) in prompt.iter().chain(*completion).enumerate() {
                ids[row * seq + column] = i64::from(id);
            }
            let first = prompt.len().max(1);
            for column in first..prompt.len() + completion.len() {
                let place = row * seq + column;
                places.push(place as i64);
                sources.push(place as i64 - 1);
                targets.push(ids[place]);
            }
            counts.push((prompt.len() + completion.len()).saturating_sub(first));
        }
        assert!(!places.is_empty(), "a batch predicts at least one token");
        let list = |values: Vec<i64>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), device)
        };
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [rows.len(), seq]), device),
            places: list(places),
            sources: list(sources),
            targets: list(targets),
            counts,
            n_tokens,
        }
    }

    /// Predicted completion tokens, by row.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Tokens of prompts and completions together, padding left out.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }
}

/// What a model says of a batch's completions.
#[derive(Clone, Debug)]
pub struct Scored {
    /// Logps of the completion tokens one after the other, `[n_tokens]`, nats.
    pub flat: Tensor<1>,
    /// The same in their places, `[batch, seq]`.
    pub table: TokenLogps,
    /// Entropy, mean logit and top-1 hits, each `[n_tokens]`, if they were asked for.
    pub stats: Option<TokenStats>,
}

impl Transformer {
    /// Scores the completions of a batch: `log π(a|s)` of each of their tokens.
    pub fn score(&self, batch: &CompletionBatch, with_stats: bool) -> Scored {
        let [rows, seq] = batch.ids.dims();
        let hidden = self.hidden(batch.ids.clone());
        let logits = self.head(hidden.select(0, batch.sources.clone()));
        let stats = with_stats.then(|| token_stats(logits.clone(), batch.targets.clone()));
        let flat = token_logps(logits, batch.targets.clone());
        Scored {
            table: TokenLogps::scatter(flat.clone(), batch.places.clone(), rows, seq),
            flat,
            stats,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LlamaShape, ModelConfig};

    fn model() -> Transformer {
        let config = ModelConfig::llama(&LlamaShape {
            vocab_size: 32,
            hidden_size: 16,
            intermediate_size: 40,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            max_positions: 32,
            tied: false,
            eos_id: 1,
            pad_id: 0,
        });
        Transformer::init(config.unwrap(), 3, &Device::default()).unwrap()
    }

    /// The same sums in another order, in f32.
    const ORDER_TOLERANCE: f32 = 1e-5;

    #[test]
    fn padding_order_and_composition_of_a_batch_change_nothing() {
        let model = model();
        let device = Device::default();
        let rows: [(&[u32], &[u32]); 3] = [
            (&[3, 4], &[5, 6, 1]),
            (&[7, 8, 9, 10, 11], &[12, 1]),
            (&[3], &[20, 21, 22, 23, 24, 25, 1]),
        ];
        let together = model.score(&CompletionBatch::new(&rows, &device), false);
        let together: Vec<f32> = together.table.sums().try_into_vec_as().unwrap();
        for (row, expected) in rows.iter().zip(&together) {
            let alone = model.score(&CompletionBatch::new(&[*row], &device), false);
            let alone: f32 = alone.table.sums().into_scalar();
            assert!((alone - expected).abs() < ORDER_TOLERANCE, "{alone} {expected}");
        }
    }

    #[test]
    fn scores_are_the_log_softmax_of_the_logits_before_each_token() {
        let model = model();
        let device = Device::default();
        let batch = CompletionBatch::new(&[(&[3, 4], &[5, 1])], &device);
        assert_eq!((batch.counts(), batch.n_tokens()), (&[2][..], 4));
        let flat: Vec<f32> = model.score(&batch, false).flat.try_into_vec_as().unwrap();
        let ids = Tensor::from_ints([[3, 4, 5, 1]], &device);
        let logits: Vec<f32> = model.logits(ids).try_into_vec_as().unwrap();
        for (index, (position, target)) in [(1, 5), (2, 1)].into_iter().enumerate() {
            let row = &logits[position * 32..][..32];
            let total: f32 = row.iter().map(|x| x.exp()).sum();
            let expected = row[target] - total.ln();
            assert!((flat[index] - expected).abs() < ORDER_TOLERANCE);
        }
    }

    #[test]
    fn the_first_token_of_an_empty_prompt_is_not_predicted() {
        let batch = CompletionBatch::new(&[(&[], &[5, 6, 1])], &Device::default());
        assert_eq!(batch.counts(), [2]);
    }
}
