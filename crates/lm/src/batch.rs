//! Batches of prompts with completions, and the logps of the completions under a model.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dpo_loss::{TokenLogps, TokenStats, token_logps, token_stats};

use crate::model::{SeqLayout, Transformer, causal_mask};

/// Prompts with their completions, padded on the right.
///
/// Completions of one prompt may share a row: the prompt stands there once, each completion
/// behind it at its own positions, and no completion sees another. Every figure is the same as
/// from a row for each; only the work is less ([`CompletionBatch::for_pairs`] decides by that).
///
/// Only completion tokens are predicted: the model's head runs on the positions before them and
/// nowhere else. The first token of an empty prompt has nothing before it and is not predicted.
#[derive(Clone, Debug)]
pub struct CompletionBatch {
    /// Token ids, `[rows, row_seq]`.
    ids: Tensor<2, Int>,
    layout: SeqLayout,
    /// Completions, and tokens of the longest with its prompt: the shape of the table of logps.
    shape: [usize; 2],
    /// `completion * seq + column` of each completion token in that table, `[n_tokens]`.
    places: Tensor<1, Int>,
    /// Where in the rows each is predicted from, `[n_tokens]`.
    sources: Tensor<1, Int>,
    /// Each completion token, `[n_tokens]`.
    targets: Tensor<1, Int>,
    /// Completion tokens that are predicted, by completion.
    counts: Vec<usize>,
    /// Prompt and completion tokens of all completions, padding left out.
    n_tokens: usize,
}

/// A completion's place: its number in the table, and its tokens.
type Numbered<'a> = (usize, &'a [u32]);

impl CompletionBatch {
    /// A batch of `(prompt, completion)`, a row for each.
    ///
    /// # Panics
    ///
    /// If there is no row, or no completion token to predict.
    pub fn new(rows: &[(&[u32], &[u32])], device: &Device) -> Self {
        let rows: Vec<(&[u32], Vec<Numbered<'_>>)> = rows
            .iter()
            .enumerate()
            .map(|(number, &(prompt, completion))| (prompt, vec![(number, completion)]))
            .collect();
        Self::lay_out(&rows, device)
    }

    /// A batch of pairs `(prompt, chosen, rejected)`: the table holds all chosen completions, then
    /// in the same order all rejected ones.
    ///
    /// A pair shares its row where that saves more in the matrices than it costs in attention, by
    /// a count of operations for a model `hidden_size` wide.
    ///
    /// # Panics
    ///
    /// If there is no pair, or no completion token to predict.
    pub fn for_pairs(
        pairs: &[(&[u32], &[u32], &[u32])],
        hidden_size: usize,
        device: &Device,
    ) -> Self {
        let mut saved = 0.0;
        let mut spent = 0.0;
        for (prompt, chosen, rejected) in pairs {
            let [p, c, r] = [prompt.len(), chosen.len(), rejected.len()].map(|n| n as f64);
            // A block's matrices hold about 12 hidden² weights, two operations each; attention
            // takes 4 hidden operations for each of the length² places of its square.
            saved += 24.0 * hidden_size as f64 * p;
            spent += 4.0 * (2.0 * c * r - p * p);
        }
        let n = pairs.len();
        let rows: Vec<(&[u32], Vec<Numbered<'_>>)> = if saved > spent {
            let pairs = pairs.iter().enumerate();
            pairs
                .map(|(i, pair)| (pair.0, vec![(i, pair.1), (n + i, pair.2)]))
                .collect()
        } else {
            let chosen = pairs
                .iter()
                .enumerate()
                .map(|(i, pair)| (pair.0, vec![(i, pair.1)]));
            let rejected = pairs
                .iter()
                .enumerate()
                .map(|(i, pair)| (pair.0, vec![(n + i, pair.2)]));
            chosen.chain(rejected).collect()
        };
        Self::lay_out(&rows, device)
    }

    fn lay_out(rows: &[(&[u32], Vec<Numbered<'_>>)], device: &Device) -> Self {
        let row_length = |(prompt, completions): &(&[u32], Vec<Numbered<'_>>)| {
            prompt.len()
                + completions
                    .iter()
                    .map(|(_, tokens)| tokens.len())
                    .sum::<usize>()
        };
        let row_seq = rows.iter().map(row_length).max().expect("a batch has rows");
        let lengths = rows.iter().flat_map(|(prompt, completions)| {
            completions
                .iter()
                .map(|(_, tokens)| prompt.len() + tokens.len())
        });
        let seq = lengths.clone().max().expect("a row has completions");
        let n_tokens = lengths.clone().sum();
        let n_completions = lengths.count();
        let alone = rows.iter().all(|(_, completions)| completions.len() == 1);

        let mut ids = vec![0_i64; rows.len() * row_seq];
        let mut positions: Vec<u32> = if alone {
            (0..row_seq as u32).collect()
        } else {
            Vec::new()
        };
        let mut hidden_from = Vec::new();
        // By completion, so that the flat order is that of the table.
        let mut tokens: Vec<Vec<(i64, i64, i64)>> = vec![Vec::new(); n_completions];
        for (row, (prompt, completions)) in rows.iter().enumerate() {
            let start = row * row_seq;
            for (column, &id) in prompt.iter().enumerate() {
                ids[start + column] = i64::from(id);
            }
            let mut segments = vec![0; row_seq];
            let mut at = (0..row_seq as u32).collect::<Vec<u32>>();
            let mut next = prompt.len();
            for (segment, &(number, completion)) in completions.iter().enumerate() {
                for (index, &id) in completion.iter().enumerate() {
                    let column = next + index;
                    ids[start + column] = i64::from(id);
                    segments[column] = segment + 1;
                    at[column] = (prompt.len() + index) as u32;
                    let before = match (index, prompt.len()) {
                        (0, 0) => continue,
                        (0, length) => length - 1,
                        _ => column - 1,
                    };
                    tokens[number].push((
                        (number * seq + prompt.len() + index) as i64,
                        (start + before) as i64,
                        i64::from(id),
                    ));
                }
                next += completion.len();
            }
            if !alone {
                positions.extend(at);
                for query in 0..row_seq {
                    let (own, length) = (segments[query], prompt.len());
                    hidden_from.extend(
                        (0..row_seq)
                            .map(|key| key > query || !(key < length || segments[key] == own)),
                    );
                }
            }
        }
        let list = |values: Vec<i64>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), device)
        };
        let flat = || tokens.iter().flatten();
        assert!(
            flat().next().is_some(),
            "a batch predicts at least one token"
        );
        let mask = if alone {
            (row_seq > 1).then(|| causal_mask(row_seq, device))
        } else {
            let shape = [rows.len(), 1, row_seq, row_seq];
            Some(Tensor::from_data(
                TensorData::new(hidden_from, shape),
                device,
            ))
        };
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [rows.len(), row_seq]), device),
            layout: SeqLayout {
                batch: rows.len(),
                seq: row_seq,
                positions,
                mask,
            },
            shape: [n_completions, seq],
            places: list(flat().map(|token| token.0).collect()),
            sources: list(flat().map(|token| token.1).collect()),
            targets: list(flat().map(|token| token.2).collect()),
            counts: tokens.iter().map(Vec::len).collect(),
            n_tokens,
        }
    }

    /// What `logits`, the [`Transformer::completion_logits`] of this batch, say of its tokens.
    ///
    /// # Panics
    ///
    /// If there is not one row of logits for each completion token.
    pub fn scored(&self, logits: Tensor<2>, with_stats: bool) -> Scored {
        let stats = with_stats.then(|| token_stats(logits.clone(), self.targets.clone()));
        let flat = token_logps(logits, self.targets.clone());
        Scored {
            table: self.table(flat.clone()),
            flat,
            stats,
        }
    }

    /// One number for each completion token, `[n_tokens]`, put to their places, `[batch, seq]`.
    ///
    /// # Panics
    ///
    /// If there is not one number for each completion token.
    pub fn table(&self, flat: Tensor<1>) -> TokenLogps {
        let [completions, seq] = self.shape;
        TokenLogps::scatter(flat, self.places.clone(), completions, seq)
    }

    /// Token ids `[rows, row_seq]`, how they lie, and where each completion token is predicted
    /// from.
    pub(crate) fn laid_out(&self) -> (Tensor<2, Int>, SeqLayout, Tensor<1, Int>) {
        (self.ids.clone(), self.layout.clone(), self.sources.clone())
    }

    /// Predicted completion tokens, by completion.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Tokens of prompts and completions together, padding left out; a shared prompt counts for
    /// each of its completions, as it would in rows of their own.
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
        batch.scored(self.completion_logits(batch), with_stats)
    }

    /// The logits that predict each completion token, `[n_tokens, vocab]`, in the order of
    /// [`Scored::flat`].
    ///
    /// For what needs the whole distribution at each token; [`Transformer::score`] for the rest.
    pub fn completion_logits(&self, batch: &CompletionBatch) -> Tensor<2> {
        self.head(self.completion_hidden(batch))
    }

    /// The hidden states that predict each completion token, `[n_tokens, hidden]`, in the order of
    /// [`Scored::flat`].
    ///
    /// [`Transformer::head`] makes logits of them, a few rows at a time where all would not fit.
    pub fn completion_hidden(&self, batch: &CompletionBatch) -> Tensor<2> {
        let hidden = self.hidden_laid_out(batch.ids.clone(), &batch.layout);
        hidden.select(0, batch.sources.clone())
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
            assert!(
                (alone - expected).abs() < ORDER_TOLERANCE,
                "{alone} {expected}"
            );
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
    fn a_shared_prompt_changes_neither_logps_nor_gradients() {
        use burn::module::Module;
        let device = Device::default().autodiff();
        let model = model().train();
        let pairs: [(&[u32], &[u32], &[u32]); 3] = [
            (&[3, 4, 9, 9, 9, 9], &[5, 6, 1], &[7, 1]),
            (&[7, 8], &[12, 1], &[20, 21, 22, 23, 1]),
            (&[3], &[20, 21, 1], &[22, 1]),
        ];
        // A narrow model is said to be wide, or infinitely narrow, to force the choice: attention
        // alone, over completions this long beside their prompts, costs more when shared.
        let shared = CompletionBatch::for_pairs(&pairs, 1 << 20, &device);
        let apart = CompletionBatch::for_pairs(&pairs, 0, &device);
        assert_eq!((shared.ids.dims()[0], apart.ids.dims()[0]), (3, 6));
        assert_eq!(shared.counts(), apart.counts());
        assert_eq!(shared.n_tokens(), apart.n_tokens());
        let run = |batch: &CompletionBatch| {
            let sums = model.score(batch, false).table.sums();
            let weights = Tensor::<1>::from_floats([1.0, 0.5, -2.0, 3.0, -1.0, 0.3], &device);
            let grads = (sums.clone() * weights).sum().backward();
            let mut visitor = Norms(grads, Vec::new());
            model.visit(&mut visitor);
            let sums: Vec<f32> = sums.inner().try_into_vec_as().unwrap();
            (sums, visitor.1)
        };
        let ((a, ga), (b, gb)) = (run(&shared), run(&apart));
        for (a, b) in a.iter().zip(&b).chain(ga.iter().zip(&gb)) {
            assert!((a - b).abs() < ORDER_TOLERANCE * (1.0 + b.abs()), "{a} {b}");
        }
        assert!(ga.len() > 20 && ga.iter().any(|norm| norm.abs() > 0.1));
    }

    /// Sums of the gradient of each parameter, weighted so that a swap shows.
    struct Norms(burn::tensor::Gradients, Vec<f32>);

    impl burn::module::ModuleVisitor for Norms {
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
            let gradient = param.val().grad(&self.0).unwrap();
            let values: Vec<f32> = gradient.try_into_vec_as().unwrap();
            let weighted = values
                .iter()
                .enumerate()
                .map(|(i, x)| x * (1.0 + (i % 7) as f32));
            self.1.push(weighted.sum());
        }
    }

    #[test]
    fn the_first_token_of_an_empty_prompt_is_not_predicted() {
        let batch = CompletionBatch::new(&[(&[], &[5, 6, 1])], &Device::default());
        assert_eq!(batch.counts(), [2]);
    }
}
