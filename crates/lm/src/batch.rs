//! Batches of prompts with completions, and the logps of the completions under a model.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dpo_loss::{TokenLogps, TokenStats, token_logps, token_stats};
use ops::{Family, Spans};

use crate::model::{SeqLayout, Sight, Transformer};

/// Rows on a card are padded to a multiple of this: its bulk copies step by 16 bytes, eight numbers in
/// bf16, and attention's tables of scores have a row for each place.
const CARD_STEP: usize = 8;

/// Prompts with their completions.
///
/// Completions of one prompt may share it: the prompt stands there once, each completion behind it at
/// its own positions, and no completion sees another. On a CPU everything stands in one row, one after
/// the other, and nothing is padded; elsewhere each prompt has a row, padded on the right. Every figure
/// is the same as from a row for each completion; only the work is less.
///
/// Only completion tokens are predicted: the model's head runs on the positions before them and
/// nowhere else. The first token of an empty prompt has nothing before it and is not predicted; a
/// completion's last token predicts nothing, and the model does not read it.
#[derive(Clone, Debug)]
pub struct CompletionBatch {
    /// Token ids that the model reads, `[rows, row_seq]`.
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
    /// A pair shares its prompt where that saves work. On a CPU it always does; elsewhere, where
    /// attention computes the scores of a whole row and hides what is not seen, the row of a pair must
    /// save more in the matrices than it costs in attention, by a count of operations for a model
    /// `hidden_size` wide.
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
        let share = ops::packs(device) || saved > spent;
        let n = pairs.len();
        let rows: Vec<(&[u32], Vec<Numbered<'_>>)> = if share {
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
        // The last token of a completion is a target, and no input.
        let row_length = |(prompt, completions): &(&[u32], Vec<Numbered<'_>>)| {
            let completions = completions.iter();
            let inputs = completions.map(|(_, tokens)| tokens.len().saturating_sub(1));
            prompt.len() + inputs.sum::<usize>()
        };
        let packed = ops::packs(device);
        let (batch, row_seq) = if packed {
            (1, rows.iter().map(row_length).sum())
        } else {
            let longest = rows.iter().map(row_length).max();
            let longest = longest.expect("a batch has rows");
            (rows.len(), longest.next_multiple_of(CARD_STEP))
        };
        let lengths = rows.iter().flat_map(|(prompt, completions)| {
            completions
                .iter()
                .map(|(_, tokens)| prompt.len() + tokens.len())
        });
        let seq = lengths.clone().max().expect("a row has completions");
        let n_tokens = lengths.clone().sum();
        let n_completions = lengths.count();

        let mut ids = vec![0_i64; batch * row_seq];
        let mut positions = vec![0_u32; batch * row_seq];
        let mut families = Vec::with_capacity(rows.len());
        // By completion, so that the flat order is that of the table.
        let mut tokens: Vec<Vec<(i64, i64, i64)>> = vec![Vec::new(); n_completions];
        let mut next = 0;
        for (row, (prompt, completions)) in rows.iter().enumerate() {
            if !packed {
                next = row * row_seq;
            }
            let mut write = |tokens: &[u32], first: usize, position: usize| {
                for (index, &id) in tokens.iter().enumerate() {
                    ids[first + index] = i64::from(id);
                    positions[first + index] = (position + index) as u32;
                }
                first..first + tokens.len()
            };
            let prompt_place = write(prompt, next, 0);
            next = prompt_place.end;
            let mut places = Vec::with_capacity(completions.len());
            for &(number, completion) in completions {
                let inputs = completion
                    .split_last()
                    .map_or(&[][..], |(_, inputs)| inputs);
                let place = write(inputs, next, prompt.len());
                next = place.end;
                for (index, &id) in completion.iter().enumerate() {
                    let before = match (index, prompt.len()) {
                        (0, 0) => continue,
                        (0, _) => prompt_place.end - 1,
                        _ => place.start + index - 1,
                    };
                    tokens[number].push((
                        (number * seq + prompt.len() + index) as i64,
                        before as i64,
                        i64::from(id),
                    ));
                }
                places.push(place);
            }
            families.push(Family {
                prompt: prompt_place,
                completions: places,
            });
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
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [batch, row_seq]), device),
            layout: SeqLayout {
                batch,
                seq: row_seq,
                positions,
                sight: Sight::Within(Spans::new(batch, row_seq, families)),
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

    /// Where it is.
    pub fn device(&self) -> Device {
        self.places.device()
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
        self.score_hidden(batch, self.completion_hidden(batch), with_stats)
    }

    /// As [`Transformer::score`], from the hidden states that predict the completion tokens,
    /// `[n_tokens, hidden]`. On a CPU no table of logits is made, on a card one.
    pub fn score_hidden(
        &self,
        batch: &CompletionBatch,
        hidden: Tensor<2>,
        with_stats: bool,
    ) -> Scored {
        let (inputs, weight, tied) = self.head_factors(hidden.clone());
        match ops::head_logps(&inputs, &weight, tied, &batch.targets) {
            Some(head) => Scored {
                table: batch.table(head.logps.clone()),
                flat: head.logps,
                stats: with_stats.then_some(TokenStats {
                    entropy: head.entropy,
                    mean_logit: head.mean_logit,
                    top1: head.top1,
                }),
            },
            None => batch.scored(self.head(hidden), with_stats),
        }
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
        self.run(batch.ids.clone(), &batch.layout, None, Some(&batch.sources))
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
        // A narrow model is said to be wide, to force the choice wherever there is one.
        let shared = CompletionBatch::for_pairs(&pairs, 1 << 20, &device);
        let chosen = pairs.iter().map(|pair| (pair.0, pair.1));
        let rejected = pairs.iter().map(|pair| (pair.0, pair.2));
        let rows: Vec<(&[u32], &[u32])> = chosen.chain(rejected).collect();
        let apart = CompletionBatch::new(&rows, &device);
        let families = |batch: &CompletionBatch| match &batch.layout.sight {
            Sight::Within(spans) => spans.families().len(),
            Sight::Past(_) => unreachable!("a batch has no past"),
        };
        assert_eq!((families(&shared), families(&apart)), (3, 6));
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

    #[test]
    fn what_the_last_block_leaves_out_is_not_read() {
        use burn::module::Module;
        let model = model().train();
        let device = Device::default().autodiff();
        let pairs: [(&[u32], &[u32], &[u32]); 2] = [
            (&[3, 4, 5, 6, 7], &[8, 9, 1], &[10, 1]),
            (&[11], &[12, 13, 14, 1], &[15, 1]),
        ];
        let batch = CompletionBatch::for_pairs(&pairs, 16, &device);
        let (ids, layout, sources) = batch.laid_out();
        let all = model.run(ids, &layout, None, None).select(0, sources);
        let run = |hidden: Tensor<2>| {
            let scored = model.score_hidden(&batch, hidden.clone(), false);
            let grads = scored.flat.powi_scalar(2).sum().backward();
            let mut visitor = Norms(grads, Vec::new());
            model.visit(&mut visitor);
            let hidden: Vec<f32> = hidden.inner().try_into_vec_as().unwrap();
            (hidden, visitor.1)
        };
        let ((a, ga), (b, gb)) = (run(model.completion_hidden(&batch)), run(all));
        assert_eq!(a.len(), 11 * 16);
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

    #[test]
    fn last_tokens_are_predicted_and_not_read() {
        let (model, device) = (model(), Device::default());
        let rows: [(&[u32], &[u32]); 4] =
            [(&[], &[1]), (&[3], &[1]), (&[], &[5, 6, 1]), (&[4], &[])];
        let batch = CompletionBatch::new(&rows, &device);
        assert_eq!((batch.counts(), batch.n_tokens()), (&[0, 1, 2, 0][..], 7));
        // On a CPU nothing is padded: 3, then 5 and 6, then 4.
        let [_, read] = batch.ids.dims();
        assert_eq!(read, 4);
        let sums = |rows: &[(&[u32], &[u32])]| -> Vec<f32> {
            let scored = model.score(&CompletionBatch::new(rows, &device), false);
            scored.table.sums().try_into_vec_as().unwrap()
        };
        let together = sums(&rows);
        for at in [1, 2] {
            let gap = (sums(&rows[at..=at])[0] - together[at]).abs();
            assert!(gap < ORDER_TOLERANCE, "{gap}");
        }
        assert_eq!((together[0], together[3]), (0.0, 0.0));
    }
}
