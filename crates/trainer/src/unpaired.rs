//! Training on completions that are labelled one by one: KTO.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dpo_loss::{Beta, UnpairedBatch, UnpairedObjective, kl_estimate};
use lm::data::{LabelledExample, PreferencePair};
use lm::{CompletionBatch, Scored, Transformer};
use serde_json::{Map, Value};

use crate::learner::{Activations, MicroBatch, plain, states};
use crate::reference::ReferenceLogps;
use crate::workers::Workers;

/// Names of the metrics; `chosen` stands for desirable completions and `rejected` for the others,
/// as in TRL. Each is the mean over a step's completions of its kind.
pub const UNPAIRED_METRICS: [&str; 6] = [
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "entropy",
];

/// Labelled completions as pairs of a completion and one that belongs to another prompt, from
/// which KTO estimates the divergence; and the labels.
///
/// As in TRL, completions move on by one prompt within each stretch of `batch_size` rows: of rows side
/// by side that share a prompt, each gets one of the prompt before. A stretch goes on until it has two
/// prompts. What does not fit behind its new prompt within `max_length` tokens is cut.
pub(crate) fn with_strangers(
    examples: Vec<LabelledExample>,
    batch_size: usize,
    max_length: usize,
) -> (Vec<PreferencePair>, Vec<bool>) {
    let desirable = examples.iter().map(|example| example.desirable).collect();
    let mut pairs = Vec::with_capacity(examples.len());
    for stretch in stretches(&examples, batch_size) {
        let prompts: Vec<_> = stretch.chunk_by(is_of_one_prompt).collect();
        for (place, prompt) in prompts.iter().enumerate() {
            // Round the stretch, to the nearest that is another's; if all are of one, its own rows.
            let before = (1..=prompts.len())
                .map(|back| prompts[(place + prompts.len() - back) % prompts.len()])
                .find(|before| !is_of_one_prompt(&before[0], &prompt[0]))
                .unwrap_or(prompt);
            let is_own = is_of_one_prompt(&before[0], &prompt[0]);
            let shift = if is_own { before.len() - 1 } else { 0 };
            for (at, example) in prompt.iter().enumerate() {
                let stranger = &before[(at + shift) % before.len()].completion_ids;
                let room = max_length.saturating_sub(example.prompt_ids.len());
                pairs.push(PreferencePair {
                    prompt_ids: example.prompt_ids.clone(),
                    chosen_ids: example.completion_ids.clone(),
                    rejected_ids: stranger[..stranger.len().min(room.max(1))].to_vec(),
                    row: example.row,
                });
            }
        }
    }
    (pairs, desirable)
}

/// Rows of `size`, the last ones fewer; and more where they would be of one prompt.
fn stretches(examples: &[LabelledExample], size: usize) -> Vec<&[LabelledExample]> {
    let several = |rows: &[LabelledExample]| {
        rows.windows(2)
            .any(|two| !is_of_one_prompt(&two[0], &two[1]))
    };
    let (mut stretches, mut from) = (Vec::new(), 0);
    while from < examples.len() {
        let mut to = (from + size.max(2)).min(examples.len());
        if !several(&examples[from..to]) {
            let other = |row: &LabelledExample| !is_of_one_prompt(row, &examples[from]);
            let found = examples[to..].iter().position(other);
            to = found.map_or(examples.len(), |more| to + more + 1);
        }
        stretches.push(from..to);
        from = to;
    }
    // Rows of one prompt are left only at the end, and join those before.
    if let [.., before, last] = &mut stretches[..]
        && !several(&examples[last.clone()])
    {
        before.end = last.end;
        stretches.pop();
    }
    stretches.into_iter().map(|rows| &examples[rows]).collect()
}

fn is_of_one_prompt(a: &LabelledExample, b: &LabelledExample) -> bool {
    a.prompt_ids == b.prompt_ids
}

/// Labelled completions with the reference's logps.
#[derive(Debug)]
pub(crate) struct Labelled<'a> {
    examples: &'a [PreferencePair],
    desirable: &'a [bool],
    /// Summed logps of each completion under the reference, nats.
    own: Vec<f32>,
    /// The same for the completion of another prompt.
    stranger: Vec<f32>,
}

impl<'a> Labelled<'a> {
    pub(crate) fn new(
        examples: &'a [PreferencePair],
        desirable: &'a [bool],
        reference: &ReferenceLogps,
    ) -> Self {
        Self {
            examples,
            desirable,
            own: reference.chosen.sums(),
            stranger: reference.rejected.sums(),
        }
    }

    /// The loss of some completions.
    pub(crate) fn micro_batch(
        &self,
        model: &Transformer,
        indices: &[usize],
        (objective, beta): (&UnpairedObjective, Beta),
        activations: Activations,
    ) -> MicroBatch {
        let device = model.device().without_autodiff();
        let batch = self.batch(indices, false, &device);
        let kl = self.kl(&model.valid(), indices, objective, &device);
        let (hidden, checkpointed) = states(model, &batch, activations);
        let scored = model.score_hidden(&batch, hidden, true);
        let (loss, values) = self.outcome(scored, indices, kl, (objective, beta));
        MicroBatch {
            loss,
            names: UNPAIRED_METRICS.to_vec(),
            values,
            weights: UNPAIRED_METRICS
                .map(|name| self.n_behind(name, indices) as f64)
                .to_vec(),
            n_tokens: batch.n_tokens(),
            checkpointed,
        }
    }

    /// Means over all completions, named with `eval_` in front; nothing for none.
    pub(crate) fn metrics(
        &self,
        model: &Transformer,
        loss: (&UnpairedObjective, Beta),
        batch_size: usize,
        workers: &Workers,
    ) -> Map<String, Value> {
        let device = model.device();
        let all: Vec<usize> = (0..self.examples.len()).collect();
        let chunks: Vec<&[usize]> = all.chunks(batch_size).collect();
        let outcomes = workers.map(chunks.len(), |index| -> Vec<f32> {
            let batch = self.batch(chunks[index], false, &device);
            let kl = self.kl(model, chunks[index], loss.0, &device);
            let scored = model.score(&batch, true);
            let (loss, values) = self.outcome(scored, chunks[index], kl, loss);
            Tensor::cat(vec![loss, values], 0)
                .try_into_vec_as()
                .expect("values of a working device can be read")
        });
        let names = std::iter::once("loss").chain(UNPAIRED_METRICS);
        let mut metrics = Map::new();
        for (place, name) in names.enumerate() {
            let (mut sum, mut weight) = (0.0, 0.0);
            for (chunk, values) in chunks.iter().zip(&outcomes) {
                let n = self.n_behind(name, chunk);
                if n > 0 {
                    sum += f64::from(values[place]) * n as f64;
                    weight += n as f64;
                }
            }
            if weight > 0.0 {
                metrics.insert(format!("eval_{name}"), (sum / weight).into());
            }
        }
        metrics
    }

    /// How many of these completions a metric is the mean over.
    fn n_behind(&self, name: &str, indices: &[usize]) -> usize {
        let desirable = indices.iter().filter(|&&index| self.desirable[index]);
        match name.rsplit_once('/') {
            Some((_, "chosen")) => desirable.count(),
            Some((_, "rejected")) => indices.len() - desirable.count(),
            _ => indices.len(),
        }
    }

    fn batch(&self, indices: &[usize], strangers: bool, device: &Device) -> CompletionBatch {
        let rows: Vec<(&[u32], &[u32])> = indices
            .iter()
            .map(|&index| {
                let pair = &self.examples[index];
                let completion = if strangers {
                    &pair.rejected_ids
                } else {
                    &pair.chosen_ids
                };
                (&pair.prompt_ids[..], &completion[..])
            })
            .collect();
        CompletionBatch::new(&rows, device)
    }

    /// The estimate of the divergence that the loss reads, `[1]`, from a model without a graph.
    fn kl(
        &self,
        model: &Transformer,
        indices: &[usize],
        objective: &UnpairedObjective,
        device: &Device,
    ) -> Tensor<1> {
        // A stranger of one token behind no prompt is predicted from nothing.
        let says_something = |&index: &usize| {
            let pair = &self.examples[index];
            pair.prompt_ids.len() + pair.rejected_ids.len() > 1
        };
        if !objective.needs_kl() || !indices.iter().any(says_something) {
            return Tensor::zeros([1], device);
        }
        let batch = self.batch(indices, true, device);
        let policy = model.score(&batch, false).table.sums();
        kl_estimate(policy, pick(&self.stranger, indices, device))
    }

    /// The loss, `[1]`, and the values of [`UNPAIRED_METRICS`].
    fn outcome(
        &self,
        scored: Scored,
        indices: &[usize],
        kl: Tensor<1>,
        (objective, beta): (&UnpairedObjective, Beta),
    ) -> (Tensor<1>, Tensor<1>) {
        let device = kl.device();
        let policy = scored.table.sums();
        let reference = pick(&self.own, indices, &device);
        let labels: Vec<f32> = indices
            .iter()
            .map(|&index| f32::from(u8::from(self.desirable[index])))
            .collect();
        let desirable = Tensor::<1>::from_floats(&labels[..], &device);
        let unpaired = UnpairedBatch {
            policy: policy.clone(),
            reference: reference.clone(),
            desirable: desirable.clone(),
        };
        let loss = objective
            .losses(&unpaired, kl.clone(), beta)
            .expect("one reference logp and one label for each completion")
            .mean();
        let policy = plain(policy);
        let rewards = (policy.clone() - reference).mul_scalar(beta.get());
        let others = desirable.clone().neg().add_scalar(1.0);
        // Without a completion of that kind, nought by nought: not a number, and left out.
        let mean = |values: &Tensor<1>, of: &Tensor<1>| {
            (values.clone() * of.clone()).sum() / of.clone().sum()
        };
        let entropy = scored
            .stats
            .map_or_else(|| kl.zeros_like(), |stats| plain(stats.entropy).mean());
        let values = vec![
            mean(&rewards, &desirable),
            mean(&rewards, &others),
            mean(&policy, &desirable),
            mean(&policy, &others),
            kl,
            entropy,
        ];
        (loss, Tensor::cat(values, 0))
    }
}

/// The values of some completions on the device.
fn pick(values: &[f32], indices: &[usize], device: &Device) -> Tensor<1> {
    let picked: Vec<f32> = indices.iter().map(|&index| values[index]).collect();
    Tensor::from_floats(&picked[..], device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strangers(prompts: &[u32], batch_size: usize, max_length: usize) -> Vec<Vec<u32>> {
        let examples = (10..).zip(prompts).map(|(id, &prompt)| LabelledExample {
            prompt_ids: vec![prompt; 3],
            completion_ids: vec![id; 4],
            desirable: id % 2 == 0,
            row: id as usize,
        });
        let (pairs, desirable) = with_strangers(examples.collect(), batch_size, max_length);
        for (at, (pair, desirable)) in pairs.iter().zip(desirable).enumerate() {
            assert_eq!((pair.row, desirable), (10 + at, at % 2 == 0));
            assert_eq!(pair.chosen_ids, [10 + at as u32; 4]);
            assert_eq!(pair.prompt_ids, [prompts[at]; 3]);
        }
        pairs.into_iter().map(|pair| pair.rejected_ids).collect()
    }

    #[test]
    fn each_prompt_meets_the_completion_before_it_in_its_stretch() {
        let firsts = |found: Vec<Vec<u32>>| found.iter().map(|ids| ids[0]).collect::<Vec<_>>();
        assert_eq!(
            firsts(strangers(&[0, 1, 2, 3, 4], 3, 9)),
            [12, 10, 11, 14, 13]
        );
        // A last row alone would meet itself.
        assert_eq!(firsts(strangers(&[0, 1, 2, 3], 3, 9)), [13, 10, 11, 12]);
        // Both completions of a prompt, one after the other: none meets its own prompt's.
        assert_eq!(
            firsts(strangers(&[0, 0, 1, 1, 2, 2], 6, 9)),
            [14, 15, 10, 11, 12, 13]
        );
        // However the stretches fall: they go on to the second prompt, and the last rows join those before.
        assert_eq!(firsts(strangers(&[0, 0, 1, 1], 2, 9)), [12, 13, 10, 11]);
        assert_eq!(
            firsts(strangers(&[0, 0, 1, 1, 2, 2], 4, 9)),
            [14, 15, 10, 11, 12, 13]
        );
        assert_eq!(firsts(strangers(&[0, 1, 0], 3, 9)), [11, 10, 11]);
        // One prompt alone.
        assert_eq!(firsts(strangers(&[0, 0, 0], 8, 9)), [12, 10, 11]);
        assert!(strangers(&[], 8, 9).is_empty());
    }

    #[test]
    fn a_stranger_is_no_longer_than_there_is_room() {
        assert_eq!(strangers(&[0, 1], 2, 5), [[11; 2], [10; 2]]);
        assert_eq!(strangers(&[0, 1], 2, 7), [[11; 4], [10; 4]]);
    }
}
