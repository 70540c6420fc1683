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
/// as in TRL. One that a micro-batch has no completion for is the mean over the others.
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
/// As in TRL, completions move on by one prompt within each stretch of `batch_size` rows.
pub(crate) fn with_strangers(
    examples: Vec<LabelledExample>,
    batch_size: usize,
) -> (Vec<PreferencePair>, Vec<bool>) {
    let desirable = examples.iter().map(|example| example.desirable).collect();
    let mut pairs = Vec::with_capacity(examples.len());
    // A stretch of one would pair a completion with itself.
    for stretch in examples.chunks(batch_size.max(2)) {
        for (place, example) in stretch.iter().enumerate() {
            let before = (place + stretch.len() - 1) % stretch.len();
            pairs.push(PreferencePair {
                prompt_ids: example.prompt_ids.clone(),
                chosen_ids: example.completion_ids.clone(),
                rejected_ids: stretch[before].completion_ids.clone(),
                row: example.row,
            });
        }
    }
    (pairs, desirable)
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
                if !values[place].is_nan() {
                    sum += f64::from(values[place]) * chunk.len() as f64;
                    weight += chunk.len() as f64;
                }
            }
            if weight > 0.0 {
                metrics.insert(format!("eval_{name}"), (sum / weight).into());
            }
        }
        metrics
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
        if !objective.needs_kl() {
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

    #[test]
    fn each_prompt_meets_the_completion_before_it_in_its_stretch() {
        let examples = (0..5)
            .map(|row| LabelledExample {
                prompt_ids: vec![row],
                completion_ids: vec![10 + row],
                desirable: row % 2 == 0,
                row: row as usize,
            })
            .collect();
        let (pairs, desirable) = with_strangers(examples, 3);
        let strangers: Vec<u32> = pairs.iter().map(|pair| pair.rejected_ids[0]).collect();
        assert_eq!(strangers, [12, 10, 11, 14, 13]);
        assert_eq!(desirable, [true, false, true, false, true]);
    }
}
